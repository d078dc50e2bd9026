import pytest
import torch

from dpo_ds.data.batch import discounted, packed_batch, padded_batch
from dpo_ds.data.tokenization import TokenizedPair
from dpo_ds.models.attention import sharing_prompts
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


@torch.no_grad()
@pytest.mark.parametrize("layout", [packed_batch, padded_batch])
def test_only_the_scored_tokens_of_a_response_add_to_its_log_prob(layout):
    model = tiny_model("llama")
    pair = TokenizedPair("", (3, 4), (5, 6, 7, 8), (9, 10), (True, False, False, True), None)
    with sharing_prompts(model):
        chosen, rejected = Scorer(model)(layout([pair])).flatten().tolist()

    def logps(ids):
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)[range(len(ids) - 1), ids[1:]]

    assert chosen == pytest.approx(float(logps([3, 4, 5, 6, 7, 8])[[1, 4]].sum()), abs=1e-5)
    assert rejected == pytest.approx(float(logps([3, 4, 9, 10])[1:].sum()), abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("layout", [packed_batch, padded_batch])
def test_tokens_beyond_the_shorter_response_are_discounted(layout):
    model = tiny_model("llama")
    # Of the chosen response the tokens 5, 7 and 8 are scored, and two of them lie within the rejected one's length.
    pairs = [
        TokenizedPair("", (3, 4), (5, 6, 7, 8), (9, 10), (True, False, True, True), None),
        TokenizedPair("", (3,), (11,), (12, 13, 14)),
    ]
    batch = layout(pairs)
    with sharing_prompts(model):
        scores = Scorer(model)(discounted(batch, 0.25))
        plain = Scorer(model)(batch)

    def logps(ids):
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)[range(len(ids) - 1), ids[1:]]

    chosen, rejected = logps([3, 4, 5, 6, 7, 8]), logps([3, 12, 13, 14])
    assert float(scores[0, 0]) == pytest.approx(float(chosen[1] + chosen[3] + 0.25 * chosen[4]), abs=1e-5)
    assert float(scores[1, 1]) == pytest.approx(float(rejected[0] + 0.25 * (rejected[1] + rejected[2])), abs=1e-5)
    assert torch.equal(scores[[1, 0], [0, 1]], plain[[1, 0], [0, 1]])
    assert discounted(batch, 1.0) is discounted(batch, None) is batch


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
