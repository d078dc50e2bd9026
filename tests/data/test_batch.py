from dataclasses import replace

import pytest
import torch

from dpo_ds.data.batch import Span, packed_batch, padded_batch
from dpo_ds.data.tokenization import TokenizedPair

PAIRS = [
    TokenizedPair(id="a", prompt_ids=(11, 12), chosen_ids=(21, 22, 23), rejected_ids=(31,)),
    TokenizedPair(id="b", prompt_ids=(13,), chosen_ids=(24,), rejected_ids=(32, 33)),
]


def test_rows_hold_prompt_and_response_padded_to_the_right_chosen_first():
    batch = padded_batch(PAIRS)
    assert batch.input_ids.tolist() == [[11, 12, 21, 22, 23], [13, 24, 0, 0, 0], [11, 12, 31, 0, 0], [13, 32, 33, 0, 0]]
    assert batch.response_tokens.tolist() == [3, 1, 1, 2]


def test_every_response_token_is_predicted_by_the_position_before_it_and_nothing_else_is_scored():
    batch = padded_batch(PAIRS)
    ids = batch.input_ids.flatten()
    assert batch.targets.tolist() == [21, 22, 23, 24, 31, 32, 33]
    assert ids[batch.predicted_at + 1].tolist() == batch.targets.tolist()
    assert ids[batch.predicted_at].tolist() == [12, 21, 22, 13, 12, 13, 32]
    assert batch.response_of.tolist() == [0, 0, 0, 1, 2, 3, 3]


def test_a_prompt_counts_once_and_a_stand_in_not_at_all():
    assert padded_batch(PAIRS).tokens == 2 + 3 + 1 + 1 + 1 + 2
    assert padded_batch(PAIRS).filled == 5 + 2 + 3 + 3
    stand_in = padded_batch(PAIRS[:1], weight=0.0)
    assert (stand_in.tokens, stand_in.filled, stand_in.weights.tolist()) == (0, 0, [0.0])


def test_a_packed_row_holds_each_prompt_once_and_no_padding():
    batch = packed_batch(PAIRS)
    assert batch.input_ids.tolist() == [[11, 12, 21, 22, 23, 31, 13, 24, 32, 33]]
    assert batch.spans == (Span(0, 2, 3, 1), Span(6, 1, 1, 2))
    assert batch.tokens == batch.filled == batch.input_ids.numel()
    assert batch.response_tokens.tolist() == [3, 1, 1, 2]


def test_both_packed_responses_count_their_positions_from_the_end_of_their_prompt():
    assert packed_batch(PAIRS).position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 0, 1, 1, 2]]


def test_the_last_prompt_token_predicts_the_first_token_of_both_packed_responses():
    batch = packed_batch(PAIRS)
    assert batch.targets.tolist() == [21, 22, 23, 24, 31, 32, 33]
    assert batch.input_ids.flatten()[batch.predicted_at].tolist() == [12, 21, 22, 13, 12, 13, 32]
    assert batch.predicted_at.tolist() == [1, 2, 3, 6, 1, 6, 8]
    assert batch.response_of.tolist() == [0, 0, 0, 1, 2, 3, 3]


def test_a_packed_stand_in_counts_for_nothing():
    stand_in = packed_batch(PAIRS[:1], weight=0.0)
    assert (stand_in.tokens, stand_in.filled, stand_in.weights.tolist()) == (0, 0, [0.0])


MASKED = TokenizedPair("c", (11, 12), (21, 22, 23, 24), (31, 32), (True, False, False, True), (True, True))


@pytest.mark.parametrize("layout", [padded_batch, packed_batch])
def test_what_is_not_scored_is_read_and_neither_predicted_nor_counted(layout):
    batch = layout([PAIRS[1], MASKED])
    whole = layout([PAIRS[1], replace(MASKED, chosen_scored=None, rejected_scored=None)])
    assert torch.equal(batch.input_ids, whole.input_ids)
    assert (batch.tokens, batch.filled, batch.spans) == (whole.tokens, whole.filled, whole.spans)
    assert batch.targets.tolist() == [24, 21, 24, 32, 33, 31, 32]
    assert batch.input_ids.flatten()[batch.predicted_at].tolist() == [13, 12, 23, 13, 32, 12, 31]
    assert batch.response_of.tolist() == [0, 1, 1, 2, 2, 3, 3]
    assert batch.response_tokens.tolist() == [1, 2, 2, 2]


@pytest.mark.parametrize("layout", [padded_batch, packed_batch])
def test_what_the_data_say_of_a_pair_travels_beside_it(layout):
    assert layout(PAIRS).labels == (None, None, None)
    batch = layout([PAIRS[0], replace(PAIRS[1], probability=0.25, weight=2.0)])
    assert (batch.probabilities.tolist(), batch.margins, batch.loss_weights.tolist()) == ([1.0, 0.25], None, [1.0, 2.0])
    assert batch.weights.tolist() == [1.0, 1.0]
    assert layout([replace(PAIRS[0], margin=-0.5)], weight=0.0).labels.margins.tolist() == [-0.5]


@pytest.mark.parametrize(("layout", "count"), [(padded_batch, 7), (packed_batch, 7)])
def test_moving_a_batch_moves_every_tensor(layout, count):
    moved = layout(PAIRS).to(torch.device("meta"))
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == count
    assert all(tensor.device.type == "meta" for tensor in tensors)
