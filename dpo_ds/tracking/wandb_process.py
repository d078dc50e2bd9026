"""The process that copies a run's ``metrics.jsonl`` to wandb: the only place that imports wandb.

It hears from the run on stdin: the summary, in one line. When stdin ends without one, the run has died.
"""

import json
import os
import shlex
import signal
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

from dpo_ds.tracking.record import METRICS_FILE
from dpo_ds.tracking.wandb_mirror import MIRROR_VARIABLE, MirrorSettings

_POLL_S = 0.5


def mirror(settings: MirrorSettings) -> None:
    """Follows the file until the run ends."""
    try:
        run = _start(settings)
    except Exception as error:
        if settings.mode == "offline":
            raise
        _say(f"warning: wandb cannot be reached, so its run is kept offline: {_reason(error)}")
        # After a failed start wandb works in a new process only, and with a new service (wandb/wandb#9865).
        os.environ.pop("WANDB_SERVICE", None)
        os.environ[MIRROR_VARIABLE] = json.dumps(asdict(replace(settings, mode="offline")))
        os.execv(sys.executable, [sys.executable, "-m", "dpo_ds.tracking.wandb_process"])
    end = _End(settings.patience_s)
    lines = _Lines(Path(settings.folder, METRICS_FILE), Path(run.settings.wandb_dir, f"mirrored-{settings.run_id}"))
    while not end.has_come.wait(_POLL_S):
        lines.copy_to(run)
    lines.copy_to(run)
    run.summary.update(json.loads(end.said) if end.said else {"status": "died"})
    place = run.settings.sync_dir
    run.finish(exit_code=0 if end.said else 1)
    if settings.mode == "offline":
        _say(f"wandb: the run is in {place}; to send it: wandb sync {shlex.quote(place)}")


def _start(settings: MirrorSettings) -> Any:
    import wandb

    run = wandb.init(
        mode=settings.mode,
        project=settings.project,
        id=settings.run_id,
        name=Path(settings.folder).name,
        dir=settings.folder,
        config=settings.config,
        # What the user has set for wandb goes first.
        group=None if "WANDB_RUN_GROUP" in os.environ else settings.group,
        tags=None if "WANDB_TAGS" in os.environ else settings.tags,
        resume="allow",
        settings=wandb.Settings(
            console="off", init_timeout=settings.patience_s, silent=True, x_stats_pid=settings.run_pid
        ),
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    if settings.mode == "online":
        _say(f"wandb: {run.url}")
    return run


class _End:
    """Waits for the run's last word; from then on wandb has its patience, after which this process ends."""

    def __init__(self, patience_s: float) -> None:
        self.has_come = threading.Event()
        self.said = ""
        self._patience_s = patience_s
        threading.Thread(target=self._await, daemon=True).start()

    def _await(self) -> None:
        self.said = sys.stdin.readline()
        self.has_come.set()
        # Without its server wandb would try for ever.
        time.sleep(self._patience_s)
        _stop(f"it was not done {self._patience_s:g} s after the run; send the rest by hand: wandb sync")


class _Lines:
    """The record's lines that wandb has not seen; one that a resumed run writes again it has."""

    def __init__(self, path: Path, count: Path) -> None:
        self._file = path.open(encoding="utf-8")
        self._rest = ""
        self._read = 0
        self._count = count
        self._mirrored = int(count.read_text()) if count.exists() else 0

    def copy_to(self, run: Any) -> None:
        *lines, self._rest = (self._rest + self._file.read()).split("\n")
        for line in lines:
            self._read += 1
            if self._read <= self._mirrored:
                continue
            metrics = json.loads(line)
            prefix = "eval/" if metrics.pop("split") == "eval" else ""
            numbers = {name: _shown(value) for name, value in metrics.items() if value is not None}
            # No step=: wandb drops lines whose step is behind the last one, as after a resume.
            run.log({name if name == "step" else prefix + name: value for name, value in numbers.items()})
        if self._read > self._mirrored:
            self._mirrored = self._read
            self._count.write_text(f"{self._mirrored}\n")


def _shown(value: Any) -> Any:
    if not isinstance(value, dict | list):
        return value
    import wandb

    if isinstance(value, list):
        return wandb.Table(columns=list(value[0]), data=[list(row.values()) for row in value])
    return wandb.Histogram(np_histogram=(value["counts"], value["edges"]))


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _stop(reason: str) -> NoReturn:
    _say(f"warning: wandb stopped: {reason}; {METRICS_FILE} is complete")
    # What wandb registered to run at exit may hang.
    os._exit(1)


def main() -> None:
    """Mirrors the run whose settings the environment holds; a failure is one warning."""
    # The scheduler's signals are for the run, whose end then comes on stdin.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        mirror(MirrorSettings(**json.loads(os.environ[MIRROR_VARIABLE])))
    except Exception as error:
        _stop(_reason(error))


if __name__ == "__main__":
    main()
