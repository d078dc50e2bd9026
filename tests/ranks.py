"""Starting real ranks in tests: one process a rank, joined over gloo on loopback, as a launcher would start them.

A rank is forked from a process that has imported the libraries and nothing else: they take longer than most jobs here.
"""

import os
import runpy
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from multiprocessing import forkserver, get_context
from pathlib import Path
from unittest.mock import patch

from dpo_ds.launcher.allocator import preloaded

REPOSITORY = Path(__file__).parent.parent

_MACHINE = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPOSITORY)}
_FORKED = get_context("forkserver")
_FORKED.set_forkserver_preload(  # what a run imports and takes long; ZeRO-3 itself imports Muon
    [
        "datasets",
        "deepspeed",
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "matplotlib.backends.backend_agg",
        "peft",
        "torch.utils.flop_counter",
        "transformers.models.llama.modeling_llama",
        "wandb",
    ]
)


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

    As under a launcher, the first rank that fails makes the others end. With ``env`` each starts its own
    interpreter, since libraries read variables while they are imported.
    """
    # Not at the top: a forked process imports this module, too, before it has its variables.
    from dpo_ds.engine.extensions import build_extensions

    # Here, where nothing is killed for being late.
    build_extensions({"zero_optimization": {}})
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    allocator = preloaded(os.environ)
    with patch.dict(os.environ, {**_MACHINE, **allocator}):
        forkserver.ensure_running()
    umask = os.umask(0)
    os.umask(umask)
    ranks = []
    for rank in range(size):
        place = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        environment = {**os.environ, **_MACHINE, **place, **(allocator if env is None else env)}
        command = [str(argument) for argument in arguments]
        ranks.append(_FORKED.Process(target=_be_rank, args=(command, environment, folder, umask, env is None)))
        ranks[-1].start()
    deadline = time.monotonic() + timeout_s
    try:
        while any(rank.exitcode is None for rank in ranks):
            if any(rank.exitcode for rank in ranks) or time.monotonic() > deadline:
                break
            time.sleep(0.1)
    finally:
        for rank in ranks:
            rank.terminate()
        for rank in ranks:
            rank.join(timeout=10)
            if rank.exitcode is None:
                rank.kill()
                rank.join()
    return Finished(
        codes=[rank.exitcode for rank in ranks],
        outputs=[(folder / f"rank{rank}.out").read_text() for rank in range(size)],
        errors=[(folder / f"rank{rank}.err").read_text() for rank in range(size)],
    )


def _be_rank(command: list[str], environment: dict[str, str], folder: Path, umask: int, in_place: bool) -> None:
    """What a forked process does: the command, in a folder, with its output in files there."""
    os.chdir(folder)
    os.umask(umask)
    for descriptor, kind in ((1, "out"), (2, "err")):
        with open(f"rank{environment['RANK']}.{kind}", "w") as file:
            os.dup2(file.fileno(), descriptor)
    if not in_place:
        os.execve(sys.executable, [sys.executable, *command], environment)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")
