"""What the wrapper makes of masks and padding, and what it refuses."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import dpo_ds
from dpo_ds import DPO
from tests.wrapped import PAD, PROBABILITIES, Bigram, disturb, random_pairs, tiny_transformer

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
