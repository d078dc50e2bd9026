"""The wrapper of one module: beside x-transformers' own, around Hugging Face models, and against values by hand."""

import math
from collections.abc import Callable

import pytest
import torch
import x_transformers
from torch import Tensor, nn
from torch.nn import functional as F

from dpo_ds import DPO
from tests.wrapped import (
    PAD,
    PROBABILITIES,
    PROMPT,
    VOCAB,
    Bigram,
    disturb,
    is_equal,
    random_pairs,
    response_logp,
    snapshot,
    tiny_gpt2,
    tiny_llama,
    tiny_transformer,
)

# Values by hand


def test_loss_and_rewards_are_those_found_by_hand():
    dpo = DPO(Bigram(PROBABILITIES), beta=0.5)
    with torch.no_grad():
        dpo.policy_model.table[1, 2] += math.log(3)  # 0.4 of 1 becomes 1.2 of 1.8
    preferred = torch.tensor([[0, 1, 2]])
    unpreferred = torch.tensor([[0, 1, 0]])
    loss, metrics = dpo(preferred, unpreferred, prompt_mask=torch.tensor([[True, True, False]]), return_metrics=True)
    # The first response token is predicted by the last prompt token: 0.4 -> 2/3 and 0.3 -> 1/6.
    chosen, rejected = 0.5 * math.log((2 / 3) / 0.4), 0.5 * math.log((1 / 6) / 0.3)
    assert metrics.chosen_rewards.item() == pytest.approx(chosen, abs=1e-6)
    assert metrics.rejected_rewards.item() == pytest.approx(rejected, abs=1e-6)
    assert metrics.margins.item() == pytest.approx(chosen - rejected, abs=1e-6)
    assert metrics.accuracies.tolist() == [1.0]
    assert loss.item() == pytest.approx(math.log1p(math.exp(-(chosen - rejected))), abs=1e-6)


def test_every_response_token_and_nothing_else_is_trained():
    dpo = DPO(Bigram(PROBABILITIES), pad_id=PAD)
    # The prompt holds 0 -> 1, the preferred response 1 -> 2 -> 0, the other 1 -> 1; then padding.
    preferred = torch.tensor([[0, 1, 2, 0, PAD]])
    unpreferred = torch.tensor([[0, 1, 1, PAD, PAD]])
    dpo(preferred, unpreferred, prompt_mask=torch.tensor([[True, True, False, False, False]])).backward()
    # Descent raises 1 -> 2 and 2 -> 0 and lowers 1 -> 1. At the start each counts beta * sigmoid(0) = 0.05 and the
    # softmax terms of 1 -> 2 and 1 -> 1 cancel.
    expected = torch.zeros(4, 4)
    expected[1, 2], expected[1, 1] = -0.05, 0.05
    expected[2] = 0.05 * torch.tensor(PROBABILITIES[2])
    expected[2, 0] -= 0.05
    torch.testing.assert_close(dpo.policy_model.table.grad, expected, rtol=0, atol=1e-7)


def test_mean_reduction_divides_each_response_by_its_own_tokens():
    dpo = DPO(Bigram(PROBABILITIES), beta=1.0, pad_id=PAD, reduction="mean")
    with torch.no_grad():
        dpo.policy_model.table[1, 2] += math.log(3)
    preferred = torch.tensor([[0, 1, 2, 0]])
    unpreferred = torch.tensor([[0, 1, 0, PAD]])
    _, metrics = dpo(
        preferred, unpreferred, prompt_mask=torch.tensor([[True, True, False, False]]), return_metrics=True
    )
    assert metrics.chosen_rewards.item() == pytest.approx(math.log((2 / 3) / 0.4) / 2, abs=1e-6)
    assert metrics.rejected_rewards.item() == pytest.approx(math.log((1 / 6) / 0.3), abs=1e-6)


def test_accuracy_counts_a_tie_half():
    dpo = DPO(Bigram(PROBABILITIES))
    with torch.no_grad():
        dpo.policy_model.table[1, 2] += 1.0
    preferred = torch.tensor([[1, 2], [1, 0], [2, 0]])
    unpreferred = torch.tensor([[1, 0], [1, 2], [2, 1]])
    _, metrics = dpo(
        preferred, unpreferred, prompt_mask=torch.tensor([[True, False]]).expand(3, 2), return_metrics=True
    )
    assert metrics.accuracies.tolist() == [1.0, 0.0, 0.5]


