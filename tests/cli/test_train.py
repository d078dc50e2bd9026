"""What a user who mistypes sees: one line, exit code 2, nothing left behind."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_ds.cli.train import main
from tests.ranks import REPOSITORY

PAIR = {"prompt": "tea is", "chosen": " hot", "rejected": " salt."}
ZERO = {"zero_optimization": {"stage": 3}}


@pytest.fixture
def files(tmp_path: Path, tiny_chat: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run file that works, to be spoilt; the working folder is there, too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(PAIR) + "\n" for _ in range(4)))
    (tmp_path / "zero.json").write_text(json.dumps(ZERO))
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


def write_rows(files: Path, *rows: dict[str, Any]) -> None:
    (files / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_zero(files: Path, **values: Any) -> None:
    (files / "other.json").write_text(json.dumps(ZERO | values))


def no_preparation(files: Path) -> None:
    pass


def another_vocabulary(files: Path) -> None:
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(files / "other")


CASES = {
    "an unknown key": (no_preparation, ["--loss.betta", "1"], "unknown option --loss.betta; did you mean --loss.beta?"),
    "a wrong type": (no_preparation, ["--train.epochs", "soon"], "train.epochs must be a whole number, got 'soon'"),
    "a beta of nothing": (no_preparation, ["--loss.beta", "0"], "loss.beta must be > 0, got 0"),
    "a missing file": (no_preparation, ["--data.train", "none.jsonl"], "data.train: there is no none.jsonl"),
    "a missing model": (no_preparation, ["--model.policy", "./none"], "model.policy: there is no ./none"),
    "an empty data set": (lambda files: write_rows(files), ["--data.train", "other.jsonl"], "other.jsonl"),
    "a row without chosen": (
        lambda files: write_rows(files, {"prompt": "a", "rejected": "b"}),
        ["--data.train", "other.jsonl"],
        "chosen",
    ),
    "nothing but useless rows": (
        lambda files: write_rows(files, *[PAIR | {"chosen": " salt."}] * 4),
        ["--data.train", "other.jsonl"],
        "4 of 4 rows",
    ),
    "pairs beyond the model's positions": (
        no_preparation,
        ["--data.max_length", "129"],
        "data.max_length must be <= 128, the positions of model.policy, got 129",
    ),
    "a tokenizer that is larger than the embedding": (
        another_vocabulary,
        ["--model.policy", "other", "--model.tokenizer", "TINY"],
        "but the embedding of model.policy",
    ),
    "a reference with another vocabulary": (
        another_vocabulary,
        ["--model.reference", "other"],
        "has a vocabulary of 8",
    ),
    "auto in a ds_config": (
        lambda files: write_zero(files, zero_optimization={"stage": 3, "reduce_bucket_size": "auto"}),
        ["--deepspeed.reference", "other.json"],
        'zero_optimization.reduce_bucket_size is "auto"',
    ),
    "an optimizer for the reference": (
        lambda files: write_zero(files, optimizer={"type": "AdamW"}),
        ["--deepspeed.reference", "other.json"],
        "optimizer must not be here",
    ),
    "a misspelt ds_config key": (
        lambda files: write_zero(files, gradient_cliping=1.0),
        ["--deepspeed.policy", "other.json"],
        "did you mean gradient_clipping?",
    ),
    "two files that disagree": (
        lambda files: write_zero(files, gradient_clipping=2.0),
        ["--deepspeed.policy", "other.json", "--train.gradient_clipping", "1.0"],
        "train.gradient_clipping is 1.0 in the run, but",
    ),
    "fewer pairs than a step takes": (no_preparation, ["--train.pairs_per_step", "5"], "has only 4 usable pairs"),
    "fewer pairs than a step takes, by their weight": (
        no_preparation,
        ["--data.train", "[{path: pairs.jsonl, weight: 0.5}]", "--train.pairs_per_step", "3"],
        "data.train has only 2 usable pairs an epoch by its weights",
    ),
    "a budget that the longest pair exceeds": (
        no_preparation,
        ["--train.tokens_per_micro_batch", "8"],
        "train.tokens_per_micro_batch must be >= ",
    ),
    "label smoothing where the loss knows none": (
        no_preparation,
        ["--loss.type", "ipo", "--loss.label_smoothing", "0.1"],
        "loss.label_smoothing",
    ),
    "soft labels where the loss knows none": (
        no_preparation,
        ["--loss.type", "hinge", "--data.train", '[{"path": "pairs.jsonl", "columns": {"probability": "p"}}]'],
        "data.train[0].columns.probability must be left out for the hinge loss, which knows no probability, got 'p'",
    ),
    "margins where the loss knows none": (
        no_preparation,
        ["--loss.type", "ipo", "--data.eval", '[{"path": "pairs.jsonl", "columns": {"margin": "m"}}]'],
        "data.eval[0].columns.margin must be left out for the ipo loss",
    ),
    "a number that the loss has not": (
        no_preparation,
        ["--loss.type", "simpo", "--reference.mode", "none", "--loss.parameters", '{"gama": 0.5}'],
        "loss.parameters must name numbers that the simpo loss has (gamma), got 'gama'",
    ),
    "a weight that is no number": (no_preparation, ["--loss.add", '{"sft": "much"}'], "loss.add must be a mapping"),
    "a reference-free loss with a cache": (
        no_preparation,
        ["--loss.type", "simpo", "--reference.mode", "cache"],
        "reference.mode must be none for the simpo loss, whose equation has no reference, got 'cache'",
    ),
    "quantiles of one pair": (
        no_preparation,
        ["--loss.type", "aot", "--train.pairs_per_step", "1"],
        "train.pairs_per_step must be >= 2 for the aot loss, which compares the pairs of a step with each other, got 1",
    ),
    "weighted quantiles": (
        no_preparation,
        ["--loss.type", "aot", "--data.train", '[{"path": "pairs.jsonl", "columns": {"weight": "w"}}]'],
        "data.train[0].columns.weight must be left out for the aot loss, which knows no weight, got 'w'",
    ),
    "a discount of what the cache has summed up": (
        no_preparation,
        ["--loss.ld_alpha", "0.5", "--reference.mode", "cache"],
        "loss.ld_reference must be false where reference.mode is cache",
    ),
    "a discount of means": (
        no_preparation,
        ["--loss.ld_alpha", "0.5", "--loss.add", '{"sft": 1.0}'],
        "loss.ld_alpha must be null where log-probs are averaged over tokens, got 0.5",
    ),
    "discounted weights of likelihood": (
        no_preparation,
        ["--loss.ld_alpha", "0.5", "--loss.weighting", "wpo"],
        "loss.ld_alpha must be null where log-probs are averaged over tokens, got 0.5",
    ),
    "a divergence from nothing": (
        no_preparation,
        ["--loss.divergence", "js_divergence", "--reference.mode", "none"],
        "loss.divergence must be reverse_kl where reference.mode is none",
    ),
    "a nested output folder": (
        no_preparation,
        ["--output_dir", "new/deep/out", "--train.pairs_per_step", "5"],
        "has only 4 usable pairs",
    ),
    "float16": (no_preparation, ["--model.dtype", "float16"], "model.dtype"),
}


def test_a_disk_that_is_too_small_for_the_export_is_found_before_the_engines(files, capsys, monkeypatch):
    small = shutil.disk_usage(files)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: small)
    with pytest.raises(SystemExit) as left:
        main(["--config", "run.yaml"])
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith(
        f"error: {Path('out/export')} needs about 0.0 GiB for 0 million parameters"
    )
    assert not (files / "out").exists()


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(files, tiny_chat, capsys, case):
    prepare, arguments, complaint = CASES[case]
    prepare(files)
    capsys.readouterr()  # what preparing said
    before = sorted(files.rglob("*"))
    with pytest.raises(SystemExit) as left:
        main(["--config", "run.yaml", *(str(tiny_chat) if a == "TINY" else a for a in arguments)])
    said = capsys.readouterr()
    assert left.value.code == 2
    assert said.err.count("\n") == 1
    assert said.err.startswith("error: ")
    assert complaint in said.err
    assert sorted(files.rglob("*")) == before


def test_a_dry_run_prints_the_plan_and_trains_nothing(files, capsys):
    main(["--config", "run.yaml", "--dry_run"])
    said = capsys.readouterr().out
    assert "4 to train on" in said
    assert "1 of 4 pairs on 1 rank" in said
    assert not (files / "out").exists()
    mixture = "[{path: pairs.jsonl, weight: 2.5}, {path: pairs.jsonl, weight: 0.5, name: half}]"
    main(["--config", "run.yaml", "--dry_run", "--data.train", mixture])
    said = capsys.readouterr().out
    assert "an epoch  10 of pairs (4 x 2.5), 2 of half (4 x 0.5)" in said
    assert "3 of 4 pairs on 1 rank" in said


def test_an_output_folder_that_holds_a_run_is_never_written_over(files, capsys):
    (files / "out").mkdir()
    (files / "out/metrics.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit):
        main(["--config", "run.yaml"])
    assert "already holds a run" in capsys.readouterr().err
    assert (files / "out/metrics.jsonl").read_text() == "{}\n"


def test_help_does_not_wait_for_torch():
    code = "import sys; from dpo_ds.cli.train import main\n"
    code += "try: main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--loss.beta" in finished.stdout


def launch(files: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Types what the README says, with the DeepSpeed launcher of this environment."""
    launcher = Path(sys.executable).parent / "deepspeed"
    command = [launcher, "--num_accelerators", "2", REPOSITORY / "launch/train.py", "--config", "run.yaml", *arguments]
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.run(list(map(str, command)), cwd=files, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.ranks
def test_under_the_launcher_one_rank_speaks_and_the_code_is_2(files):
    finished = launch(files, "--train.pairs_per_step", "5")
    lines = [line for line in (finished.stdout + finished.stderr).splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert finished.returncode == 2
    assert not (files / "out").exists()


@pytest.mark.ranks
def test_the_launcher_trains_and_exports(files):
    finished = launch(files)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert json.loads((files / "out/summary.json").read_text())["status"] == "complete"
    assert (files / "out/export/model.safetensors").exists()
