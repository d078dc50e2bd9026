import math
import statistics

import numpy as np
import pytest
import torch

from dpo_ds.losses import PairLogps, preference_loss
from dpo_ds.metrics import Tally, add_diagnostics, add_groups, add_histogram, add_pairs, length_groups, length_names

CPU = torch.device("cpu")


def pairs(margins):
    zeros = torch.zeros(len(margins))
    ones = torch.ones(len(margins))
    return PairLogps(torch.tensor(margins), zeros, zeros, zeros, ones, ones)


def tally_of(margins, weights):
    tally = Tally(CPU)
    logps = pairs(margins)
    add_pairs(tally, preference_loss(logps, type="sigmoid", beta=0.5), logps, weights=torch.tensor(weights))
    return tally


def diagnosed(chosen, rejected, chosen_tokens, rejected_tokens):
    """The means of pairs whose reference finds everything certain, so that log-ratios are log-probs."""
    zeros = torch.zeros(len(chosen))
    policy, tokens = map(torch.tensor, (chosen, rejected)), map(torch.tensor, (chosen_tokens, rejected_tokens))
    logps = PairLogps(*policy, zeros, zeros, *tokens)
    tally, loss = Tally(CPU), preference_loss(logps, type="sigmoid", beta=1.0)
    add_diagnostics(tally, loss, logps, weights=torch.ones(len(chosen)), has_logratios=True)
    return tally.means(tally.packed())


def test_each_mean_of_pairs_is_that_of_its_own_numbers():
    # Log-ratios 1, 3 of the chosen and -0.5, 2 of the rejected responses.
    columns = torch.tensor([(-10.0, -12.0, -11.0, -11.5, 4, 6), (-20.0, -30.0, -23.0, -32.0, 10, 5)]).T
    tally, logps = Tally(CPU), PairLogps(*columns)
    add_pairs(tally, preference_loss(logps, type="sigmoid", beta=0.5), logps, weights=torch.ones(2))
    assert tally.means(tally.packed()) == pytest.approx(
        {
            "loss": (math.log1p(math.exp(-0.75)) + math.log1p(math.exp(-0.5))) / 2,
            "rewards/chosen": 0.5 * (1 + 3) / 2,
            "rewards/rejected": 0.5 * (-0.5 + 2) / 2,
            "rewards/accuracies": 1.0,
            "rewards/margins": 0.5 * (1.5 + 1) / 2,
            "logps/chosen": -15.0,
            "logps/rejected": -21.0,
            "lengths/chosen": 7.0,
            "lengths/rejected": 5.5,
        }
    )


def test_means_weigh_pairs_not_micro_batches():
    ranks = [tally_of([2.0, 4.0, 6.0], [1.0, 1.0, 1.0]), tally_of([-8.0], [1.0])]
    means = ranks[0].means(ranks[0].packed() + ranks[1].packed())
    assert means["rewards/margins"] == pytest.approx(0.5 * (2 + 4 + 6 - 8) / 4)
    assert means["rewards/accuracies"] == pytest.approx(3 / 4)


def test_each_source_has_its_own_mean_over_its_real_pairs():
    loss = preference_loss(pairs([2.0, -4.0, 6.0, 8.0]), type="hinge", beta=0.25)
    tally = Tally(CPU)
    weights = torch.tensor([1.0, 1.0, 1.0, 0.0])
    for sources in ([0, 2, 2, 0], [2, 2, 2, 2]):
        groups = torch.tensor(sources)
        add_groups(tally, loss, kind="source", names={0: "a", 2: "b"}, groups=groups, weights=weights)
    # max(0, 1 - margin / 4) is 1/2, 2 and 0.
    assert tally.means(tally.packed()) == pytest.approx(
        {
            "source/a/loss": 1 / 2,
            "source/a/rewards/accuracies": 1.0,
            "source/b/loss": (2 + 0 + 1 / 2 + 2 + 0) / 5,
            "source/b/rewards/accuracies": 3 / 5,
        }
    )


def test_opposite_outcomes_on_two_ranks_are_an_accuracy_of_a_half():
    right, wrong = tally_of([1.0], [1.0]), tally_of([-1.0], [1.0])
    assert right.means(right.packed() + wrong.packed())["rewards/accuracies"] == 0.5


def test_a_tie_is_half_right():
    tie = tally_of([0.0], [1.0])
    assert tie.means(tie.packed())["rewards/accuracies"] == 0.5


def test_a_stand_in_counts_for_nothing_even_if_it_is_not_finite():
    tally = tally_of([3.0, float("nan")], [1.0, 0.0])
    assert tally.means(tally.packed())["logps/chosen"] == 3.0


def test_sums_of_micro_batches_add_up():
    tally = Tally(CPU)
    for value in (1.0, 2.5):
        tally.add("work/tokens", value)
    assert tally.sums(tally.packed()) == {"work/tokens": 3.5}


