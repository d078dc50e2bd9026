"""The wish that a run should stop, from a signal or a deadline: a flag that the run looks at. Nothing is saved here."""

import os
import re
import signal
import threading
import time
from collections.abc import Mapping
from enum import IntEnum
from types import FrameType, TracebackType

from dpo_ds.errors import UserError

_INSISTS_AFTER_S = 5.0
_UNITS_S = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_JOB_MARGIN_S = 300.0
_JOB_MARGIN_SHARE = 0.1  # of a job that is shorter than 50 minutes


class Reason(IntEnum):
    """Why a run stops; where ranks have several, the largest is the run's."""

    JOB_END = 1
    STOP_AFTER = 2
    SIGUSR2 = 3
    SIGUSR1 = 4
    SIGINT = 5
    SIGTERM = 6


_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class StopRequest:
    """Whether this process was asked to stop, and why.

    Within the ``with`` block, which the main thread enters, TERM, USR1, USR2 and INT only ask: schedulers and launchers
    send them two or three times. A second INT some seconds after the first leaves at once, with code 130, even where
    the main thread is stuck in a library: a thread takes the signals down. A forked child gets the former handlers.
    """

    def __init__(
        self,
        *,
        stop_after_s: float | None = None,
        job_time_left_s: float | None = None,
        insists_after_s: float = _INSISTS_AFTER_S,
    ) -> None:
        """Starts the clock of the deadlines.

        Args:
            stop_after_s: seconds from now after which the user wants the run to stop; None for never.
            job_time_left_s: seconds from now after which the scheduler leaves too little time to save; None for never.
            insists_after_s: how many seconds after the first INT another one is meant.
        """
        now = time.monotonic()  # no deadline moves when somebody sets the clock
        limits = {Reason.STOP_AFTER: stop_after_s, Reason.JOB_END: job_time_left_s}
        self._deadlines = {reason: now + limit for reason, limit in limits.items() if limit is not None}
        self._insists_after_s = insists_after_s
        self._is_listening = False
        self._interrupted: float | None = None
        self._reason: Reason | None = None

    @property
    def reason(self) -> Reason | None:
        """The first reason to stop; None while there is none."""
        if self._reason is None:
            now = time.monotonic()
            self._reason = next((reason for reason, at in self._deadlines.items() if now >= at), None)
        return self._reason

    def __enter__(self) -> "StopRequest":
        reading, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        self._listener = threading.Thread(target=self._listen, args=(reading,), name="signals", daemon=True)
        self._listener.start()
        self._former_pipe = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        self._former = {number: signal.signal(number, _leave_it_to_the_listener) for number in _SIGNALS}
        self._is_listening = True
        os.register_at_fork(after_in_child=self._restore)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_listening:  # not so in a forked child
            self._restore()
            os.write(self._pipe, b"\0")
            self._listener.join()
            os.close(self._pipe)

    def _restore(self) -> None:
        # A forked child that only took notes of TERM could not be ended, and would note it in its parent's pipe.
        if self._is_listening:
            for number, handler in self._former.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._former_pipe)
            self._is_listening = False

    def _listen(self, pipe: int) -> None:
        while True:
            for number in os.read(pipe, 64):
                if number == 0:
                    os.close(pipe)
                    return
                if number in _SIGNALS:
                    self._take(signal.Signals(number))

    def _take(self, taken: signal.Signals) -> None:
        if taken is signal.SIGINT:
            now = time.monotonic()
            if self._interrupted is None:
                self._interrupted = now
            elif now - self._interrupted >= self._insists_after_s:
                os._exit(128 + signal.SIGINT)
        if self._reason is None:
            self._reason = Reason[taken.name]


def _leave_it_to_the_listener(number: int, frame: FrameType | None) -> None:
    pass


def ignore_signals() -> None:
    """Ignores what a ``StopRequest`` takes, for a process that is leaving with a code that must not change."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def parse_duration(text: str, *, key: str) -> float:
    """Returns the seconds of a time such as ``1d12h``, ``3h50m`` or ``90s``.

    Args:
        text: whole numbers of days, hours, minutes and seconds, each at most once and in this order.
        key: the option's name, for the message.

    Raises:
        UserError: the text is something else, or no time at all.
    """
    pattern = "".join(rf"(?:(\d+){unit})?" for unit in _UNITS_S)
    found = re.fullmatch(pattern, text.strip(), re.ASCII)
    counts = found.groups(default="0") if found else ("0",) * len(_UNITS_S)
    seconds = sum(int(count) * unit_s for count, unit_s in zip(counts, _UNITS_S.values(), strict=True))
    if seconds == 0:
        raise UserError(f"{key} must be a time such as 3h50m, 1d12h or 90s, got {text!r}")
    return float(seconds)


def job_time_left(environment: Mapping[str, str] = os.environ) -> float | None:
    """Returns the seconds until a Slurm job should begin to stop; None where no scheduler says when it ends.

    What is left for saving are five minutes, or a tenth of a short job.

    Args:
        environment: the process's.
    """
    end = environment.get("SLURM_JOB_END_TIME", "")
    if not end.isdecimal():
        return None
    start = environment.get("SLURM_JOB_START_TIME", "")
    share = _JOB_MARGIN_SHARE * (int(end) - int(start)) if start.isdecimal() else _JOB_MARGIN_S
    return int(end) - min(_JOB_MARGIN_S, share) - time.time()
