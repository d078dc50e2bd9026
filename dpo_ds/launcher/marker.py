"""``RESUME.json``: what a stopped run leaves for whoever starts it again, since several launchers lose exit codes."""

import json
from contextlib import suppress
from pathlib import Path

from dpo_ds.errors import Stopped
from dpo_ds.files import write_whole

MARKER_FILE = "RESUME.json"
STOPPED_CODE = 200


def mark_stopped(folder: Path, stopped: Stopped) -> None:
    """Writes the marker, complete or not at all.

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
    write_whole(folder / MARKER_FILE, (json.dumps(about, indent=2) + "\n").encode())


def unmark(folder: Path) -> None:
    """Takes the marker away: the run goes on, is complete, or needs a person; without one, does nothing.

    Args:
        folder: the run's output folder.
    """
    with suppress(OSError):  # in a folder that cannot be written, whatever is written next says so
        (folder / MARKER_FILE).unlink()
