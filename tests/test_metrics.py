import pytest
import torch

from dpo_ds.losses import PairLogps, preference_loss
from dpo_ds.metrics import Tally, add_pairs, add_sources

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
        add_sources(tally, loss, names={0: "a", 2: "b"}, sources=torch.tensor(sources), weights=weights)
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
