"""Jobs on two machines with an address each: over ssh, pdsh and MPI, as agents by hand, as torchrun, as pods."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from dpo_ds.cli.launch import kubernetes_manifest
from tests.cluster.nodes import Nodes, why_not
from tests.ranks import REPOSITORY, run_ranks
from tests.test_resume import record, write_run
from tests.test_run import TRAIN

_LACKING = why_not()
assert _LACKING is None or "DPO_DS_REQUIRE_CLUSTER" not in os.environ, _LACKING
STEPS = 150
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


@pytest.fixture(scope="module")
def calm(tiny_chat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on this one machine that nobody disturbs."""
    sections: dict[str, dict[str, object]] = {
        "train": {"max_steps": STEPS, "epochs": 100, "eval_every": None},
        "checkpoint": {"every": 50},
    }
    folder = write_run(tmp_path_factory.mktemp("runs") / "calm", tiny_chat, **sections)
    run_ranks(2, [TRAIN, "--config", folder / "run.yaml"], folder=folder).expect_success()
    return folder


@pytest.fixture
def folder(calm: Path, tmp_path: Path) -> Path:
    """The same run, not yet begun."""
    again = Path(shutil.copytree(calm, tmp_path / "again", ignore=shutil.ignore_patterns("out", "rank*")))
    (again / "run.yaml").write_text((again / "run.yaml").read_text().replace(str(calm), str(again)))
    (again / "hostfile").write_text("# two machines\nnode0 slots=1\nnode1 slots=1\n")
    return again


def launch(nodes: Nodes, folder: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "dpo_ds", "launch", "--on", "ssh", "--hostfile", "hostfile", "--script", TRAIN]
    return nodes.start(0, [*command, "--config", folder / "run.yaml"], cwd=folder, env=ENVIRONMENT)


def ended(*processes: "subprocess.Popen[str]", timeout_s: float = 120) -> tuple[list[int], str]:
    said = "".join(text for process in processes for text in process.communicate(timeout=timeout_s))
    return [process.returncode for process in processes], said


def wait_for(is_so: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def expect_none_left(nodes: Nodes, folder: Path, timeout_s: float = 15) -> None:
    wait_for(lambda: not nodes.processes(str(folder)), timeout_s)


def expect_same(folder: Path, calm: Path) -> None:
    assert record(folder) == record(calm)
    assert json.loads((folder / "out/summary.json").read_text())["world_size"] == 2


def steps_taken(folder: Path) -> int:
    return len(record(folder)) if (folder / "out/metrics.jsonl").exists() else 0


def test_two_machines_over_ssh_train_as_one(nodes, folder, calm):
    codes, said = ended(launch(nodes, folder))
    assert codes == [0], said
    expect_same(folder, calm)
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
    assert ended(job)[0] == [0]
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [smallest, TORTURE, "s3cret", None]


def test_a_mistake_is_said_once_with_its_code(nodes, folder):
    (folder / "pairs.jsonl").write_text("")
    codes, said = ended(launch(nodes, folder))
    assert codes == [2]
    assert said.count("error: ") == 1
    assert "pairs.jsonl" in said
    expect_none_left(nodes, folder)


def test_term_saves_and_the_same_command_goes_on(nodes, folder, calm):
    job = launch(nodes, folder)
    wait_for(lambda: steps_taken(folder) >= 3)
    os.kill(launcher_of(nodes, folder), signal.SIGTERM)
    codes, said = ended(job)
    assert codes == [200], said
    assert json.loads((folder / "out/RESUME.json").read_text())["step"] < STEPS
    expect_none_left(nodes, folder)
    assert ended(launch(nodes, folder))[0] == [0]
    expect_same(folder, calm)


def test_ranks_end_with_a_killed_launcher(nodes, folder):
    job = launch(nodes, folder)
    wait_for(lambda: steps_taken(folder) >= 2)
    os.kill(launcher_of(nodes, folder), signal.SIGKILL)
    ended(job)
    expect_none_left(nodes, folder, 60)


def test_a_machine_without_power_ends_the_job_by_name_and_the_job_goes_on_when_it_is_back(nodes, folder, calm):
    job = launch(nodes, folder)
    wait_for(lambda: steps_taken(folder) >= 60)
    nodes.power_off(1)
    began = time.monotonic()
    codes, said = ended(job)
    assert codes == [255], said
    assert "error: node1: ssh has ended with 255" in said
    assert time.monotonic() - began < 60
    expect_none_left(nodes, folder)
    nodes.boot(1)
    codes, said = ended(launch(nodes, folder))
    assert codes == [0], said
    assert "going on behind step 50" in said
    expect_same(folder, calm)


def test_pods_of_the_manifest_train_and_save_when_they_are_asked_to_leave(nodes, folder, calm):
    manifest = kubernetes_manifest(
        (REPOSITORY / "launch/kubernetes.yaml").read_text(),
        nodes=2,
        gpus=1,
        arguments=[str(TRAIN), "--config", str(folder / "run.yaml")],
    )
    job = next(document for document in yaml.safe_load_all(manifest) if document["kind"] == "Job")
    container = job["spec"]["template"]["spec"]["containers"][0]
    # What the cluster's own names are for: its first pod, which is node0 here.
    words = [word.replace("dpo-ds-0.dpo-ds", "node0") for word in [*container["command"], *container["args"]]]
    # A container's first process has the number 1, to which no signal comes that it does not handle.
    first = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]

    def pods() -> "list[subprocess.Popen[str]]":
        return [
            nodes.start(number, [*first, *words], cwd=folder, env=ENVIRONMENT | {"JOB_COMPLETION_INDEX": str(number)})
            for number in (0, 1)
        ]

    started = pods()
    wait_for(lambda: steps_taken(folder) >= 3)
    for pid in nodes.processes(str(folder)):
        words_of = Path(f"/proc/{pid}/cmdline").read_bytes()
        if b"dpo_ds.launcher.agent" in words_of and not words_of.startswith((b"nsenter", b"unshare")):
            os.kill(pid, signal.SIGTERM)
    codes, said = ended(*started)
    assert codes == [200, 200], said
    codes, said = ended(*pods())
    assert codes == [0, 0], said
    expect_same(folder, calm)


