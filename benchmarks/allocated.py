"""launch/train.py with what its ranks have allocated watched; started on every rank by ``benchmarks.planning``.

What glibc has handed out, not what the process holds: a rank without a GPU keeps what it frees.
"""

import argparse
import atexit
import ctypes
import json
import os
from pathlib import Path

from benchmarks.memory import watched


class _Mallinfo(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def main() -> None:
    """Trains, and writes this rank's bytes into the folder that ``--allocated`` names."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--allocated", type=Path, required=True)
    args, rest = parser.parse_known_args()
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _Mallinfo

    def allocated() -> int:
        info = libc.mallinfo2()
        return int(info.uordblks + info.hblkhd)

    from dpo_ds import engine
    from dpo_ds.cli.train import main as train

    before: list[int] = []
    load_sharded = engine.load_sharded

    def load(*arguments: object, **keywords: object) -> object:
        before.append(allocated())
        return load_sharded(*arguments, **keywords)  # type: ignore[arg-type]

    setattr(engine, "load_sharded", load)  # noqa: B010
    with watched(allocated, every_s=0.005) as seen:

        def write() -> None:
            found = {"before": before[0], "peak": max(seen)}
            (args.allocated / f"rank{os.environ['LOCAL_RANK']}.json").write_text(json.dumps(found))

        atexit.register(write)
        train(rest)


if __name__ == "__main__":
    main()
