"""What ``python -m dpo_ds launch`` would run or submit, and what it refuses. Jobs that run are in tests/cluster."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from dpo_ds.cli.launch import kubernetes_manifest, launch
from dpo_ds.errors import UserError
from dpo_ds.launcher.network import interface_to
from dpo_ds.launcher.ssh import Host, passed_on, read_hostfile
from tests.ranks import REPOSITORY

RUN = ["--model.policy", "m", "--data.train", "d", "--output_dir", "a b $HOME"]


def test_a_hostfile_is_deepspeeds(tmp_path):
    (tmp_path / "hostfile").write_text("# head\nhead.of.cluster slots=8\n\nuser@two slots=8  # the other\n")
    assert read_hostfile(tmp_path / "hostfile") == [Host("head.of.cluster", 8), Host("user@two", 8)]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("one\n", r"hostfile line 1 must be NAME slots=RANKS, got 'one'"),
        ("one slots=1\ntwo slots=\n", "line 2 must be"),
        ("one slots=0\n", "line 1 must be"),
        ("one slots=1\none slots=1\n", "must name each machine once, one is there twice"),
        ("# nobody\n", "names no machine"),
        (None, "cannot be read"),
    ],
)
def test_a_wrong_hostfile_is_refused(tmp_path, text, complaint):
    if text is not None:
        (tmp_path / "hostfile").write_text(text)
    with pytest.raises(UserError, match=complaint):
        read_hostfile(tmp_path / "hostfile")


def test_machines_with_different_numbers_of_ranks_are_refused(tmp_path):
    (tmp_path / "hostfile").write_text("one slots=2\ntwo slots=1\n")
    with pytest.raises(UserError, match=r"got one 2, two 1; set one number with --gpus"):
        launch(["--on", "ssh", "--hostfile", str(tmp_path / "hostfile"), *RUN])


def test_only_what_is_named_reaches_other_machines():
    here = {
        "PATH": "/bin",
        "NCCL_DEBUG": "INFO",
        "https_proxy": "p",
        "AWS_SECRET": "x",
        "HOSTNAME": "here",
        "RANK": "3",
    }
    assert passed_on(here) == {"PATH": "/bin", "NCCL_DEBUG": "INFO", "https_proxy": "p"}


def test_ssh_is_shown_with_every_word_but_no_value_of_a_variable(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "5ecret")
    (tmp_path / "hostfile").write_text("one slots=2\ntwo slots=2\nthree slots=2\n")
    hostfile = ["--hostfile", str(tmp_path / "hostfile"), "--master_port", "5000"]
    assert launch(["--on", "ssh", "--dry_run", "--nodes", "2", *hostfile, *RUN]) == 0
    variables, *lines = capsys.readouterr().out.splitlines()
    assert "WANDB_API_KEY" in variables.split()
    assert "5ecret" not in "".join([variables, *lines])
    assert [line.split()[0] for line in lines] == ["one", "there:", "two", "there:"]
    for rank, line in enumerate(lines[1::2]):
        words = shlex.split(line)[1:]
        place = f"--nodes 2 --ranks 2 --master_addr one --master_port 5000 --grace 600 --node_rank {rank} --".split()
        assert words == [*place, str(REPOSITORY / "launch/train.py"), *RUN]


def test_slurm_is_shown_with_its_command_and_its_script(capsys):
    options = ["--on", "slurm", "--nodes", "4", "--gpus", "8", "--option=--partition=big", "--option=--time=9:0:0"]
    assert launch([*options, "--dry_run", *RUN]) == 0
    command, _, *script = capsys.readouterr().out.splitlines()
    batch, train = REPOSITORY / "launch/slurm.sbatch", REPOSITORY / "launch/train.py"
    flags = ["--nodes=4", "--gpus-per-node=8", "--partition=big", "--time=9:0:0"]
    assert shlex.split(command) == ["sbatch", *flags, str(batch), str(train), *RUN]
    assert "\n".join(script) == batch.read_text().rstrip("\n")


def test_this_machine_runs_the_agent(tmp_path):
    (tmp_path / "script.py").write_text("import os, sys\nsys.stdout.write(f\"{sys.argv[1:]} {os.environ['RANK']}\\n\")")
    options = ["--script", str(tmp_path / "script.py"), "--gpus", "2"]
    command = [sys.executable, "-m", "dpo_ds", "launch", *options, *RUN]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert sorted(done.stdout.splitlines()) == [f"{RUN} 0", f"{RUN} 1"]


def test_the_manifest_is_valid_and_filled(capsys):
    assert launch(["--on", "kubernetes", "--nodes", "4", "--gpus", "8", "--dry_run", *RUN]) == 0
    service, job = yaml.safe_load_all(capsys.readouterr().out)
    for document in (service, job):
        kubernetes_validate.validate(document, "1.31", strict=True)
    assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (4, 4)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["args"] == ["--nodes", "4", "--ranks", "8", "--", "launch/train.py", *RUN]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    # The first pod's name, as the service gives it.
    first = f"{job['metadata']['name']}-0.{job['spec']['template']['spec']['subdomain']}"
    assert container["command"][container["command"].index("--master_addr") + 1] == first
    assert service["metadata"]["name"] == job["spec"]["template"]["spec"]["subdomain"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}


def test_the_mpi_operators_job_meets_at_its_first_worker():
    job = yaml.safe_load((REPOSITORY / "launch/mpijob.yaml").read_text())
    templates = {kind: replica["template"] for kind, replica in job["spec"]["mpiReplicaSpecs"].items()}
    for template in templates.values():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": template["spec"]}
        kubernetes_validate.validate(pod, "1.31", strict=True)
    ((launcher,), (worker,)) = (templates[kind]["spec"]["containers"] for kind in ("Launcher", "Worker"))
    name = job["metadata"]["name"]
    assert f"MASTER_ADDR={name}-worker-0.{name}" in launcher["command"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == job["spec"]["slotsPerWorker"]
    interpreter, _, script, *_ = launcher["args"]
    assert interpreter == "python"
    assert (REPOSITORY / script).exists()


def test_a_manifest_without_a_job_is_refused():
    with pytest.raises(UserError, match="must hold one Job, got 0"):
        kubernetes_manifest("kind: Service\n", nodes=1, gpus=1, arguments=[])


@pytest.mark.parametrize(
    ("mode", "text", "complaint"),
    [
        (0o640, "A: b\n", r"may be read by others \(mode 640\); chmod 600"),
        (0o600, "A: 1\n", "must be a mapping of names to strings"),
        (0o600, "A: [\n", r"cannot be read as YAML \(ParserError\)"),
    ],
)
def test_a_file_of_secrets_that_others_can_read_or_nobody_is_refused(tmp_path, mode, text, complaint):
    secrets = tmp_path / "secrets.yaml"
    secrets.write_text(text)
    secrets.chmod(mode)
    with pytest.raises(UserError, match=complaint):
        launch(["--env_file", str(secrets), "--dry_run", *RUN])


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--on", "local", "--nodes", "2"], "--nodes must be 1 on this machine alone, got 2"),
        (["--loss.beta", "-1"], "loss.beta must be > 0"),
        (["--silence", "0"], "--silence must be a number of seconds > 0, got 0"),
        (["--script", "launch/nothing.py"], "--script: there is no launch/nothing.py"),
        (["--on", "kubernetes"], "there is no kubectl on this machine"),
    ],
)
def test_a_mistake_is_found_before_anything_is_submitted(options, complaint, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=complaint):
        launch([*options, *RUN])


def test_the_loopback_is_how_this_machine_reaches_itself():
    assert interface_to("127.0.0.1") == "lo"
    assert interface_to("no.such.machine.invalid") is None


def test_secrets_do_not_go_to_a_manifest(tmp_path):
    secrets = Path(tmp_path / "secrets.yaml")
    secrets.write_text(json.dumps({"A": "b"}))
    secrets.chmod(0o600)
    with pytest.raises(UserError, match="put secrets into a Secret"):
        launch(["--on", "kubernetes", "--env_file", str(secrets), *RUN])
