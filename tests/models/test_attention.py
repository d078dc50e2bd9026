import copy

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask, flex_attention

from dpo_ds.data.batch import Span, packed_batch, padded_batch
from dpo_ds.data.tokenization import TokenizedPair
from dpo_ds.errors import UserError
from dpo_ds.models.attention import QUERY_BLOCK, block_mask, share_prompts, shared_prompt_attention, why_not_packable
from dpo_ds.models.scorer import Scorer
from tests.models.tiny_models import FAMILIES, UNPACKABLE, tiny_model
from tests.plain_dpo import response_logp

LENGTHS = {
    "unlike": [(7, 3, 5), (2, 9, 1), (12, 1, 4)],
    "one-token parts": [(1, 1, 1), (1, 6, 1), (4, 1, 3)],
    "a single pair": [(5, 4, 6)],
    "very unlike": [(1, 1, 2), (40, 25, 3), (2, 30, 60)],
}


def random_pairs(lengths):
    generator = torch.Generator().manual_seed(1)

    def ids(count):
        return tuple(torch.randint(3, 50, (count,), generator=generator).tolist())

    return [TokenizedPair(str(n), *(ids(count) for count in parts)) for n, parts in enumerate(lengths)]


def score_and_gradients(model, score):
    """Log-probs, and the gradients of a sum in which every response has another weight."""
    logps = score(model)
    (logps * torch.arange(1, logps.numel() + 1).view_as(logps) / logps.numel()).sum().backward()
    return logps.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def alone(pairs):
    def score(model):
        responses = [[pair.chosen_ids for pair in pairs], [pair.rejected_ids for pair in pairs]]
        return torch.stack(
            [
                torch.stack([response_logp(model, [*p.prompt_ids], [*r]) for p, r in zip(pairs, row, strict=True)])
                for row in responses
            ]
        )

    return score


def packed(pairs):
    def score(model):
        share_prompts(model)
        return Scorer(model)(packed_batch(pairs))

    return score


def padded(pairs):
    def score(model):
        share_prompts(model)
        return Scorer(model)(padded_batch(pairs))

    return score


def assert_equal_scores_and_gradients(model, first, second):
    expected, expected_gradients = score_and_gradients(copy.deepcopy(model), first)
    got, gradients = score_and_gradients(copy.deepcopy(model), second)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for name, gradient in expected_gradients.items():
        largest = gradient.abs().max().item()
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-5 * max(1.0, largest), msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_pairs_score_and_train_as_each_response_alone(family):
    pairs = random_pairs(LENGTHS["unlike"])
    assert_equal_scores_and_gradients(tiny_model(family), alone(pairs), packed(pairs))


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_packed_pairs_of_any_lengths_score_and_train_as_each_response_alone(family, lengths):
    pairs = random_pairs(LENGTHS[lengths])
    assert_equal_scores_and_gradients(tiny_model(family), alone(pairs), packed(pairs))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_pairs_longer_than_a_block_of_queries_score_and_train_as_each_response_alone(family):
    pairs = random_pairs([(QUERY_BLOCK - 3, 20, QUERY_BLOCK + 9), (4, 2, 3)])
    assert_equal_scores_and_gradients(tiny_model(family), alone(pairs), packed(pairs))


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_rows_score_and_train_as_each_response_alone(family):
    pairs = random_pairs(LENGTHS["unlike"])
    assert_equal_scores_and_gradients(tiny_model(family), alone(pairs), padded(pairs))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_packed_pairs_train_alike_with_gradient_checkpointing(family):
    pairs = random_pairs(LENGTHS["unlike"])

    def checkpointed(model):
        model.train()
        model.activation_checkpointing_enable({"use_reentrant": False})
        return packed(pairs)(model)

    assert_equal_scores_and_gradients(tiny_model(family), packed(pairs), checkpointed)


def test_the_gradient_is_the_derivative():
    torch.manual_seed(0)
    spans = (Span(0, 2, 3, 1), Span(6, 1, 2, 2))
    query, key, value = (torch.randn(1, heads, 11, 3, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))

    for window, softcap in ((None, None), (2, None), (None, 0.7), (3, 0.7)):

        def attend(q, k, v, window=window, softcap=softcap):
            # The sums that keys gather are float32.
            out, _ = shared_prompt_attention(torch.nn.Module(), q, k, v, window, softcap=softcap, spans=spans)
            return out

        assert torch.autograd.gradcheck(attend, (query, key, value), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 1, 4])
def test_the_block_mask_shows_what_the_plain_rule_shows(window):
    spans = (Span(0, 3, 2, 4), Span(9, 1, 1, 1), Span(12, 2, 6, 3))
    mask = create_mask(
        block_mask(spans, window=window, device=torch.device("cpu")).mask_mod, 1, 1, 23, 23, device="cpu"
    )[0, 0]
    expected = torch.zeros(23, 23, dtype=torch.bool)
    for start, prompt, chosen, rejected in spans:
        first_chosen, first_rejected = start + prompt, start + prompt + chosen
        sequences = [
            [*range(start, first_rejected)],
            [*range(start, first_chosen), *range(first_rejected, first_rejected + rejected)],
        ]
        for sequence in sequences:
            for place, query in enumerate(sequence):
                oldest = 0 if window is None else max(0, place - window + 1)
                expected[query, sequence[oldest : place + 1]] = True
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_under_the_block_mask_equals_the_blocks(window):
    torch.manual_seed(0)
    spans = (Span(0, 30, 20, 90), Span(140, 1, 1, 1), Span(143, 9, 60, 33))
    query, key, value = (torch.randn(1, heads, 245, 16) for heads in (4, 2, 2))
    mask = block_mask(spans, window=window, device=torch.device("cpu"))
    expected = flex_attention(query, key, value, block_mask=mask, enable_gqa=True, scale=0.3).transpose(1, 2)
    got, _ = shared_prompt_attention(torch.nn.Module(), query, key, value, window, scaling=0.3, spans=spans)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "what"),
    [
        ({"s_aux": torch.zeros(2)}, "attention sinks"),
        ({"position_bias": torch.zeros(1, 2, 3, 3)}, "a bias on the scores"),
        ({"is_causal": False}, "attention in both directions"),
        ({"dropout": 0.1}, "dropout"),
    ],
)
def test_what_packed_pairs_cannot_have_is_refused(kwargs, what):
    states = torch.zeros(1, 2, 3, 4)
    with pytest.raises(UserError, match=f"Module wants {what}"):
        shared_prompt_attention(torch.nn.Module(), states, states, states, None, spans=(Span(0, 1, 1, 1),), **kwargs)


@pytest.mark.parametrize("family", UNPACKABLE)
def test_a_model_that_cannot_keep_pairs_apart_is_named_as_such(family):
    assert why_not_packable(tiny_model(family)) is not None


def test_layers_that_carry_a_state_are_named():
    assert why_not_packable(tiny_model("lfm2")) == (
        "Lfm2ForCausalLM has layers of another kind than full and sliding attention (conv)"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_speaks_against_attention_models(family):
    assert why_not_packable(tiny_model(family)) is None
