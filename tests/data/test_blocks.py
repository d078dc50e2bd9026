import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ds.data.blocks import BlockSchedule, Place
from dpo_ds.errors import UserError


def schedule(**values):
    defaults = {"rows": 25, "rows_per_block": 10, "max_dropped": 0.2, "pairs_per_step": 3, "epochs": 2}
    return BlockSchedule.of_run(**{**defaults, "max_steps": None, "seed": 3, "shuffle": True, **values})


def test_a_block_serves_the_whole_steps_of_its_fewest_pairs():
    # 10 rows less 2: two steps of 3; the 5 of the last block less 1: one.
    assert schedule().steps_of_blocks.tolist() == [2, 2, 1]
    assert (schedule().steps_per_epoch, schedule().steps, schedule().turns) == (5, 10, 6)
    assert schedule(rows=23).steps_of_blocks.tolist() == [2, 2, 1]
    # 2 rows make no step: they are left out.
    assert schedule(rows=22).steps_of_blocks.tolist() == [2, 2]
    assert schedule(max_dropped=0.0).steps_of_blocks.tolist() == [3, 3, 1]
    assert [*schedule().rows_of_block(2)] == [20, 21, 22, 23, 24]


def test_without_shuffling_blocks_and_pairs_keep_their_order():
    plain = schedule(shuffle=False)
    assert [plain.place(step)[:3] for step in range(1, 7)] == [
        (0, 0, 0),
        (0, 0, 0),
        (1, 0, 1),
        (1, 0, 1),
        (2, 0, 2),
        (3, 1, 0),
    ]
    assert plain.place(2) == Place(turn=0, epoch=0, block=0, position=1)
    assert plain.pairs_of_step(2, pairs=8).tolist() == [3, 4, 5]
    assert plain.pairs_of_step(6, pairs=8).tolist() == [0, 1, 2]


@given(
    rows=st.integers(1, 300),
    rows_per_block=st.integers(1, 60),
    max_dropped=st.sampled_from([0.0, 0.05, 0.1, 0.3, 1 / 3]),
    pairs_per_step=st.integers(1, 7),
    seed=st.integers(0, 5),
    more=st.integers(0, 9),
)
def test_an_epoch_takes_every_block_once_and_none_of_its_pairs_twice(
    rows, rows_per_block, max_dropped, pairs_per_step, seed, more
):
    values = {
        "rows": rows,
        "rows_per_block": rows_per_block,
        "max_dropped": max_dropped,
        "pairs_per_step": pairs_per_step,
        "seed": seed,
    }
    try:
        found = schedule(**values)
    except UserError:
        least = min(rows, rows_per_block) - int(max_dropped * min(rows, rows_per_block))
        assert least < pairs_per_step
        return
    taken = {}
    for step in range(1, found.steps + 1):
        place = found.place(step)
        assert found.block_of_turn(place.turn) == place.block
        # As few pairs as a block may have, or more of them.
        block_rows = len(found.rows_of_block(place.block))
        pairs = block_rows - int(max_dropped * block_rows) + more
        indices = found.pairs_of_step(step, pairs=pairs)
        assert len(indices) == pairs_per_step
        assert indices.max() < pairs
        taken.setdefault((place.epoch, place.block), []).extend(indices)
    assert {block for epoch, block in taken if epoch == 0} == set(range(found.blocks))
    assert {block for epoch, block in taken if epoch == 1} == set(range(found.blocks))
    assert all(len(set(indices)) == len(indices) for indices in taken.values())


def test_epochs_and_seeds_have_other_orders_of_blocks_and_of_pairs():
    many = {"rows": 1000, "rows_per_block": 20}
    one, other = schedule(**many), schedule(**many, seed=4)
    orders = [[one.block_of_turn(turn) for turn in range(start, start + 50)] for start in (0, 50)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(50))
    assert orders[0] != orders[1] != [other.block_of_turn(turn) for turn in range(50)]
    single = schedule(rows=100, rows_per_block=100)
    assert not np.array_equal(
        single.pairs_of_step(1, pairs=90), single.pairs_of_step(1 + single.steps_per_epoch, pairs=90)
    )


def test_a_run_may_have_its_own_number_of_steps():
    assert schedule(max_steps=7).steps == 7
    assert schedule(max_steps=7, shuffle=False).turns == 4


@pytest.mark.parametrize("values", [{"max_dropped": 1.0}, {"pairs_per_step": 9}, {"rows": 2}])
def test_blocks_that_serve_no_step_are_refused(values):
    with pytest.raises(UserError, match=r"data.streaming.rows_per_shard must give train.pairs_per_step \(.*raise it"):
        schedule(**values)
