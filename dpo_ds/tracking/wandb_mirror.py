"""The run's side of wandb: starts a process that copies ``metrics.jsonl`` there, and ends it. wandb is not imported."""

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dpo_ds.launcher.job import job_of
from dpo_ds.tracking.record import METRICS_FILE, Mark, Metrics, plain, versions

RUN_ID_FILE = "wandb_run_id"
MIRROR_VARIABLE = "DPO_DS_WANDB_MIRROR"
Mode = Literal["online", "offline"]
_LONGEST_TAG = 64
"""Characters; wandb refuses runs with longer ones."""


@dataclass(frozen=True)
class MirrorSettings:
    """What the mirroring process must know.

    Attributes:
        folder: the run's output folder, absolute; wandb's files go below it.
        mode: online or offline.
        project: wandb's project.
        run_id: wandb's name for the run.
        config: what wandb shows as the run's config.
        run_pid: the process whose use of the machine wandb shows.
        patience_s: how long wandb may take to connect, and to end after the run.
        group: what wandb shows runs of one job under, None where no scheduler runs it.
        tags: of the run.
    """

    folder: str
    mode: Mode
    project: str
    run_id: str
    config: dict[str, Any]
    run_pid: int
    patience_s: float
    group: str | None
    tags: tuple[str, ...]


class WandbMirror:
    """A process that copies ``metrics.jsonl`` to wandb.

    wandb may raise, hang while it connects, or hang at exit even though it had failed before. In a process of its own
    it can do none of that to a run, which waits for it only at the end, and not for ever.
    """

    def __init__(
        self,
        folder: Path,
        *,
        mode: Mode,
        project: str,
        config: Mapping[str, Any],
        run_id: str | None = None,
        patience_s: float = 60,
    ) -> None:
        """Starts the process.

        Args:
            folder: the run's output folder.
            mode: online or offline.
            project: wandb's project.
            config: what wandb shows as the run's config, beside the versions.
            run_id: of the run that goes on; None for a new one.
            patience_s: how long wandb may take to connect, and to end after the run.
        """
        self._folder, self._patience_s = folder.resolve(), patience_s
        job = job_of(os.environ)
        settings = MirrorSettings(
            folder=str(self._folder),
            mode=mode,
            project=project,
            run_id=run_id or secrets.token_hex(4),
            config={**config, "versions": versions()},
            run_pid=os.getpid(),
            patience_s=patience_s,
            group=job.name if job else None,
            tags=tuple(tag[:_LONGEST_TAG] for tag in job.tags) if job else (),
        )
        self._run_id = settings.run_id
        # For people, who may want to look it up.
        (folder / RUN_ID_FILE).write_text(settings.run_id + "\n")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dpo_ds.tracking.wandb_process"],
            # Not on the command line, which every user of the machine can read.
            env={**os.environ, MIRROR_VARIABLE: json.dumps(plain(asdict(settings)))},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            # Ctrl-C and the scheduler's signals are for the run.
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def log(self, metrics: Metrics) -> None:
        """Does nothing: the process reads the file."""

    def mark(self) -> Mark:
        """Returns wandb's name for the run."""
        return Mark(wandb_run_id=self._run_id)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Hands over the summary and waits for the process; ends it when patience does."""
        try:
            self._process.communicate(json.dumps(plain(summary)) + "\n", timeout=2 * self._patience_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            print(f"warning: wandb hangs and was left behind; {METRICS_FILE} is complete", file=sys.stderr)
