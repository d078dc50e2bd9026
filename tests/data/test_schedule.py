import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ds.data.schedule import (
    Lengths,
    PackedRows,
    PaddedRows,
    Part,
    Plan,
    Schedule,
    plan_evaluation,
    plan_training,
    regroup,
)


def schedule(**changes: object) -> Schedule:
    settings = {"parts": [Part(10)], "pairs_per_step": 4, "epochs": 2, "max_steps": None, "seed": 7, "shuffle": True}
    return Schedule.of_run(**{**settings, **changes})  # type: ignore[arg-type]


def test_an_epoch_holds_every_pair_once_and_ends_with_a_ragged_step():
    steps = [schedule().pairs_of_step(step).tolist() for step in (1, 2, 3)]
    assert [len(step) for step in steps] == [4, 4, 2]
    assert sorted(pair for step in steps for pair in step) == list(range(10))


def test_epochs_differ_in_order_and_a_seed_repeats_itself():
    first = np.concatenate([schedule().pairs_of_step(step) for step in (1, 2, 3)])
    second = np.concatenate([schedule().pairs_of_step(step) for step in (4, 5, 6)])
    again = np.concatenate([schedule().pairs_of_step(step) for step in (1, 2, 3)])
    assert not np.array_equal(first, second)
    assert np.array_equal(first, again)


def test_without_shuffling_the_order_is_the_files():
    assert schedule(shuffle=False).pairs_of_step(2).tolist() == [4, 5, 6, 7]
    assert schedule(shuffle=False).pairs_of_step(4).tolist() == [0, 1, 2, 3]


def test_steps_are_those_of_all_epochs_unless_max_steps_says_otherwise():
    assert schedule().steps == 6
    assert schedule().total_pairs == 20
    assert schedule(max_steps=4).steps == 4
    assert schedule(max_steps=4).total_pairs == 10 + 4


def epoch_of(number: int, **changes: object) -> list[int]:
    made = schedule(**changes)
    steps = range(number * made.steps_per_epoch + 1, (number + 1) * made.steps_per_epoch + 1)
    return [pair for step in steps for pair in made.pairs_of_step(step).tolist()]


def test_the_order_of_unweighted_sources_is_one_permutation_seeded_by_seed_and_epoch():
    parts = [Part(6), Part(4)]
    assert epoch_of(1, parts=parts) == np.random.RandomState([7, 1]).permutation(10).tolist()


def test_a_weight_of_two_is_each_pair_twice_an_epoch():
    for epoch in (0, 1):
        assert sorted(epoch_of(epoch, parts=[Part(3, 2.0), Part(4)])) == [0, 0, 1, 1, 2, 2, 3, 4, 5, 6]


def test_a_weight_of_a_half_is_another_half_each_epoch_and_all_pairs_in_two():
    first, second, third = (set(epoch_of(epoch, parts=[Part(4), Part(20, 0.5)])) for epoch in (0, 1, 2))
    assert [len(epoch) for epoch in (first, second, third)] == [14, 14, 14]
    assert first & second == {0, 1, 2, 3}
    assert first | second == set(range(24))
    assert third not in (first, second)


def test_without_shuffling_weighted_sources_follow_each_other_in_the_files_order():
    parts = [Part(4, 0.5), Part(2, 1.5)]
    assert [epoch_of(epoch, parts=parts, shuffle=False) for epoch in (0, 1)] == [[0, 1, 4, 5, 4], [2, 3, 5, 4, 5]]


def test_a_source_gives_an_epoch_its_share_rounded_half_up_and_at_least_one_pair():
    shares = [(10, 0.25, 3), (10, 0.24, 2), (10, 0.01, 1), (3, 0.5, 2), (0, 1.0, 0), (1, 2.5, 3)]
    assert [Part(pairs, weight).taken for pairs, weight, _ in shares] == [taken for _, _, taken in shares]


@given(
    parts=st.lists(st.builds(Part, st.integers(1, 12), st.floats(0.05, 4)), min_size=1, max_size=3),
    epochs=st.integers(1, 6),
    shuffle=st.booleans(),
)
def test_no_pair_of_a_source_comes_more_than_once_oftener_than_another(parts, epochs, shuffle):
    taken = [pair for n in range(epochs) for pair in epoch_of(n, parts=parts, shuffle=shuffle)]
    start = 0
    for part in parts:
        times = [taken.count(pair) for pair in range(start, start + part.pairs)]
        assert sum(times) == epochs * part.taken
        assert max(times) - min(times) <= 1
        start += part.pairs
    assert schedule(parts=parts, epochs=epochs).total_pairs == len(taken)


def test_a_pair_that_a_step_holds_twice_is_planned_twice():
    rows = PackedRows(np.full(4, 10), np.full(4, 1.0))
    for split in (rows, PaddedRows(np.full(4, 5))):
        assert_runs_everywhere(
            plan_training([3, 1, 3, 0], rows=split, ranks=2, tokens_per_micro_batch=20), [0, 1, 3, 3], 2
        )


def assert_runs_everywhere(plan: Plan, pairs: list[int], ranks: int) -> None:
    assert len(plan) == ranks
    assert len({len(micro_batches) for micro_batches in plan}) == 1, "ranks would hang in each other's collectives"
    real = [pair for rank in plan for batch in rank if batch.weight for pair in batch.pairs]
    assert sorted(real) == pairs
    assert all(len(batch.pairs) >= 1 for rank in plan for batch in rank)


PARTS = st.tuples(st.integers(1, 30), st.integers(1, 15), st.integers(1, 15))