# Models


@pytest.mark.parametrize("build", [tiny_transformer, tiny_llama, tiny_gpt2])
def test_loss_is_ln2_when_policy_equals_reference(build: Callable[[], nn.Module]):
    torch.manual_seed(0)
    dpo = DPO(build()).train()
    preferred, unpreferred, prompt_mask = random_pairs()
    loss, metrics = dpo(preferred, unpreferred, prompt_mask=prompt_mask, return_metrics=True)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert loss.ndim == 0
    assert metrics.chosen_rewards.tolist() == metrics.rejected_rewards.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("build", [tiny_transformer, tiny_llama, tiny_gpt2])
def test_loss_of_ragged_pairs_is_that_of_each_sequence_alone(build: Callable[[], nn.Module]):
    torch.manual_seed(0)
    dpo = DPO(build(), beta=0.3, pad_id=0).train()
    disturb(dpo.policy_model)
    preferred, unpreferred, prompt_mask = random_pairs()
    preferred_ends, unpreferred_ends = [10, 7, 5], [6, 10, 4]
    for row in range(3):
        preferred[row, preferred_ends[row] :] = 0
        unpreferred[row, unpreferred_ends[row] :] = 0
    loss, metrics = dpo(preferred, unpreferred, prompt_mask=prompt_mask, return_metrics=True)

    rewards = torch.stack(
        [
            0.3
            * (
                response_logp(dpo.policy_model, ids[row, :end], start=PROMPT, end=end)
                - response_logp(dpo.ref_model, ids[row, :end], start=PROMPT, end=end)
            )
            for ids, ends in ((preferred, preferred_ends), (unpreferred, unpreferred_ends))
            for row, end in enumerate(ends)
        ]
    ).view(2, 3)
    torch.testing.assert_close(metrics.chosen_rewards.double(), rewards[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(metrics.rejected_rewards.double(), rewards[1], rtol=0, atol=1e-5)
    assert loss.item() == pytest.approx(-F.logsigmoid(rewards[0] - rewards[1]).mean().item(), abs=1e-5)


def test_dropout_is_off_in_training_mode():
    torch.manual_seed(0)
    dpo = DPO(tiny_transformer()).train()
    disturb(dpo.policy_model)
    preferred, unpreferred, prompt_mask = random_pairs()
    assert dpo.policy_model.training
    losses = [dpo(preferred, unpreferred, prompt_mask=prompt_mask) for _ in range(2)]
    assert torch.equal(*losses)


def test_a_model_takes_one_token_more_than_it_has_positions():
    torch.manual_seed(0)
    dpo = DPO(tiny_gpt2())
    preferred, unpreferred, prompt_mask = random_pairs(length=13)
    assert dpo(preferred, unpreferred, prompt_mask=prompt_mask).isfinite()


@pytest.mark.parametrize(
    ("loss_type", "at_rest"),
    [("sigmoid", math.log(2)), ("hinge", 1.0), ("ipo", 6.25), ("nca_pair", 2 * math.log(2)), ("aot", math.log(2))],
)
def test_other_losses_start_at_their_own_value(loss_type, at_rest):
    dpo = DPO(Bigram(PROBABILITIES), beta=0.2, loss_type=loss_type)
    loss = dpo(torch.tensor([[0, 1, 2]]), torch.tensor([[0, 1, 1]]), prompt_mask=torch.tensor([[True, True, False]]))
    assert loss.item() == pytest.approx(at_rest, rel=1e-6)


def test_a_loss_that_carries_a_running_mean_is_for_the_engines():
    with pytest.raises(ValueError, match=r"loss_type must be a loss without a running mean.*got 'bco_pair'"):
        DPO(Bigram(PROBABILITIES), loss_type="bco_pair")


# Learning


def successor_language(batch: int, generator: torch.Generator) -> Tensor:
    """Sequences of 12 tokens in which 1 or 2 is added at each step, modulo the vocabulary."""
    steps = torch.randint(1, 3, (batch, 12), generator=generator)
    return steps.cumsum(-1) % VOCAB


def test_steps_on_a_pretrained_transformer_raise_the_preferred_response_and_leave_the_reference():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(3)
    model = tiny_transformer()
    pretraining = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        ids = successor_language(16, generator)
        loss = F.cross_entropy(model(ids[:, :-1]).transpose(1, 2), ids[:, 1:])
        pretraining.zero_grad()
        loss.backward()
        pretraining.step()
    assert loss.item() < 1.2  # the language's own entropy is ln 2, guessing costs ln 16 = 2.8

    # Prefer a step of 2 after every prompt over a step of 1.
    prompts = successor_language(8, generator)[:, :6]
    steps = torch.arange(1, 7)
    preferred = torch.cat([prompts, (prompts[:, -1:] + 2 * steps) % VOCAB], 1)
    unpreferred = torch.cat([prompts, (prompts[:, -1:] + steps) % VOCAB], 1)
    prompt_mask = (torch.arange(12) < 6).expand(8, 12)

    dpo = DPO(model, beta=0.1).train()
    assert dpo.policy_model is model
    assert next(dpo.ref_model.parameters()).grad is None
    reference = snapshot(dpo.ref_model)
    optimizer = torch.optim.AdamW(dpo.parameters(), lr=1e-3)
    history = []
    for _ in range(10):
        loss, metrics = dpo(preferred, unpreferred, prompt_mask=prompt_mask, return_metrics=True)
        history.append((loss.item(), metrics.margins.mean().item(), metrics.accuracies.mean().item()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    assert history[0] == (pytest.approx(math.log(2), abs=1e-6), 0.0, 0.5)
    losses, margins, _ = zip(*history, strict=True)
    assert list(losses) == sorted(losses, reverse=True)
    assert list(margins) == sorted(margins)
    assert history[-1][2] == 1.0
    assert is_equal(reference, snapshot(dpo.ref_model))
    assert not is_equal(reference, snapshot(dpo.policy_model))
    assert all(parameter.grad is None for parameter in dpo.ref_model.parameters())


# Beside x_transformers.DPO


def test_parity_with_x_transformers_where_its_masks_select_the_same_tokens():
    torch.manual_seed(0)
    model = tiny_transformer().eval()
    theirs, ours = x_transformers.DPO(model, beta=0.3), DPO(model, beta=0.3, reduction="mean")
    disturb(model)
    preferred, unpreferred, prompt_mask = random_pairs()
    preferred_mask = torch.arange(10) < torch.tensor([[10], [7], [5]])
    unpreferred_mask = torch.arange(10) < torch.tensor([[6], [10], [4]])

    # It applies entry t of a mask to the token at t + 1, so it gets masks moved one to the left.
    expected = theirs(
        preferred,
        unpreferred,
        prompt_mask=prompt_mask.roll(-1, 1),
        preferred_seq_mask=preferred_mask.roll(-1, 1),
        unpreferred_seq_mask=unpreferred_mask.roll(-1, 1),
    )
    masks = {"preferred_seq_mask": preferred_mask, "unpreferred_seq_mask": unpreferred_mask}
    loss = ours(preferred, unpreferred, prompt_mask=prompt_mask, **masks)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)

    policy = list(model.parameters())
    for grad, expected_grad in zip(
        torch.autograd.grad(loss, policy, allow_unused=True),
        torch.autograd.grad(expected, policy, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-6)

    with_the_same_masks = theirs(preferred, unpreferred, prompt_mask=prompt_mask, **masks)
    assert abs(with_the_same_masks.item() - loss.item()) > 1e-4  # a hundred times the tolerance above


def test_the_first_response_token_is_trained_here_and_not_in_x_transformers():
    preferred, unpreferred = torch.tensor([[0, 1, 2]]), torch.tensor([[0, 1, 0]])
    prompt_mask = torch.tensor([[True, True, False]])
    theirs, ours = Bigram(PROBABILITIES), Bigram(PROBABILITIES)
    x_transformers.DPO(theirs)(preferred, unpreferred, prompt_mask=prompt_mask).backward()
    DPO(ours)(preferred, unpreferred, prompt_mask=prompt_mask).backward()
    assert not theirs.table.grad.any()
    assert ours.table.grad[1, 2] < 0 < ours.table.grad[1, 0]


def test_a_reference_with_tied_embeddings_keeps_its_own_head_which_that_of_x_transformers_does_not():
    def disturbed(wrapper: type) -> tuple[Tensor, Tensor]:
        model = tiny_transformer(tie_embedding=True).eval()
        wrapped, ids = wrapper(model), torch.tensor([[1, 2, 3]])
        before = wrapped.ref_model(ids)
        disturb(model)
        return before, wrapped.ref_model(ids)

    assert torch.equal(*disturbed(DPO))
    assert not torch.allclose(*disturbed(x_transformers.DPO))


# The two models


def test_parameters_are_those_of_the_policy_alone():
    dpo = DPO(tiny_llama())
    policy = list(dpo.policy_model.parameters())
    assert [id(parameter) for parameter in dpo.parameters()] == [id(parameter) for parameter in policy]
    assert [id(parameter) for parameter in dpo.parameters(recurse=True)] == [id(parameter) for parameter in policy]
    assert list(dpo.parameters(recurse=False)) == []
    assert not any(parameter.requires_grad for parameter in dpo.ref_model.parameters())


def test_named_parameters_have_the_names_of_the_state_dict():
    dpo = DPO(Bigram(PROBABILITIES))
    assert [name for name, _ in dpo.named_parameters()] == ["policy_model.table"]
    assert [name for name, _ in dpo.named_parameters("outer")] == ["outer.policy_model.table"]
    assert [name for name, _ in nn.ModuleDict({"dpo": dpo}).named_parameters()] == [
        "dpo.policy_model.table",
        "dpo.ref_model.table",
    ]
    assert set(dict(dpo.named_parameters())) < set(dpo.state_dict())


def test_named_parameters_yield_a_tied_weight_once_or_under_each_name():
    model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    dpo = DPO(model)
    assert [name for name, _ in dpo.named_parameters()] == ["policy_model.0.weight"]
    assert [name for name, _ in dpo.named_parameters(remove_duplicate=False)] == [
        "policy_model.0.weight",
        "policy_model.1.weight",
    ]
    assert dpo.ref_model[1].weight is dpo.ref_model[0].weight


def test_requires_grad_on_the_wrapper_does_not_thaw_the_reference():
    dpo = DPO(tiny_llama()).requires_grad_(True)
    assert not any(parameter.requires_grad for parameter in dpo.ref_model.parameters())


def test_the_reference_stays_in_evaluation_mode():
    dpo = DPO(tiny_transformer().train())
    assert dpo.policy_model.training
    assert not any(module.training for module in dpo.ref_model.modules())
    dpo.train()
    assert dpo.policy_model.training
    assert not any(module.training for module in dpo.ref_model.modules())
    assert dpo.eval() is dpo
    assert not dpo.policy_model.training


def test_a_copy_carries_no_gradients():
    model = Bigram(PROBABILITIES)
    model(torch.tensor([[0]])).sum().backward()
    dpo = DPO(model)
    assert dpo.ref_model.table.grad is None
    assert dpo.policy_model.table.grad is not None


def test_a_resumed_run_has_the_reference_it_started_from():
    torch.manual_seed(0)
    dpo = DPO(tiny_llama(), beta=0.3)
    disturb(dpo.policy_model)
    preferred, unpreferred, prompt_mask = random_pairs()
    loss = dpo(preferred, unpreferred, prompt_mask=prompt_mask)

    # The folder of a run holds the moved policy; the wrapper's copy of it is not the reference.
    resumed = DPO(tiny_llama(), beta=0.3)
    resumed.load_state_dict(dpo.state_dict())

    assert is_equal(resumed.ref_model.state_dict(), dpo.ref_model.state_dict())
    assert torch.equal(resumed(preferred, unpreferred, prompt_mask=prompt_mask), loss)
    assert not any(parameter.requires_grad for parameter in resumed.ref_model.parameters())


def test_the_policy_saves_without_its_copy_and_opens_as_the_bare_model():
    torch.manual_seed(0)
    dpo = DPO(tiny_llama())
    disturb(dpo.policy_model)
    bare = tiny_llama()
    bare.load_state_dict(dpo.policy_model.state_dict())
    assert is_equal(bare.state_dict(), dpo.policy_model.state_dict())
