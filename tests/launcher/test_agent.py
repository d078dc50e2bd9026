"""The node agent with real processes: codes, signals, logs, orphans; and a run on two nodes of one rank each."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from dpo_ds.errors import UserError
from dpo_ds.launcher.agent import Node, node_from
from tests.ranks import REPOSITORY
from tests.test_run import Run, losses, rows_of_words
from tests.test_run import run as run

pytestmark = pytest.mark.ranks

SCRIPT = f"""
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {str(REPOSITORY)!r})
from dpo_ds.launcher.guard import end_with_launcher
from dpo_ds.launcher.signals import StopRequest

rank, what = os.environ["RANK"], sys.argv[1:]
# One write: ranks are not buffered, and two prints would mix their pieces.
sys.stdout.write(f"rank {{rank}} of {{os.environ['WORLD_SIZE']}} got {{what!r}}\\n")
with StopRequest() as request:
    end_with_launcher(grace_s=1)
    Path(f"{{rank}}.pid").write_text(str(os.getpid()))
    if what[0] == "fails" and rank == "1":
        print("error: rank 1 has no more disk", file=sys.stderr, flush=True)
        sys.exit(7)
    if what[0] == "killed" and rank == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    while what[0] != "done" and request.reason is None:
        time.sleep(0.01)
Path(f"{{rank}}.saved").write_text(repr(request.reason))
sys.exit(0 if what[0] == "done" else 200)
"""


def start(folder: Path, *words: str, options: tuple[str, ...] = ()) -> "subprocess.Popen[str]":
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "dpo_ds.launcher.agent", "--ranks", "2", *options, "--", "script.py", *words]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def pids(folder: Path) -> list[int]:
    deadline = time.monotonic() + 120
    paths = [folder / f"{rank}.pid" for rank in (0, 1)]
    while not all(path.exists() and path.read_text() for path in paths):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return [int(path.read_text()) for path in paths]


def is_there(pid: int) -> bool:
    try:
        return b") Z" not in Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_arguments_and_environment_arrive_as_they_were_given(tmp_path):
    odd = 'a b $HOME `id` "q" \'s\' ;\n{"a": 1}'
    agent = start(tmp_path, "done", odd)
    out, _ = agent.communicate(timeout=180)
    assert agent.returncode == 0
    assert sorted(out.splitlines()) == sorted(f"rank {rank} of 2 got {['done', odd]!r}" for rank in (0, 1))


@pytest.mark.parametrize(("what", "code"), [("fails", 7), ("killed", 137)])
def test_the_first_failure_ends_all_ranks_and_is_the_code(tmp_path, what, code):
    began = time.monotonic()
    agent = start(tmp_path, what)
    _, errors = agent.communicate(timeout=180)
    assert agent.returncode == code
    assert time.monotonic() - began < 30
    assert f"rank 1 on {socket.gethostname()} has ended with code {code}" in errors
    assert not any(is_there(pid) for pid in pids(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_reaches_every_rank_which_saves(tmp_path, number):
    agent = start(tmp_path, "waits")
    pids(tmp_path)
    agent.send_signal(number)
    _, errors = agent.communicate(timeout=180)
    assert (agent.returncode, errors) == (200, "")
    assert all(f".{number.name}:" in (tmp_path / f"{rank}.saved").read_text() for rank in (0, 1))


def test_a_rank_that_does_not_stop_is_killed_after_the_grace_time(tmp_path):
    agent = start(tmp_path, "waits", options=("--grace", "1"))
    stuck = pids(tmp_path)[0]
    os.kill(stuck, signal.SIGSTOP)
    agent.send_signal(signal.SIGTERM)
    agent.communicate(timeout=180)
    assert agent.returncode in (200, 137)
    assert not is_there(stuck)


def test_ranks_end_with_a_killed_agent(tmp_path):
    agent = start(tmp_path, "waits")
    ranks = pids(tmp_path)
    agent.kill()
    agent.communicate(timeout=180)
    deadline = time.monotonic() + 20
    while any(map(is_there, ranks)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_there, ranks))


def test_a_failing_ranks_last_words_come_out_of_its_log(tmp_path):
    agent = start(tmp_path, "fails", options=("--logs", "logs"))
    out, errors = agent.communicate(timeout=180)
    assert "rank 1 of 2" not in out
    assert "error: rank 1 has no more disk" in errors
    assert "rank 1 of 2" in (tmp_path / "logs/rank-1.log").read_text()


@pytest.mark.parametrize(
    ("environment", "given", "expected"),
    [
        ({}, {"ranks": 3}, Node(0, 1, 3, "127.0.0.1", 0)),
        (
            {
                "PET_NNODES": "2",
                "PET_NODE_RANK": "1",
                "PET_NPROC_PER_NODE": "4",
                "MASTER_ADDR": "job-master-0",
                "RANK": "1",
            },
            {},
            Node(1, 2, 4, "job-master-0", 29500),
        ),
        (
            {"JOB_COMPLETION_INDEX": "3", "MASTER_ADDR": "dpo-0.dpo"},
            {"nodes": 4, "ranks": 8, "port": 29400},
            Node(3, 4, 8, "dpo-0.dpo", 29400),
        ),
        (
            {
                "SLURM_STEP_ID": "0",
                "SLURM_STEP_NUM_NODES": "2",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_NODEID": "1",
                "SLURM_GPUS_ON_NODE": "8",
                "SLURM_JOB_ID": "12",
            },
            {"address": "node0"},
            Node(1, 2, 8, "node0", 20012),
        ),
    ],
)
def test_a_node_knows_its_place(environment, given, expected):
    assert node_from(environment, **given) == expected


@pytest.mark.parametrize(
    ("environment", "given", "complaint"),
    [
        ({}, {"nodes": 2, "node_rank": 2, "ranks": 1}, "node_rank must be from 0 to 1 on 2 nodes, got 2"),
        ({}, {"nodes": 2, "ranks": 1}, "--master_addr is not given, so 2 nodes cannot meet"),
        ({"PET_NNODES": "1:4", "PET_NODE_RANK": "0"}, {}, "PET_NNODES must be a whole number, got '1:4'"),
        (
            {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "16", "SLURM_NODEID": "0"},
            {},
            "srun has started 16 tasks on 2 nodes",
        ),
    ],
)
def test_a_node_without_a_place_is_refused(environment, given, complaint):
    with pytest.raises(UserError, match=complaint):
        node_from(environment, **given)


def test_two_nodes_of_one_rank_train_as_one_node_of_two_ranks(run: Run, tmp_path):
    rows = rows_of_words(8)
    finished, out = run(2, rows=rows)
    finished.expect_success()
    folder, expected = out.parent, losses(out)
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    agents = []
    for node in ("0", "1"):
        options = ["--ranks", "1", "--nodes", "2", "--node_rank", node, "--master_addr", "127.0.0.1"]
        script = [str(REPOSITORY / "launch/train.py"), "--config", "run.yaml", "--output_dir", str(folder / "again")]
        agents.append(
            subprocess.Popen(
                [sys.executable, "-m", "dpo_ds.launcher.agent", *options, "--master_port", str(port), "--", *script],
                cwd=folder,
                env=environment | {"PYTHONPATH": str(REPOSITORY)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    ended = [agent.communicate(timeout=200) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], ended
    assert losses(folder / "again") == expected
    assert json.loads((folder / "again/summary.json").read_text())["world_size"] == 2