@given(parts=st.lists(PARTS, min_size=1, max_size=40), ranks=st.integers(1, 5), budget=st.integers(100, 400))
@pytest.mark.parametrize("planner", [plan_training, plan_evaluation])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_plan_holds_every_pair_once_within_the_budget_and_as_many_micro_batches_on_every_rank(
    planner, layout, parts, ranks, budget
):
    lengths = Lengths(*np.array(parts).T)
    rows = PaddedRows(lengths.longer) if layout == "padded" else PackedRows(lengths.tokens, lengths.attended)
    plan = planner(range(len(parts)), rows=rows, ranks=ranks, tokens_per_micro_batch=budget)
    assert_runs_everywhere(plan, list(range(len(parts))), ranks)
    for rank in plan:
        for batch in rank:
            held = [parts[pair] for pair in batch.pairs]
            padded = 2 * len(held) * max(prompt + max(chosen, rejected) for prompt, chosen, rejected in held)
            assert (padded if layout == "padded" else sum(map(sum, held))) <= budget


def test_lengths_of_a_pair_count_its_prompt_once():
    lengths = Lengths(np.array([4]), np.array([2]), np.array([3]))
    assert (lengths.longer, lengths.scored, lengths.tokens) == (7, 5, 9)
    # The prompt's tokens see half of it each, a response's the whole prompt and half of itself.
    assert lengths.attended == 4 * 2 + 2 * (4 + 1) + 3 * (4 + 1.5)


def test_packed_rows_are_filled_tightly_and_cost_every_rank_the_same():
    draw = np.random.RandomState(0)
    tokens = draw.randint(20, 400, 64)
    rows = PackedRows(tokens, tokens.astype(float))
    plan = plan_training(range(64), rows=rows, ranks=4, tokens_per_micro_batch=1024)
    sums = np.array([[tokens[list(batch.pairs)].sum() for batch in rank] for rank in plan])
    assert sums.size == -(-tokens.sum() // 1024 // 4) * 4, "more micro-batches than the tokens need"
    # Ranks wait for each other after every micro-batch.
    assert (np.ptp(sums, axis=0) < 0.02 * sums.mean(axis=0)).all()


def test_a_pair_that_no_other_fits_beside_has_a_row_of_its_own():
    tokens = np.array([90, 90, 90, 20])
    plan = plan_training(range(4), rows=PackedRows(tokens, tokens.astype(float)), ranks=1, tokens_per_micro_batch=100)
    assert [batch.pairs for batch in plan[0]] == [(0,), (1,), (2,), (3,)]


@given(parts=st.lists(PARTS, min_size=1, max_size=40), ranks=st.integers(1, 5))
def test_regrouped_ranks_keep_their_pairs_in_as_many_larger_micro_batches(parts, ranks):
    lengths = Lengths(*np.array(parts).T)
    rows = PackedRows(lengths.tokens, lengths.attended)
    plan = plan_training(range(len(parts)), rows=rows, ranks=ranks, tokens_per_micro_batch=60)
    larger = regroup(plan, rows=rows, tokens_per_micro_batch=600)
    assert len({len(rank) for rank in larger}) == 1
    assert len(larger[0]) <= len(plan[0])
    for before, after in zip(plan, larger, strict=True):
        assert {pair for batch in before for pair in batch.pairs} == {pair for batch in after for pair in batch.pairs}
        assert all(sum(sum(parts[pair]) for pair in batch.pairs) <= 600 for batch in after)


def test_a_micro_batch_is_split_rather_than_a_stand_in_added():
    plan = plan_training(range(4), rows=PaddedRows(np.full(4, 10)), ranks=2, tokens_per_micro_batch=1000)
    assert [[batch.pairs for batch in rank] for rank in plan] == [[(0, 1)], [(2, 3)]]
    assert all(batch.weight == 1 for rank in plan for batch in rank)


def test_ranks_share_a_step_evenly_although_one_micro_batch_could_hold_most_of_it():
    lengths = np.array([150, 140, 130, 120, 110, 100, 90, 80])
    plan = plan_training(range(8), rows=PaddedRows(lengths), ranks=2, tokens_per_micro_batch=2048)
    # 8 rows of 150 and 8 of 110 tokens; filling the budget first would give 12 of 150 and 4 of 90.
    assert [[batch.pairs for batch in rank] for rank in plan] == [[(0, 1, 2, 3)], [(4, 5, 6, 7)]]


def test_a_rank_without_a_pair_gets_the_shortest_as_a_stand_in_that_counts_for_nothing():
    plan = plan_training([0, 1], rows=PaddedRows(np.array([9, 5])), ranks=3, tokens_per_micro_batch=100)
    assert [(batch.pairs, batch.weight) for rank in plan for batch in rank] == [((0,), 1), ((1,), 1), ((1,), 0)]


def test_the_micro_batches_of_an_evaluation_do_not_depend_on_the_number_of_ranks():
    lengths = np.random.RandomState(0).randint(5, 60, 37)
    plans = [
        plan_evaluation(range(37), rows=PaddedRows(lengths), ranks=ranks, tokens_per_micro_batch=300)
        for ranks in (1, 2, 3)
    ]
    batches = [sorted(batch.pairs for rank in plan for batch in rank if batch.weight) for plan in plans]
    assert batches[0] == batches[1] == batches[2]


def test_the_longest_pairs_come_first_so_that_memory_runs_out_at_once_or_never():
    lengths = np.array([3, 50, 4, 40, 5, 30])
    plan = plan_training(range(6), rows=PaddedRows(lengths), ranks=1, tokens_per_micro_batch=100)
    assert plan[0][0].pairs == (1,)
