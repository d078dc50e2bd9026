"""MLPs that take few tokens at a time compute what they compute of all, and say where they cannot."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from dpo_ds.data.batch import packed_batch, padded_batch
from dpo_ds.models.attention import share_prompts
from dpo_ds.models.causal_lm import checkpoint_activations
from dpo_ds.models.scorer import Scorer
from dpo_ds.models.tiles import tile_mlps
from tests.models.test_attention import LENGTHS, random_pairs
from tests.models.tiny_models import FAMILIES, tiny_model

DENSE = [family for family in FAMILIES if family != "qwen2_moe"]
BATCH = packed_batch(random_pairs(LENGTHS["unlike"]))


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("family", DENSE)
def test_tiles_score_and_train_as_the_whole(family, again):
    found = []
    for tokens in (None, 7):
        model = tiny_model(family)
        share_prompts(model)
        widest = [0]
        for name, module in model.named_modules():
            if name.endswith(".mlp"):
                module.get_submodule(_into(module)).register_forward_pre_hook(
                    lambda _, inputs, widest=widest: widest.append(inputs[0].flatten(0, -2).shape[0])
                )
        if tokens is not None:
            tile_mlps(model, tokens=tokens)
        if again:
            checkpoint_activations(model, "full")
            model.train()
        logps = Scorer(model)(BATCH)
        logps.sum().backward()
        assert max(widest) == (tokens or BATCH.input_ids.numel())
        found.append((logps.detach(), {name: weight.grad for name, weight in model.named_parameters()}))
    (whole, gradients), (tiled, others) = found
    torch.testing.assert_close(tiled, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(others, gradients, rtol=1e-5, atol=1e-4)


def _into(mlp: torch.nn.Module) -> str:
    return next(name for name, module in mlp.named_children() if hasattr(module, "weight"))


@pytest.mark.parametrize("tokens", [1, 5, 64, 10_000])
@pytest.mark.parametrize("lengths", ["unlike", "very unlike"])
def test_any_size_of_tile_gives_the_same_scores(lengths, tokens):
    scorer, batch = Scorer(tiny_model("llama")), padded_batch(random_pairs(LENGTHS[lengths]))
    with torch.no_grad():
        expected = scorer(batch)
        assert scorer.why_not_tiled(batch, tokens=tokens, bound=1e-4) is None
        torch.testing.assert_close(scorer(batch), expected, rtol=1e-5, atol=1e-5)


def test_a_mixture_of_experts_is_refused():
    scorer = Scorer(tiny_model("qwen2_moe"))
    assert "Qwen2MoeDecoderLayer has no MLP of its own" in scorer.why_not_tiled(BATCH, tokens=7, bound=1e-4)


def test_an_mlp_whose_tokens_meet_is_found(monkeypatch):
    own = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: own(self, x) + x.cumsum(1) / 10)
    scorer = Scorer(tiny_model("llama"))
    batch = padded_batch(random_pairs(LENGTHS["unlike"]))
    assert "scores otherwise when its MLPs take few tokens" in scorer.why_not_tiled(batch, tokens=7, bound=1e-2)
