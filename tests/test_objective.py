"""What objectives take from the data, what they need, and the numbers that nobody gave them."""

import math

import pytest
import torch

from dpo_ds.losses import LOSSES, Objective
from tests.test_losses import (
    DIVERGENCES,
    MARGINS,
    PAIRS,
    PROBABILITIES,
    B,
    assert_losses,
    by_hand,
    given,
    margin,
    pair_logps,
    sig,
    softplus,
    with_numbers,
)


def test_numbers_that_are_left_out_have_their_defaults():
    assert {name: dict(loss.parameters) for name, loss in LOSSES.items() if loss.parameters} == {
        "discopop": {"tau": 0.05},
        "simpo": {"gamma": 0.5},
        "cpo": {"cpo_alpha": 1.0},
        "slic": {"slic_delta": 1.0, "slic_lambda": 1.0},
        "dpop": {"dpop_lambda": 50.0},
        "chi_po": {"chi_clip": 10.0},
        "r_dpo": {"length_penalty": 0.01},
        "beta_dpo": {"beta_sensitivity": 0.6},
    }
    assert (Objective().beta, Objective().divergence_alpha) == (0.1, 0.5)


def test_a_margin_is_subtracted_from_what_simpo_and_r_dpo_compare():
    labels = given(margins=MARGINS)
    rows = [(by_hand(row), m) for row, m in zip(PAIRS, MARGINS, strict=True)]
    losses = with_numbers("simpo")(pair_logps(), labels=labels).losses
    assert_losses(losses, [softplus(-(B * (p.pc / p.nc - p.pr / p.nr) - 0.4 - m)) for p, m in rows])
    losses = with_numbers("r_dpo")(pair_logps(), labels=labels).losses
    assert_losses(losses, [softplus(-(B * (p.c - p.r) + 0.04 * (p.nc - p.nr) - m)) for p, m in rows])


def test_a_soft_label_of_exo_is_the_distribution_that_it_aims_at():
    losses = with_numbers("exo_pair")(pair_logps(), labels=given(probabilities=PROBABILITIES)).losses
    expected = []
    for row, right in zip(PAIRS, [0.74, 0.38, 0.8], strict=True):
        q = sig(B * margin(row))
        expected.append(q * math.log(q / right) + (1 - q) * math.log((1 - q) / (1 - right)))
    assert_losses(losses, expected)


def test_a_margin_leaves_an_added_loss_that_compares_nothing():
    losses = Objective("sigmoid", beta=0.3, add={"sft": 0.5})(pair_logps(), labels=given(margins=MARGINS)).losses
    rows = zip(PAIRS, MARGINS, strict=True)
    assert_losses(losses, [softplus(m - 0.3 * margin(row)) - 0.5 * row[0] / row[4] for row, m in rows])


@pytest.mark.parametrize("add", [{}, {"sigmoid": 1.0}])
def test_a_first_loss_that_compares_nothing_knows_no_labels(add):
    objective = Objective("sft", add=add)
    assert not objective.takes_soft_labels
    assert not objective.takes_margins


def test_what_needs_a_reference_is_known():
    assert Objective("sigmoid").needs_reference
    assert Objective("simpo", add={"sigmoid": 1.0}).needs_reference
    assert not Objective("simpo", add={"sft": 1.0}).needs_reference


def test_a_number_may_be_zero_but_not_infinite():
    losses = Objective("simpo", beta=2.0, parameters={"gamma": 0.0})(pair_logps()).losses
    assert_losses(losses, [softplus(-2.0 * (row[0] / row[4] - row[1] / row[5])) for row in PAIRS])
    with pytest.raises(ValueError, match=r"parameters.gamma must be >= 0, got inf"):
        Objective("simpo", parameters={"gamma": math.inf})


def test_another_divergence_allows_an_explicit_sum_and_an_added_loss_without_a_reference():
    objective = Objective("sigmoid", beta=0.3, add={"sft": 0.5}, divergence="forward_kl", reduction="sum")
    x = [0.3 * (math.exp(row[3] - row[1]) - math.exp(row[2] - row[0])) for row in PAIRS]
    expected = [softplus(-x) - 0.5 * row[0] / row[4] for x, row in zip(x, PAIRS, strict=True)]
    assert_losses(objective(pair_logps()).losses, expected)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_loss_and_gradient_stay_finite_at_extreme_margins_of_another_divergence(divergence, extreme):
    logps = pair_logps([(extreme, 0.0, 0.0, 0.0, 1, 1)], dtype=torch.float32)
    logps.policy_chosen.requires_grad_()
    losses = Objective("sigmoid", beta=1.0, divergence=divergence)(logps).losses
    losses.sum().backward()
    assert losses.isfinite().all()
    assert logps.policy_chosen.grad.isfinite().all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_scores_under_another_divergence_are_its_slopes_and_not_only_up_to_a_constant(divergence):
    scores, slope = pair_logps().under(divergence, alpha=0.3), DIVERGENCES[divergence]
    assert_losses(scores.policy_chosen, [slope(math.exp(row[0] - row[2])) for row in PAIRS])
    assert_losses(scores.policy_rejected, [slope(math.exp(row[1] - row[3])) for row in PAIRS])
