"""Jobs on two machines with an address each: over ssh, pdsh and MPI, as agents by hand, as torchrun, as pods."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.nodes import Nodes, why_not
from tests.ranks import REPOSITORY
from tests.test_run import TRAIN, Run, lines, losses, rows_of_words
from tests.test_run import run as run

_LACKING = why_not()
assert _LACKING is None or "DPO_DS_REQUIRE_CLUSTER" not in os.environ, _LACKING
pytestmark = [
    pytest.mark.multinode,
    pytest.mark.ranks,
    pytest.mark.skipif(_LACKING is not None, reason=str(_LACKING)),
]

TORTURE = "a b  $HOME `id` \"q\" 'r' ; & \\ ü\n$(id) {x} *"
ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(REPOSITORY),
    "DPO_DS_TORTURE": TORTURE,
}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    machines = Nodes(tmp_path_factory.mktemp("nodes"))
    yield machines
    machines.remove()


@pytest.fixture
def trained(run: Run) -> tuple[Path, list[float]]:
    """A run's folder, and what it loses on one machine."""
    finished, out = run(2, rows=rows_of_words(12))
    finished.expect_success()
    (out.parent / "hostfile").write_text("# two machines\nnode0 slots=1\nnode1 slots=1\n")
    return out.parent, losses(out)


def launch(nodes: Nodes, folder: Path, *overrides: str, out: str = "again") -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "dpo_ds", "launch", "--on", "ssh", "--hostfile", "hostfile", "--script", TRAIN]
    run_arguments = ["--config", "run.yaml", "--output_dir", folder / out, *overrides]
    return nodes.start(0, [*command, *run_arguments], cwd=folder, env=ENVIRONMENT)


def ended(process: "subprocess.Popen[str]", timeout_s: float = 120) -> tuple[int, str]:
    said = "".join(process.communicate(timeout=timeout_s))
    return process.returncode, said


def wait_for(is_so: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def expect_none_left(nodes: Nodes, folder: Path, timeout_s: float = 15) -> None:
    wait_for(lambda: not nodes.processes(str(folder / "again")), timeout_s)


def steps_taken(folder: Path) -> int:
    return len(lines(folder / "again")) if (folder / "again/metrics.jsonl").exists() else 0


def test_two_machines_over_ssh_train_as_one(nodes, trained):
    folder, expected = trained
    code, said = ended(launch(nodes, folder))
    assert code == 0, said
    assert losses(folder / "again") == expected
    assert json.loads((folder / "again/summary.json").read_text())["world_size"] == 2
    expect_none_left(nodes, folder)


def test_values_and_arguments_arrive_byte_for_byte_and_on_no_command_line(nodes, tmp_path):
    (tmp_path / "hostfile").write_text("node0 slots=1\nnode1 slots=1\n")
    (tmp_path / "secrets.yaml").write_text(json.dumps({"MY_TOKEN": "s3cret"}))
    (tmp_path / "secrets.yaml").chmod(0o600)
    (tmp_path / "script.py").write_text(
        "import json, os, sys, time\n"
        "rank = os.environ['RANK']\n"
        "told = [sys.argv[1:], os.environ['DPO_DS_TORTURE'], os.environ['MY_TOKEN'], os.environ.get('NOT_PASSED')]\n"
        "open(f'{rank}.tmp', 'w').write(json.dumps(told)); os.rename(f'{rank}.tmp', f'{rank}.json')\n"
        "while not os.path.exists('done'): time.sleep(0.05)\n"
    )
    options = [
        "--on",
        "ssh",
        "--hostfile",
        "hostfile",
        "--env_file",
        "secrets.yaml",
        "--script",
        tmp_path / "script.py",
    ]
    smallest = ["--model.policy", "m", "--data.train", "d", "--output_dir", TORTURE]
    command = [sys.executable, "-m", "dpo_ds", "launch", *options, *smallest]
    job = nodes.start(0, command, cwd=tmp_path, env=ENVIRONMENT | {"NOT_PASSED": "x"})
    wait_for(lambda: all((tmp_path / f"{rank}.json").exists() for rank in (0, 1)))
    assert not nodes.processes("s3cret")
    (tmp_path / "done").touch()
    assert ended(job)[0] == 0
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [smallest, TORTURE, "s3cret", None]


def test_a_mistake_is_said_once_with_its_code(nodes, trained):
    folder, _ = trained
    (folder / "pairs.jsonl").write_text("")
    code, said = ended(launch(nodes, folder))
    assert code == 2
    assert said.count("error: ") == 1
    assert "pairs.jsonl" in said
    expect_none_left(nodes, folder)


def test_term_saves_and_the_same_command_goes_on(nodes, trained):
    folder, _ = trained
    steps = ("--train.max_steps", "400")
    undisturbed = launch(nodes, folder, *steps, out="calm")
    assert ended(undisturbed)[0] == 0
    job = launch(nodes, folder, *steps)
    wait_for(lambda: steps_taken(folder) >= 3)
    os.kill(launcher_of(nodes, folder), signal.SIGTERM)
    code, said = ended(job)
    assert code == 200, said
    assert json.loads((folder / "again/RESUME.json").read_text())["step"] < 400
    expect_none_left(nodes, folder)
    assert ended(launch(nodes, folder, *steps))[0] == 0
    assert losses(folder / "again") == losses(folder / "calm")


def test_ranks_end_with_a_killed_launcher(nodes, trained):
    folder, _ = trained
    job = launch(nodes, folder, "--train.max_steps", "2000")
    wait_for(lambda: steps_taken(folder) >= 2)
    os.kill(launcher_of(nodes, folder), signal.SIGKILL)
    ended(job)
    expect_none_left(nodes, folder, 60)


def test_a_machine_without_power_ends_the_job_by_name_and_the_job_goes_on_when_it_is_back(nodes, trained):
    folder, _ = trained
    steps = ("--train.max_steps", "300", "--checkpoint.every", "50")
    job = launch(nodes, folder, *steps)
    wait_for(lambda: steps_taken(folder) >= 60)
    nodes.power_off(1)
    began = time.monotonic()
    code, said = ended(job)
    assert code == 255, said
    assert "error: node1: ssh has ended with 255" in said
    assert time.monotonic() - began < 60
    expect_none_left(nodes, folder)
    nodes.boot(1)
    assert ended(launch(nodes, folder, *steps))[0] == 0
    assert [line["step"] for line in lines(folder / "again")] == list(range(1, 301))


def launcher_of(nodes: Nodes, folder: Path) -> int:
    """The process that starts the agents; nsenter, which has started it, has the same words behind its own."""
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in nodes.processes(str(folder / "again"))}
    [pid] = [pid for pid, words in commands.items() if b"\0launch\0" in words and not words.startswith(b"nsenter")]
    return pid
