"""The process group: joining it, leaving it, and the few collectives that the other rooms may ask for."""

import ctypes
import os
import socket
import warnings
from contextlib import closing, suppress
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from dpo_ds.engine.extensions import expose_ninja
from dpo_ds.errors import UserError
from dpo_ds.launcher.identity import Identity

T = TypeVar("T")

RENDEZVOUS_TIMEOUT = timedelta(hours=24)
"""How long the other ranks wait for the one that validates and tokenizes; their launcher ends them if it fails."""


class World:
    """All ranks of the run. ``World.join()`` is collective, as is every method but ``leave``."""

    def __init__(self, identity: Identity, device: torch.device) -> None:
        self.rank = identity.rank
        self.size = identity.size
        self.device = device

    @classmethod
    def join(cls, identity: Identity, *, collective_timeout: timedelta = timedelta(minutes=10)) -> "World":
        """Joins the process group, waiting for all ranks.

        Args:
            identity: who this process is.
            collective_timeout: after this long in one collective a rank gives up.
        """
        if identity.size == 1:
            _be_the_only_rank()
        expose_ninja()
        # Two libraries' words about each other, on every rank, in the middle of the progress bar.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        accelerator = get_accelerator()
        if accelerator.device_name() == "cpu":
            if "OMP_NUM_THREADS" not in os.environ:
                torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // identity.local_size))
            _keep_freed_memory()
        else:
            accelerator.set_device(identity.local_rank)
        # The rendezvous waits longer than a collective may: one rank of each node checks and tokenizes first.
        meeting = rendezvous("env://", identity.rank, identity.size, timeout=RENDEZVOUS_TIMEOUT)
        store, rank, size = next(iter(meeting))
        dist.init_process_group(
            accelerator.communication_backend_name(),
            store=store,
            rank=rank,
            world_size=size,
            timeout=collective_timeout,
        )
        deepspeed.init_distributed(verbose=False, timeout=collective_timeout)
        world = cls(identity, torch.device(accelerator.current_device_name()))
        world._unlink_collective_buffers()
        return world

    def leave(self) -> None:
        """Leaves the process group. After a failure it must not be called: it may wait for ranks that are gone."""
        dist.destroy_process_group()

    def synchronize(self) -> None:
        """Waits until this rank's device has finished its work."""
        get_accelerator().synchronize()

    def sum(self, tensor: Tensor) -> Tensor:
        """Returns the sum of the ranks' tensors, on every rank."""
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def gather(self, value: T) -> list[T]:
        """Returns every rank's value, in the order of ranks, on every rank. For small things, seldom."""
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def broadcast(self, value: T | None) -> T:
        """Returns rank 0's value on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[return-value]

    def barrier(self) -> None:
        """Waits for all ranks."""
        dist.barrier()

    def agree(self, problem: str | None) -> None:
        """Raises the first rank's problem on every rank, if any rank has one, so that all leave together.

        Raises:
            UserError: some rank named a problem.
        """
        problems = [named for named in self.gather(problem) if named]
        if problems:
            raise UserError(problems[0])

    def _unlink_collective_buffers(self) -> None:
        # DeepSpeed's CPU collective leaves 69 MB a rank in /dev/shm. Once every rank has mapped them (which joining
        # made sure of) the names serve nobody, and without names nothing can stay behind, however the run ends.
        dist.barrier()
        name = f"deepspeed_allreduce_buffer_{os.getuid()}_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}"
        with suppress(FileNotFoundError):
            Path("/dev/shm", f"{name}_{self.rank}").unlink()


def _keep_freed_memory() -> None:
    # glibc maps every large tensor anew and hands it back when it is freed, so that a CPU rank spends a quarter of a
    # step on page faults. Elsewhere than on glibc there is no mallopt, and nothing to do.
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def _be_the_only_rank() -> None:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
