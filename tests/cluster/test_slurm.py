"""Jobs of launch/slurm.sbatch on a real Slurm: trained, pre-empted, cancelled, failed."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster import needs
from tests.cluster.slurm import Slurm, why_not
from tests.cluster.telling import TELLING, TORTURE, told
from tests.ranks import REPOSITORY
from tests.test_resume import record, steps_taken

pytestmark = [pytest.mark.slurm, pytest.mark.ranks, needs(why_not())]

ENVIRONMENT = {
    # The two nodes are one machine, whose name Slurm's do not resolve to.
    "MASTER_ADDR": "127.0.0.1",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(REPOSITORY),
    "DPO_DS_TORTURE": TORTURE,
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}
ODD = ["--tracking.project", TORTURE]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.stop()


def launch(slurm: Slurm, folder: Path) -> str:
    options = ["--nodes", "2", *(f"--option={option}" for option in ("--parsable", f"--output={folder}/%j.out"))]
    command = [sys.executable, "-m", "dpo_ds", "launch", "--on", "slurm", *options, "--option=--signal=USR1@60"]
    done = subprocess.run(
        [*command, "--script", str(TELLING), "--config", str(folder / "run.yaml"), *ODD],
        cwd=REPOSITORY,
        env=slurm.environment | ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def wait_for(is_so: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_job_is_preempted_requeued_and_ends_as_one_that_nobody_disturbed(slurm, folder, calm):
    job = launch(slurm, folder)
    wait_for(lambda: steps_taken(folder) >= 3)
    whole = ("-p", "high", "--nodes=2", "--exclusive")
    other = slurm.submit(*whole, f"--output={folder}/%j.out", "--wrap", "sleep 1", cwd=folder)
    slurm.wait(other, "COMPLETED")
    about = slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED")
    assert (about["JobState"], about["ExitCode"], about["Restarts"]) == ("COMPLETED", "0:0", "1")
    assert record(folder) == record(calm)
    assert json.loads((folder / "out/summary.json").read_text())["world_size"] == 2
    assert not (folder / "out/RESUME.json").exists()
    arguments = ["--config", str(folder / "run.yaml"), *ODD]
    for rank in (0, 1):
        assert told(folder, rank) == {"arguments": arguments, "inherited": TORTURE, "of the run file": TORTURE}
    expect_none_left(folder)


def test_a_cancelled_job_leaves_no_process_and_is_not_requeued(slurm, folder):
    job = launch(slurm, folder)
    wait_for(lambda: steps_taken(folder) >= 2)
    slurm.cancel(job)
    assert slurm.wait(job, "CANCELLED")["Restarts"] == "0"
    expect_none_left(folder)


def test_a_mistake_and_a_failing_ranks_code_are_the_jobs_and_what_sacct_tells(slurm, folder):
    # Not by the launch command, which would find the mistake before Slurm does.
    options = ("--nodes=2", f"--output={folder}/%j.out", "launch/slurm.sbatch")
    mistaken = slurm.submit(*options, str(folder / "run.yaml"), "--loss.beta", "-1", cwd=REPOSITORY, env=ENVIRONMENT)
    (folder / "failing.py").write_text("import os, sys\nsys.exit(7 * int(os.environ['RANK']))\n")
    failing = slurm.submit(*options, str(folder / "failing.py"), cwd=REPOSITORY, env=ENVIRONMENT)
    for job, code, said in (
        (mistaken, "2:0", "error: loss.beta"),
        (failing, "7:0", "rank 1 on"),
    ):
        about = slurm.wait(job, "FAILED", "COMPLETED")
        assert (about["JobState"], about["ExitCode"]) == ("FAILED", code)
        assert slurm.accounted(job, "state,exitcode") == f"FAILED|{code}"
        assert said in (folder / f"{job}.out").read_text()
    expect_none_left(folder)


def expect_none_left(folder: Path) -> None:
    def names_it(process: Path) -> bool:
        try:
            return str(folder).encode() in (process / "cmdline").read_bytes()
        except OSError:
            return False

    wait_for(lambda: not any(map(names_it, Path("/proc").glob("[0-9]*"))), 30)
