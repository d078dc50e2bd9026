"""Ranks end with their launcher. It is killed without a word to them, or does not pass the word on; Linux only."""

import ctypes
import errno
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

STARTED_BY_AGENT = "DPO_DS_AGENT"
"""Variable that this package's agent sets for its ranks."""

_GRACE_S = 600.0
_POLL_S = 1.0
_PR_SET_PDEATHSIG = 1
_LAUNCHERS = {
    *("deepspeed", "ds", "deepspeed.launcher.runner", "deepspeed.launcher.launch"),
    *("torchrun", "torch.distributed.run", "torch.distributed.launch"),
    *("dpo_ds.launcher.agent", "dpo_ds.launcher.remote"),
}


class _Process(NamedTuple):
    pid: int
    parent: int
    started: int  # in the kernel's ticks, since a pid is given again


def end_with_launcher(*, grace_s: float = _GRACE_S) -> None:
    """Sees to it that this rank gets TERM when one of its launcher's processes is gone, and ends itself a while later.

    TERM ends a rank that has nothing to lose and lets one that trains save. Watched are the ancestors up to the
    outermost one that is a launcher: DeepSpeed's ``launch.py``, the ``deepspeed`` front before it, or ``torchrun``. A
    process that was started without them, perhaps to outlive its shell, is left alone.

    Args:
        grace_s: seconds from TERM to the end of a rank that is still there.
    """
    if sys.platform != "linux":
        return
    line = list(_ancestors())
    launchers = [place for place, process in enumerate(line) if _is_launcher(process.pid)]
    if launchers:
        sys.stdout, sys.stderr = _outliving(sys.stdout), _outliving(sys.stderr)
        # The thread sees to all ancestors; the kernel is quicker for the nearest, even where the interpreter is stuck.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        # A launcher that has gone before that call is found missing at once.
        watched = line[: launchers[-1] + 1]
        threading.Thread(target=_watch, args=(watched, grace_s), name="launcher guard", daemon=True).start()
    elif line and _was_launched():
        os.kill(os.getpid(), signal.SIGTERM)  # the launcher has gone before this process could look


def _watch(watched: list[_Process], grace_s: float) -> None:
    while os.getppid() == watched[0].pid and all(map(_is_there, watched)):
        time.sleep(_POLL_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_s)
    os._exit(128 + signal.SIGTERM)


def _ancestors() -> Iterator[_Process]:
    process = _process(os.getppid())
    while process:
        yield process
        process = _process(process.parent)


def _process(pid: int) -> _Process | None:
    try:
        # The name in parentheses may hold anything.
        state, parent, *others = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    return None if state in b"ZX" else _Process(pid, int(parent), int(others[17]))


def _is_there(watched: _Process) -> bool:
    try:
        now = _process(watched.pid)
    except OSError:
        return True  # no file could be opened, which says nothing of the launcher
    # Not its parent: a launcher may outlive its shell.
    return now is not None and now.started == watched.started


def _is_launcher(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    # python -u -m MODULE at the longest: what comes later belongs to somebody else.
    return any(Path(os.fsdecode(word)).name in _LAUNCHERS for word in words[:4])


def _was_launched() -> bool:
    # CROSS_RANK and the argument are DeepSpeed's; nobody else sets both.
    by_deepspeed = "CROSS_RANK" in os.environ and any(word.startswith("--local_rank=") for word in sys.argv)
    return by_deepspeed or STARTED_BY_AGENT in os.environ


class _Outliving(io.FileIO):
    """A file descriptor that may be written to although its reader is gone."""

    def write(self, text: Any) -> int:
        try:
            return super().write(text)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            return len(text)


def _outliving(stream: TextIO) -> TextIO:
    # Whoever read a rank's output may have gone with the launcher, and "saving ..." must not fail for that.
    stream.flush()
    raw = io.BufferedWriter(_Outliving(stream.fileno(), "w", closefd=False))
    return io.TextIOWrapper(raw, encoding=stream.encoding, errors=stream.errors, line_buffering=True)
