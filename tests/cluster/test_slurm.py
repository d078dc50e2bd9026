"""Jobs of launch/slurm.sbatch on a real Slurm: trained, pre-empted, cancelled, failed."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.slurm import Slurm, why_not
from tests.ranks import REPOSITORY
from tests.test_run import Run, lines, losses, rows_of_words
from tests.test_run import run as run

_LACKING = why_not()
assert _LACKING is None or "DPO_DS_REQUIRE_CLUSTER" not in os.environ, _LACKING
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.ranks,
    pytest.mark.skipif(_LACKING is not None, reason=str(_LACKING)),
]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.stop()


def submit(slurm: Slurm, config: Path, *overrides: str) -> str:
    # The two nodes are one machine, whose name Slurm's do not resolve to.
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{slurm.environment['PATH']}",
    }
    options = ["--nodes", "2", *(f"--option={option}" for option in ("--parsable", f"--output={config.parent}/%j.out"))]
    command = [sys.executable, "-m", "dpo_ds", "launch", "--on", "slurm", *options, "--option=--signal=USR1@60"]
    done = subprocess.run(
        [*command, "--config", str(config), *overrides],
        cwd=REPOSITORY,
        env=slurm.environment | environment,
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


def steps_taken(out: Path) -> int:
    return len(lines(out)) if (out / "metrics.jsonl").exists() else 0


def test_a_job_is_preempted_requeued_and_ends_as_one_that_nobody_disturbed(slurm, run: Run):
    rows = rows_of_words(800)
    finished, out = run(2, rows=rows)
    finished.expect_success()
    config, again = out.parent / "run.yaml", out.parent / "again"
    job = submit(slurm, config, "--output_dir", str(again))
    wait_for(lambda: steps_taken(again) >= 3)
    other = slurm.submit(
        "-p", "high", "--nodes=2", "--exclusive", f"--output={out.parent}/%j.out", "--wrap", "sleep 1", cwd=out.parent
    )
    slurm.wait(other, "COMPLETED")
    about = slurm.wait(job, "COMPLETED", "FAILED", "CANCELLED")
    assert (about["JobState"], about["ExitCode"], about["Restarts"]) == ("COMPLETED", "0:0", "1")
    assert losses(again) == losses(out)
    assert json.loads((again / "summary.json").read_text())["world_size"] == 2
    assert not (again / "RESUME.json").exists()


def test_a_cancelled_job_leaves_no_process_and_is_not_requeued(slurm, run: Run):
    finished, out = run(1, rows=rows_of_words(4), train={"max_steps": 1})
    finished.expect_success()
    config, again = out.parent / "run.yaml", out.parent / "again"
    job = submit(slurm, config, "--output_dir", str(again), "--train.max_steps", "2000")
    wait_for(lambda: steps_taken(again) >= 2)
    slurm.cancel(job)
    assert slurm.wait(job, "CANCELLED")["Restarts"] == "0"
    wait_for(lambda: not any(_names(process, str(again)) for process in Path("/proc").glob("[0-9]*")), 30)


def test_a_mistake_in_the_run_file_is_the_jobs_exit_code(slurm, run: Run):
    finished, out = run(1, rows=rows_of_words(4), train={"max_steps": 1})
    finished.expect_success()
    # Not by the launch command, which would find it before Slurm does.
    log, config = f"--output={out.parent}/%j.out", str(out.parent / "run.yaml")
    environment = {"MASTER_ADDR": "127.0.0.1", "PATH": f"{Path(sys.executable).parent}:{slurm.environment['PATH']}"}
    job = slurm.submit(
        "--nodes=2", log, "launch/slurm.sbatch", config, "--loss.beta", "-1", cwd=REPOSITORY, env=environment
    )
    about = slurm.wait(job, "FAILED", "COMPLETED")
    assert (about["JobState"], about["ExitCode"]) == ("FAILED", "2:0")
    assert "error: loss.beta" in (out.parent / f"{job}.out").read_text()


def _names(process: Path, text: str) -> bool:
    try:
        return text.encode() in (process / "cmdline").read_bytes()
    except OSError:
        return False
