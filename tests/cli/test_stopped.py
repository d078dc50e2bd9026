"""How a process ends whose run was stopped, or cannot go on after it was."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

PAIR = {"prompt": "tea is", "chosen": " hot", "rejected": " salt."}
PROCESS = """
import sys
from pathlib import Path
from dpo_ds.cli.train import start
from dpo_ds.errors import RunError, Stopped
from dpo_ds.launcher.marker import mark_stopped

def stop(*_):
    stopped = Stopped("SIGTERM", step=3, checkpoint="checkpoints/step-00000003")
    mark_stopped(Path("out"), stopped)
    raise stopped

def fail(*_):
    raise RunError("step 4: the loss is not finite")

start(["--config", "run.yaml"], globals()[sys.argv[1]])
"""


@pytest.fixture
def folder(tmp_path: Path, tiny_chat: Path) -> Path:
    """The working folder, with a small run."""
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(PAIR) + "\n" for _ in range(4)))
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    run = {
        "model": {"policy": str(tiny_chat), "dtype": "float32"},
        "data": {"train": "pairs.jsonl", "max_length": 64},
        "train": {"pairs_per_step": 4},
        "deepspeed": {"policy": "zero.json", "reference": "zero.json"},
        "tracking": {"wandb": "disabled"},
        "output_dir": "out",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    return tmp_path


def ended(folder: Path, how: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROCESS, how]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=100, check=False)


def test_a_stopped_run_exits_with_200_and_one_that_cannot_go_on_takes_the_marker_away(folder):
    stopped = ended(folder, "stop")
    assert stopped.returncode == 200
    assert stopped.stdout.endswith("stopped by SIGTERM after step 3; the same command goes on from there\n")
    assert (folder / "out/RESUME.json").exists()
    failed = ended(folder, "fail")
    assert failed.returncode == 1
    assert failed.stderr == "error: step 4: the loss is not finite\n"
    assert not (folder / "out/RESUME.json").exists()
