"""The ranks agree on stopping: one that was asked stops all, at the same point, and they leave together."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from dpo_ds.engine.world import World
from dpo_ds.errors import RunError, Stopped, first_line
from dpo_ds.launcher.marker import MARKER_FILE, mark_stopped, unmark
from dpo_ds.launcher.signals import Reason, StopRequest


class Agreement:
    """What all ranks were asked. Every method is collective.

    The ranks compare in the background, on the CPU, while they work: neither the device nor its collectives wait.
    """

    def __init__(
        self,
        request: StopRequest,
        *,
        timeout: timedelta = timedelta(minutes=10),
        progressed: Callable[[], None] = lambda: None,
    ) -> None:
        """Makes a group of its own for the comparisons.

        Args:
            request: what this process was asked.
            timeout: how far one rank may be behind another.
            progressed: called at every question, which is a micro-batch's progress.
        """
        self._progressed = progressed
        self._request = request
        self._timeout = timeout
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._pending: tuple[dist.Work, torch.Tensor] | None = None
        self._agreed: Reason | None = None

    def ask(self) -> Reason | None:
        """Returns why the run must stop, the same on all ranks, or None; once there is a reason, it stays.

        It is to be called at every micro-batch: the answer is that of the call before, whose comparison has had a
        micro-batch's time, and a new one starts.

        Raises:
            RunError: another rank is gone, or too far behind.
        """
        self.settle()
        self._progressed()
        if self._agreed is None:
            flag = torch.tensor(self._request.reason or 0)
            work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
            self._pending = work, flag
        return self._agreed

    def settle(self) -> Reason | None:
        """Returns the answer to the last question, which ``ask`` would return next, and starts no other.

        Raises:
            RunError: another rank is gone, or too far behind.
        """
        if self._pending is not None:
            (work, flag), self._pending = self._pending, None
            try:
                work.wait()
            except RuntimeError as error:
                raise RunError(
                    "whether to stop cannot be agreed: another rank is gone, or is more than "
                    f"{self._timeout.total_seconds():.0f} s behind ({first_line(error)}); what it said last tells why"
                ) from error
            self._agreed = Reason(int(flag)) if flag else None
        return self._agreed


@contextmanager
def stoppable(request: StopRequest, *, world: World, folder: Path) -> Iterator[Agreement]:
    """Lets signals and deadlines ask the block to stop; collective.

    A block that stops raises ``Stopped`` on every rank. Then ``RESUME.json`` is written, and the ranks leave together:
    a launcher ends the others as soon as one has gone.

    Args:
        request: what this process was asked; this enters it.
        world: the ranks, which have left their group when ``Stopped`` comes through.
        folder: the run's output folder, whose earlier marker is taken away.

    Raises:
        Stopped: the block has stopped.
    """
    with request:
        agreement = Agreement(request, progressed=world.progressed)
        if world.rank == 0:
            unmark(folder)
        try:
            yield agreement
        except Stopped as stopped:
            if world.rank == 0:
                try:
                    mark_stopped(folder, stopped)
                except OSError as error:  # what was saved is there all the same
                    print(f"warning: {folder / MARKER_FILE} cannot be written: {error}", file=sys.stderr, flush=True)
            world.barrier()
            world.leave()
            raise
        agreement.settle()
