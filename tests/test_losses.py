"""Losses against formulas written out with ``math``, and against their own derivatives."""

import math

import pytest
import torch
from torch import Tensor

from dpo_ds.losses import LOSSES, PairLabels, PairLogps, preference_loss, starting_losses

# Three pairs: (policy chosen, policy rejected, reference chosen, reference rejected, chosen tokens, rejected tokens).
PAIRS = [
    (-10.0, -12.0, -11.0, -11.5, 4, 6),
    (-30.0, -20.0, -24.0, -22.0, 10, 5),
    (-7.0, -9.0, -7.0, -9.0, 3, 3),
]


def pair_logps(rows: list[tuple[float, ...]] = PAIRS, *, dtype: torch.dtype = torch.float64) -> PairLogps:
    columns = torch.tensor(rows, dtype=dtype).unbind(1)
    return PairLogps(*columns[:4], chosen_tokens=columns[4].long(), rejected_tokens=columns[5].long())


def margin(row: tuple[float, ...], *, mean: bool = False) -> float:
    policy_chosen, policy_rejected, reference_chosen, reference_rejected, chosen_tokens, rejected_tokens = row
    chosen, rejected = policy_chosen - reference_chosen, policy_rejected - reference_rejected
    return chosen / chosen_tokens - rejected / rejected_tokens if mean else chosen - rejected


def softplus(x: float) -> float:
    """``-log sigmoid(-x)``."""
    return math.log1p(math.exp(x))


def assert_losses(actual: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_the_margins_of_the_three_pairs_are_those_found_by_hand():
    # (-10 + 11) - (-12 + 11.5), (-30 + 24) - (-20 + 22), 0; and per token 1/4 + 0.5/6, -6/10 - 2/5, 0.
    assert [margin(row) for row in PAIRS] == [1.5, -8.0, 0.0]
    assert [margin(row, mean=True) for row in PAIRS] == pytest.approx([1 / 3, -1.0, 0.0])
    assert pair_logps().margins.tolist() == [1.5, -8.0, 0.0]


def test_sigmoid_is_the_negative_log_sigmoid_of_beta_times_margin():
    losses = preference_loss(pair_logps(), type="sigmoid", beta=0.3).losses
    assert_losses(losses, [softplus(-0.3 * margin(row)) for row in PAIRS])


def test_sigmoid_with_smoothing_mixes_the_loss_of_the_label_and_of_its_opposite():
    losses = preference_loss(pair_logps(), type="sigmoid", beta=0.3, label_smoothing=0.2).losses
    expected = [0.8 * softplus(-0.3 * margin(row)) + 0.2 * softplus(0.3 * margin(row)) for row in PAIRS]
    assert_losses(losses, expected)


def test_sigmoid_norm_compares_log_probs_per_token():
    losses = preference_loss(pair_logps(), type="sigmoid_norm", beta=2.0).losses
    assert_losses(losses, [softplus(-2.0 * margin(row, mean=True)) for row in PAIRS])


def test_sigmoid_norm_is_sigmoid_of_averaged_log_probs():
    averaged = preference_loss(pair_logps().averaged(), type="sigmoid", beta=2.0, label_smoothing=0.1)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            preference_loss(pair_logps(), type="sigmoid_norm", beta=2.0, label_smoothing=0.1), averaged, strict=True
        )
    )


def test_hinge_is_one_less_beta_times_margin_and_never_negative():
    losses = preference_loss(pair_logps(), type="hinge", beta=0.8).losses
    # 1 - 0.8 * 1.5 < 0, 1 + 0.8 * 8, 1.
    assert_losses(losses, [0.0, 7.4, 1.0])


def test_ipo_is_the_squared_distance_of_the_mean_margin_from_its_target():
    losses = preference_loss(pair_logps(), type="ipo", beta=0.1).losses
    assert_losses(losses, [(margin(row, mean=True) - 5.0) ** 2 for row in PAIRS])


def test_ipo_over_sums_is_the_equation_of_the_paper():
    losses = preference_loss(pair_logps(), type="ipo", beta=0.1, reduction="sum").losses
    # (1.5 - 5)^2, (-8 - 5)^2, (0 - 5)^2.
    assert_losses(losses, [12.25, 169.0, 25.0])


# Of the three pairs.
PROBABILITIES, MARGINS, WEIGHTS = [0.9, 0.3, 1.0], [0.5, -1.0, 0.25], [2.0, 0.5, 3.0]


def given(**values: list[float]) -> PairLabels:
    return PairLabels(**{name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()})


