"""Where metrics go: ``metrics.jsonl``, which is the record, and wandb, which is a mirror of it. No rank logic."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from dpo_ds.tracking.record import METRICS_FILE, SUMMARY_FILE, JsonLines, Mark, Tracker, versions, write_summary
from dpo_ds.tracking.wandb_mirror import WandbMirror

__all__ = [
    "METRICS_FILE",
    "SUMMARY_FILE",
    "JsonLines",
    "Mark",
    "Tracker",
    "WandbMirror",
    "open_tracker",
    "versions",
    "write_summary",
]


def open_tracker(
    folder: Path,
    *,
    wandb: Literal["online", "offline", "disabled"],
    project: str,
    config: Mapping[str, Any],
    behind: Mark = Mark(),  # noqa: B008 (immutable)
) -> Tracker:
    """Returns the tracker of the one rank that records; what an earlier record in the folder has beyond a mark goes.

    A wandb that cannot be started is a warning.

    Args:
        folder: the run's output folder, which exists.
        wandb: online, offline or disabled.
        project: wandb's project.
        config: what wandb shows as the run's config.
        behind: where the record goes on; at its beginning by default.
    """
    lines = JsonLines(folder / METRICS_FILE, keep_bytes=behind.metrics_bytes)
    if wandb == "disabled":
        return Tracker([lines])
    try:
        mirror = WandbMirror(folder, mode=wandb, project=project, config=config, run_id=behind.wandb_run_id)
        return Tracker([lines, mirror])
    except OSError as error:
        print(f"warning: wandb cannot be started ({error}); {METRICS_FILE} is complete", file=sys.stderr)
        return Tracker([lines])
