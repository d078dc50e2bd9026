"""Losses against formulas written out with ``math``, and against their own derivatives."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import dpo_ds.losses as losses_room
from dpo_ds.losses import LOSSES, Objective, PairLabels, PairLogps, PreferenceLoss, Running, preference_loss

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


def least(type: str, **options: Any) -> Objective:
    """A loss with the least that it has to be told."""
    if LOSSES[type].needs_smoothing:
        options["label_smoothing"] = options.get("label_smoothing") or 0.2
    return Objective(type, **options)


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


@pytest.mark.parametrize("type", [name for name, loss in LOSSES.items() if not loss.sorts_pairs])
def test_a_weight_multiplies_the_loss_of_its_pair_and_leaves_the_rewards(type):
    objective = least(type, beta=0.3)
    plain, weighted = objective(pair_logps()), objective(pair_logps(), labels=given(weights=WEIGHTS))
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


def test_the_losses_of_an_unmoved_policy_follow_from_the_labels_alone():
    labels = given(probabilities=PROBABILITIES, margins=MARGINS, weights=WEIGHTS)
    found = preference_loss(pair_logps().unmoved(), type="sigmoid", beta=0.3, labels=labels)
    # The rewards are 0, so that x = -m.
    rows = zip(PROBABILITIES, MARGINS, WEIGHTS, strict=True)
    assert_losses(found.losses, [w * (p * softplus(m) + (1 - p) * softplus(-m)) for p, m, w in rows])
    assert found.margins.tolist() == [0.0, 0.0, 0.0]


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


# Where every log-ratio is 0 and the responses are equally long; e is the label smoothing.
AT_REST = {
    "sigmoid": lambda beta, e: math.log(2),
    "sigmoid_norm": lambda beta, e: math.log(2),
    "robust": lambda beta, e: math.log(2),
    "hinge": lambda beta, e: 1.0,
    "ipo": lambda beta, e: 1 / (4 * beta**2),
    "exo_pair": lambda beta, e: 0.5 * math.log(0.5 / (1 - e)) + 0.5 * math.log(0.5 / e),
    "nca_pair": lambda beta, e: 2 * math.log(2),
    "bco_pair": lambda beta, e: 2 * math.log(2),
    "bco_pair_unshifted": lambda beta, e: 2 * math.log(2),
    "sppo_hard": lambda beta, e: 1 / (2 * beta**2),
    "aot": lambda beta, e: math.log(2),
    "aot_unpaired": lambda beta, e: math.log(2),
    "apo_zero": lambda beta, e: 1.0,
    "apo_down": lambda beta, e: 1.0,
    "discopop": lambda beta, e: (math.log(2) + 1) / 2,
    "dpop": lambda beta, e: math.log(2),
    "chi_po": lambda beta, e: math.log(2),
    "r_dpo": lambda beta, e: math.log(2),
    "beta_dpo": lambda beta, e: math.log(2),
    "cal_dpo": lambda beta, e: math.log(2) + 1 / (2 * beta**2),
}


def test_every_loss_with_a_reference_has_a_value_at_rest():
    assert set(AT_REST) == {name for name, loss in LOSSES.items() if loss.needs_reference}


@pytest.mark.parametrize("type", AT_REST)
@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
def test_losses_start_at_their_own_value_where_policy_equals_reference(type, beta):
    equal = pair_logps([(-10.0, -12.0, -10.0, -12.0, 6, 6), (-300.0, -2.0, -300.0, -2.0, 8, 8)])
    for smoothing in (0.0, 0.3):
        if (smoothing and not LOSSES[type].smooths_labels) or (not smoothing and LOSSES[type].needs_smoothing):
            continue
        result = preference_loss(equal, type=type, beta=beta, label_smoothing=smoothing)
        assert_losses(result.losses, [AT_REST[type](beta, smoothing)] * 2)
        assert result.chosen_rewards.tolist() == result.rejected_rewards.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("type", LOSSES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("extreme", [1e4, -1e4])
def test_loss_and_gradient_stay_finite_at_extreme_margins(type, smoothing, extreme):
    logps = pair_logps([(extreme, 0.0, 0.0, 0.0, 1, 1)], dtype=torch.float32)
    logps.policy_chosen.requires_grad_()
    result = least(type, beta=1.0, label_smoothing=smoothing if LOSSES[type].smooths_labels else 0.0)(logps)
    result.losses.sum().backward()
    assert result.losses.isfinite().all()
    assert logps.policy_chosen.grad.isfinite().all()


# Beta-DPO's beta is a constant for the gradient, which finite differences do not know.
@pytest.mark.parametrize("type", [name for name in LOSSES if name != "beta_dpo"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_gradients_are_those_of_finite_differences(type, reduction):
    loss = LOSSES[type]
    labels = given(
        **({"weights": WEIGHTS} if not loss.sorts_pairs else {}),
        **({"probabilities": PROBABILITIES} if loss.takes_soft_labels else {}),
        **({"margins": MARGINS} if loss.takes_margins else {}),
    )
    objective = least(type, beta=0.3, label_smoothing=0.1 if loss.smooths_labels else 0.0, reduction=reduction)
    assert_gradients(lambda logps: objective(logps, labels=labels))


# No ties and no kinks, where there is no derivative.
SMOOTH = [PAIRS[0], (-30.3, -20.0, -24.0, -22.0, 10, 5), (-7.1, -9.2, -7.3, -9.0, 3, 3)]


def assert_gradients(losses: Callable[[PairLogps], PreferenceLoss]) -> None:
    logps = pair_logps(SMOOTH)

    def moved(chosen: Tensor, rejected: Tensor) -> Tensor:
        return losses(replace(logps, policy_chosen=chosen, policy_rejected=rejected)).losses

    assert torch.autograd.gradcheck(
        moved, (logps.policy_chosen.requires_grad_(), logps.policy_rejected.requires_grad_())
    )


@pytest.mark.parametrize("type", [name for name, loss in LOSSES.items() if not loss.smooths_labels])
def test_smoothing_is_refused_where_the_loss_does_not_know_it(type):
    with pytest.raises(ValueError, match=f"label_smoothing must be 0 for the {type} loss, got 0.1"):
        preference_loss(pair_logps(), type=type, beta=0.1, label_smoothing=0.1)


# The rest of the table: each loss by hand, for the rows that the function gets.


class By(NamedTuple):
    """One pair as the formulas of papers write it."""

    c: float  # h_c
    r: float  # h_r
    pc: float  # log pi_c
    pr: float  # log pi_r
    nc: float
    nr: float


def by_hand(row: tuple[float, ...]) -> By:
    return By(row[0] - row[2], row[1] - row[3], row[0], row[1], row[4], row[5])


def sig(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def odds(probability: float) -> float:
    return probability / (1 - probability)


def phi(h: float) -> float:
    return math.exp(h) + h


B, E = 0.3, 0.2
NUMBERS = {"tau": 0.7, "gamma": 0.4, "cpo_alpha": 0.6, "slic_delta": 1.7, "slic_lambda": 0.2, "dpop_lambda": 3.0}
NUMBERS |= {"chi_clip": 0.5, "length_penalty": 0.04, "beta_sensitivity": 0.9}
FORMULAS: dict[str, Callable[[By], float]] = {
    "robust": lambda p: ((1 - E) * softplus(-B * (p.c - p.r)) - E * softplus(B * (p.c - p.r))) / (1 - 2 * E),
    "exo_pair": lambda p: sum(
        q * math.log(q / label) for q, label in ((sig(B * (p.c - p.r)), 1 - E), (1 - sig(B * (p.c - p.r)), E))
    ),
    "nca_pair": lambda p: -math.log(sig(B * p.c)) - 0.5 * math.log(sig(-B * p.c)) - 0.5 * math.log(sig(-B * p.r)),
    "bco_pair": lambda p: -math.log(sig(B * p.c - 0.8)) - math.log(sig(-(B * p.r - 0.8))),
    "bco_pair_unshifted": lambda p: -math.log(sig(B * p.c)) - math.log(sig(-B * p.r)),
    "sppo_hard": lambda p: (p.c - 1 / (2 * B)) ** 2 + (p.r + 1 / (2 * B)) ** 2,
    "apo_zero": lambda p: 1 - sig(B * p.c) + sig(B * p.r),
    "apo_down": lambda p: sig(B * p.c) + 1 - sig(B * p.c - B * p.r),
    "discopop": lambda p: (
        (1 - sig(B * (p.c - p.r) / 0.7)) * softplus(-B * (p.c - p.r))
        + sig(B * (p.c - p.r) / 0.7) * math.exp(-B * (p.c - p.r))
    ),
    "simpo": lambda p: softplus(-(B * p.pc / p.nc - B * p.pr / p.nr - 0.4)),
    "orpo": lambda p: (
        -p.pc / p.nc - B * math.log(sig(math.log(odds(math.exp(p.pc / p.nc)) / odds(math.exp(p.pr / p.nr)))))
    ),
    "cpo": lambda p: softplus(-B * (p.pc - p.pr)) - 0.6 * p.pc / p.nc,
    "slic": lambda p: max(0.0, 1.7 - p.pc + p.pr) - 0.2 * p.pc,
    "sft": lambda p: -p.pc / p.nc,
    "dpop": lambda p: softplus(-B * (p.c - p.r - 3.0 * max(0.0, -p.c))),
    "chi_po": lambda p: softplus(-min(0.5, max(-0.5, B * phi(p.c) - B * phi(p.r)))),
    "r_dpo": lambda p: softplus(-(B * p.c - B * p.r + (0.04 * p.nc - 0.04 * p.nr))),
    "cal_dpo": lambda p: softplus(-(p.c - p.r)) + (p.c - 0.5 / B) ** 2 + (p.r + 0.5 / B) ** 2,
}


def with_numbers(type: str, **options: Any) -> Objective:
    parameters = {name: NUMBERS[name] for name in LOSSES[type].parameters}
    return least(
        type, beta=B, parameters=parameters, label_smoothing=E if LOSSES[type].smooths_labels else 0, **options
    )


@pytest.mark.parametrize("type", FORMULAS)
def test_a_loss_is_its_papers_equation(type):
    losses = with_numbers(type)(pair_logps(), running={type: Running(0.8)}).losses
    expected = [FORMULAS[type](by_hand(row)) for row in PAIRS]
    assert_losses(losses, expected)


@pytest.mark.parametrize("type", FORMULAS)
@pytest.mark.parametrize("moved", range(6))
def test_the_equations_notice_every_number_that_they_hold(type, moved):
    # A formula that lost a term, a factor or a sign would not move with it as the paper's does.
    rows = [
        tuple(value * 1.01 + 0.003 if place == moved else value for place, value in enumerate(row)) for row in PAIRS
    ]
    columns = torch.tensor(rows, dtype=torch.float64).unbind(1)
    losses = with_numbers(type)(PairLogps(*columns), running={type: Running(0.8)}).losses
    assert_losses(losses, [FORMULAS[type](by_hand(row)) for row in rows])


def test_every_loss_has_an_equation_by_hand():
    tested_above = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "aot", "aot_unpaired", "beta_dpo"}
    assert set(FORMULAS) | tested_above == set(LOSSES)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_aot_compares_quantiles(smoothing):
    # Policy differences 2, -10, 2, sorted -10, 2, 2; the reference's 0.5, -2, 2, sorted -2, 0.5, 2.
    losses = preference_loss(pair_logps(), type="aot", beta=0.3, label_smoothing=smoothing).losses
    x = [0.3 * (-10 + 2), 0.3 * (2 - 0.5), 0.3 * (2 - 2)]
    assert_losses(losses, [(1 - smoothing) * softplus(-x) + smoothing * softplus(x) for x in x])
    # Log-ratios 1, -6, 0 of the chosen, sorted -6, 0, 1; -0.5, 2, 0 of the rejected, sorted -0.5, 0, 2.
    losses = preference_loss(pair_logps(), type="aot_unpaired", beta=0.3, label_smoothing=smoothing).losses
    x = [0.3 * (-6 + 0.5), 0.0, 0.3 * (1 - 2)]
    assert_losses(losses, [(1 - smoothing) * softplus(-x) + smoothing * softplus(x) for x in x])


def test_beta_dpo_follows_the_steps_mean_margin():
    # Mean reward margin 0.3 * (1.5 - 8) / 3 = -0.65, and 0.2 below the running mean.
    losses = with_numbers("beta_dpo")(pair_logps(), running={"beta_dpo": Running(-0.45)}).losses
    beta = 0.3 * (1 + 0.9 * (-0.65 + 0.45))
    assert_losses(losses, [softplus(-beta * margin(row)) for row in PAIRS])


def test_the_dynamic_beta_stays_above_a_hundredth():
    losses = with_numbers("beta_dpo")(pair_logps(), running={"beta_dpo": Running(10.0)}).losses
    assert_losses(losses, [softplus(-0.003 * margin(row)) for row in PAIRS])


def test_the_dynamic_beta_is_a_constant_for_the_gradient():
    logps = pair_logps()
    logps.policy_chosen.requires_grad_()
    with_numbers("beta_dpo")(logps, running={"beta_dpo": Running(-0.45)}).losses.sum().backward()
    beta = 0.3 * (1 - 0.9 * 0.2)
    assert_losses(logps.policy_chosen.grad, [-beta * sig(-beta * margin(row)) for row in PAIRS])


def test_running_means_go_on_with_each_step():
    bco, beta_dpo = Objective("bco_pair"), Objective("beta_dpo")
    means = bco.start()
    for chosen, rejected, pairs in ((0.4, 0.2, 1), (1.0, -0.6, 3)):
        means = bco.carried(means, chosen_reward=chosen, rejected_reward=rejected, pairs=pairs)
    # The means 0.3 of one pair and 0.2 of three.
    assert means == {"bco_pair": pytest.approx(((0.3 + 3 * 0.2) / 4, 4))}
    means = beta_dpo.start()
    for chosen, rejected in ((0.4, 0.2), (1.0, -0.6)):
        means = beta_dpo.carried(means, chosen_reward=chosen, rejected_reward=rejected, pairs=2)
    assert means == {"beta_dpo": pytest.approx((0.9 * 0.1 * 0.2 + 0.1 * 1.6, 4))}
    assert Objective("sigmoid").start() == {}


def test_a_sum_of_losses_weighs_them_and_keeps_the_rewards_of_the_first():
    total = Objective("sigmoid", beta=0.3, label_smoothing=0.1, add={"sft": 0.5, "ipo": 2.0})(pair_logps())
    first = preference_loss(pair_logps(), type="sigmoid", beta=0.3, label_smoothing=0.1)
    expected = [
        loss - 0.5 * row[0] / row[4] + 2.0 * (margin(row, mean=True) - 1 / 0.6) ** 2
        for loss, row in zip(first.losses.tolist(), PAIRS, strict=True)
    ]
    assert_losses(total.losses, expected)
    assert torch.equal(total.margins, first.margins)


def test_rewards_without_a_reference_are_the_policys_own_log_probs():
    rewards = Objective("simpo", beta=2.0)(pair_logps()).chosen_rewards
    assert_losses(rewards, [2.0 * row[0] / row[4] for row in PAIRS])


DIVERGENCES: dict[str, Callable[[float], float]] = {
    "forward_kl": lambda t: 1 - 1 / t,
    "js_divergence": lambda t: math.log(2 * t / (1 + t)),
    "alpha_divergence": lambda t: (t ** (0.3 - 1) - 1) / (0.3 - 1),
}


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("type", [name for name, loss in LOSSES.items() if loss.compares_margins])
def test_another_divergence_puts_its_slope_in_the_place_of_the_log_ratio(divergence, type):
    objective = with_numbers(type, divergence=divergence, divergence_alpha=0.3)
    slope = DIVERGENCES[divergence]
    sloped = [
        (slope(math.exp(row[0] - row[2])), slope(math.exp(row[1] - row[3])), 0.0, 0.0, row[4], row[5]) for row in PAIRS
    ]
    assert_losses(objective(pair_logps()).losses, with_numbers(type)(pair_logps(sloped)).losses.tolist())
    assert torch.equal(objective(pair_logps()).margins, with_numbers(type)(pair_logps()).margins)
    assert_gradients(objective)


def test_alpha_divergences_meet_their_limits():
    def losses(divergence: str, alpha: float) -> Tensor:
        return Objective("sigmoid", beta=0.3, divergence=divergence, divergence_alpha=alpha)(pair_logps()).losses

    assert torch.equal(losses("alpha_divergence", 1.0), losses("reverse_kl", 0.5))
    torch.testing.assert_close(losses("alpha_divergence", 0.0), losses("forward_kl", 0.5), rtol=1e-12, atol=0)
    torch.testing.assert_close(losses("alpha_divergence", 1 + 1e-9), losses("reverse_kl", 0.5), rtol=1e-7, atol=0)


def test_an_alpha_divergence_is_the_papers_of_one_less_alpha():
    # Wang et al. 2023: f'(t) = (1 - t^-a) / a.
    losses = Objective("sigmoid", beta=0.3, divergence="alpha_divergence", divergence_alpha=0.8)(pair_logps()).losses
    rewards = [[(1 - math.exp(-0.2 * h)) / 0.2 for h in (row[0] - row[2], row[1] - row[3])] for row in PAIRS]
    assert_losses(losses, [softplus(-0.3 * (chosen - rejected)) for chosen, rejected in rewards])


def test_what_averages_over_tokens_is_known():
    assert not Objective("sigmoid", add={"dpop": 1.0}).averages
    assert Objective("ipo").averages
    assert not Objective("ipo", reduction="sum").averages
    assert Objective("sigmoid", add={"sft": 1.0}).averages
    assert Objective("cpo").averages
    assert Objective("sigmoid", weighting="wpo").averages


def test_a_longer_chosen_response_needs_less_of_a_margin_with_a_length_penalty():
    # Else the penalty would be a bonus: where lengths alone differ, a longer chosen response teaches less.
    rows = [(-9.0, -9.0, -9.0, -9.0, tokens, 5) for tokens in (3, 5, 9)]
    losses = Objective("r_dpo", beta=0.3, parameters={"length_penalty": 0.1})(pair_logps(rows)).losses
    assert_losses(losses, [softplus(0.2), math.log(2), softplus(-0.4)])


def test_wpo_weighs_pairs_by_their_likelihood_without_a_gradient():
    plain, weighted = (Objective("sigmoid", beta=0.3, weighting=weighting) for weighting in ("none", "wpo"))
    weights = [math.exp(row[0] / row[4] + row[1] / row[5]) for row in PAIRS]
    losses = plain(pair_logps()).losses.tolist()
    assert_losses(weighted(pair_logps()).losses, [w * loss for w, loss in zip(weights, losses, strict=True)])
    logps = pair_logps()
    logps.policy_chosen.requires_grad_()
    weighted(logps).losses.sum().backward()
    assert_losses(
        logps.policy_chosen.grad, [-w * 0.3 * sig(-0.3 * margin(row)) for w, row in zip(weights, PAIRS, strict=True)]
    )


REFUSED = {
    "a loss of no name": ({"type": "dpo"}, "type must be one of sigmoid, .*, got 'dpo'"),
    "an added loss of no name": ({"add": {"dpo": 1.0}}, "add must be one of sigmoid, .*, got 'dpo'"),
    "a loss added to itself": ({"add": {"sigmoid": 1.0}}, "add must not hold sigmoid"),
    "a weight of nothing": ({"add": {"sft": 0.0}}, "add must hold weights > 0, got 0.0 for sft"),
    "a number of another loss": ({"parameters": {"gamma": 1.0}}, r"sigmoid loss has \(none\), got 'gamma'"),
    "a negative number": ({"type": "simpo", "parameters": {"gamma": -1.0}}, "parameters.gamma must be >= 0, got -1.0"),
    "a division by zero": ({"type": "discopop", "parameters": {"tau": 0.0}}, "parameters.tau must be > 0, got 0.0"),
    "a logarithm of zero": ({"type": "exo_pair"}, "label_smoothing must be > 0 for the exo_pair loss"),
    "another divergence of one reward": ({"type": "nca_pair", "divergence": "js_divergence"}, "must be reverse_kl for"),
    "another divergence of no reward": ({"type": "simpo", "divergence": "js_divergence"}, "must be reverse_kl for"),
    "another divergence of means": ({"reduction": "mean", "divergence": "forward_kl"}, "must be reverse_kl for mean"),
    "an unknown divergence": ({"divergence": "kl"}, "divergence must be one of reverse_kl, .*, got 'kl'"),
    "weighted quantiles": ({"type": "aot", "weighting": "wpo"}, "weighting must be none for the aot loss"),
    "a mean of rewards without a reference": ({"type": "cpo", "add": {"bco_pair": 1.0}}, "add must not hold bco_pair"),
    "a mean of other rewards": ({"type": "sigmoid_norm", "add": {"bco_pair": 1.0}}, "add must not hold bco_pair"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_combined_is_refused_with_the_reason(case):
    options, complaint = REFUSED[case]
    with pytest.raises(ValueError, match=complaint):
        Objective(**options)


def test_a_sum_knows_the_labels_that_all_of_its_losses_know():
    assert Objective("sigmoid", add={"sft": 1.0}).takes_soft_labels
    assert Objective("sigmoid", add={"sft": 1.0}).takes_margins
    assert not Objective("sigmoid", add={"bco_pair": 1.0}).takes_soft_labels
    assert not Objective("sigmoid", add={"bco_pair": 1.0}).takes_margins
    # It compares two responses, and would do so as if the label were certain.
    assert not Objective("sigmoid", add={"orpo": 1.0}).takes_soft_labels
    assert not Objective("sigmoid", add={"aot": 1.0}).takes_weights
    with pytest.raises(ValueError, match=r"the sigmoid \+ aot loss knows no weights of pairs"):
        Objective("sigmoid", add={"aot": 1.0})(pair_logps(), labels=given(weights=WEIGHTS))


def test_the_documents_table_has_every_loss():
    text = (Path(losses_room.__file__).parent / "README.md").read_text()
    assert not [name for name in LOSSES if f"| `{name}` |" not in text]
