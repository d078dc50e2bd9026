"""Starting a program on ranks of this machine, and watching the memory of each."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
_POLL_S = 0.5

ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "disabled",
}


@dataclass
class Memory:
    """What was seen of the ranks' memory while they ran, in bytes.

    Attributes:
        peak_rss: each rank's largest resident set, by local rank; the kernel's own high-water mark.
        peak_sum: the largest sum over all ranks at one time, a page that several map counted once; 0 if not watched.
    """

    peak_rss: dict[int, int] = field(default_factory=dict)
    peak_sum: int = 0


@dataclass(frozen=True)
class Ended:
    """A program that has ended.

    Attributes:
        status: its exit status.
        memory: of its ranks.
        seconds: from start to end.
    """

    status: int
    memory: Memory
    seconds: float


def run_ranks(
    arguments: Sequence[str],
    *,
    ranks: int,
    log: Path,
    environment: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> Ended:
    """Runs what ``deepspeed`` starts, to its end.

    Args:
        arguments: ``deepspeed``'s, behind its own options.
        ranks: how many, one thread each.
        log: file for all that they print.
        environment: added to this process's; None adds nothing.
        limit: bytes that all ranks together may hold; more ends them, before the kernel ends something else. None does
            not watch the sum, which costs the ranks some time.
    """
    port = _free_port()
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
    scripts = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    memory = Memory()
    start = time.perf_counter()
    with log.open("w") as out:
        program = subprocess.Popen(
            [*launcher, "--master_port", str(port), *arguments],
            cwd=ROOT,
            env={**os.environ, "PATH": scripts, **ENVIRONMENT, **(environment or {})},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        try:
            while program.poll() is None:
                _watch(memory, port, sums=limit is not None)
                if limit is not None and memory.peak_sum > limit:
                    program.terminate()
                time.sleep(_POLL_S)
        finally:
            if program.poll() is None:
                program.terminate()
                program.wait()
            # DeepSpeed's CPU collective leaves 69 MB a rank behind.
            for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*_{port}_*"):
                left.unlink(missing_ok=True)
    return Ended(program.returncode, memory, time.perf_counter() - start)


def _watch(memory: Memory, port: int, *, sums: bool) -> None:
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):  # it ended meanwhile
            variables = dict(
                pair.partition("=")[::2] for pair in (process / "environ").read_text(errors="replace").split("\0")
            )
            if variables.get("MASTER_PORT") != str(port) or "LOCAL_RANK" not in variables:
                continue
            rank = int(variables["LOCAL_RANK"])
            peak = _kilobytes(process / "status", "VmHWM")
            memory.peak_rss[rank] = max(memory.peak_rss.get(rank, 0), peak)
            if sums:
                total += _kilobytes(process / "smaps_rollup", "Pss")
    memory.peak_sum = max(memory.peak_sum, total)


def _kilobytes(file: Path, name: str) -> int:
    line = next(line for line in file.read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
