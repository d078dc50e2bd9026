"""One function over many items in several processes, results in the order of the items.

Processes are spawned, never forked: a fork takes over locks that threads of the parent hold. No row and no token is
known here.
"""

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

from dpo_ds.errors import RunError

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_TRIAL_S = 0.5
_WORTH_SPAWNING_S = 4.0
_MOST = 16  # reading and writing takes the one process about a tenth of what the work on the items takes
_AHEAD = 2  # items that wait for each process, so that none is idle and memory stays bounded


def map_in_order(
    function: Callable[[_Item], _Result], items: Iterable[_Item], *, count: int, processes: int | None
) -> Generator[_Result]:
    """Yields ``function(item)`` for every item, in order, whatever the number of processes.

    Args:
        function: what works; where other processes do, it is pickled and sent to each once.
        items: taken as results are, a few ahead.
        count: how many there are.
        processes: how many work, 1 for this one alone; None for this one until the rest would take it long, and then
            one on each core, 16 at most.

    Raises:
        RunError: a process was killed.
    """
    remaining = iter(items)
    if processes is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        processes = min(cores, _MOST)
        began = time.monotonic()
        for done, item in enumerate(remaining, start=1):
            yield function(item)
            spent = time.monotonic() - began
            if processes > 1 and spent > _TRIAL_S and spent / done * (count - done) > _WORTH_SPAWNING_S:
                break
    yield from map(function, remaining) if processes == 1 else _spread(function, remaining, processes)


def _spread(function: Callable[[_Item], _Result], items: Iterator[_Item], processes: int) -> Generator[_Result]:
    executor = ProcessPoolExecutor(processes, get_context("spawn"), initializer=_begin, initargs=(function,))
    waiting: deque[Future[_Result]] = deque()
    try:
        for item in items:
            waiting.append(executor.submit(_call, item))
            if len(waiting) > _AHEAD * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise RunError(
            f"one of {processes} processes that tokenize was killed, perhaps for memory; lower data.processes, or set "
            "it to 1"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


def _begin(function: Callable[[Any], Any]) -> None:
    # What a pool's process works with can only be kept in a global: an argument would travel with every item.
    global _function
    _function = function
    stand_behind_parent()


def stand_behind_parent() -> None:
    """Lets this process, which another one has spawned, live as long as that one, and no signal end it before."""
    # A terminal or a launcher signals the whole group; the parent decides what happens then.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A killed parent says nothing to its pool, whose processes would wait for items for ever.
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(item: Any) -> Any:
    return _function(item)


_function: Callable[[Any], Any]