def test_diagnostics_of_two_ranks_are_those_of_all_pairs_together():
    # Policy and reference log-probs, tokens: log-ratios -2, 4, 1 of the chosen and 1, -1, 0 of the rejected responses.
    rows = [(-6.0, -3.0, -4.0, -4.0, 4, 2), (-1.0, -5.0, -5.0, -4.0, 2, 5), (-2.0, -3.0, -3.0, -3.0, 10, 3)]
    margins, differences = [-3.0, 5.0, 1.0], [2.0, -3.0, 7.0]

    def tallied(some):
        *logps, chosen_tokens, rejected_tokens = torch.tensor(some).T
        seen = PairLogps(*logps, chosen_tokens, rejected_tokens)
        tally = Tally(CPU)
        loss = preference_loss(seen, type="sigmoid", beta=1.0)
        add_diagnostics(tally, loss, seen, weights=torch.ones(len(some)), has_logratios=True)
        return tally

    one, two = tallied(rows[:1]), tallied(rows[1:])
    means = one.means(one.packed() + two.packed())
    assert means["kl/chosen"] == pytest.approx((-2 + 4 + 1) / (4 + 2 + 10))
    assert means["kl/rejected"] == pytest.approx((1 - 1 + 0) / (2 + 5 + 3), abs=1e-6)
    assert means["displaced"] == pytest.approx(1 / 3)
    weights = [1 / (1 + math.exp(margin)) for margin in margins]
    assert means["gradient_weight"] == pytest.approx(sum(weights) / 3)
    assert means["saturated"] == pytest.approx(sum(weight < 0.01 for weight in weights) / 3)
    assert means["length_correlation"] == pytest.approx(statistics.correlation(margins, differences))


def test_kl_displaced_and_saturated_look_at_the_right_side_of_their_bounds():
    # Margins -2.5, 5, 4.3 and 0.5; sigmoid(-4.3) = 0.0134 is not yet saturated, sigmoid(-5) = 0.0067 is.
    means = diagnosed([-2.0, 0.0, 0.5, -1.5], [0.5, -5.0, -3.8, -2.0], [4, 2, 10, 3], [3, 5, 2, 7])
    assert means["kl/chosen"] == pytest.approx((-2 + 0 + 0.5 - 1.5) / (4 + 2 + 10 + 3))
    assert means["kl/rejected"] == pytest.approx((0.5 - 5 - 3.8 - 2) / (3 + 5 + 2 + 7))
    assert means["displaced"] == 2 / 4
    assert means["saturated"] == 1 / 4


@pytest.mark.parametrize("offset", [0.0, 4000.0])
def test_the_correlation_holds_for_small_spreads_and_large_means(offset):
    margins, differences = [0.25, 0.5, 0.125, 0.75], [1.0, -1.0, 2.0, 0.0]
    means = diagnosed([offset + margin for margin in margins], [0.0] * 4, [5, 3, 6, 4], [4] * 4)
    assert means["length_correlation"] == pytest.approx(statistics.correlation(margins, differences), rel=1e-6)


def test_what_does_not_vary_has_no_correlation_and_a_missing_reference_no_divergence():
    tally, logps = Tally(CPU), pairs([1.0, 2.0])
    loss = preference_loss(logps, type="sigmoid", beta=1.0)
    add_diagnostics(tally, loss, logps, weights=torch.ones(2), has_logratios=False)
    means = tally.means(tally.packed())
    assert set(means) == {"gradient_weight", "saturated", "length_correlation"}
    assert math.isnan(means["length_correlation"])


def test_a_histogram_counts_real_pairs_and_puts_what_is_beyond_into_the_outermost_bins():
    tally = Tally(CPU)
    add_histogram(tally, "x", torch.tensor([-1e6, 0.0, 0.2, 0.2, 1e6]), weights=torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0]))
    found = tally.histograms(tally.packed())["histogram/x"]
    counted = {found["edges"][place]: count for place, count in enumerate(found["counts"]) if count}
    assert counted == {-100.0: 1.0, 0.0: 1.0, 0.1: 1.0, 30.0: 1.0}
    assert len(found["edges"]) == len(found["counts"]) + 1
    assert not tally.means(tally.packed())


def test_every_bin_of_a_histogram_begins_at_its_edge():
    tally = Tally(CPU)
    inside = [-99, -29, -9, -2.9, -0.99, -0.29, -0.099, -0.029, -0.0099, 0.0]
    inside += [0.0101, 0.031, 0.11, 0.31, 1.1, 3.1, 11.0, 31.0]
    add_histogram(tally, "x", torch.tensor(inside), weights=torch.ones(len(inside)))
    found = tally.histograms(tally.packed())["histogram/x"]
    assert found["counts"] == [1.0] * 18
    assert found["edges"] == [-edge for edge in reversed(found["edges"])]
    assert found["edges"][-1] == 100


def test_a_tally_keeps_no_graph():
    tally = Tally(CPU)
    tally.add("loss", torch.ones(2, requires_grad=True) * 2)
    assert not tally.packed().requires_grad


def test_lengths_fall_into_groups_of_twice_the_length():
    groups = length_groups(np.array([1, 32, 33, 64, 65, 1000]))
    assert groups.tolist() == [5, 5, 6, 6, 7, 10]
    assert length_names(groups) == {5: "1-32", 6: "33-64", 7: "65-128", 10: "513-1024"}
    assert length_names(groups[:2]) == {}
