"""What is known of models without their weights: published sizes, and what a micro-batch takes."""

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config, Qwen3MoeConfig

from dpo_ds.data.tokenization import TokenizedPair
from dpo_ds.models import shapes
from dpo_ds.models.adapters import Adapter
from dpo_ds.models.scorer import GPU_LOGIT_CHUNK_BYTES
from dpo_ds.models.shapes import parameters_of, peaks_of_micro_batch, without_weights

LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
LLAMA_70B = LlamaConfig(
    vocab_size=128256,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
)
QWEN_32B = Qwen3Config(
    vocab_size=151936,
    hidden_size=5120,
    intermediate_size=25600,
    num_hidden_layers=64,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=128,
)
WIDTH = 64
SMALL = {
    "vocab_size": 512,
    "hidden_size": WIDTH,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PAIRS = [
    TokenizedPair(id=str(n), prompt_ids=(5,) * 40, chosen_ids=(6,) * (30 + n), rejected_ids=(7,) * 30) for n in range(6)
]
TOKENS = sum(100 + n for n in range(6))
OPTIONS = {"dtype": torch.bfloat16, "packed": True, "checkpointing": "none"}


@pytest.mark.parametrize(
    ("config", "total"), [(LLAMA_8B, 8_030_261_248), (LLAMA_70B, 70_553_706_496), (QWEN_32B, 32_762_123_264)]
)
def test_sizes_are_the_published_ones(config, total):
    found = parameters_of(without_weights(config), threshold=100_000)
    assert (found.total, found.trained) == (total, total)
    width, layers = config.hidden_size, config.num_hidden_layers
    norms = width * (2 * layers + 1) + (2 * 128 * layers if config is QWEN_32B else 0)
    assert found.whole == norms
    assert found.largest == max(config.vocab_size * width, (total - 2 * config.vocab_size * width - width) // layers)


def test_an_adapter_alone_trains():
    adapted = without_weights(LlamaConfig(**SMALL, num_hidden_layers=2), Adapter(r=4))
    found = parameters_of(adapted, threshold=1)
    into = 4 * (WIDTH + WIDTH) + 2 * 4 * (WIDTH + WIDTH // 2) + 4 * (WIDTH + WIDTH) + 3 * 4 * (WIDTH + 160)
    assert found.trained == 2 * into


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("adapter", [None, Adapter(r=4)])
def test_a_checkpointed_layer_keeps_its_input_or_its_part_of_it(adapter, parts):
    def training(layers: int) -> int:
        config = LlamaConfig(**SMALL, num_hidden_layers=layers)
        options = OPTIONS | {"checkpointing": "full", "parts": parts}
        return peaks_of_micro_batch(config, PAIRS, adapter=adapter, **options).training

    assert training(12) - training(11) == 2 * WIDTH * -(-TOKENS // parts)


def test_layers_whose_inputs_wait_in_host_memory_take_none_on_the_device():
    few, more = (
        peaks_of_micro_batch(
            LlamaConfig(**SMALL, num_hidden_layers=layers), PAIRS, **OPTIONS | {"checkpointing": "offload"}
        )
        for layers in (11, 12)
    )
    assert few.training == more.training
    assert more.host - few.host == 2 * WIDTH * TOKENS


def test_a_gpu_holds_larger_chunks_of_logits():
    config = LlamaConfig(**SMALL | {"vocab_size": 65536}, num_hidden_layers=1)
    on_cpu, on_gpu = (peaks_of_micro_batch(config, PAIRS, on_gpu=on_gpu, **OPTIONS).scoring for on_gpu in (False, True))
    assert on_gpu - on_cpu > GPU_LOGIT_CHUNK_BYTES / 2


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_tiles_bound_what_is_as_wide_as_an_mlp_is_inside(checkpointing):
    wide = LlamaConfig(**SMALL | {"intermediate_size": 64 * WIDTH}, num_hidden_layers=4)
    options = OPTIONS | {"checkpointing": checkpointing}
    whole, *tiled = (
        peaks_of_micro_batch(wide, PAIRS, tile=tile, **options) for tile in (None, TOKENS // 8, TOKENS // 64)
    )
    assert tiled[1].training < tiled[0].training < whole.training / 2
    assert tiled[1].scoring < tiled[0].scoring < whole.scoring


def test_ranks_that_share_rows_hold_parts_of_all_that_a_layer_keeps():
    config = LlamaConfig(**SMALL, num_hidden_layers=8)
    alone, shared = (peaks_of_micro_batch(config, PAIRS, parts=parts, **OPTIONS).training for parts in (1, 4))
    assert 0.2 < shared / alone < 0.4


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL, num_hidden_layers=7),
        Qwen3MoeConfig(**SMALL, num_hidden_layers=7, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2),
    ],
)
def test_many_layers_take_what_few_of_them_tell(config, monkeypatch):
    found = peaks_of_micro_batch(config, PAIRS, **OPTIONS)
    monkeypatch.setattr(shapes, "_SAMPLED_LAYERS", (2, 7))
    assert found == pytest.approx(peaks_of_micro_batch(config, PAIRS, **OPTIONS), rel=0.01)


def test_training_takes_most_without_an_adapter_and_least_when_only_scoring():
    config = LlamaConfig(**SMALL, num_hidden_layers=6)
    whole, scoring, _ = peaks_of_micro_batch(config, PAIRS, **OPTIONS)
    adapted = peaks_of_micro_batch(config, PAIRS, adapter=Adapter(r=4, target_modules=("q_proj",)), **OPTIONS).training
    again = peaks_of_micro_batch(config, PAIRS, **OPTIONS | {"checkpointing": "full"}).training
    assert scoring < again < adapted < whole
    longer = [pair for pair in PAIRS for _ in range(2)]
    assert peaks_of_micro_batch(config, longer, **OPTIONS).training == pytest.approx(2 * whole, rel=0.1)
