"""The record of a run in its output folder: ``metrics.jsonl`` and ``summary.json``. No ranks, no wandb."""

import json
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any, Protocol

Metrics = Mapping[str, float | int | str | None]

METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
_PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "wandb", "dpo_ds")


class Sink(Protocol):
    """A place that metrics go to."""

    def log(self, metrics: Metrics) -> None:
        """Takes one line of metrics."""

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

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Ends the record with the run's summary."""
        for sink in self._sinks:
            sink.finish(summary)


class JsonLines:
    """One JSON object a line, on disk as soon as it is logged."""

    def __init__(self, path: Path) -> None:
        """Starts an empty file.

        Args:
            path: the file.
        """
        self._file = path.open("w", encoding="utf-8")

    def log(self, metrics: Metrics) -> None:
        """Appends a line; numbers that JSON lacks (NaN, infinities) become null."""
        self._file.write(json.dumps(plain(metrics), allow_nan=False) + "\n")
        self._file.flush()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Closes the file; the summary has its own."""
        self._file.close()


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Writes ``summary.json``, complete or not at all.

    Args:
        folder: the run's output folder.
        summary: what is to be said of the run.
    """
    unfinished = folder / f"{SUMMARY_FILE}.tmp"
    unfinished.write_text(json.dumps(plain(summary), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    unfinished.replace(folder / SUMMARY_FILE)


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
