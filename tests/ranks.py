"""Starting real ranks in tests: one process a rank, joined over gloo on loopback, as a launcher would start them."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from dpo_ds.engine.extensions import build_extensions

REPOSITORY = Path(__file__).parent.parent


@dataclass(frozen=True)
class Finished:
    """How the ranks ended: exit codes, standard output and standard error, in the order of ranks."""

    codes: list[int]
    outputs: list[str]
    errors: list[str]

    def expect_success(self) -> "Finished":
        """Returns itself, or fails with what the ranks said."""
        assert self.codes == [0] * len(self.codes), f"{self.codes}\n" + "\n".join(e[-3000:] for e in self.errors)
        return self


def run_ranks(
    size: int,
    arguments: Sequence[str | Path],
    *,
    folder: Path,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 300,
) -> Finished:
    """Runs ``python ARGUMENTS`` on ``size`` ranks and waits for all of them.

    As under a launcher, the first rank that fails makes the others end.
    """
    # Here, where nothing is killed for being late.
    build_extensions({"zero_optimization": {}})
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(size):
        place = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        }
        with (folder / f"rank{rank}.out").open("w") as out, (folder / f"rank{rank}.err").open("w") as err:
            processes.append(
                subprocess.Popen(
                    [sys.executable, *map(str, arguments)],
                    env={**os.environ, **place, **(env or {})},
                    stdout=out,
                    stderr=err,
                    cwd=folder,
                )
            )
    deadline = time.monotonic() + timeout_s
    try:
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes) or time.monotonic() > deadline:
                break
            time.sleep(0.1)
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in processes:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    return Finished(
        codes=[process.returncode for process in processes],
        outputs=[(folder / f"rank{rank}.out").read_text() for rank in range(size)],
        errors=[(folder / f"rank{rank}.err").read_text() for rank in range(size)],
    )
