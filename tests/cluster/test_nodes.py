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
import yaml

from dpo_ds.cli.launch import kubernetes_manifest
from tests.cluster import needs, needs_program
from tests.cluster.conftest import EVERY, STEPS
from tests.cluster.listening import SILENCE_S
from tests.cluster.nodes import Nodes, why_not
from tests.cluster.telling import TELLING, TORTURE, told
from tests.ranks import REPOSITORY
from tests.test_resume import record, steps_taken

pytestmark = [pytest.mark.multinode, pytest.mark.ranks, needs(why_not())]

PYTHON = sys.executable
LISTENING = Path(__file__).with_name("listening.py")
ENVIRONMENT = {
    "PATH": f"{Path(PYTHON).parent}:{os.environ['PATH']}",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(REPOSITORY),
    "DPO_DS_TORTURE": TORTURE,
}
ODD = ["--tracking.project", TORTURE]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    machines = Nodes(tmp_path_factory.mktemp("nodes"))
    yield machines
    machines.remove()


def launch(nodes: Nodes, folder: Path, *, grace_s: int = 60) -> "subprocess.Popen[str]":
    # A machine that is silent for three seconds is lost.
    options = ["--hostfile", "hostfile", "--silence", "3", "--grace", str(grace_s), "--script", TELLING]
    command = [PYTHON, "-m", "dpo_ds", "launch", "--on", "ssh", *options, "--config", folder / "run.yaml", *ODD]
    return nodes.start(0, command, cwd=folder, env=ENVIRONMENT)


def ended(*processes: "subprocess.Popen[str]", timeout_s: float = 120) -> tuple[list[int], str]:
    said = "".join(text for process in processes for text in process.communicate(timeout=timeout_s))
    return [process.returncode for process in processes], said