def test_a_soft_label_mixes_the_loss_of_the_label_and_of_its_opposite():
    losses = preference_loss(pair_logps(), type="sigmoid", beta=0.3, labels=given(probabilities=PROBABILITIES)).losses
    x = [0.3 * margin(row) for row in PAIRS]
    assert_losses(losses, [p * softplus(-x) + (1 - p) * softplus(x) for p, x in zip(PROBABILITIES, x, strict=True)])


def test_a_soft_label_of_the_length_normalised_loss_mixes_its_losses():
    logps, labels = pair_logps(), given(probabilities=PROBABILITIES)
    losses = preference_loss(logps, type="sigmoid_norm", beta=2.0, labels=labels).losses
    x = [2.0 * margin(row, mean=True) for row in PAIRS]
    assert_losses(losses, [p * softplus(-x) + (1 - p) * softplus(x) for p, x in zip(PROBABILITIES, x, strict=True)])


def test_a_soft_label_of_a_smoothed_loss_is_wrong_where_one_of_the_two_is():
    labels = given(probabilities=PROBABILITIES)
    losses = preference_loss(pair_logps(), type="sigmoid", beta=0.3, label_smoothing=0.2, labels=labels).losses
    # 0.9 * 0.8 + 0.1 * 0.2, 0.3 * 0.8 + 0.7 * 0.2, 0.8.
    x = [0.3 * margin(row) for row in PAIRS]
    right = [0.74, 0.38, 0.8]
    assert_losses(losses, [p * softplus(-x) + (1 - p) * softplus(x) for p, x in zip(right, x, strict=True)])


@pytest.mark.parametrize(("type", "mean"), [("sigmoid", False), ("sigmoid_norm", True)])
def test_a_margin_is_subtracted_inside_the_sigmoid(type, mean):
    labels = given(probabilities=PROBABILITIES, margins=MARGINS)
    losses = preference_loss(pair_logps(), type=type, beta=0.3, labels=labels).losses
    x = [0.3 * margin(row, mean=mean) - m for row, m in zip(PAIRS, MARGINS, strict=True)]
    assert_losses(losses, [p * softplus(-x) + (1 - p) * softplus(x) for p, x in zip(PROBABILITIES, x, strict=True)])


def test_a_margin_moves_the_hinge():
    losses = preference_loss(pair_logps(), type="hinge", beta=0.8, labels=given(margins=MARGINS)).losses
    # 1 + 0.5 - 0.8 * 1.5, 1 - 1 + 0.8 * 8, 1 + 0.25.
    assert_losses(losses, [0.3, 6.4, 1.25])


@pytest.mark.parametrize("type", LOSSES)
def test_a_weight_multiplies_the_loss_of_its_pair_and_leaves_the_rewards(type):
    plain = preference_loss(pair_logps(), type=type, beta=0.3)
    weighted = preference_loss(pair_logps(), type=type, beta=0.3, labels=given(weights=WEIGHTS))
    assert_losses(weighted.losses, [w * loss for w, loss in zip(WEIGHTS, plain.losses.tolist(), strict=True)])
    assert torch.equal(weighted.margins, plain.margins)


def test_margins_and_soft_labels_leave_the_rewards():
    plain = preference_loss(pair_logps(), type="sigmoid", beta=0.3)
    labels = given(probabilities=PROBABILITIES, margins=MARGINS)
    assert torch.equal(preference_loss(pair_logps(), type="sigmoid", beta=0.3, labels=labels).margins, plain.margins)


def test_labels_that_say_nothing_change_nothing():
    for type in ("sigmoid", "sigmoid_norm"):
        plain = preference_loss(pair_logps(), type=type, beta=0.3, label_smoothing=0.1)
        ones, zeros = [1.0] * 3, [0.0] * 3
        labels = given(probabilities=ones, margins=zeros, weights=ones)
        same = preference_loss(pair_logps(), type=type, beta=0.3, label_smoothing=0.1, labels=labels)
        assert torch.equal(plain.losses, same.losses)


def test_what_a_loss_does_not_know_of_labels_is_refused():
    with pytest.raises(ValueError, match="the hinge loss knows no soft labels"):
        preference_loss(pair_logps(), type="hinge", beta=0.1, labels=given(probabilities=PROBABILITIES))
    with pytest.raises(ValueError, match="the ipo loss knows no margins"):
        preference_loss(pair_logps(), type="ipo", beta=0.1, labels=given(margins=MARGINS))


