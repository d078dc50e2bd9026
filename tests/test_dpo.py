"""The wrapper of one module: beside x-transformers' own, around Hugging Face models, and against values by hand."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import x_transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from x_transformers import Decoder, TransformerWrapper

import dpo_ds
from dpo_ds import DPO
from dpo_ds.losses import LOSSES

VOCAB = 16
PROMPT = 3


class Bigram(nn.Module):
    """A language model that is a table: row ``i`` holds the logits of what follows token ``i``."""

    def __init__(self, probabilities: list[list[float]]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, ids: Tensor) -> Tensor:
        return self.table[ids]


# After token 0 comes 1 with 0.7, and so on; token 3 is the padding.
PROBABILITIES = [[0.1, 0.7, 0.1, 0.1], [0.3, 0.2, 0.4, 0.1], [0.5, 0.2, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]]
PAD = 3


def tiny_transformer() -> TransformerWrapper:
    layers = Decoder(dim=32, depth=1, heads=2, attn_dim_head=16, attn_dropout=0.1, ff_dropout=0.1)
    return TransformerWrapper(num_tokens=VOCAB, max_seq_len=12, emb_dropout=0.1, attn_layers=layers)


def tiny_llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_dropout=0.1,
        bos_token_id=1,
        eos_token_id=2,
    )
    return AutoModelForCausalLM.from_config(config)


def tiny_gpt2() -> nn.Module:
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=12, bos_token_id=1, eos_token_id=2
    )
    return AutoModelForCausalLM.from_config(config)


def random_pairs(batch: int = 3, length: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """Returns preferred, unpreferred and prompt mask: equal prompts, other responses, no token 0."""
    generator = torch.Generator().manual_seed(1)
    preferred, unpreferred = torch.randint(1, VOCAB, (2, batch, length), generator=generator)
    unpreferred[:, :PROMPT] = preferred[:, :PROMPT]
    prompt_mask = (torch.arange(length) < PROMPT).expand(batch, length)
    return preferred, unpreferred, prompt_mask


def disturb(model: nn.Module) -> None:
    """Moves a model away from where it was, so that it differs from its reference."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def is_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def response_logp(model: nn.Module, ids: Tensor, *, start: int, end: int) -> Tensor:
    """``log pi(ids[start:end] | ids[:start])`` of one sequence, ``(seq,)``, token by token and without a mask."""
    output = model(ids[None])
    logits = output if isinstance(output, Tensor) else output.logits
    logps = logits[0].double().log_softmax(-1)
    return torch.stack([logps[t - 1, ids[t]] for t in range(start, end)]).sum()


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


@pytest.mark.parametrize("loss_type", LOSSES)
def test_other_losses_start_at_their_own_value(loss_type):
    dpo = DPO(Bigram(PROBABILITIES), beta=0.2, loss_type=loss_type)
    loss = dpo(torch.tensor([[0, 1, 2]]), torch.tensor([[0, 1, 1]]), prompt_mask=torch.tensor([[True, True, False]]))
    assert loss.item() == pytest.approx(LOSSES[loss_type].at_zero_margin(0.2), rel=1e-6)


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


# Masks


def test_padding_found_by_its_id_is_that_of_masks_given():
    torch.manual_seed(0)
    model = tiny_transformer()
    preferred, unpreferred, prompt_mask = random_pairs()
    preferred[1, 7:] = 0
    unpreferred[2, 5:] = 0
    by_id, by_mask = DPO(model, pad_id=0), DPO(model)
    disturb(model)
    loss = by_id(preferred, unpreferred, prompt_mask=prompt_mask)
    expected = by_mask(
        preferred,
        unpreferred,
        prompt_mask=prompt_mask,
        preferred_seq_mask=preferred != 0,
        unpreferred_seq_mask=unpreferred != 0,
    )
    assert torch.equal(loss, expected)


