"""``RESUME.json``: what a stopped run leaves for whoever starts it again, since several launchers lose exit codes."""

import json
import os
from contextlib import suppress
from pathlib import Path

from dpo_ds.errors import Stopped

MARKER_FILE = "RESUME.json"
STOPPED_CODE = 200


def mark_stopped(folder: Path, stopped: Stopped) -> None:
    """Writes the marker, complete or not at all, and on the disk when this returns.

    Args:
        folder: the run's output folder.
        stopped: why the run stops, and what it has saved.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "status": "stopped",
        "reason": stopped.reason,
        "step": stopped.step,
        "checkpoint": stopped.checkpoint,
        "command_exit_code": STOPPED_CODE,
    }
    unfinished = folder / f"{MARKER_FILE}.tmp"
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(json.dumps(about, indent=2) + "\n")
        file.flush()
        # A machine that is taken away may well lose its power next.
        os.fsync(file.fileno())
    unfinished.replace(folder / MARKER_FILE)


def unmark(folder: Path) -> None:
    """Takes the marker away: the run goes on, is complete, or needs a person; without one, does nothing.

    Args:
        folder: the run's output folder.
    """
    with suppress(OSError):  # in a folder that cannot be written, whatever is written next says so
        (folder / MARKER_FILE).unlink()
