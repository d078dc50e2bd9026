"""The picture of a run's curves."""

import json
from pathlib import Path

import pytest
from matplotlib.image import imread

from dpo_ds.report import plot_curves


def write_metrics(folder: Path, *, steps: int, evaluates: bool) -> Path:
    file = folder / "metrics.jsonl"
    curve = {"loss": 0.6, "rewards/margins": 0.2, "rewards/accuracies": 0.75}
    rewards = {"rewards/chosen": 0.1, "rewards/rejected": -0.1}
    lines = [{"step": step, "split": "train", **curve, **rewards} for step in range(1, steps + 1)]
    if evaluates:
        lines += [{"step": step, "split": "eval", **curve, **rewards} for step in (0, steps)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.mark.parametrize("steps", [0, 1, 12, 120])
@pytest.mark.parametrize("evaluates", [False, True])
def test_a_run_of_any_length_is_drawn(tmp_path, steps, evaluates):
    picture = tmp_path / "curves.png"
    plot_curves(write_metrics(tmp_path, steps=steps, evaluates=evaluates), picture)
    height, width, _ = imread(picture).shape
    assert (height, width) == (810, 1350)


def test_values_that_are_missing_or_null_leave_gaps(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "split": "train", "loss": null}\n{"step": 2, "split": "train", "loss": 0.5}\n')
    plot_curves(file, tmp_path / "curves.png")
    assert imread(tmp_path / "curves.png").std() > 0


def test_curves_of_train_and_held_out_pairs_differ_in_the_picture(tmp_path):
    pictures = []
    for evaluates in (False, True):
        plot_curves(write_metrics(tmp_path, steps=12, evaluates=evaluates), tmp_path / "curves.png")
        pictures.append(imread(tmp_path / "curves.png"))
    assert (pictures[0] != pictures[1]).any()
