"""Signals and deadlines, sent to real processes."""

import os
import signal
import subprocess
import sys
import time

import pytest

from dpo_ds.errors import UserError
from dpo_ds.launcher.signals import Reason, StopRequest, job_time_left, parse_duration

ASKED = """
import time
from dpo_ds.launcher.signals import StopRequest

with StopRequest(insists_after_s=0.5) as request:
    print("working", flush=True)
    while request.reason is None:
        time.sleep(0.01)
    time.sleep(0.5)
    print(request.reason.name, flush=True)
"""
# A lock that is taken twice: the interpreter's own handlers would never run.
STUCK = """
import ctypes
from dpo_ds.launcher.signals import StopRequest

with StopRequest(insists_after_s=0.5) as request:
    lock = ctypes.create_string_buffer(64)
    print("working", flush=True)
    ctypes.CDLL(None).pthread_mutex_lock(lock)
    ctypes.CDLL(None).pthread_mutex_lock(lock)
"""
FORKED = """
import os, signal, time
from dpo_ds.launcher.signals import StopRequest

with StopRequest() as request:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, b"forked")
        time.sleep(20)
        os._exit(0)
    os.read(reading, 6)
    os.kill(child, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), request.reason)
"""
RESTORED = """
import os, signal
from dpo_ds.launcher.signals import StopRequest, ignore_signals

with StopRequest():
    pass
assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL and signal.set_wakeup_fd(-1) == -1
ignore_signals()
os.kill(os.getpid(), signal.SIGTERM)
print("still here", flush=True)
signal.signal(signal.SIGTERM, signal.SIG_DFL)
os.kill(os.getpid(), signal.SIGTERM)
"""


def working(code: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    return process


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT"])
def test_a_signal_asks_and_repeats_are_ignored(name):
    process = working(ASKED)
    for _ in range(3):
        process.send_signal(signal.Signals[name])
        time.sleep(0.05)
    assert process.communicate(timeout=20)[0] == f"{name}\n"
    assert process.returncode == 0


def test_the_first_of_several_signals_is_the_reason():
    process = working(ASKED)
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20)[0] == "SIGUSR1\n"


def test_only_a_later_second_int_leaves_at_once_even_a_stuck_process():
    process = working(STUCK)
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.6)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=5) == 130
    process.communicate()


def test_a_forked_child_can_be_ended_and_asks_nothing_of_its_parent():
    finished = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=30, check=True)
    assert finished.stdout == f"{-signal.SIGTERM} None\n"


def test_handlers_are_restored_and_a_leaving_process_ignores_signals():
    finished = subprocess.run([sys.executable, "-c", RESTORED], capture_output=True, text=True, timeout=30)
    assert (finished.returncode, finished.stdout) == (-signal.SIGTERM, "still here\n")


def test_deadlines_ask_when_they_have_passed():
    assert StopRequest(stop_after_s=60, job_time_left_s=60).reason is None
    assert StopRequest(stop_after_s=60, job_time_left_s=-1).reason is Reason.JOB_END
    request = StopRequest(stop_after_s=0.2)
    assert request.reason is None
    time.sleep(0.25)
    assert request.reason is Reason.STOP_AFTER


def test_a_signal_within_the_block_reaches_this_process():
    with StopRequest() as request:
        os.kill(os.getpid(), signal.SIGUSR2)
        deadline = time.monotonic() + 5
        while request.reason is None and time.monotonic() < deadline:
            time.sleep(0.01)
    assert request.reason is Reason.SIGUSR2


@pytest.mark.parametrize(
    ("text", "seconds"), [("3h50m", 13800), ("90s", 90), ("1d12h", 129600), ("1d1h1m1s", 90061), (" 5m ", 300)]
)
def test_a_duration_is_read(text, seconds):
    assert parse_duration(text, key="--stop_after") == seconds


@pytest.mark.parametrize("text", ["", "3:50", "50", "50m3h", "1.5h", "-5m", "0s", "5min", "3h 50m", "null"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(UserError, match=r"--stop_after must be a time such as 3h50m, 1d12h or 90s, got '"):
        parse_duration(text, key="--stop_after")


def test_a_slurm_job_leaves_five_minutes_or_a_tenth():
    now = int(time.time())
    long = {"SLURM_JOB_START_TIME": str(now - 100), "SLURM_JOB_END_TIME": str(now + 7200)}
    short = {"SLURM_JOB_START_TIME": str(now), "SLURM_JOB_END_TIME": str(now + 600)}
    assert job_time_left(long) == pytest.approx(6900, abs=2)
    assert job_time_left(short) == pytest.approx(540, abs=2)
    assert job_time_left({"SLURM_JOB_END_TIME": str(now + 600)}) == pytest.approx(300, abs=2)
    assert job_time_left({}) is None
    assert job_time_left({"SLURM_JOB_END_TIME": "unknown"}) is None