def test_torchrun_on_two_machines(nodes, folder, calm):
    rendezvous = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "node0:29412", "--rdzv_id", "1"]
    agents = [
        nodes.start(
            node,
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"),
                *rendezvous,
                *(TRAIN, "--config", folder / "run.yaml"),
            ],
            cwd=folder,
            env=ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "v0"},
        )
        for node in (0, 1)
    ]
    codes, said = ended(*agents)
    assert codes == [0, 0], said
    expect_same(folder, calm)


@pytest.mark.skipif(shutil.which("pdsh") is None, reason="pdsh not installed (apt install pdsh)")
def test_deepspeeds_own_front_over_pdsh(nodes, folder, calm):
    # A shell on each machine reads these values: no torture here.
    names = ("PATH", "DS_ACCELERATOR", "OMP_NUM_THREADS", "PYTHONPATH")
    (folder / ".deepspeed_env").write_text("".join(f"{name}={ENVIRONMENT[name]}\n" for name in names))
    deepspeed = [Path(sys.executable).parent / "deepspeed", "--launcher", "pdsh", "--hostfile", "hostfile"]
    job = nodes.start(0, [*deepspeed, TRAIN, "--config", folder / "run.yaml"], cwd=folder, env=ENVIRONMENT)
    codes, said = ended(job)
    assert codes == [0], said
    expect_same(folder, calm)


@pytest.mark.skipif(shutil.which("ompi_info") is None, reason="Open MPI not installed (apt install openmpi-bin)")
def test_open_mpi_on_two_machines(nodes, folder, calm):
    passed = [word for name in (*ENVIRONMENT, "MASTER_ADDR") for word in ("-x", name)]
    mpirun = [
        *("mpirun", "-n", "2", "-hostfile", "hostfile", "--map-by", "ppr:1:node", *passed),
        *("--mca", "btl_tcp_if_include", "v0", "--mca", "oob_tcp_if_include", "v0"),
    ]
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "MASTER_ADDR": "node0"}
    command = [*mpirun, sys.executable, TRAIN, "--config", folder / "run.yaml"]
    codes, said = ended(nodes.start(0, command, cwd=folder, env=ENVIRONMENT | root))
    assert codes == [0], said
    expect_same(folder, calm)


def launcher_of(nodes: Nodes, folder: Path) -> int:
    """The process that starts the agents; nsenter, which has started it, has the same words behind its own."""
    commands = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in nodes.processes(str(folder))}
    [pid] = [pid for pid, words in commands.items() if b"\0launch\0" in words and not words.startswith(b"nsenter")]
    return pid