def test_the_id_of_padding_inside_a_response_is_a_token():
    preferred, unpreferred = torch.tensor([[0, 1, PAD, 2, PAD, PAD]]), torch.tensor([[0, 1, 2, 2, PAD, PAD]])
    prompt_mask = torch.tensor([[True, True, False, False, False, False]])
    dpo = DPO(Bigram(PROBABILITIES), pad_id=PAD)
    dpo(preferred, unpreferred, prompt_mask=prompt_mask).backward()
    # 1 -> PAD is raised and 1 -> 2 lowered, each by beta * sigmoid(0); their softmax terms cancel.
    assert dpo.policy_model.table.grad[1].tolist() == pytest.approx([0, 0, 0.05, -0.05], abs=1e-7)


def test_masks_given_beat_the_id_of_padding():
    # The last real token has the id of the padding, as where EOS is both.
    preferred, unpreferred = torch.tensor([[0, 1, PAD, PAD]]), torch.tensor([[0, 1, 2, PAD]])
    prompt_mask = torch.tensor([[True, True, False, False]])
    dpo = DPO(Bigram(PROBABILITIES), pad_id=PAD)
    with pytest.raises(ValueError, match="row 0: the response in preferred_seq has no token"):
        dpo(preferred, unpreferred, prompt_mask=prompt_mask)
    mask = torch.tensor([[True, True, True, False]])
    loss = dpo(preferred, unpreferred, prompt_mask=prompt_mask, preferred_seq_mask=mask, unpreferred_seq_mask=mask)
    loss.backward()
    # 1 -> PAD is raised and 1 -> 2 lowered, each by beta * sigmoid(0); their softmax terms cancel.
    assert dpo.policy_model.table.grad[1].tolist() == pytest.approx([0, 0, 0.05, -0.05], abs=1e-7)


def test_sequences_of_two_lengths_take_a_prompt_mask_each():
    torch.manual_seed(0)
    model = tiny_transformer()
    preferred, unpreferred, prompt_mask = random_pairs()
    dpo = DPO(model, pad_id=0)
    disturb(model)
    padded = unpreferred.clone()
    padded[:, 6:] = 0
    loss = dpo(preferred, unpreferred[:, :6], prompt_mask=prompt_mask, unpreferred_prompt_mask=prompt_mask[:, :6])
    torch.testing.assert_close(loss, dpo(preferred, padded, prompt_mask=prompt_mask), rtol=0, atol=1e-6)


