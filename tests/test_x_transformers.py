"""Models of x-transformers through the launcher: they load, train, export and answer as any model does."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

from dpo_ds.errors import UserError
from dpo_ds.models.shapes import peaks_of_micro_batch
from dpo_ds.models.x_transformer import XTransformerConfig, XTransformerForCausalLM
from tests.data.small_tokenizer import small_tokenizer
from tests.models.test_attention import random_pairs
from tests.test_run import Run, lines, losses, rows_of_words, six_plain_steps
from tests.test_run import run as run

LAYERS = {"dim": 32, "depth": 2, "heads": 4, "attn_dim_head": 8}
SMALL = {"num_tokens": 264, "max_seq_len": 128}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rotary, gated": (SMALL, LAYERS | {"rotary_pos_emb": True, "ff_glu": True, "attn_kv_heads": 2}),
    "learned positions, memory tokens": (SMALL | {"num_memory_tokens": 3}, LAYERS),
    "tied": (SMALL | {"tie_embedding": True}, LAYERS | {"use_rmsnorm": True}),
}


def transformer(kind: str) -> TransformerWrapper:
    torch.manual_seed(3)
    outer, inner = KINDS[kind]
    model = TransformerWrapper(**outer, attn_layers=Decoder(**inner))
    for name, weight in model.named_parameters():
        # Larger than x-transformers draws them, so that six steps tell something.
        if "token_emb" in name or "to_logits" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return model


def config_of(outer: dict[str, Any], inner: dict[str, Any]) -> XTransformerConfig:
    return XTransformerConfig("TransformerWrapper", {**outer, "attn_layers": {"module": "Decoder", "arguments": inner}})


def written(kind: str, folder: Path, *, wrapped: bool = False, **changes: Any) -> Path:
    """Writes a model of the kind with a tokenizer; ``wrapped``: under the names of an ``AutoregressiveWrapper``."""
    folder.mkdir()
    small_tokenizer(folder)
    model = transformer(kind)
    tensors = (AutoregressiveWrapper(model) if wrapped else model).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    outer, inner = KINDS[kind]
    arguments = {**outer, "attn_layers": {"module": "Decoder", "arguments": inner}}
    config = {"model_type": "x-transformers", "module": "TransformerWrapper", "arguments": arguments, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class WithLogits(torch.nn.Module):
    """Called as Hugging Face's models are."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.model = kind, transformer(kind)

    def __deepcopy__(self, memo: dict[int, Any]) -> "WithLogits":
        # Copied as an object, a module with tied embeddings would go on to multiply by the first one's: its head is a
        # lambda that holds it. So does the reference of x-transformers' own DPO.
        copied = WithLogits(self.kind)
        copied.load_state_dict(self.state_dict())
        return copied

    def forward(self, ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.model(ids))


@pytest.mark.ranks
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_six_steps_lose_what_a_plain_loop_loses_and_the_export_is_the_policy(
    run: Run, tiny_chat, tmp_path, kind, ranks
):
    folder = written(kind, tmp_path / "model", wrapped=ranks == 2)
    policy = WithLogits(kind)
    expected = six_plain_steps(tiny_chat, model=policy)
    rows = rows_of_words(24)
    finished, out = run(
        ranks,
        rows=rows,
        held_out=rows[:3],
        model={"policy": str(folder)},
        data={"eval": "held_out.jsonl"},
        tracking={"answers": 2, "answer_tokens": 4},
    )
    assert "rows are padded" in finished.expect_success().outputs[0]
    assert losses(out) == pytest.approx(expected, abs=1e-5)
    assert expected[-1] < expected[0] - 0.01, "the steps are too small to tell anything"
    assert len(lines(out, "eval")[-1]["answers"]) == 2

    exported = transformer(kind)
    AutoregressiveWrapper(exported).load_state_dict(load_file(out / "export/model.safetensors"))
    for name, weight in policy.model.named_parameters():
        torch.testing.assert_close(exported.get_parameter(name), weight, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    "head",
    [{"sigsoftmax_logits": True}, {"mixture_of_softmax": True, "mixture_of_softmax_k": 2}, {"num_output_heads": 2}],
)
def test_a_head_of_more_steps_than_a_product_is_refused(head):
    outer, inner = KINDS["rotary, gated"]
    with pytest.raises(UserError, match="must have one softmax of one linear head"):
        XTransformerForCausalLM(config_of(outer | head, inner))


@pytest.mark.parametrize("checkpointing", ["none", None])
def test_what_it_takes_in_memory_is_that_of_all_its_layers(monkeypatch, checkpointing):
    outer, inner = KINDS["rotary, gated"]
    config = config_of(outer, inner | {"depth": 9})
    found = []
    for sampled in ((2, 4), (2, 9)):
        monkeypatch.setattr("dpo_ds.models.shapes._SAMPLED_LAYERS", sampled)
        found.append(
            tuple(
                peaks_of_micro_batch(
                    config, random_pairs([(7, 13, 15)]), dtype=torch.float32, packed=False, checkpointing=checkpointing
                )
            )
        )
    assert found[0] == pytest.approx(found[1], rel=2e-2)
    assert config.num_hidden_layers == 9


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("changes", "train", "says"),
    [
        ({"module": "Popen"}, {}, "must be a TransformerWrapper whose attn_layers are a Decoder"),
        ({"arguments": SMALL | {"attn_layers": {"module": "Decoder", "arguments": {"dim": 32}}}}, {}, "cannot build"),
        (
            {"arguments": SMALL | {"attn_layers": {"module": "Decoder", "arguments": LAYERS | {"dim": 64}}}},
            {},
            "does not fill its model",
        ),
        ({}, {"layout": "packed"}, "train.layout: packed is not possible"),
        ({}, {"activation_checkpointing": "full"}, "train.activation_checkpointing must be none"),
        ({}, {"tokens_per_mlp_tile": 8}, "train.tokens_per_mlp_tile must be null"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(run: Run, tmp_path, changes, train, says):
    folder = written("tied", tmp_path / "model", **changes)
    finished, _ = run(1, rows=rows_of_words(8), model={"policy": str(folder)}, train=train)
    assert finished.codes == [2]
    (line,) = [line for line in finished.errors[0].splitlines() if line.startswith("error:")]
    assert says in line