def test_the_losses_of_equal_weights_follow_from_the_labels_alone():
    labels = given(probabilities=PROBABILITIES, margins=MARGINS, weights=WEIGHTS)
    found = starting_losses(labels, pairs=3, type="sigmoid", beta=0.3)
    # The rewards are 0, so that x = -m.
    rows = zip(PROBABILITIES, MARGINS, WEIGHTS, strict=True)
    assert_losses(found.double(), [w * (p * softplus(m) + (1 - p) * softplus(-m)) for p, m, w in rows])
    hinge = starting_losses(given(margins=MARGINS, weights=WEIGHTS), pairs=3, type="hinge", beta=0.3)
    assert_losses(hinge.double(), [2 * 1.5, 0.0, 3 * 1.25])
    ipo = starting_losses(given(weights=WEIGHTS), pairs=3, type="ipo", beta=0.5)
    assert_losses(ipo.double(), WEIGHTS)
    assert starting_losses(PairLabels(), pairs=2, type="ipo", beta=0.1).tolist() == [25.0, 25.0]


def test_rewards_are_beta_times_log_ratios_and_detached():
    logps = pair_logps()
    logps.policy_chosen.requires_grad_()
    logps.policy_rejected.requires_grad_()
    result = preference_loss(logps, type="sigmoid", beta=0.5)
    assert result.chosen_rewards.tolist() == [0.5, -3.0, 0.0]
    assert result.rejected_rewards.tolist() == [-0.25, 1.0, 0.0]
    assert result.losses.requires_grad
    assert not result.chosen_rewards.requires_grad
    assert not result.rejected_rewards.requires_grad


def test_rewards_of_a_mean_loss_are_those_that_it_compares():
    result = preference_loss(pair_logps(), type="ipo", beta=0.5)
    assert result.chosen_rewards.tolist() == pytest.approx([0.5 / 4, -3.0 / 10, 0.0])
    assert result.rejected_rewards.tolist() == pytest.approx([-0.25 / 6, 1.0 / 5, 0.0])


@pytest.mark.parametrize("type", LOSSES)
@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
def test_value_at_zero_margin_is_the_function_where_policy_equals_reference(type, beta):
    equal = pair_logps([(-10.0, -12.0, -10.0, -12.0, 4, 6), (-300.0, -2.0, -300.0, -2.0, 80, 1)])
    result = preference_loss(equal, type=type, beta=beta)
    expected = LOSSES[type].at_zero_margin(beta)
    assert_losses(result.losses, [expected, expected])
    assert result.chosen_rewards.tolist() == result.rejected_rewards.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("type", [name for name, loss in LOSSES.items() if loss.smooths_labels])
def test_value_at_zero_margin_does_not_depend_on_smoothing(type):
    losses = preference_loss(pair_logps(PAIRS[2:]), type=type, beta=0.1, label_smoothing=0.3).losses
    assert_losses(losses, [LOSSES[type].at_zero_margin(0.1)])


@pytest.mark.parametrize(
    ("type", "label_smoothing"),
    [(name, 0.0) for name in LOSSES] + [(name, 0.1) for name, loss in LOSSES.items() if loss.smooths_labels],
)
@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_loss_and_gradient_stay_finite_at_extreme_margins(type, label_smoothing, extreme):
    logps = pair_logps([(extreme, 0.0, 0.0, 0.0, 1, 1)], dtype=torch.float32)
    logps.policy_chosen.requires_grad_()
    losses = preference_loss(logps, type=type, beta=1.0, label_smoothing=label_smoothing).losses
    losses.sum().backward()
    assert losses.isfinite().all()
    assert logps.policy_chosen.grad.isfinite().all()


@pytest.mark.parametrize("type", LOSSES)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_gradients_are_those_of_finite_differences(type, reduction):
    logps = pair_logps()
    label_smoothing = 0.1 if LOSSES[type].smooths_labels else 0.0
    labels = given(
        weights=WEIGHTS,
        **({"probabilities": PROBABILITIES} if LOSSES[type].smooths_labels else {}),
        **({"margins": MARGINS} if LOSSES[type].takes_margins else {}),
    )

    def losses(chosen: Tensor, rejected: Tensor) -> Tensor:
        moved = PairLogps(
            chosen,
            rejected,
            logps.reference_chosen,
            logps.reference_rejected,
            logps.chosen_tokens,
            logps.rejected_tokens,
        )
        return preference_loss(
            moved, type=type, beta=0.3, label_smoothing=label_smoothing, reduction=reduction, labels=labels
        ).losses

    inputs = (logps.policy_chosen.requires_grad_(), logps.policy_rejected.requires_grad_())
    assert torch.autograd.gradcheck(losses, inputs)


@pytest.mark.parametrize("type", [name for name, loss in LOSSES.items() if not loss.smooths_labels])
def test_smoothing_is_refused_where_the_loss_does_not_know_it(type):
    with pytest.raises(ValueError, match=f"label_smoothing must be 0 for the {type} loss, got 0.1"):
        preference_loss(pair_logps(), type=type, beta=0.1, label_smoothing=0.1)
