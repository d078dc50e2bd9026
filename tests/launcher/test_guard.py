"""Ranks whose launcher is killed: DeepSpeed's own, with a rank's script that needs no torch."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ranks import REPOSITORY

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a rank does not learn of its launcher's end"),
]

RANK = f"""
import os, sys, time
from pathlib import Path
sys.path.insert(0, {str(REPOSITORY)!r})
from dpo_ds.launcher.guard import end_with_launcher
from dpo_ds.launcher.signals import StopRequest

def note(text):
    with Path(f"rank{{os.environ['RANK']}}").open("a") as file:
        file.write(text + "\\n")

if sys.argv[-1] == "loading":
    end_with_launcher()
    note(f"working {{os.getpid()}} {{os.getppid()}}")
    time.sleep(60)
hangs = sys.argv[-1] == "one hangs" and os.environ["RANK"] == "1"
with StopRequest() as request:
    end_with_launcher(grace_s=1 if hangs else 60)
    note(f"working {{os.getpid()}} {{os.getppid()}}")
    while request.reason is None or hangs:
        time.sleep(0.01)
    print("saving", flush=True)  # nobody reads it
    time.sleep(0.3)
    note("saved")
"""


def is_there(pid: int) -> bool:
    try:
        return b") Z" not in Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(is_so: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not (done := is_so()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return done


def said(folder: Path, rank: int) -> list[str]:
    file = folder / f"rank{rank}"
    return file.read_text().splitlines() if file.exists() else []


def kill_the_launcher_of(what_they_do: str, folder: Path, killed: str, number: signal.Signals) -> list[list[str]]:
    """Starts two ranks, kills a process before them, and returns what they noted once all processes are gone."""
    script = folder / "rank.py"
    script.write_text(RANK)
    front = subprocess.Popen(
        [Path(sys.executable).parent / "deepspeed", "--num_accelerators", "2", script, what_they_do],
        cwd=folder,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert front.stdout is not None
    try:
        assert wait_until(lambda: all(said(folder, rank) for rank in range(2)), timeout_s=60)
        lines = [said(folder, rank)[0].split() for rank in range(2)]
        ranks, launchers = [int(line[1]) for line in lines], {int(line[2]) for line in lines}
        assert len(launchers) == 1
        front.stdout.close()
        os.kill(front.pid if killed == "front" else launchers.pop(), number)
        assert front.wait(timeout=60) in (-number, 0)
        others = [*ranks, *launchers]
        gone = wait_until(lambda: not any(map(is_there, others)), timeout_s=10)
        notes = [said(folder, rank)[1:] for rank in range(2)]
        assert gone, notes
        return notes
    finally:
        for pid in [front.pid, *(int(line.split()[1]) for rank in range(2) for line in said(folder, rank)[:1])]:
            if is_there(pid):
                os.kill(pid, signal.SIGKILL)
        front.wait()


def test_ranks_save_and_end_when_the_front_is_ended(tmp_path):
    assert kill_the_launcher_of("saving", tmp_path, "front", signal.SIGTERM) == [["saved"], ["saved"]]


def test_ranks_end_when_launch_py_is_killed_a_hung_one_a_while_later(tmp_path):
    assert kill_the_launcher_of("one hangs", tmp_path, "launch.py", signal.SIGKILL) == [["saved"], []]


def test_a_rank_that_has_nothing_to_save_ends_with_the_front_at_once(tmp_path):
    assert kill_the_launcher_of("loading", tmp_path, "front", signal.SIGKILL) == [[], []]


def test_a_process_that_no_launcher_started_outlives_its_parent(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    parent = f"import os, subprocess; subprocess.Popen([{sys.executable!r}, 'rank.py', 'saving']); os.read(0, 1)"
    shell = subprocess.Popen(
        [sys.executable, "-c", parent], cwd=tmp_path, env={**os.environ, "RANK": "0"}, stdin=subprocess.PIPE
    )
    assert wait_until(lambda: bool(said(tmp_path, 0)), timeout_s=20)
    orphan = int(said(tmp_path, 0)[0].split()[1])
    shell.kill()
    shell.communicate()
    assert not wait_until(lambda: not is_there(orphan), timeout_s=2.5)
    os.kill(orphan, signal.SIGTERM)
    assert wait_until(lambda: not is_there(orphan), timeout_s=5)
    assert said(tmp_path, 0)[1:] == ["saved"]


def test_a_rank_whose_launcher_went_first_ends(tmp_path):
    (tmp_path / "rank.py").write_text(RANK)
    env = {**os.environ, "RANK": "0", "CROSS_RANK": "0"}
    orphan = subprocess.run([sys.executable, "rank.py", "--local_rank=0", "loading"], cwd=tmp_path, env=env, timeout=20)
    assert orphan.returncode == -signal.SIGTERM
    assert said(tmp_path, 0) == []
