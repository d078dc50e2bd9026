"""The record of a run, and its mirror in wandb."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest

from dpo_ds.tracking import JsonLines, Tracker, WandbMirror, open_tracker, versions, write_summary

FAKE_KEY = "0" * 40


@pytest.fixture
def bare_wandb(monkeypatch, tmp_path_factory):
    """An environment in which wandb knows no account."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = tmp_path_factory.mktemp("home")
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def processes_of(folder: Path) -> list[int]:
    """Processes that have the folder in their environment, as wandb's have."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def wait_until(holds: Callable[[], bool], *, timeout_s: float = 20) -> None:
    """Fails when it does not come to hold."""
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


def offline_records(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in (folder / "wandb").glob("offline-run-*/run-*.wandb")]


def short_run(folder: Path, *, mode: str, patience_s: float) -> float:
    """Logs two lines and finishes; returns the seconds that finishing took."""
    mirror = WandbMirror(folder, mode=mode, project="p", config={"beta": 0.1}, patience_s=patience_s)
    tracker = Tracker([JsonLines(folder / "metrics.jsonl"), mirror])
    for step in (1, 2):
        start = time.monotonic()
        tracker.log({"step": step, "split": "train", "rewards/margins": 0.25})
        assert time.monotonic() - start < 0.5
    start = time.monotonic()
    tracker.finish({"status": "complete"})
    assert lines_of(folder) == [{"step": step, "split": "train", "rewards/margins": 0.25} for step in (1, 2)]
    return time.monotonic() - start


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    tracker = open_tracker(tmp_path, wandb="disabled", project="p", config={})
    tracker.log({"step": 0, "split": "eval", "loss": 0.75})
    tracker.log({"step": 1, "split": "train", "loss": 0.5, "pairs": 16, "note": None})
    assert lines_of(tmp_path) == [
        {"step": 0, "split": "eval", "loss": 0.75},
        {"step": 1, "split": "train", "loss": 0.5, "pairs": 16, "note": None},
    ]
    tracker.finish({})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_numbers_that_json_lacks_become_null(tmp_path):
    tracker = Tracker([JsonLines(tmp_path / "metrics.jsonl")])
    tracker.log({"step": 1, "split": "train", "loss": float("nan"), "grad_norm": float("inf")})
    tracker.finish({})
    assert lines_of(tmp_path) == [{"step": 1, "split": "train", "loss": None, "grad_norm": None}]


def test_a_tracker_without_sinks_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tracker = Tracker()
    tracker.log({"step": 1, "split": "train"})
    tracker.finish({})
    assert list(tmp_path.iterdir()) == []


def test_the_summary_is_valid_json(tmp_path):
    write_summary(tmp_path, {"status": "complete", "peaks": (1, 2), "rate": float("nan"), "versions": versions()})
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["peaks"], summary["rate"]) == ("complete", [1, 2], None)
    assert summary["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert all(summary["versions"][name] for name in ("torch", "deepspeed", "transformers", "datasets", "wandb"))
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_an_offline_run_lies_in_the_output_folder(tmp_path, bare_wandb, monkeypatch, capfd):
    for name, value in {"ID": "4711", "NAME": "align", "PARTITION": "gpus"}.items():
        monkeypatch.setenv(f"SLURM_JOB_{name}", value)
    tracker = open_tracker(tmp_path, wandb="offline", project="a-project", config={"loss": {"beta": 0.125}})
    histogram = {"edges": [-1.0, 0.0, 1.0], "counts": [3.0, 5.0]}
    tracker.log({"step": 0, "split": "eval", "rewards/accuracies": 0.5, "histogram/rewards/margins": histogram})
    tracker.log({"step": 1, "split": "train", "rewards/margins": 0.25})
    tracker.log(
        {"step": 1, "split": "eval", "answers": [{"prompt": "a", "answer": "b"}, {"prompt": "c", "answer": "d"}]}
    )
    tracker.finish({"status": "complete", "steps": 1})
    run_id = (tmp_path / "wandb_run_id").read_text().strip()
    [folder] = (tmp_path / "wandb").glob(f"offline-run-*-{run_id}")
    # The record is length-prefixed protobuf without compression.
    record = (folder / f"run-{run_id}.wandb").read_bytes()
    for text in (
        b"slurm-4711",
        b"align",
        b"gpus",
        b"a-project",
        b"eval/rewards/accuracies",
        b"rewards/margins",
        b"0.125",
        b"complete",
        b"deepspeed",
    ):
        assert text in record, text
    assert b"eval/histogram/rewards/margins" in record
    # What wandb draws as a histogram, not as a table of numbers.
    assert b'"histogram"' in record
    assert b"eval/rewards/margins" not in record
    [table] = folder.rglob("*.table.json")
    assert json.loads(table.read_text())["data"] == [["a", "b"], ["c", "d"]]
    assert b"eval/step" not in record
    said = capfd.readouterr().err
    assert "warning" not in said
    assert f"to send it: wandb sync {folder}" in said


def test_no_process_outlives_a_finished_run(tmp_path, bare_wandb):
    mirror = WandbMirror(tmp_path, mode="offline", project="p", config={})
    assert processes_of(tmp_path)
    Tracker([JsonLines(tmp_path / "metrics.jsonl"), mirror]).finish({})
    wait_until(lambda: not processes_of(tmp_path))


@pytest.mark.parametrize("key", [FAKE_KEY, None], ids=["server refuses connections", "no account"])
def test_an_online_run_that_cannot_be_online_is_kept_offline(tmp_path, bare_wandb, monkeypatch, capfd, key):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    assert short_run(tmp_path, mode="online", patience_s=10) < 25
    assert any(b"rewards/margins" in record for record in offline_records(tmp_path))
    warnings = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith("warning: wandb cannot be reached, so its run is kept offline: ")


def test_a_server_that_never_answers_does_not_hold_the_run(tmp_path, bare_wandb, monkeypatch):
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
        assert short_run(tmp_path, mode="online", patience_s=3) < 10


def test_a_folder_that_wandb_cannot_write_is_one_warning(tmp_path, bare_wandb, capfd):
    (tmp_path / "wandb").write_text("in the way")
    short_run(tmp_path, mode="offline", patience_s=10)
    [warning] = [line for line in capfd.readouterr().err.splitlines() if "warning" in line]
    assert warning.startswith("warning: wandb stopped: NotADirectoryError")
    assert warning.endswith("metrics.jsonl is complete")


def test_a_mirror_that_hangs_is_ended(tmp_path, bare_wandb, capfd):
    mirror = WandbMirror(tmp_path, mode="offline", project="p", config={}, patience_s=0.5)
    os.kill(mirror.pid, signal.SIGSTOP)
    start = time.monotonic()
    mirror.finish({})
    assert time.monotonic() - start < 5
    assert "warning: wandb hangs" in capfd.readouterr().err


def test_a_run_that_dies_is_said_to_have_died(tmp_path, bare_wandb):
    code = (
        "import os, sys, pathlib; from dpo_ds.tracking import open_tracker\n"
        "tracker = open_tracker(pathlib.Path(sys.argv[1]), wandb='offline', project='p', config={})\n"
        "tracker.log({'step': 1, 'split': 'train', 'loss': 0.5}); os._exit(1)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 1
    wait_until(lambda: any(b"died" in record for record in offline_records(tmp_path)))
    wait_until(lambda: not processes_of(tmp_path))
    assert len(lines_of(tmp_path)) == 1
