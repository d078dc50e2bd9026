"""``plan --gpus``: what a run takes of its machines, and the recipes, each as its first lines say."""

import json
import re
from pathlib import Path

import pytest
from transformers import LlamaConfig, PretrainedConfig, Qwen2Config

from dpo_ds.cli.commands import main
from tests.cli.test_train import files as files
from tests.data.small_tokenizer import small_tokenizer
from tests.models.test_shapes import LLAMA_8B, LLAMA_70B, QWEN_32B
from tests.ranks import REPOSITORY

RECIPES = sorted((REPOSITORY / "launch/recipes").glob("*.yaml"))
QWEN_HALF_B = Qwen2Config(
    vocab_size=151936,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
SHAPES: dict[str, PretrainedConfig] = {
    "qwen2.5-0.5b-gpu": QWEN_HALF_B,
    "llama3.1-8b-node": LLAMA_8B,
    "llama3.1-8b-lora-node": LLAMA_8B,
    "qwen3-32b-4-nodes": QWEN_32B,
    "llama3.1-70b-8-nodes": LLAMA_70B,
}


def planned(capsys, *arguments: str) -> str:
    main(["plan", *arguments])
    return capsys.readouterr().out


def most(said: str) -> float:
    return float(re.search(r"([\d.]+) +[\d.]+  most in use at one time", said)[1])


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """Stands in for what recipes take from the hub: pairs of about 2,000 tokens, a tokenizer, and models' configs."""
    folder = tmp_path_factory.mktemp("hub")
    small_tokenizer(folder / "tokenizer")
    rows = [{"prompt": "p" * 500, "chosen": "c" * (760 + n % 9), "rejected": "r" * (769 - n % 9)} for n in range(128)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fewer = LlamaConfig(**LLAMA_8B.to_dict() | {"vocab_size": 4096})  # which saves time
    for name, config in {**SHAPES, "fewer-words": fewer}.items():
        config.max_position_embeddings = 8192
        config.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe.stem in SHAPES], ids=lambda path: path.stem)
def test_a_recipe_takes_what_its_first_lines_say(recipe, hub, tmp_path, capsys):
    text = recipe.read_text()
    nodes, gpus, gib, expected = map(
        int,
        re.search(r"(\d+) nodes? of (\d+) GPUs? of (\d+) GiB. Expected: (\d+) GiB", text).groups(),
    )
    machines = ["--nodes", str(nodes), "--gpus", str(gpus), "--gpu_gib", str(gib), "--host_gib", "1024"]
    places = ["--model.policy", str(hub / recipe.stem), "--model.tokenizer", str(hub / "tokenizer")]
    data = ["--data.train", str(hub / "pairs.jsonl"), "--data.eval", "null", "--train.eval_every", "null"]
    output = ["--output_dir", str(tmp_path / "out")]
    said = planned(capsys, "--config", str(recipe), *machines, *places, *data, *output)
    assert "      fits  yes\n" in said
    assert most(said) == pytest.approx(expected, abs=0.6)
    assert re.search(f"machines  {nodes} of {gpus} GPUs? of {gib} GiB\n", said)


def test_every_recipe_is_planned():
    assert {recipe.stem for recipe in RECIPES} == {*SHAPES, "smollm2-cpu"}
    for recipe in RECIPES:
        assert re.match(r"# .*: .*(deepspeed|sbatch).*\n# Hardware: .*\n?.*Data: ", recipe.read_text())


@pytest.mark.parametrize(
    ("gib", "verdict"),
    [
        (22, "no; it does with --deepspeed.reference ds_configs/zero3_reference_offload.json"),
        (20, "no; it does with --deepspeed.policy ds_configs/zero3_offload_optimizer.json"),
        (
            8,
            "no; it does with --train.activation_checkpointing offload "
            "--deepspeed.reference ds_configs/zero3_reference_offload.json "
            "--deepspeed.policy ds_configs/zero3_offload_optimizer.json",
        ),
        (
            6,
            "no; it does with --deepspeed.reference ds_configs/zero3_reference_offload.json "
            "--deepspeed.policy ds_configs/zero3_offload_parameters.json",
        ),
        (
            3,
            "no; lower train.tokens_per_micro_batch or data.max_length, raise train.sequence_parallel_size, train an "
            "adapter, or take more memory",
        ),
    ],
)
def test_where_it_does_not_fit_the_nearest_that_does_is_named(gib, verdict, hub, tmp_path, capsys):
    recipe = REPOSITORY / "launch/recipes/llama3.1-8b-node.yaml"
    said = planned(
        capsys,
        *("--config", str(recipe), "--gpus", "8", "--gpu_gib", str(gib), "--host_gib", "512"),
        *("--model.policy", str(hub / "fewer-words"), "--model.tokenizer", str(hub / "tokenizer")),
        *("--data.train", str(hub / "pairs.jsonl"), "--data.eval", "null", "--train.eval_every", "null"),
        *("--output_dir", str(tmp_path / "out"), "--train.tokens_per_micro_batch", "4096"),
    )
    assert f"      fits  {verdict}\n" in said


def test_ranks_without_a_gpu_share_the_machines_memory(files, capsys):
    small_buffers = ("--config", "run.yaml", "--gpus", "2", "--deepspeed.policy", "ds_configs/zero3_cpu.json")
    said = planned(capsys, *small_buffers, "--host_gib", "3")
    assert "machines  1 of 2 ranks without a GPU" in said
    assert "fits  yes" in said
    assert "while scoring" not in said  # too little to show
    more = planned(capsys, *small_buffers, "--host_gib", "1")
    assert most(more) == most(said) > 0.7
    assert "fits  no; lower" in more
    assert "not known without" in planned(capsys, *small_buffers)
    assert not (files / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--gpus", "0"], "error: --gpus must be > 0, got 0\n"),
        (["--nodes", "2"], "error: --gpus must be given, too: how many ranks a machine has\n"),
        (["--gpu_gib", "80"], "error: --gpus must be given, too: how many ranks a machine has\n"),
    ],
)
def test_machines_that_cannot_be_are_refused(files, capsys, arguments, complaint):
    with pytest.raises(SystemExit) as left:
        main(["plan", "--config", "run.yaml", *arguments])
    assert left.value.code == 2
    assert capsys.readouterr().err == complaint
