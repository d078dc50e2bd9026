"""Programs that start anew under jemalloc, and what they then do with memory that they free."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dpo_ds.launcher.allocator import preloaded

REPOSITORY = Path(__file__).parent.parent.parent

CHANGED = {"LD_PRELOAD", "MALLOC_CONF", "DS_ACCELERATOR", "LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"}

needs_jemalloc = pytest.mark.skipif(not preloaded({}), reason="the machine has no jemalloc")

RESTARTED = """
import os, subprocess, sys
from dpo_ds.launcher import allocator
print(os.getpid(), *sys.argv[1:])
allocator._ACCELERATORS = (DEVICES)
allocator.restart_with_jemalloc()
print(allocator.is_jemalloc(), os.environ.get("LD_PRELOAD"))
"""

HELD = """
from dpo_ds.engine import host_memory
import sys, time, torch

def held():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 // 2**20
"""

FREED = (
    HELD
    + """
def freed_of(mebibytes):
    before = held()
    block = torch.ones(mebibytes * 2**18)
    assert held() - before > 0.9 * mebibytes
    del block
    time.sleep(1)  # jemalloc hands memory back within half a second, when something is allocated
    torch.ones(2**20)
    return held() - before

host_memory.keep_freed()
torch.ones(2**18).sum()
kept = freed_of(256)
host_memory.trim()
host_memory.spare()
spared = freed_of(300)
print(kept, spared)
"""
)


UNLIKE_SHAPES = (
    HELD
    + """
if sys.argv[1] == "few":
    host_memory.keep_few_kernels()
whole = torch.ones(1001, 64, dtype=torch.bfloat16)
whole @ whole[:64]
before = held()
for length in range(1, 1001):
    whole[:length] @ whole[:64]
print(held() - before)
"""
)


def output_of(program: str, *arguments: str, folder: Path, env: dict[str, str]) -> list[list[str]]:
    """Runs a program from a file, as ranks do, and returns the words of its lines."""
    script = folder / "program.py"
    script.write_text(program)
    clean = {name: value for name, value in os.environ.items() if name not in CHANGED}
    done = subprocess.run(
        [sys.executable, "-u", script, *arguments],
        env={**clean, "PYTHONPATH": str(REPOSITORY), **env},
        capture_output=True,
        text=True,
        check=True,
    )
    return [line.split() for line in done.stdout.splitlines()]


@needs_jemalloc
@pytest.mark.parametrize(("devices", "env"), [("", {}), ("'/dev/null',", {"DS_ACCELERATOR": "cpu"})])
def test_a_program_starts_anew_once_as_the_same_process_and_its_children_do_not(tmp_path, devices, env):
    program = RESTARTED.replace("DEVICES", devices)
    lines = output_of(program, "--key", "a b", folder=tmp_path, env=env)
    assert lines[0] == lines[1]
    assert lines[0][1:] == ["--key", "a", "b"]
    assert lines[2:] == [["True", "None"]]


@pytest.mark.parametrize(
    ("devices", "env"),
    [("'/dev/null',", {}), ("", {"LD_PRELOAD": ""})],
    ids=["an accelerator", "a user's own LD_PRELOAD"],
)
def test_a_program_is_left_alone(tmp_path, devices, env):
    lines = output_of(RESTARTED.replace("DEVICES", devices), folder=tmp_path, env=env)
    assert lines[1:] == [["False", *str(env.get("LD_PRELOAD")).split()]]


def test_a_machine_without_jemalloc_has_nothing_to_preload(monkeypatch):
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    assert preloaded({}) == {}


@needs_jemalloc
def test_a_users_own_settings_of_jemalloc_stay():
    assert preloaded({"MALLOC_CONF": "narenas:2"})["MALLOC_CONF"] == "narenas:2"


@pytest.mark.parametrize(
    "variables", [{}, pytest.param(preloaded({}), marks=needs_jemalloc)], ids=["glibc", "jemalloc"]
)
def test_freed_memory_is_kept_and_handed_back_when_asked(tmp_path, variables):
    *_, (kept, spared) = output_of(FREED, folder=tmp_path, env=variables)  # DeepSpeed has a word before
    assert int(kept) > 200
    assert int(spared) < 50


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN multiplies no bfloat16 here")
def test_shapes_that_do_not_come_again_take_a_bounded_memory(tmp_path):
    bounded, unbounded, own = (
        int(output_of(UNLIKE_SHAPES, kept, folder=tmp_path, env=env)[-1][0])
        for kept, env in (
            ("few", {}),
            ("all", {}),
            ("few", {"LRU_CACHE_CAPACITY": "1024", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024"}),
        )
    )
    assert bounded < 0.5 * unbounded
    assert own > 0.8 * unbounded
