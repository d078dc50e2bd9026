"""Processes that end together: signals reach all of them, and the first failure is the end, and the code, of all."""

import signal
import subprocess
import time
from abc import ABC, abstractmethod
from types import FrameType

from dpo_ds.launcher.marker import STOPPED_CODE

_POLL_S = 0.1
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Together(ABC):
    """Starts processes, waits for all of them, and leaves none."""

    def __init__(self, *, grace_s: float, failed_grace_s: float) -> None:
        """Starts nothing yet.

        Args:
            grace_s: seconds from a signal, or from the first process that has stopped, to the end of the others.
            failed_grace_s: the same from the first that has failed.
        """
        self._grace_s, self._failed_grace_s = grace_s, failed_grace_s
        self._processes: list[subprocess.Popen[bytes]] = []
        self._asked: list[int] = []

    def run(self) -> int:
        """Runs the processes to their end.

        Returns:
            0 when all were done, else the code of the first that failed, 128 and its number where it was a signal.
        """
        former = {number: signal.signal(number, self._take) for number in _SIGNALS}
        try:
            self._start()
            return self._watch()
        finally:
            for process in self._processes:
                if process.poll() is None:
                    process.kill()
            for number, handler in former.items():
                signal.signal(number, handler)

    def ask(self, number: int) -> None:
        """Passes a signal on to all processes, and gives them their time to save."""
        self._asked.append(number)

    @abstractmethod
    def _start(self) -> None:
        """Appends the processes to ``_processes``."""

    @abstractmethod
    def _pass_on(self, process: "subprocess.Popen[bytes]", number: int) -> None:
        """Passes a signal on to a process that has not ended."""

    @abstractmethod
    def _tell(self, place: int, code: int) -> None:
        """Says that a process has failed."""

    def _end(self, process: "subprocess.Popen[bytes]") -> None:
        """Ends a process whose time is over."""
        process.kill()

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.ask(number)

    def _watch(self) -> int:
        code, deadline = 0, None
        while any(process.poll() is None for process in self._processes):
            while self._asked:
                self._send(self._asked.pop(0))
                deadline = deadline or time.monotonic() + self._grace_s
            if code == 0:
                code = self._first_failure()
                if code not in (0, STOPPED_CODE):
                    # TERM makes a rank save, which it cannot do alone; one that waits for the failed one is ended.
                    self._send(signal.SIGTERM)
                    deadline = time.monotonic() + self._failed_grace_s
                elif code:
                    deadline = deadline or time.monotonic() + self._grace_s
            if deadline is not None and time.monotonic() > deadline:
                for process in self._processes:
                    if process.poll() is None:
                        self._end(process)
                deadline = None
            time.sleep(_POLL_S)
        return code or self._first_failure()

    def _send(self, number: int) -> None:
        for process in self._processes:
            if process.poll() is None:
                self._pass_on(process, number)

    def _first_failure(self) -> int:
        for place, process in enumerate(self._processes):
            ended = process.poll()
            if ended:
                code = ended if ended > 0 else 128 - ended
                if code != STOPPED_CODE:
                    self._tell(place, code)
                return code
        return 0
