import pytest
import torch

from dpo_ds.models.scorer import Scorer
from tests.models.test_attention import LENGTHS, random_pairs
from tests.models.tiny_models import FAMILIES, tiny_model

CPU = torch.device("cpu")
PAIRS = random_pairs(LENGTHS["unlike"])


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_models_prove_that_they_can_be_packed_and_keep_their_attention(family):
    model = tiny_model(family)
    own = model.config._attn_implementation
    assert Scorer(model).differs_when_packed(PAIRS, device=CPU) < 1e-5
    assert Scorer(model).why_not_packed(PAIRS, bound=1e-5, device=CPU) is None
    assert model.config._attn_implementation == own


def test_a_state_that_runs_through_the_row_shows_as_a_difference():
    assert Scorer(tiny_model("lfm2")).differs_when_packed(PAIRS, device=CPU) > 1e-2


@pytest.mark.parametrize("forgotten", ["spans", "position_ids"])
def test_a_model_that_does_not_pass_the_layout_on_shows_as_a_difference(forgotten):
    model = tiny_model("llama")
    model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {name: value for name, value in kwargs.items() if name != forgotten}),
        with_kwargs=True,
    )
    reason = Scorer(model).why_not_packed(PAIRS, bound=1e-2, device=CPU)
    assert reason is not None
    assert reason.startswith("LlamaForCausalLM scores packed pairs unlike single ones (log-probs differ by ")


def test_attention_sinks_are_a_reason_against_packing():
    reason = Scorer(tiny_model("gpt_oss")).why_not_packed(PAIRS, bound=1e-5, device=CPU)
    assert reason == "GptOssAttention wants attention sinks, which packed pairs cannot have; use padded rows"