def test_a_prompt_mask_with_a_hole_leaves_tokens_between_responses_out():
    # 0 | 1 | 2 | 0: the second and the last token are the response's, the third is not.
    preferred, unpreferred = torch.tensor([[0, 1, 2, 0]]), torch.tensor([[0, 2, 2, 1]])
    prompt_mask = torch.tensor([[True, False, True, False]])
    dpo = DPO(Bigram(PROBABILITIES))
    dpo(preferred, unpreferred, prompt_mask=prompt_mask).backward()
    assert not dpo.policy_model.table.grad[1].any()
    assert dpo.policy_model.table.grad[0, 1] < 0


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "beta must be > 0, got 0.0"),
        ({"beta": math.nan}, "beta must be > 0, got nan"),
        ({"loss_type": "dpo"}, "loss_type must be one of sigmoid, .*, got 'dpo'"),
        ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, "label_smoothing must be 0 for the ipo loss, got 0.1"),
        ({"reduction": "max"}, "reduction must be 'sum', 'mean' or None, got 'max'"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DPO(Bigram(PROBABILITIES), **options)


IDS = torch.tensor([[0, 1, 2, 0], [0, 1, 1, 2]])
PROMPTS = torch.tensor([[True, True, False, False]] * 2)
ALL = torch.ones(2, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preferred_seq": IDS.float()}, r"preferred_seq must hold token ids, .* got torch.float32 of \(2, 4\)"),
        (
            {"preferred_seq": IDS[0], "unpreferred_seq": IDS[0]},
            r"preferred_seq must hold .* shape \(batch, seq\), got torch.int64 of \(4,\)",
        ),
        ({"unpreferred_seq": IDS[:, :3]}, r"\(2, 4\), unpreferred_seq \(2, 3\), .* give unpreferred_prompt_mask"),
        (
            {"unpreferred_seq": IDS[:1], "unpreferred_prompt_mask": PROMPTS[:1]},
            "preferred_seq has 2 rows, unpreferred_seq 1",
        ),
        (
            {"prompt_mask": PROMPTS.long()},
            r"the prompt mask of preferred_seq must be bool of \(2, 4\), got torch.int64 of \(2, 4\)",
        ),
        ({"prompt_mask": PROMPTS[:1]}, r"prompt mask of preferred_seq must be bool of \(2, 4\), .* of \(1, 4\)"),
        (
            {"unpreferred_prompt_mask": PROMPTS[:, :3]},
            r"prompt mask of unpreferred_seq must be bool of \(2, 4\), .* of \(2, 3\)",
        ),
        ({"preferred_seq_mask": ALL.float()}, "preferred_seq_mask must be bool of .*, got torch.float32"),
        ({"unpreferred_seq_mask": ALL[:, 1:]}, r"unpreferred_seq_mask must be bool of \(2, 4\), .* of \(2, 3\)"),
        (
            {"unpreferred_seq_mask": torch.tensor([[True] * 4, [False, True, True, True]])},
            "row 1: unpreferred_seq_mask is False before a True: pad to the right",
        ),
        (
            {"preferred_seq": torch.tensor([[0, 1, 2, 0], [PAD, 0, 1, 2]])},
            "row 1: preferred_seq begins with pad_id 3: pad to the right",
        ),
        (
            {"unpreferred_seq": torch.tensor([[0, 1, 2, 0], [0, 1, PAD, PAD]])},
            "row 1: the response in unpreferred_seq has no token",
        ),
        ({"prompt_mask": ALL}, "row 0: the response in preferred_seq has no token"),
        (
            {"preferred_seq": torch.tensor([[0, 1, 2, 0], [PAD] * 4])},
            "row 1: the response in preferred_seq has no token",
        ),
        # A first token has nothing that predicts it.
        (
            {"prompt_mask": torch.tensor([[True, True, False, False], [False, True, True, True]])},
            "row 1: the response in preferred_seq has no token",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused_by_name_and_row(changes, message):
    inputs = {"preferred_seq": IDS, "unpreferred_seq": IDS.flip(0), "prompt_mask": PROMPTS} | changes
    preferred, unpreferred = inputs.pop("preferred_seq"), inputs.pop("unpreferred_seq")
    with pytest.raises(ValueError, match=message):
        DPO(Bigram(PROBABILITIES), pad_id=PAD)(preferred, unpreferred, **inputs)


class Answer(nn.Module):
    """A module that returns what it is told to."""

    def __init__(self, answer: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, ids: Tensor) -> object:
        return self.answer(ids)


@pytest.mark.parametrize(
    ("answer", "got"),
    [
        (lambda ids: ids.float().mean(), r"\(\)"),
        (lambda ids: torch.zeros(2, 9, 4), r"\(2, 9, 4\)"),
        (lambda ids: (torch.zeros(2, 3, 4), None), "tuple"),
    ],
)
def test_a_model_that_returns_no_logits_is_refused(answer, got):
    with pytest.raises(ValueError, match=rf"model must map ids \(2, 3\) to logits .*, got {got}"):
        DPO(Answer(answer))(IDS, IDS.flip(0), prompt_mask=PROMPTS)


PARTITION_THEN_WRAP = """
import deepspeed
from torch import nn

from dpo_ds import DPO

deepspeed.init_distributed(dist_backend="gloo")
zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": 1, "zero_optimization": zero}):
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8))
assert all(parameter.numel() == 0 for parameter in model.parameters())
try:
    DPO(model)
except ValueError as error:
    print("refused:", error)
"""


@pytest.mark.ranks
def test_a_model_that_zero3_has_partitioned_is_refused_with_the_way_to_go(tmp_path):
    rank = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",  # any free one
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(dpo_ds.__file__).parents[1]),
        # DeepSpeed builds its CPU collective with the ninja that lies beside the interpreter.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    result = subprocess.run(
        [sys.executable, "-c", PARTITION_THEN_WRAP],
        cwd=tmp_path,
        env=os.environ | rank,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "refused: model must hold its own weights, but ZeRO-3 has partitioned 3" in result.stdout, result.stderr
    assert "dpo_ds.initialize" in result.stdout
