"""The record of a run in its output folder: ``metrics.jsonl`` and ``summary.json``. No ranks, no wandb."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any, NamedTuple, Protocol

from dpo_ds.files import write_whole

Metrics = Mapping[str, float | int | str | Mapping[str, list[float]] | list[dict[str, str]] | None]
"""Numbers by name, histograms (their bins' edges and counts), and tables: rows of texts by column."""

METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
_PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "wandb", "dpo_ds")


class Mark(NamedTuple):
    """Where a record stands, for a run that goes on from here.

    Attributes:
        metrics_bytes: length of ``metrics.jsonl``, 0 without one.
        wandb_run_id: wandb's name for the run, None without one.
    """

    metrics_bytes: int = 0
    wandb_run_id: str | None = None


class Sink(Protocol):
    """A place that metrics go to."""

    def log(self, metrics: Metrics) -> None:
        """Takes one line of metrics."""

    def mark(self) -> Mark:
        """Returns where the record stands, as far as it is kept here."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Takes the run's summary; nothing comes after it."""


class Tracker:
    """Hands metrics to its sinks. Without sinks it keeps nothing, as on every rank but one."""

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        """Composes a tracker.

        Args:
            sinks: where metrics go.
        """
        self._sinks = tuple(sinks)

    def log(self, metrics: Metrics) -> None:
        """Records one line; ``metrics`` holds at least ``step`` and ``split``."""
        for sink in self._sinks:
            sink.log(metrics)

    def mark(self) -> Mark:
        """Returns where the record stands, all of it safely on disk."""
        marks = [sink.mark() for sink in self._sinks]
        run_ids = [mark.wandb_run_id for mark in marks if mark.wandb_run_id]
        return Mark(max((mark.metrics_bytes for mark in marks), default=0), run_ids[0] if run_ids else None)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Ends the record with the run's summary."""
        for sink in self._sinks:
            sink.finish(summary)


class JsonLines:
    """One JSON object a line, on disk as soon as it is logged."""

    def __init__(self, path: Path, *, keep_bytes: int = 0) -> None:
        """Starts an empty file, or goes on behind what is kept of an earlier one.

        Args:
            path: the file.
            keep_bytes: how much of the earlier file is kept; the rest is cut off.
        """
        # Without a buffer, since what does not fit on a full disk would be tried again when the file is closed.
        self._file = path.open("ab", buffering=0)
        self._file.truncate(min(keep_bytes, path.stat().st_size))

    def log(self, metrics: Metrics) -> None:
        """Appends a line; numbers that JSON lacks (NaN, infinities) become null."""
        self._file.write((json.dumps(plain(metrics), allow_nan=False) + "\n").encode())

    def mark(self) -> Mark:
        """Returns the file's length, all of it safely on disk."""
        os.fsync(self._file.fileno())
        return Mark(metrics_bytes=os.fstat(self._file.fileno()).st_size)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Closes the file; the summary has its own."""
        self._file.close()


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Writes ``summary.json``, complete or not at all.

    Args:
        folder: the run's output folder.
        summary: what is to be said of the run.
    """
    write_whole(folder / SUMMARY_FILE, (json.dumps(plain(summary), indent=2, allow_nan=False) + "\n").encode())


def versions() -> dict[str, str | None]:
    """Returns the versions of Python and of the packages that decide a run's numbers; None for one that is missing."""
    found: dict[str, str | None] = {"python": python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def plain(value: Any) -> Any:
    """Returns the value with dicts, lists, and None where JSON has no number for it: NaN and infinities."""
    if isinstance(value, Mapping):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
