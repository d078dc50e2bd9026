"""How a process ends whose run was stopped, or cannot go on after it was."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

PAIR = {"prompt": "tea is", "chosen": " hot", "rejected": " salt."}
PROCESS = """
import os
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

for work in (stop, fail):
    try:
        start(["--config", "run.yaml"], work)
    except SystemExit as left:
        print(left.code, Path("out/RESUME.json").exists(), flush=True)
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


def test_a_stopped_run_exits_with_200_and_one_that_cannot_go_on_takes_the_marker_away(folder):
    finished = subprocess.run([sys.executable, "-c", PROCESS], cwd=folder, capture_output=True, text=True, timeout=100)
    said = [line for line in finished.stdout.splitlines() if line.startswith(("stopped", "200", "1 "))]
    assert said == ["stopped by SIGTERM after step 3; the same command goes on from there", "200 True", "1 False"]
    assert finished.stderr == "error: step 4: the loss is not finite\n"
