"""Runs that are stopped by force and started again, on real ranks, beside runs that nobody disturbed."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_ds.cli.preflight import Inputs, preflight
from dpo_ds.config import parse_run
from dpo_ds.errors import UserError
from dpo_ds.tracking import Mark, open_tracker
from tests.ranks import REPOSITORY, Finished, run_ranks
from tests.test_run import TRAIN, rows_of_words
from tests.test_tracking import bare_wandb as bare_wandb
from tests.test_tracking import lines_of, processes_of, wait_until

pytestmark = pytest.mark.ranks

DYING = REPOSITORY / "tests/dying.py"
EXPORT = REPOSITORY / "launch/export.py"
CLOCKS = {"step_seconds", "tokens_per_second", "mfu"}
SHARD = "zero_pp_rank_1_mp_rank_00_optim_states.pt"

# 13 pairs by 4: the last of an epoch's 4 steps holds one pair, and steps 8 and 9 lie on both sides of an epoch's edge.
STEPS = 12
SETTINGS: dict[str, Any] = {
    "data": {"train": "pairs.jsonl", "eval": "held_out.jsonl", "max_length": 100},
    "train": {
        **{"pairs_per_step": 4, "tokens_per_micro_batch": 200, "learning_rate": 2e-4, "warmup_ratio": 0.5},
        **{"epochs": 3, "eval_every": 3, "seed": 5},
    },
    "deepspeed": {"policy": "zero.json", "reference": "zero.json"},
    "tracking": {"wandb": "disabled"},
    "checkpoint": {"every": 2},
}


def write_run(folder: Path, policy: Path, **sections: dict[str, Any]) -> Path:
    """Writes a run's files into a new folder and returns it."""
    folder.mkdir()
    rows = rows_of_words(18)
    for name, some in (("pairs", rows[:13]), ("held_out", rows[13:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    zero = {"zero_optimization": {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 0}}
    (folder / "zero.json").write_text(json.dumps(zero))
    config = {**SETTINGS, "model": {"policy": str(policy), "dtype": "float32"}, "output_dir": str(folder / "out")}
    for section, values in sections.items():
        config[section] = {**config.get(section, {}), **values}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def start(folder: Path, *arguments: str, dying: str | None = None) -> Finished:
    """Starts the run on two ranks; ``dying`` names the method, its call and the rank where one is killed."""
    command = [TRAIN, "--config", folder / "run.yaml", *arguments]
    if dying is None:
        return run_ranks(2, command, folder=folder)
    finished = run_ranks(2, [DYING, *dying.split(), *command], folder=folder)
    assert -9 in finished.codes, finished.errors
    return finished


def record(folder: Path) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl, without what a clock says."""
    lines = [json.loads(line) for line in (folder / "out/metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in CLOCKS and not name.startswith("seconds/")}
        for line in lines
    ]


def steps_taken(folder: Path) -> int:
    """The whole lines of a run's metrics.jsonl; who reads while another writes may see half of one."""
    file = folder / "out/metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "out/checkpoints").iterdir())


@pytest.fixture(scope="module")
def undisturbed(tiny_chat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in float32 that nobody disturbs, and that saves nothing."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "undisturbed", tiny_chat, checkpoint={"every": None})
    start(folder).expect_success()
    return folder


@pytest.fixture(scope="module")
def killed(tiny_chat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, saving every second step, one of whose ranks was killed in step 7."""
    folder = write_run(tmp_path_factory.mktemp("runs") / "killed", tiny_chat)
    start(folder, dying="step 7 1")
    return folder


@pytest.fixture
def again(killed: Path, tmp_path: Path) -> Path:
    """A copy of what the killed run left."""
    return copied(killed, tmp_path / "again")


def copied(left: Path, folder: Path) -> Path:
    """Copies what a run left; the paths in its run file lead to the copy."""
    shutil.copytree(left, folder)
    text = (folder / "run.yaml").read_text()
    (folder / "run.yaml").write_text(text.replace(str(left), str(folder)))
    return folder


def look(folder: Path, *arguments: str, ranks: int = 2) -> Inputs:
    """Does what one process does before there are engines."""
    return preflight(parse_run(["--config", str(folder / "run.yaml"), *arguments]), ranks=ranks)


def test_a_killed_run_goes_on_to_the_bit(undisturbed, again):
    assert checkpoints(again) == ["step-00000004", "step-00000006"]
    before = record(again)
    assert [line["step"] for line in before if line["split"] == "train"] == [1, 2, 3, 4, 5, 6]
    finished = start(again, "--checkpoint.background", "true").expect_success()
    assert "going on behind step 6 of 12" in finished.outputs[0]
    assert record(again) == record(undisturbed)
    assert checkpoints(again) == ["step-00000010", "step-00000012"]
    summaries = [json.loads((folder / "out/summary.json").read_text()) for folder in (again, undisturbed)]
    for name in ("status", "steps", "pairs", "tokens"):
        assert summaries[0][name] == summaries[1][name]
    weights = [folder / "out/export/model.safetensors" for folder in (again, undisturbed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    with pytest.raises(UserError, match="already holds a run"):
        look(again)
    # Any checkpoint can be exported later, on any number of ranks.
    written = ["--checkpoint.resume", again / "out/checkpoints/step-00000012", "--export.folder", again / "later"]
    before = record(again)
    run_ranks(1, [EXPORT, "--config", again / "run.yaml", *written], folder=again).expect_success()
    assert (again / "later/model.safetensors").read_bytes() == weights[1].read_bytes()
    assert record(again) == before


def test_killed_in_the_middle_of_a_save_in_bfloat16_with_padded_rows(tiny_chat, tmp_path):
    sections = {"model": {"dtype": "bfloat16"}, "train": {"layout": "padded"}}
    calm = write_run(tmp_path / "calm", tiny_chat, **sections, checkpoint={"every": None})
    start(calm).expect_success()
    folder = write_run(tmp_path / "killed", tiny_chat, **sections, checkpoint={"every": 3})
    # Each save writes two files a rank: the sixth is the end of the third save.
    start(folder, dying="save 6 1")
    assert checkpoints(folder) == ["step-00000003", "step-00000006", "step-00000009.tmp"]
    assert record(folder)[-1]["step"] == 9
    alone = copied(folder, tmp_path / "alone")
    finished = start(folder).expect_success()
    assert "going on behind step 6 of 12" in finished.outputs[0]
    assert record(folder) == record(calm)
    assert checkpoints(folder) == ["step-00000009", "step-00000012"]
    run_ranks(1, [TRAIN, "--config", alone / "run.yaml"], folder=alone).expect_success()
    assert_equal_to_rounding(record(alone), record(calm), 0.01)


def test_a_reference_that_follows_the_policy_goes_on_from_where_it_was(tiny_chat, tmp_path):
    moving = {"sync_every": 3, "sync_weight": 0.5}
    calm = write_run(tmp_path / "calm", tiny_chat, reference=moving, checkpoint={"every": None})
    start(calm).expect_success()
    folder = write_run(tmp_path / "killed", tiny_chat, reference=moving)
    start(folder, dying="step 8 1")
    spread = copied(folder, tmp_path / "spread")
    start(folder).expect_success()
    assert record(folder) == record(calm)
    with pytest.raises(UserError, match=r"reference.sync_every is null, but .* was made with 3"):
        look(spread, "--reference.sync_every", "null")
    run_ranks(3, [TRAIN, "--config", spread / "run.yaml"], folder=spread).expect_success()
    assert_equal_to_rounding(record(spread), record(calm), 1e-5)


def test_a_flipped_bit_is_found_and_the_checkpoint_before_taken(undisturbed, again):
    shard = again / "out/checkpoints/step-00000006" / SHARD
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    finished = start(again).expect_success()
    assert f"warning: {shard} is damaged" in finished.outputs[0]
    assert "going on behind step 4 of 12" in finished.outputs[0]
    assert record(again) == record(undisturbed)


def test_another_reference_is_refused(again, tiny_chat, tmp_path):
    other = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_chat))
    other.save_pretrained(tmp_path / "other")
    finished = start(again, "--model.reference", str(tmp_path / "other"))
    [error] = [line for said in finished.errors for line in said.splitlines() if line.startswith("error:")]
    assert finished.codes[0] == 2, finished.errors
    assert error.startswith("error: model.reference is '")
    assert "--allow_changed model.reference" in error


def halve(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a truncated shard": (lambda folder: halve(folder / SHARD), f"step-00000006/{SHARD} holds "),
    "a missing shard": (lambda folder: (folder / SHARD).unlink(), f"there is no .*step-00000006/{SHARD}"),
    "a missing manifest": (lambda folder: (folder / "COMPLETE").unlink(), "there is no .*step-00000006/COMPLETE"),
    "half a manifest": (lambda folder: halve(folder / "COMPLETE"), "step-00000006 cannot be read"),
    "another state": (
        lambda folder: (folder / "state.json").write_text((folder / "state.json").read_text().replace("6", "7")),
        "state.json",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(again, capsys, damage):
    spoil, complaint = DAMAGES[damage]
    folder = again / "out/checkpoints"
    spoil(folder / "step-00000006")
    assert look(again).checkpoints == (folder / "step-00000004",)
    assert "an older checkpoint is taken" in capsys.readouterr().out
    with pytest.raises(UserError, match=complaint):
        look(again, "--checkpoint.resume", str(folder / "step-00000006"))
    shutil.rmtree(folder / "step-00000004")
    with pytest.raises(UserError, match=complaint):
        look(again)


CHANGES = {
    "train.seed": ("6", r"train.seed is 6, but .*step-00000006 was made with 5"),
    "loss.beta": ("0.2", "loss.beta is 0.2, but .* was made with 0.1"),
    "loss.type": ("ipo", "loss.type is 'ipo', but .* was made with 'sigmoid'"),
    "model.dtype": ("bfloat16", "model.dtype is 'bfloat16', but .* was made with 'float32'"),
    "train.pairs_per_step": ("2", "train.pairs_per_step is 2, but .* was made with 4"),
    "train.epochs": ("4", "train.epochs is 4, but .* was made with 3"),
    "data.train": ("held_out.jsonl", "data.train is "),
    "data.eval": ("pairs.jsonl", "data.eval is "),
    "reference.mode": ("none", "reference.mode is 'none', but"),
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_changed_run_is_refused_unless_the_change_is_allowed(again, key):
    value, complaint = CHANGES[key]
    before = (again / "out/metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=f"{complaint}.*--allow_changed {key}"):
        look(again, f"--{key}", value)
    assert (again / "out/metrics.jsonl").read_bytes() == before
    assert look(again, f"--{key}", value, "--allow_changed", key).checkpoints


def test_what_only_rounds_may_change(again):
    assert look(again, "--train.tokens_per_micro_batch", "300", "--train.layout", "padded").checkpoints


SPLITS = {"2 -> 1": (1,), "2 -> 3 -> 2": (3, 2)}


@pytest.mark.parametrize("split", SPLITS)
def test_another_number_of_ranks_goes_on(undisturbed, again, split):
    for ranks, stop_after in zip(SPLITS[split], (8, 12)[-len(SPLITS[split]) :], strict=True):
        command = [TRAIN, "--config", again / "run.yaml"]
        if stop_after == 8:
            finished = run_ranks(ranks, [DYING, "step", "3", "0", *command], folder=again)
            assert -9 in finished.codes, finished.errors
        else:
            finished = run_ranks(ranks, command, folder=again).expect_success()
        assert f"ranks and is spread over {ranks}" in finished.outputs[0]
    assert_equal_to_rounding(record(again), record(undisturbed), 1e-5)
    weights = [load_file(folder / "out/export/model.safetensors") for folder in (again, undisturbed)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=0, atol=2e-5)


def assert_equal_to_rounding(records: list[dict[str, Any]], expected: list[dict[str, Any]], bound: float) -> None:
    """Compares two records of a run on other numbers of ranks, whose sums are taken in another order."""
    assert [(line["step"], line["split"]) for line in records] == [(line["step"], line["split"]) for line in expected]
    for line, other in zip(records, expected, strict=True):
        for name in ("loss", "rewards/chosen", "rewards/rejected", "grad_norm"):
            if name in other:
                assert line[name] == pytest.approx(other[name], rel=bound, abs=bound), (line["step"], name)


def test_a_run_is_begun_anew_only_where_nothing_is_lost(again):
    with pytest.raises(UserError, match="already holds a run"):
        look(again, "--checkpoint.resume", "never")
    shutil.rmtree(again / "out/checkpoints")
    with pytest.raises(UserError, match="already holds a run"):
        look(again)
    # Saving every tenth step, it would have had no checkpoint yet.
    assert look(again, "--checkpoint.every", "10").checkpoints == ()


def test_a_checkpoint_that_is_named_is_taken(again):
    fourth = again / "out/checkpoints/step-00000004"
    with pytest.raises(UserError, match="step-00000006 beside it is newer"):
        look(again, "--checkpoint.resume", str(fourth))
    elsewhere = ["--checkpoint.resume", str(fourth), "--output_dir", str(again / "elsewhere")]
    assert look(again, *elsewhere).checkpoints == (fourth,)
    shutil.rmtree(again / "out/checkpoints/step-00000006")
    assert look(again, "--checkpoint.resume", str(fourth)).checkpoints == (fourth,)


def test_a_key_that_does_not_exist_cannot_be_allowed(again):
    with pytest.raises(UserError, match=r"did you mean train\.seed\?"):
        look(again, "--allow_changed=train.sead")


def test_a_folder_in_which_another_run_works_is_left_alone(again):
    before = record(again)
    with FileLock(again / "out/.lock"):
        finished = start(again)
    assert finished.codes[0] == 2, finished.errors
    assert "is in use by another run" in "".join(finished.errors)
    assert record(again) == before


def test_wandb_hears_of_every_step_once_under_one_name(tmp_path, bare_wandb):
    code = (
        "import os, sys, pathlib; from dpo_ds.tracking import open_tracker\n"
        "tracker = open_tracker(pathlib.Path(sys.argv[1]), wandb='offline', project='p', config={})\n"
        "for step in (1, 2, 3, 4):\n"
        "    tracker.log({'step': step, 'split': 'train', 'loss': 0.12345 + step})\n"
        "    if step == 2: mark = tracker.mark()\n"
        "print(mark.metrics_bytes, mark.wandb_run_id, flush=True); os._exit(1)"
    )
    died = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    size, run_id = died.stdout.split()
    wait_until(lambda: not processes_of(tmp_path))
    first = next((tmp_path / "wandb").glob(f"offline-run-*-{run_id}"))
    time.sleep(1)  # wandb names an offline run by its second
    tracker = open_tracker(tmp_path, wandb="offline", project="p", config={}, behind=Mark(int(size), run_id))
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]
    for step in (3, 4, 5, 6):
        tracker.log({"step": step, "split": "train", "loss": 0.12345 + step})
    tracker.finish({})
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2, 3, 4, 5, 6]
    [second] = {*(tmp_path / "wandb").glob(f"offline-run-*-{run_id}")} - {first}
    told = [(folder / f"run-{run_id}.wandb").read_bytes() for folder in (first, second)]
    assert [[f"{step}.12345".encode() in record for step in (1, 2, 3, 4, 5, 6)] for record in told] == [
        [True, True, True, True, False, False],
        [False, False, False, False, True, True],
    ]