def wait_for(is_so: Callable[[], bool], timeout_s: float = 60, *jobs: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > deadline or any(job.poll() is not None for job in jobs):
            for job in jobs:
                job.terminate()
            pytest.fail(f"it is not so: {ended(*jobs)}")
        time.sleep(0.1)


def wait_for_steps(steps: int, folder: Path, *jobs: "subprocess.Popen[str]") -> None:
    wait_for(lambda: steps_taken(folder) >= steps, 90, *jobs)


def expect_none_left(nodes: Nodes, folder: Path, timeout_s: float = 15) -> None:
    wait_for(lambda: not nodes.processes(str(folder)), timeout_s)


def expect_same(nodes: Nodes, folder: Path, calm: Path) -> None:
    assert record(folder) == record(calm)
    assert json.loads((folder / "out/summary.json").read_text())["world_size"] == 2
    expect_none_left(nodes, folder)


def expect_told(folder: Path, *odd: str, inherited: str | None = TORTURE) -> None:
    for rank in (0, 1):
        arguments = ["--config", str(folder / "run.yaml"), *odd]
        assert told(folder, rank) == {"arguments": arguments, "inherited": inherited, "of the run file": TORTURE}
        (folder / f"told-{rank}.json").unlink()


def test_over_ssh_a_job_outlives_all_that_ends_it(nodes, folder, calm):
    # Asked to leave, it saves.
    job = launch(nodes, folder)
    wait_for_steps(3, folder, job)
    os.kill(launcher_of(nodes, folder), signal.SIGTERM)
    codes, said = ended(job)
    assert codes == [200], said
    assert json.loads((folder / "out/RESUME.json").read_text())["step"] < EVERY
    expect_none_left(nodes, folder)

    # A cut link: the job ends and says whose, and nothing goes on behind the cut.
    job = launch(nodes, folder, grace_s=3)
    wait_for_steps(EVERY + 5, folder, job)
    nodes.plug(1, "down")
    expect_lost(nodes, folder, job)
    nodes.plug(1, "up")

    # With a killed launcher, its ranks save and end.
    job = launch(nodes, folder)
    wait_for_steps(EVERY + 15, folder, job)
    os.kill(launcher_of(nodes, folder), signal.SIGKILL)
    _, said = ended(job)
    assert f"going on behind step {EVERY} of {STEPS}" in said
    expect_none_left(nodes, folder)

    # A machine without power.
    job = launch(nodes, folder, grace_s=3)
    wait_for_steps(2 * EVERY + 5, folder, job)
    nodes.power_off(1)
    expect_lost(nodes, folder, job)
    nodes.boot(1)

    # And all the same in the end.
    codes, said = ended(launch(nodes, folder))
    assert codes == [0], said
    assert f"going on behind step {2 * EVERY} of {STEPS}" in said
    expect_told(folder, *ODD)
    expect_same(nodes, folder, calm)


def expect_lost(nodes: Nodes, folder: Path, job: "subprocess.Popen[str]") -> None:
    began = time.monotonic()
    codes, said = ended(job)
    assert codes == [255], said
    assert "error: node1: ssh has ended with 255" in said
    assert time.monotonic() - began < 40
    expect_none_left(nodes, folder, 30)


def test_a_secret_is_on_no_command_line_and_what_is_not_named_stays_here(nodes, tmp_path):
    (tmp_path / "hostfile").write_text("node0 slots=1\nnode1 slots=1\n")
    (tmp_path / "secrets.yaml").write_text(json.dumps({"MY_TOKEN": "s3cret"}))
    (tmp_path / "secrets.yaml").chmod(0o600)
    (tmp_path / "script.py").write_text(
        "import json, os, sys, time\n"
        "rank = os.environ['RANK']\n"
        "told = [sys.argv[1:], os.environ['DPO_DS_TORTURE'], os.environ['MY_TOKEN'], os.environ.get('NOT_PASSED')]\n"
        "open(f'{rank}.tmp', 'w').write(json.dumps(told)); os.rename(f'{rank}.tmp', f'{rank}.json')\n"
        "while not os.path.exists('done'): time.sleep(0.05)\n"
        "sys.exit(7 * int(rank))\n"
    )
    options = ["--hostfile", "hostfile", "--env_file", "secrets.yaml", "--script", tmp_path / "script.py"]
    smallest = ["--model.policy", "m", "--data.train", "d", "--output_dir", TORTURE]
    command = [PYTHON, "-m", "dpo_ds", "launch", "--on", "ssh", *options, *smallest]
    job = nodes.start(0, command, cwd=tmp_path, env=ENVIRONMENT | {"NOT_PASSED": "x"})
    wait_for(lambda: all((tmp_path / f"{rank}.json").exists() for rank in (0, 1)))
    assert not nodes.processes("s3cret")
    (tmp_path / "done").touch()
    codes, said = ended(job)
    assert codes == [7]
    assert "rank 1 on node1 has ended with code 7" in said
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [smallest, TORTURE, "s3cret", None]
    expect_none_left(nodes, tmp_path)


def test_a_mistake_is_said_once_with_its_code(nodes, folder):
    (folder / "pairs.jsonl").write_text("")
    codes, said = ended(launch(nodes, folder))
    assert codes == [2]
    assert said.count("error: ") == 1
    assert "pairs.jsonl" in said
    assert "(on node" in said
    expect_none_left(nodes, folder)


def test_pods_of_the_manifest_train_and_save_when_they_are_asked_to_leave(nodes, folder, calm):
    manifest = kubernetes_manifest(
        (REPOSITORY / "launch/kubernetes.yaml").read_text(),
        nodes=2,
        gpus=1,
        arguments=[str(TELLING), "--config", str(folder / "run.yaml"), *ODD],
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
    wait_for_steps(3, folder, *started)
    for pid in nodes.processes(str(folder)):
        words_of = Path(f"/proc/{pid}/cmdline").read_bytes()
        if b"dpo_ds.launcher.agent" in words_of and not words_of.startswith((b"nsenter", b"unshare")):
            os.kill(pid, signal.SIGTERM)
    codes, said = ended(*started)
    assert codes == [200, 200], said
    expect_none_left(nodes, folder)
    codes, said = ended(*pods())
    assert codes == [0, 0], said
    expect_told(folder, *ODD)
    expect_same(nodes, folder, calm)


def listen(nodes: Nodes, folder: Path) -> "list[subprocess.Popen[str]]":
    folder.mkdir()
    place = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "node0"}
    ranks = [
        nodes.start(rank, [PYTHON, LISTENING, folder], cwd=folder, env=ENVIRONMENT | place | {"RANK": str(rank)})
        for rank in (0, 1)
    ]
    wait_for(lambda: len(list(folder.glob("*.listens"))) == len(ranks), 60, *ranks)
    return ranks


def test_a_cut_link_is_heard_and_a_stopped_process_or_one_that_has_left_is_no_cut(nodes, tmp_path):
    ranks = listen(nodes, tmp_path / "cut")
    time.sleep(1)
    stopped = [pid for pid in nodes.processes(str(tmp_path)) if words_of(pid)[0] == os.fsencode(PYTHON)]
    assert len(stopped) == 2
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(2 * SILENCE_S)
    # nsenter, which has started them, has stopped with them.
    for pid in nodes.processes(str(tmp_path)):
        os.kill(pid, signal.SIGCONT)
    time.sleep(1)
    assert [rank.poll() for rank in ranks] == [None, None]
    nodes.plug(1, "down")
    codes, said = ended(*ranks, timeout_s=2 * SILENCE_S)
    nodes.plug(1, "up")
    assert codes == [1, 1], said
    for rank, other in ((0, 1), (1, 0)):
        assert f"error: rank {rank} on node{rank} has heard nothing of node{other} for {SILENCE_S} s" in said

    ranks = listen(nodes, tmp_path / "left")
    (tmp_path / "left/done").touch()
    wait_for(lambda: all(rank.stdout.readline() for rank in ranks), 10)
    nodes.plug(1, "down")
    codes, said = ended(*ranks)
    nodes.plug(1, "up")
    assert codes == [0, 0], said
    assert not said


def test_torchrun_on_two_machines_whose_link_is_cut(nodes, folder, calm):
    rendezvous = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "node0:29412", "--rdzv_id", "1"]
    torchrun = [PYTHON, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", *rendezvous]
    odd = [*ODD, "--timeouts.silence_s", "4"]

    def agents() -> "list[subprocess.Popen[str]]":
        return [
            nodes.start(
                node,
                [*torchrun, TELLING, "--config", folder / "run.yaml", *odd],
                cwd=folder,
                env=ENVIRONMENT | {"GLOO_SOCKET_IFNAME": "v0"},
            )
            for node in (0, 1)
        ]

    started = agents()
    wait_for_steps(EVERY + 5, folder, *started)
    nodes.plug(1, "down")
    wait_for(lambda: not ranks_of_torchrun(nodes, folder), 15)
    codes, said = ended(started[0])
    nodes.plug(1, "up")
    # torchrun itself asks for its store, on the other side of the cut, for minutes.
    other_codes, other_said = ended(started[1])
    assert codes == other_codes == [1], said + other_said
    for rank, words in enumerate((said, other_said)):
        assert f"error: rank {rank} on node{rank} has heard nothing of node{1 - rank} for 4 s" in words
    expect_none_left(nodes, folder)

    codes, said = ended(*agents())
    assert codes == [0, 0], said
    assert f"going on behind step {EVERY} of {STEPS}" in said
    expect_told(folder, *odd)
    expect_same(nodes, folder, calm)


def ranks_of_torchrun(nodes: Nodes, folder: Path) -> list[int]:
    commands = {pid: words_of(pid) for pid in nodes.processes(str(folder))}
    return [pid for pid, words in commands.items() if b"torch.distributed.run" not in words]


def deepspeed(nodes: Nodes, folder: Path, *options: str, arguments: list[str | Path]) -> "subprocess.Popen[str]":
    # DeepSpeed puts these values into quotes for a shell that reads them under pdsh, and does not under MPI.
    names = ("PATH", "DS_ACCELERATOR", "OMP_NUM_THREADS", "PYTHONPATH")
    variables = {name: ENVIRONMENT[name] for name in names} | {"MASTER_ADDR": "node0"}
    (folder / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    command = [Path(PYTHON).parent / "deepspeed", "--hostfile", "hostfile", *options, *arguments]
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return nodes.start(0, command, cwd=folder, env=ENVIRONMENT | root)


def expect_code(nodes: Nodes, folder: Path, *options: str) -> None:
    """A rank of the other machine fails: its code comes out of DeepSpeed's front."""
    (folder / "failing.py").write_text("import os\nexit(7 * int(os.environ.get('RANK') or os.environ['PMIX_RANK']))\n")
    codes, said = ended(deepspeed(nodes, folder, *options, arguments=[folder / "failing.py"]))
    assert codes == [7], said
    expect_none_left(nodes, folder)


@needs_program("pdsh", "pdsh")
def test_deepspeeds_own_front_over_pdsh(nodes, folder, calm):
    expect_code(nodes, folder, "--launcher", "pdsh")

    # A shell on each machine reads the arguments, so that blanks are all that they may have.
    odd = ["--tracking.project", "two  words"]
    arguments = [TELLING, "--config", folder / "run.yaml", *odd]
    job = deepspeed(nodes, folder, "--launcher", "pdsh", arguments=arguments)
    wait_for_steps(3, folder, job)
    [front] = [pid for pid in nodes.processes(str(folder)) if words_of(pid)[1].endswith(b"bin/deepspeed")]
    os.kill(front, signal.SIGTERM)
    codes, said = ended(job)
    assert codes == [1], said
    expect_none_left(nodes, folder)
    assert json.loads((folder / "out/RESUME.json").read_text())["step"] < STEPS

    codes, said = ended(deepspeed(nodes, folder, "--launcher", "pdsh", arguments=arguments))
    assert codes == [0], said
    assert "going on behind step" in said
    expect_told(folder, *odd, inherited=None)
    expect_same(nodes, folder, calm)


@pytest.mark.mpi
@needs_program("ompi_info", "openmpi-bin")
def test_open_mpi_under_deepspeeds_own_front_and_without_it(nodes, folder, calm):
    network = ["--mca", "btl_tcp_if_include", "v0", "--mca", "oob_tcp_if_include", "v0"]
    passed = [word for name in (*ENVIRONMENT, "MASTER_ADDR") for word in ("-x", name)]
    mpirun = ["mpirun", "-n", "2", "-hostfile", "hostfile", "--map-by", "ppr:1:node", *network, *passed]
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "MASTER_ADDR": "node0"}
    command = [*mpirun, PYTHON, TELLING, "--config", folder / "run.yaml", *ODD]
    job = nodes.start(0, command, cwd=folder, env=ENVIRONMENT | root)
    wait_for_steps(3, folder, job)
    # To TERM mpirun answers with KILL, a moment later.
    [front] = [pid for pid in nodes.processes(str(folder)) if words_of(pid)[0].endswith(b"mpirun")]
    os.kill(front, signal.SIGUSR1)
    codes, said = ended(job)
    assert codes == [200], said
    expect_told(folder, *ODD)
    expect_none_left(nodes, folder)

    launcher = ["--launcher", "openmpi", "--launcher_args", " ".join([*network, "-x", "DPO_DS_TORTURE"])]
    expect_code(nodes, folder, *launcher)
    job = deepspeed(nodes, folder, *launcher, arguments=[TELLING, "--config", folder / "run.yaml", *ODD])
    codes, said = ended(job)
    assert codes == [0], said
    assert "going on behind step" in said
    expect_told(folder, *ODD)
    expect_same(nodes, folder, calm)


def words_of(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")


def launcher_of(nodes: Nodes, folder: Path) -> int:
    """The process that starts the agents; nsenter, which has started it, has the same words behind its own."""
    commands = {pid: words_of(pid) for pid in nodes.processes(str(folder))}
    [pid] = [pid for pid, words in commands.items() if b"launch" in words and words[0] != b"nsenter"]
    return pid
