"""A run that the clusters' jobs are compared with."""

import shutil
from pathlib import Path

import pytest

from tests.cluster.telling import TORTURE, TRAIN
from tests.ranks import run_ranks
from tests.test_resume import write_run

STEPS = 100
EVERY = 25
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="package")
def calm(tiny_chat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two ranks on this one machine, which nobody disturbs."""
    folder = tmp_path_factory.mktemp("runs") / "calm"
    # The model is one of the hub, in a cache that is named in the run file alone, and there is no network.
    offline = {"HF_HOME": str(folder / "hub's"), "HF_HUB_OFFLINE": "1"}
    sections: dict[str, dict[str, object]] = {
        "train": {"max_steps": STEPS, "epochs": 100, "eval_every": None},
        "checkpoint": {"every": EVERY},
        "env": {"TOLD": str(folder), "OF_RUN_FILE": TORTURE, **offline},
    }
    write_run(folder, Path("people/tiny"), **sections)
    cached = folder / "hub's/hub/models--people--tiny"
    shutil.copytree(tiny_chat, cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(COMMIT)
    # Interpreters of their own: the hub's library reads the run file's variables while it is imported.
    run_ranks(2, [TRAIN, "--config", folder / "run.yaml"], folder=folder, env={}).expect_success()
    return folder


@pytest.fixture
def folder(calm: Path, tmp_path: Path) -> Path:
    """The same run, not yet begun."""
    again = Path(shutil.copytree(calm, tmp_path / "again", ignore=shutil.ignore_patterns("out", "rank*")))
    (again / "run.yaml").write_text((again / "run.yaml").read_text().replace(str(calm), str(again)))
    (again / "hostfile").write_text("# two machines\nnode0 slots=1\nnode1 slots=1\n")
    return again
