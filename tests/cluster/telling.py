"""Runs launch/train.py on a rank that writes down what has reached it: ``telling.py ARGUMENTS``, into ``$TOLD``."""

import atexit
import json
import os
import runpy
import sys
from pathlib import Path

TELLING = Path(__file__)
TRAIN = TELLING.parents[2] / "launch/train.py"
TORTURE = "a b  $HOME `id` \"q\" 'r' ; & \\ ü\n$(id) {x} *"
"""What a shell, or two of them, would take apart."""


def told(folder: Path, rank: int) -> dict[str, object]:
    """Returns what a rank has written down: its arguments, and two variables, one inherited, one of the run file."""
    found: dict[str, object] = json.loads((folder / f"told-{rank}.json").read_text())
    return found


def _tell(arguments: list[str]) -> None:
    # Here, at the end, the run file's section env has been read.
    about = {
        # DeepSpeed's launcher adds an argument of its own.
        "arguments": [word for word in arguments if not word.startswith("--local_rank=")],
        "inherited": os.environ.get("DPO_DS_TORTURE"),
        "of the run file": os.environ.get("OF_RUN_FILE"),
    }
    Path(os.environ["TOLD"], f"told-{os.environ['RANK']}.json").write_text(json.dumps(about))


if __name__ == "__main__":
    atexit.register(_tell, sys.argv[1:])
    sys.argv[0] = str(TRAIN)
    runpy.run_path(str(TRAIN), run_name="__main__")
