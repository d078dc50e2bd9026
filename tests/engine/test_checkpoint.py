"""Checkpoints of real engines on two ranks: saved, pruned, refused, restored."""

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_ds.engine.checkpoint import surplus
from dpo_ds.engine.ds_config import policy_ds_config
from tests.engine.test_engines import expect_passed, training_options
from tests.ranks import REPOSITORY, run_ranks

SCENARIOS = REPOSITORY / "tests/engine/checkpoint_scenarios.py"
WAYS = {
    "float32": ("float32", "plain"),
    "bfloat16": ("bfloat16", "plain"),
    "optimizer in host memory": ("float32", "ds_configs/zero3_offload_optimizer.json"),
    "weights in host memory": ("float32", "ds_configs/zero3_offload_parameters.json"),
    "many groups": ("float32", "sub-groups"),
    "lion": ("float32", "lion"),
    "lion in host memory": ("float32", "lion, offloaded"),
    "rmsprop": ("float32", "rmsprop"),
    "rmsprop in host memory": ("float32", "rmsprop, offloaded"),
}
FAULTS = {
    "older_ones_go": "the newest, those of every fourth step and the best stay",
    "disks_of_nodes_are_told_apart": "rank 1 writes where rank 0 cannot see it",
    "unwritable_folder_is_named": "the output folder is a file",
    "written_meanwhile": "one that is written while steps are taken is the one that is written at once",
    "full_disk_is_named": "rank 1 cannot write all of its shard",
    "lack_of_space_is_named": "the file system is smaller than a checkpoint",
    "code_in_a_shard_is_not_executed": "a shard holds a pickled call",
    "optimizer_that_was_left_out_is_found": "one rank's moments are zeros",
    "other_weights_than_saved_are_found": "what was loaded has another fingerprint",
}


@pytest.fixture(scope="module")
def job(tiny_models, tmp_path_factory) -> Path:
    """Runs every scenario below in one job of two ranks, and returns its folder."""
    folder = tmp_path_factory.mktemp("job")
    trained = [
        [str(tiny_models[model]), str(folder / f"{n}-{model}"), dtype, options_of(way, folder)]
        for n, (dtype, way) in enumerate(WAYS.values())
        for model in (("llama-tied", "deepseek_v3") if way == "plain" else ("llama-tied",))
    ]
    agenda: list[Any] = [["goes_on", arguments] for arguments in trained]
    for name in FAULTS:
        arguments = [str(tiny_models["llama"]), str(folder / name)]
        agenda.append([name, [*arguments, str(folder / "mark")] if "code" in name else arguments])
    (folder / "agenda2.json").write_text(json.dumps(agenda))
    run_ranks(2, [SCENARIOS, folder / "agenda2.json"], folder=folder)
    for ranks in (1, 3):
        (folder / f"agenda{ranks}.json").write_text(json.dumps([["spreads", arguments] for arguments in trained]))
        command = [SCENARIOS, folder / f"agenda{ranks}.json"]
        run_ranks(ranks, command, folder=folder)
    return folder


def options_of(way: str, folder: Path) -> dict[str, Any]:
    """Arguments of ``initialize``."""
    optimizer, _, offloaded = way.partition(", ")
    if optimizer in ("lion", "rmsprop"):
        options = training_options("ds_configs/zero3_offload_optimizer.json", folder) if offloaded else {}
        return options | {"optimizer": optimizer}
    if way != "sub-groups":
        return training_options(way, folder)
    # Small ones, whose borders lie elsewhere for another number of ranks.
    config = policy_ds_config(REPOSITORY / "ds_configs/zero3_cpu.json", dtype="float32", gradient_clipping=1.0)
    config["zero_optimization"]["sub_group_size"] = 3000
    return {"policy_config": config}


@pytest.mark.ranks
@pytest.mark.parametrize("way", WAYS)
def test_training_goes_on_to_the_bit_with_the_same_random_numbers(job, tiny_models, way):
    place = list(WAYS).index(way)
    for model in ("llama-tied", "deepseek_v3") if WAYS[way][1] == "plain" else ("llama-tied",):
        expect_passed(job, "goes_on", str(tiny_models[model]), str(job / f"{place}-{model}"))


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_training_goes_on_on_another_number_of_ranks(job, tiny_models, way, ranks):
    place = list(WAYS).index(way)
    for model in ("llama-tied", "deepseek_v3") if WAYS[way][1] == "plain" else ("llama-tied",):
        expect_passed(job, "spreads", str(tiny_models[model]), str(job / f"{place}-{model}"), ranks=ranks)


@pytest.mark.ranks
@pytest.mark.parametrize("scenario", FAULTS)
def test_a_fault_is_named_on_every_rank_and_leaves_nothing_behind(job, scenario):
    expect_passed(job, scenario)


def test_the_newest_the_lasting_and_the_best_stay():
    steps = [10, 20, 30, 40, 50]
    assert surplus(steps, keep=2, keep_every=None, best=None) == {10, 20, 30}
    assert surplus(steps, keep=1, keep_every=20, best=None) == {10, 30, 50} - {50}
    assert surplus(steps, keep=1, keep_every=None, best=10) == {20, 30, 40}
    assert surplus(steps[:1], keep=2, keep_every=None, best=None) == set()
