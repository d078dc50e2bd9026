"""How long a rank may stand still, by phase: in place of a hang, one line that says where it stands, and its end.

One clock serves every backend and also what is no collective. The collectives' own clocks come behind it, for a rank
whose interpreter is stuck; DeepSpeed's groups would keep a library's default, so all groups are set.
"""

import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch.distributed.distributed_c10d as c10d

from dpo_ds.config.schema import TimeoutsConfig

Phase = Literal["join", "load", "cache", "train", "save"]

_JOIN_S = 300.0

_MARGIN_S = 60.0
"""By how much a collective is more patient than this clock, which has the clearer words."""

_PACKAGE = Path(__file__).parents[1]


class Patience:
    """Ends this process when it makes no progress for longer than its phase allows."""

    def __init__(self, rank: int, *, poll_s: float = 1.0) -> None:
        """Starts in phase ``join`` with the default limits; nothing is watched before ``start``.

        Args:
            rank: for the message.
            poll_s: how often the clock is read.
        """
        self._rank = rank
        self._poll_s = poll_s
        self._limits_s: Mapping[str, float] = asdict(TimeoutsConfig())
        self._phase: Phase = "join"
        self._still_s = 0.0
        self._over = threading.Event()

    @property
    def collective_timeout(self) -> timedelta:
        """How long a collective of this phase may take before its own library ends it."""
        return timedelta(seconds=self._limit_s + _MARGIN_S)

    @property
    def _limit_s(self) -> float:
        # Until then the run file is not known on every rank.
        return _JOIN_S if self._phase == "join" else self._limits_s[f"{self._phase}_s"]

    def start(self) -> None:
        """Starts the clock, in a thread of its own."""
        threading.Thread(target=self._watch, name="patience", daemon=True).start()

    def stop(self) -> None:
        """Stops the clock for good."""
        self._over.set()

    def allow(self, limits_s: Mapping[str, float]) -> None:
        """Sets the limits.

        Args:
            limits_s: seconds without progress, under the names of the run file: ``load_s`` and so on.
        """
        self._limits_s = limits_s
        self.enter(self._phase)

    def enter(self, phase: Phase) -> None:
        """Begins a phase, which is progress, and gives every process group its patience."""
        self._phase = phase
        self.progressed()
        with warnings.catch_warnings():
            # Under TORCH_DISTRIBUTED_DEBUG=DETAIL a group's timeout cannot be changed.
            warnings.simplefilter("ignore", UserWarning)
            for group in c10d._world.pg_map:
                c10d._set_pg_timeout(self.collective_timeout, group)

    def progressed(self) -> None:
        """Says that this rank does not stand still."""
        self._still_s = 0.0

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._over.wait(self._poll_s):
            now = time.monotonic()
            # The time in which a scheduler has suspended the whole job does not count.
            self._still_s += min(now - before, 2 * self._poll_s)
            before = now
            if self._still_s > self._limit_s:
                print(f"error: rank {self._rank} {self._complaint()}", file=sys.stderr, flush=True)
                # Nothing that runs at exit may wait for the other ranks.
                os._exit(1)

    def _complaint(self) -> str:
        if self._phase == "join":
            return (
                f"has waited for the other ranks' first word for {_JOIN_S:g} s; look at what they say, and whether "
                "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network between the nodes"
            )
        return (
            f"has made no progress in phase {self._phase} for {self._limit_s:g} s (timeouts.{self._phase}_s) and "
            f"stands in {_place()}; a rank that stands elsewhere than the others is the one that hangs"
        )


def _place() -> str:
    """Returns the innermost line of this package, or of the program, that the main thread is in."""
    stack = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident or 0])
    ours = [frame for frame in stack if Path(frame.filename).is_relative_to(_PACKAGE)]
    frame = (ours or stack)[-1]
    return f"{Path(frame.filename).name} line {frame.lineno} ({frame.name})"
