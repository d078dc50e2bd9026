import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dpo_ds.engine.ds_config import policy_ds_config
from dpo_ds.engine.export import safetensors_layout
from dpo_ds.engine.extensions import build_extensions
from tests.engine.conftest import FAMILIES
from tests.engine.scenarios import some_pairs
from tests.plain_dpo import response_logp
from tests.ranks import REPOSITORY, run_ranks

pytestmark = pytest.mark.ranks

EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
ROUTER_BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
SCENARIOS = REPOSITORY / "tests/engine/scenarios.py"


def tampered(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """Copies a model's folder with its tensors changed."""
    target.mkdir()
    (target / "config.json").write_text((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def swap_two_weights(tensors: dict[str, torch.Tensor]) -> None:
    weight = tensors["model.layers.1.mlp.down_proj.weight"]
    weight[3, 4], weight[4, 3] = weight[4, 3].clone(), weight[3, 4].clone()


EXPORTED = {"llama": "20KB", "llama-tied": "50GB", "deepseek_v3": "50GB"}
WAYS_TO_TRAIN: dict[str, dict[str, Any]] = {
    "plain": {},
    "activation checkpointing": {"activation_checkpointing": "full"},
    "ds_configs/zero3_offload_optimizer.json": {},
    "ds_configs/zero3_offload_parameters.json": {},
    "ds_configs/zero3_large_cpu.json": {},
}
OFFLOADS_TO_FILES = "ds_configs/zero3_large_cpu.json"
HAS_LIBAIO = get_accelerator().create_op_builder("AsyncIOBuilder").is_compatible(verbose=False)


def training_options(way: str, folder: Path) -> dict[str, Any]:
    """Arguments of ``initialize``; a ds_config of the project is resolved for float32, its files in a folder."""
    if not way.endswith(".json"):
        return WAYS_TO_TRAIN[way]
    config = policy_ds_config(REPOSITORY / way, dtype="float32", gradient_clipping=1.0)
    build_extensions(config)
    if way == OFFLOADS_TO_FILES:
        config["zero_optimization"]["offload_optimizer"]["nvme_path"] = str(folder)
    return {"policy_config": config}


@pytest.fixture(scope="module")
def job(tiny_models, tmp_path_factory) -> Path:
    """Runs every scenario below, in one job for each number of ranks, and returns the folder of what they wrote."""
    folder = tmp_path_factory.mktemp("job")
    llama, tied, routed = (str(tiny_models[family]) for family in EXPORTED)
    lacking = tampered(
        tiny_models["llama"], folder / "lacking", lambda t: t.pop("model.layers.1.self_attn.q_proj.weight")
    )
    extra = tampered(tiny_models["llama"], folder / "extra", lambda t: t.update({"model.layers.7.w": torch.zeros(2)}))
    swapped = tampered(tiny_models["llama"], folder / "swapped", swap_two_weights)
    unlike = tampered(tiny_models["deepseek_v3"], folder / "unlike", lambda t: t[EXPERT][0, :1].add_(1e-3))
    expertless = tampered(tiny_models["deepseek_v3"], folder / "expertless", lambda t: t.pop(EXPERT))
    unbiased = tampered(tiny_models["deepseek_v3"], folder / "unbiased", lambda t: t.pop(ROUTER_BIAS))
    alone = [
        ["fingerprints", [llama, str(folder / "fingerprint{ranks}")]],
        ["fingerprints", [routed, str(folder / "fingerprint-routed{ranks}")]],
        ["scores", [tied, str(folder / "norm{ranks}")]],
    ]
    agendas = {
        2: [
            *([name, [routed if name == "moved_buffer_is_found" else llama]] for name in IN_ONE_PIECE),
            ["reference_stays", [tied]],
            ["unlike_reference_cannot_follow", [llama, routed]],
            ["other_expert_is_found", [routed, str(unlike)]],
            ["machines_are_told_apart", [llama]],
            ["unlike_products_take_a_bounded_memory", [llama]],
            ["first_scores", [llama, "float32"]],
            ["first_scores", [llama, "bfloat16"]],
            *(["scores", [str(tiny_models[family]), str(folder / f"{family}.json")]] for family in FAMILIES),
            *(
                ["exports", [str(tiny_models[family]), str(folder / f"export-{family}"), size]]
                for family, size in EXPORTED.items()
            ),
            ["broken_exports_are_refused", [llama, str(folder / "refused")]],
            ["interrupted_replacement_loses_nothing", [llama, str(folder / "interrupted")]],
            ["broken_checkpoint_is_refused", [str(lacking), "q_proj"]],
            ["broken_checkpoint_is_refused", [str(extra), "model.layers.7"]],
            ["broken_checkpoint_is_refused", [str(unbiased), "e_score_correction_bias"]],
            ["broken_checkpoint_is_refused", [str(expertless), "experts"]],
            ["fingerprints", [str(swapped), str(folder / "fingerprint-swapped")]],
            *(
                ["gradient_norm", [llama, str(folder / f"trained{n}"), training_options(way, folder)]]
                for n, way in enumerate(WAYS_TO_TRAIN)
                if way != OFFLOADS_TO_FILES or HAS_LIBAIO
            ),
            *alone,
        ],
        1: alone,
        3: alone,
    }
    for ranks, agenda in agendas.items():
        path = folder / f"agenda{ranks}.json"
        path.write_text(json.dumps(agenda).replace("{ranks}", str(ranks)))
        run_ranks(ranks, [SCENARIOS, path], folder=folder)
    return folder


def expect_passed(job: Path, name: str, *arguments: str, ranks: int = 2) -> None:
    """Fails with what the ranks of the job of so many said of a scenario, unless it passed on all."""
    for rank in range(ranks):
        noted = [json.loads(line) for line in (job / f"agenda{ranks}.{rank}.outcomes").read_text().splitlines()]
        said = [outcome for known, given, outcome in noted if (known, given[: len(arguments)]) == (name, [*arguments])]
        assert said, f"rank {rank} never came to {name} {arguments}; its last was {noted[-1]}"
        assert said == ["passed"] * len(said), said[0]


def plain_scores(folder: Path) -> list[list[float]]:
    """Chosen and rejected log-probs of the scenarios' pairs by plain PyTorch, one response at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return [
            [float(response_logp(model, [*pair.prompt_ids], [*getattr(pair, side)])) for pair in some_pairs(4)]
            for side in ("chosen_ids", "rejected_ids")
        ]


IN_ONE_PIECE = {
    "moved_reference_is_found": "one weight of one rank moved by 1e-6",
    "moved_running_copy_is_found": "the copy that a small model runs on moved, its shards did not",
    "moved_buffer_is_found": "a router's correction bias moved",
    "trainable_reference_is_found": "a parameter asks for gradients",
    "aliased_reference_is_found": "the reference's shards are the policy's",
    "gate_finds_a_difference": "equal weights score differently before the first update",
    "gate_finds_noise_of_training_mode": "the policy scores differently in training mode",
    "unknown_head_is_refused": "the model scales its logits in a way that the scorer does not know",
}


@pytest.mark.parametrize("scenario", IN_ONE_PIECE)
def test_what_must_not_be_is_found(job, scenario):
    expect_passed(job, scenario)


def test_machines_are_told_apart(job):
    expect_passed(job, "machines_are_told_apart")


def test_products_of_unlike_shapes_take_a_bounded_memory(job):
    expect_passed(job, "unlike_products_take_a_bounded_memory")


def test_an_expert_that_is_not_the_files_is_found(job):
    expect_passed(job, "other_expert_is_found")


def test_a_reference_of_another_architecture_cannot_follow(job):
    expect_passed(job, "unlike_reference_cannot_follow")


def test_the_reference_is_frozen_sharded_without_an_optimizer_and_stays_while_the_policy_moves(job):
    expect_passed(job, "reference_stays")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equal_weights_score_exactly_equally_before_the_first_update(job, tiny_models, dtype):
    expect_passed(job, "first_scores", str(tiny_models["llama"]), dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_on_two_ranks_are_those_of_plain_pytorch_on_each_response_alone(job, tiny_models, family):
    by_rank = json.loads((job / f"{family}.json").read_text())["scores"]
    # Rank r scored pairs r and r + 2.
    scored = [[by_rank[pair % 2][side][pair // 2] for pair in range(4)] for side in (0, 1)]
    torch.testing.assert_close(scored, plain_scores(tiny_models[family]), rtol=0, atol=1e-4)


def test_the_gradient_norm_does_not_depend_on_the_number_of_ranks(job):
    norms = [json.loads((job / f"norm{ranks}").read_text())["grad_norm"] for ranks in (1, 2, 3)]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-5)


def test_the_fingerprint_depends_on_every_weights_place_and_not_on_the_number_of_ranks(job):
    one, two, three, swapped = ((job / f"fingerprint{which}").read_text() for which in (1, 2, 3, "-swapped"))
    assert one == two == three != swapped
    one, two, three = ((job / f"fingerprint-routed{ranks}").read_text() for ranks in (1, 2, 3))
    assert one == two == three


@pytest.mark.parametrize("way", list(WAYS_TO_TRAIN)[1:])
def test_gradients_are_the_same_however_memory_is_saved(job, way):
    if way == OFFLOADS_TO_FILES and not HAS_LIBAIO:
        pytest.skip("libaio and its headers are not installed, which DeepSpeed needs to offload to files")
    expected, norms = (json.loads((job / f"trained{list(WAYS_TO_TRAIN).index(w)}").read_text()) for w in ("plain", way))
    assert norms == pytest.approx(expected, rel=1e-5)
    assert norms[0] != pytest.approx(norms[1], rel=1e-3), "the steps are too small to tell anything"


@pytest.mark.parametrize("problem", ["lacking", "extra", "unbiased", "expertless"])
def test_a_checkpoint_that_does_not_fill_its_model_exactly_is_refused_on_every_rank(job, problem):
    expect_passed(job, "broken_checkpoint_is_refused", str(job / problem))


@pytest.mark.parametrize("family", EXPORTED)
def test_an_export_opens_in_a_plain_process_and_scores_as_the_engine_did(job, tiny_models, family):
    folder = job / f"export-{family}"
    files = sorted(folder.glob("*.safetensors"))
    assert (len(files) > 2) == (EXPORTED[family] == "20KB")
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert tensors.keys() == load_file(tiny_models[family] / "model.safetensors").keys()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype is torch.bfloat16
    by_rank = json.loads((job / f"export-{family}.json").read_text())
    scored = [[by_rank[pair % 2][side][pair // 2] for pair in range(4)] for side in (0, 1)]
    # bfloat16 rounds elsewhere when a response is scored alone: within 1 % of log-probs of about -30.
    torch.testing.assert_close(scored, plain_scores(folder), rtol=0.01, atol=0.1)


@pytest.mark.parametrize("family", EXPORTED)
def test_the_files_are_those_that_the_library_writes_of_the_same_tensors(job, tmp_path, family):
    for file in (job / f"export-{family}").glob("*.safetensors"):
        save_file(load_file(file), tmp_path / file.name, metadata={"format": "pt"})
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_every_file_of_an_export_is_listed_with_a_checksum_and_has_the_users_umask(job):
    folder = job / "export-llama"
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True, check=True)
    said = {line.removesuffix(": OK") for line in checked.stdout.splitlines()}
    assert said == {path.name for path in folder.iterdir()} - {"SHA256SUMS"}
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors.index.json"} <= said
    (job / "mine").write_text("")
    assert {path.stat().st_mode for path in folder.iterdir()} == {(job / "mine").stat().st_mode}


def test_an_export_that_cannot_be_right_or_written_is_refused_by_all_ranks_and_the_older_one_stays(job):
    expect_passed(job, "broken_exports_are_refused")


def test_a_rank_killed_while_it_replaces_an_export_loses_none(job):
    expect_passed(job, "interrupted_replacement_loses_nothing")


def test_a_file_begins_as_the_library_would_begin_it(tmp_path):
    tensors = {
        "b.weight": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
        "a.ключ": torch.tensor(2.5),
        "a.bias": torch.ones(3, dtype=torch.float32),
        "steps": torch.tensor([1, 2]),
        "mask": torch.tensor([True, False, True]),
        "nothing": torch.zeros(0, 4),
    }
    content, places = safetensors_layout(tensors)
    for name, place in places.items():
        assert place == len(content)
        content += tensors[name].flatten().view(torch.uint8).numpy().tobytes()
    save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
    assert content == (tmp_path / "expected").read_bytes()
