"""Reading parts of files must give what transformers gives, to the bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from tests.engine import conftest
from tests.models import tiny_models as packing
from tests.ranks import REPOSITORY, run_ranks

pytestmark = pytest.mark.ranks

SCENARIOS = REPOSITORY / "tests/engine/loading_scenarios.py"
FAMILIES = [*conftest.FAMILIES, *(f"{family}, too" for family in [*packing.FAMILIES, *packing.ATTENTION_SINKS])]
KINDS = [
    "in several files",
    "without the backbone's prefix",
    "with a tied head of its own",
    "in bfloat16",
    "with experts in one tensor",
]
DIVIDED = "deepseek_v3"
"""Its experts are a tensor each in its file, which transformers puts together."""


def changed(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """Copies a model's folder with its tensors changed."""
    target.mkdir()
    (target / "config.json").write_text((source / "config.json").read_text())
    save_file(change(load_file(source / "model.safetensors")), target / "model.safetensors", metadata={"format": "pt"})
    return target


def written_in_kinds(models: dict[str, Path], folder: Path) -> dict[str, Path]:
    """Writes the same tiny models in the ways that checkpoints come in."""
    several = AutoModelForCausalLM.from_pretrained(models["llama"])
    several.generation_config = GenerationConfig(temperature=0.7, do_sample=True)
    several.save_pretrained(folder / "several", max_shard_size="20KB")
    assert len([*(folder / "several").glob("*.safetensors")]) > 2
    fused = AutoModelForCausalLM.from_pretrained(models[DIVIDED])
    fused.save_pretrained(folder / "fused", save_original_format=False)
    return {
        "with experts in one tensor": folder / "fused",
        "in several files": folder / "several",
        "without the backbone's prefix": changed(
            models["gpt2"],
            folder / "prefix",
            lambda tensors: {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()},
        ),
        "with a tied head of its own": changed(
            models["llama-tied"],
            folder / "head",
            lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
        ),
        "in bfloat16": changed(
            models["llama"],
            folder / "bfloat16",
            lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()},
        ),
    }


@pytest.fixture(scope="module")
def outcomes(tiny_models, tmp_path_factory) -> dict[str, list[str]]:
    """Runs every scenario on 1, 2 and 3 ranks; what was said of each, on all ranks."""
    folder = tmp_path_factory.mktemp("loading")
    models = dict(tiny_models)
    for family in [*packing.FAMILIES, *packing.ATTENTION_SINKS]:
        models[f"{family}, too"] = folder / family
        packing.tiny_model(family).save_pretrained(folder / family, save_original_format=False)
    kinds = written_in_kinds(tiny_models, folder)
    wide = changed(
        tiny_models["llama"],
        folder / "wide",
        lambda tensors: tensors | {"model.norm.weight": torch.ones(33)},
    )
    agenda: list[list[Any]] = [
        *(
            ["loads_alike", [str(models[f]), dtype, f != DIVIDED]]
            for f in FAMILIES
            for dtype in ("float32", "bfloat16")
        ),
        *(["loads_alike", [str(kinds[k]), dtype]] for k in KINDS for dtype in ("float32", "bfloat16")),
        ["is_refused", [str(wide), "does not fill its model: size mismatch for model.norm.weight"]],
    ]
    names = [f"{case} {dtype}" for case in [*FAMILIES, *KINDS] for dtype in ("float32", "bfloat16")] + ["wide"]
    said: dict[str, list[str]] = {name: [] for name in names}
    for ranks in (1, 2, 3):
        path = folder / f"agenda{ranks}.json"
        path.write_text(json.dumps(agenda))
        finished = run_ranks(ranks, [SCENARIOS, path], folder=folder)
        for rank in range(ranks):
            noted = path.with_suffix(f".{rank}.outcomes").read_text().splitlines()
            for name, line in zip(names, noted, strict=False):
                said[name].append(json.loads(line)[2])
        finished.expect_success()
    return said


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_read_in_parts_are_those_that_transformers_loads(outcomes, family, dtype):
    assert outcomes[f"{family} {dtype}"] == ["passed"] * 6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_of_every_kind_load_as_transformers_loads_them(outcomes, kind, dtype):
    assert outcomes[f"{kind} {dtype}"] == ["passed"] * 6


def test_a_weight_of_another_shape_is_refused(outcomes):
    assert outcomes["wide"] == ["passed"] * 6
