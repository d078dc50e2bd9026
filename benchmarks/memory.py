"""Memory of processes, as Linux counts it, and what is most while something runs."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def anonymous_bytes(pid: int) -> int:
    """Returns what a process and all that it has started hold for themselves: no files, no shared memory."""
    waiting, total = [pid], 0
    while waiting:
        process = Path("/proc") / str(waiting.pop())
        try:
            status = (process / "status").read_text().splitlines()
            waiting += [int(child) for task in process.glob("task/*/children") for child in task.read_text().split()]
        except OSError:  # it has just ended
            continue
        total += sum(1024 * int(line.split()[1]) for line in status if line.startswith("RssAnon:"))
    return total


@contextmanager
def watched(measure: Callable[[], T], *, every_s: float) -> Iterator[list[T]]:
    """Yields a list to which what ``measure`` returns is added over and over until the block ends."""
    seen, is_over = [measure()], threading.Event()

    def watch() -> None:
        while not is_over.wait(every_s):
            seen.append(measure())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        is_over.set()
        watcher.join()
