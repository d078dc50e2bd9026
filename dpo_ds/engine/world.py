"""The process group: joining it, leaving it, and the few collectives that the other rooms may ask for."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from dpo_ds.engine.extensions import expose_ninja
from dpo_ds.engine.host_memory import keep_few_kernels, keep_freed, spare, trim
from dpo_ds.engine.meeting import Meeting
from dpo_ds.engine.patience import Patience, Phase
from dpo_ds.engine.pulse import watch_machines
from dpo_ds.errors import UserError
from dpo_ds.launcher.identity import Identity

T = TypeVar("T")


class World:
    """All ranks of the run. Its methods are collective but ``enter``, ``progressed``, ``synchronize``, and memory's."""

    def __init__(self, identity: Identity, device: torch.device, patience: Patience) -> None:
        self.rank = identity.rank
        self.size = identity.size
        self.device = device
        self._identity = identity
        self._patience = patience
        self._unwatch: Callable[[], None] = lambda: None

    @classmethod
    def join(cls, identity: Identity, meeting: Meeting) -> "World":
        """Joins the process group, waiting for all ranks. From here on, a rank that stands still for too long ends.

        Args:
            identity: who this process is.
            meeting: where the ranks have met.
        """
        expose_ninja()
        # Two libraries' words about each other, on every rank, in the middle of the progress bar.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        accelerator = get_accelerator()
        if accelerator.device_name() == "cpu":
            if "OMP_NUM_THREADS" not in os.environ:
                torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // identity.local_size))
            keep_few_kernels()
            keep_freed()
        else:
            accelerator.set_device(identity.local_rank)
        for name, value in (
            ("RANK", identity.rank),
            ("WORLD_SIZE", identity.size),
            ("LOCAL_RANK", identity.local_rank),
        ):
            os.environ.setdefault(name, str(value))  # DeepSpeed reads them where no launcher has set them
        patience = Patience(identity.rank)
        patience.start()
        dist.init_process_group(
            accelerator.communication_backend_name(),
            store=meeting.store,
            rank=identity.rank,
            world_size=identity.size,
            timeout=patience.collective_timeout,
        )
        deepspeed.init_distributed(verbose=False, timeout=patience.collective_timeout)
        world = cls(identity, torch.device(accelerator.current_device_name()), patience)
        # Tries the device's own network out, in a time of its own.
        world.sum(torch.ones(1, device=world.device))
        world._unlink_collective_buffers()
        world.enter("load")
        return world

    def leave(self) -> None:
        """Leaves the process group. After a failure it must not be called: it may wait for ranks that are gone."""
        self._unwatch()
        dist.destroy_process_group()
        self._patience.stop()

    def allow(self, limits_s: Mapping[str, float]) -> None:
        """Sets how long this rank may stand still, and other machines be silent, before it ends with a line about it.

        Args:
            limits_s: seconds, by the names ``load_s``, ``cache_s``, ``train_s``, ``save_s`` and ``silence_s``.
        """
        self._patience.allow(limits_s)
        self._unwatch()
        self._unwatch = watch_machines(self._identity, self.broadcast, silence_s=limits_s["silence_s"])

    def enter(self, phase: Phase) -> None:
        """Begins a phase, the first behind ``join`` being ``load``."""
        self._patience.enter(phase)

    def progressed(self) -> None:
        """Says that this rank does not stand still: at least once in what its phase allows."""
        self._patience.progressed()

    def trim_memory(self) -> None:
        """Hands memory that was freed back to the system, where this process keeps it: after loading, not in steps."""
        trim()

    def spare_memory(self) -> None:
        """Hands freed memory back as it comes, from now on, at the price of some time: where memory is short."""
        spare()

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

    def group(self, ranks: Sequence[int]) -> dist.ProcessGroup:
        """Makes a group of some ranks; collective among all, and a rank that is not in it gets what it cannot use."""
        group: dist.ProcessGroup = dist.new_group(list(ranks), timeout=self._patience.collective_timeout)
        return group

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
