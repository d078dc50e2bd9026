"""Single-process commands."""

import subprocess
import sys

import pytest

from dpo_ds.cli.commands import main
from tests.cli.test_train import files as files


def test_plan_says_what_would_happen_and_leaves_nothing_behind(files, capsys):
    main(["plan", "--config", "run.yaml"])
    assert "4 to train on" in capsys.readouterr().out
    assert not (files / "out").exists()


def test_prepare_tokenizes_what_a_run_then_finds(files, capsys):
    main(["prepare", "--config", "run.yaml"])
    said = capsys.readouterr().out
    (folder,) = (files / "out/data").iterdir()
    assert f"prepared  {'out/data'}/{folder.name}" in said
    written = (folder / "pairs-00000.arrow").stat().st_mtime_ns
    main(["prepare", "--config", "run.yaml"])
    assert (folder / "pairs-00000.arrow").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["prepair"], "error: unknown command prepair; did you mean prepare?"),
        (["plan", "--config", "run.yaml", "--loss.beta", "0"], "error: loss.beta must be > 0, got 0"),
    ],
)
def test_a_mistake_is_one_line(files, capsys, arguments, complaint):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    said = capsys.readouterr().err
    assert left.value.code == 2
    assert said.startswith(complaint)
    assert said.count("\n") == 1


def test_the_package_runs_as_a_module():
    said = subprocess.run([sys.executable, "-m", "dpo_ds"], capture_output=True, text=True, check=True).stdout
    assert "prepare" in said
