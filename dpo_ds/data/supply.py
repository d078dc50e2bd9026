"""The process that prepares a stream's blocks ahead of training and removes those behind, and the feed that maps them.

One such process on each node, outside of every rank, so that no collective waits for the tokenizer; ranks wait on the
file system. Nodes may share the folder or have one each. It says nothing of other ranks.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from dpo_ds.data.blocks import BlockSchedule
from dpo_ds.data.feed import StepPairs
from dpo_ds.data.prepared import PreparedPairs, open_prepared
from dpo_ds.data.processes import stand_behind_parent
from dpo_ds.data.stream import Stream
from dpo_ds.data.tokenization import TokenizedPair, Tokenizer
from dpo_ds.errors import RunError, UserError

_POLL_S = 0.2
_GRACE_S = 1.0
_TOLD = 3  # exit code of a process that has said why it cannot go on
_MOST_DEATHS = 3


class Supplier:
    """A process that keeps the next blocks on disk; one that is killed is replaced, and loses what it had not whole."""

    def __init__(self, stream: Stream, schedule: BlockSchedule, tokenizer: Tokenizer, *, turn: int) -> None:
        """Starts it.

        Args:
            stream: whose blocks it prepares.
            schedule: the order of their turns.
            tokenizer: the policy's.
            turn: the first that will be asked for.
        """
        self._stream, self._schedule, self._tokenizer = stream, schedule, tokenizer
        self._turn = turn
        self._deaths = 0
        self._start()

    @property
    def pid(self) -> int:
        """Of the process that works now."""
        assert self._process.pid is not None
        return self._process.pid

    def _start(self) -> None:
        spawn = get_context("spawn")
        turns, self._turns = spawn.Pipe(duplex=False)
        arguments = (self._stream, self._schedule, self._tokenizer, self._turn, turns)
        self._process = spawn.Process(target=_supply, args=arguments, name="supplier")
        self._process.start()
        turns.close()

    def needs(self, turn: int) -> None:
        """Says that nobody will read a block before that turn's again, and sees to it that the process is alive.

        Raises:
            RunError: it was killed again and again.
        """
        if turn != self._turn:
            self._turn, self._deaths = turn, 0
            with suppress(BrokenPipeError):
                self._turns.send(turn)
        if self._process.is_alive() or self._process.exitcode == _TOLD:
            return
        self._deaths += 1
        if self._deaths == _MOST_DEATHS:
            raise RunError(
                f"the process that prepares data ended {_MOST_DEATHS} times (the last time with code "
                f"{self._process.exitcode}), perhaps for memory; lower data.streaming.rows_per_shard or data.processes"
            )
        self.stop()
        self._start()

    def stop(self) -> None:
        """Ends it: what it had whole is on disk, and the rest would be done again."""
        self._turns.close()
        self._process.join(_GRACE_S)
        self._process.kill()
        self._process.join()


def _supply(
    stream: Stream, schedule: BlockSchedule, tokenizer: Tokenizer, turn: int, turns: "Connection[int, int]"
) -> None:
    stand_behind_parent()
    # In place of one of the system's, which a killed process would leave behind.
    tqdm.set_lock(threading.RLock())
    next_turn, files, waits_s = turn, None, 0.0
    while True:
        try:
            if turns.poll(waits_s):
                while turns.poll():
                    turn = turns.recv()
        except EOFError:  # the parent is gone
            return
        waits_s = _POLL_S
        next_turn = max(next_turn, turn)
        # One turn more than may be prepared: another node's process may be one ahead of this one.
        stream.forget(but_for=schedule.blocks_of_turns(range(turn, min(turn + stream.keep + 1, schedule.turns))))
        if next_turn >= min(turn + stream.keep, schedule.turns):
            continue
        block = schedule.block_of_turn(next_turn)
        if stream.path(block).exists():
            next_turn, waits_s = next_turn + 1, 0.0
            continue
        with _alone(stream) as is_alone:
            if not is_alone or stream.path(block).exists():
                continue
            stream.forget_begun(but_for=block)
            if stream.is_full(but_for=block):
                # Of what another start had prepared, this one needs something else first.
                stream.forget(but_for=schedule.blocks_of_turns(range(turn, min(turn + stream.keep, schedule.turns))))
                continue
            try:
                files = files or stream.open_sources()
                stream.prepare(block, schedule.rows_of_block(block), *files, tokenizer)
                waits_s = 0.0
            except (UserError, RunError) as error:
                stream.tell(block, str(error))
                print(f"warning: the run will end where it comes to this: {error}", file=sys.stderr, flush=True)
                sys.exit(_TOLD)


@contextmanager
def _alone(stream: Stream) -> Iterator[bool]:
    """Holds the right to write blocks, or says that another process has it."""
    lock = FileLock(stream.blocks / ".lock")
    try:
        # Where there are no locks, two processes may write one block, each under names of its own.
        with suppress(NotImplementedError):
            lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


class StreamFeed:
    """A feed of a stream's blocks, each waited for when its turn comes; one is mapped at a time."""

    def __init__(
        self,
        stream: Stream,
        schedule: BlockSchedule,
        *,
        supplier: Supplier | None,
        patience_s: float,
        opened: Callable[[Path], PreparedPairs] = open_prepared,
    ) -> None:
        """Opens nothing yet.

        Args:
            stream: whose blocks these are.
            schedule: which of their pairs a step holds.
            supplier: the node's, where this process is the one that speaks to it.
            patience_s: how long a block may be waited for.
            opened: opens a block's folder.
        """
        self._stream, self._schedule, self._supplier = stream, schedule, supplier
        self._patience_s, self._opened = patience_s, opened
        self._mapped: tuple[int, PreparedPairs] | None = None
        self._awaited_since: float | None = None

    @property
    def steps(self) -> int:
        """As ``Feed`` says."""
        return self._schedule.steps

    @property
    def probe(self) -> TokenizedPair:
        """As ``Feed`` says."""
        return open_prepared(self._stream.sample).pair(0)

    def pairs_until(self, step: int) -> int:
        """As ``Feed`` says."""
        return step * self._schedule.pairs_per_step

    def is_at_hand(self, step: int) -> bool:
        """As ``Feed`` says."""
        return self._mapped is not None and self._mapped[0] == self._schedule.place(step).turn

    def is_there(self, step: int) -> bool:
        """As ``Feed`` says. Whoever asks for a step needs none before it any more."""
        turn, _, block, _ = self._schedule.place(step)
        if self._supplier is not None:
            self._supplier.needs(turn)
        if self.is_at_hand(step) or self._stream.path(block).exists():
            self._awaited_since = None
            return True
        if problem := self._stream.problem(block):
            raise UserError(problem)
        self._awaited_since = self._awaited_since or time.monotonic()
        if time.monotonic() > self._awaited_since + self._patience_s:
            raise RunError(
                f"{self._stream.path(block)} is not there after {self._patience_s:g} s (timeouts.data_s); is the "
                "tokenizer slower than training? Raise data.processes, lower data.streaming.rows_per_shard, or "
                "look at what the process that prepares it says"
            )
        return False

    def of_step(self, step: int) -> StepPairs:
        """As ``Feed`` says. Whoever asks for a step needs none before it any more."""
        while not self.is_there(step):
            time.sleep(_POLL_S)
        if not self.is_at_hand(step):
            self._mapped = None  # first, lest two blocks be mapped at a time
            turn, _, block, _ = self._schedule.place(step)
            self._mapped = turn, self._opened(self._stream.path(block))
        assert self._mapped is not None
        pairs = self._mapped[1]
        return StepPairs(pairs, self._schedule.pairs_of_step(step, pairs=len(pairs)))
