"""Runs the whole matrix, or the cells that hold some words, and writes a table: python -m tests.faults [WORD ...]"""

import os
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from pathlib import Path

from tests.conftest import tiny_chat_in
from tests.faults.matrix import DISKS, MATRIX, Runs, suffer

TABLE = Path(__file__).parent / "TABLE.md"


def main(words: list[str]) -> int:
    """Returns how many cells failed; those that need a disk of their own are left out without root."""
    # Disks are made in a mount namespace of our own.
    if os.geteuid() == 0 and "DPO_DS_OWN_MOUNTS" not in os.environ:
        os.environ["DPO_DS_OWN_MOUNTS"] = "1"
        os.execvp("unshare", ["unshare", "--mount", sys.executable, "-m", "tests.faults", *words])
    cells = [fault for fault in MATRIX if all(word in str(fault) for word in words)]
    if os.geteuid() != 0:
        cells = [fault for fault in cells if fault.kind not in DISKS]
    outcomes: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = Runs(tiny_chat_in(folder / "model"), folder)
        for number, fault in enumerate(cells):
            began = time.monotonic()
            try:
                suffer(fault, runs, folder / f"run{number}")
                good = True
            except Exception:
                traceback.print_exc()
                good = False
            failed += not good
            outcomes[fault.kind][fault.phase].append(good)
            print(
                f"{number + 1:4} of {len(cells)}  {'passed' if good else 'FAILED'}  {fault}  "
                f"{time.monotonic() - began:.0f} s",
                flush=True,
            )
    if not words:
        TABLE.write_text(table(outcomes))
    return failed


def table(outcomes: dict[str, dict[str, list[bool]]]) -> str:
    """Returns Markdown: how many of how many cells passed, by fault and phase."""
    phases = list(dict.fromkeys(phase for of_kind in outcomes.values() for phase in of_kind))
    rows = [f"| | {' | '.join(phases)} |", f"|---|{'---|' * len(phases)}"]
    for kind, of_kind in outcomes.items():
        cells = [f"{sum(of_kind[phase])} of {len(of_kind[phase])}" if phase in of_kind else "" for phase in phases]
        rows.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:]) else 0)
