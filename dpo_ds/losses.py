"""Preference losses: log-probs in, per-pair losses and rewards out, no reduction over pairs.

A new loss is one function and one line of ``LOSSES``. No model, no config and no rank may enter.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

Reduction = Literal["sum", "mean"]


@dataclass(frozen=True)
class PairLogps:
    """What the policy and the reference think of the same pairs; every field is ``(pairs,)``.

    ``h(x, y) = log pi(y|x) - log pi_ref(y|x)`` is a response's log-ratio. Without a reference its log-probs are zero,
    so that ``h`` is the policy's own log-prob.
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def chosen_logratios(self) -> Tensor:
        """``h(x, chosen)``, ``(pairs,)``."""
        return self.policy_chosen - self.reference_chosen

    @property
    def rejected_logratios(self) -> Tensor:
        """``h(x, rejected)``, ``(pairs,)``."""
        return self.policy_rejected - self.reference_rejected

    @property
    def margins(self) -> Tensor:
        """``h(x, chosen) - h(x, rejected)``, ``(pairs,)``."""
        return self.chosen_logratios - self.rejected_logratios

    def averaged(self) -> "PairLogps":
        """Returns the same pairs with each response's log-probs divided by its number of tokens."""
        return replace(
            self,
            policy_chosen=self.policy_chosen / self.chosen_tokens,
            policy_rejected=self.policy_rejected / self.rejected_tokens,
            reference_chosen=self.reference_chosen / self.chosen_tokens,
            reference_rejected=self.reference_rejected / self.rejected_tokens,
        )


class PairLabels(NamedTuple):
    """What the data say of pairs beside which response is the better one; each ``(pairs,)``, or None for the default.

    Attributes:
        probabilities: that the chosen response really is the better one, in [0, 1]; by default 1.
        margins: by how much its reward has to be the larger; by default 0.
        weights: factors of the pairs' losses, > 0; by default 1. A mean over pairs is still one over their number, as
            in WPO, Zhou et al. 2024, arXiv:2406.11827: what a pair adds does not depend on its neighbours'
            weights.
    """

    probabilities: Tensor | None = None
    margins: Tensor | None = None
    weights: Tensor | None = None


_HARD_LABELS = PairLabels()


class PreferenceLoss(NamedTuple):
    """Per-pair results, each ``(pairs,)``; the rewards are detached."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor

    @property
    def margins(self) -> Tensor:
        """The chosen rewards less the rejected ones."""
        return self.chosen_rewards - self.rejected_rewards

    @property
    def accuracies(self) -> Tensor:
        """1 where the margin is positive, 0.5 where it is 0, so that an untrained policy does not start at 0."""
        return (self.margins.sign() + 1) / 2


class LossFunction(Protocol):
    """A loss of each pair: ``(pairs,)``."""

    def __call__(self, logps: PairLogps, *, beta: float, label_smoothing: float | Tensor) -> Tensor: ...


def sigmoid_loss(logps: PairLogps, *, beta: float, label_smoothing: float | Tensor) -> Tensor:
    """DPO: ``-log sigmoid(beta * margin)``, Rafailov et al. 2023, eq. 7, arXiv:2305.18290.

    With label smoothing ``e`` it is the conservative form, which takes a label to be wrong with probability ``e``:
    ``-(1 - e) log sigmoid(beta * margin) - e log sigmoid(-beta * margin)``, Mitchell 2023, eq. 3,
    https://ericmitchell.ai/cdpo.pdf.

    On length-averaged log-probs it is the length-normalised DPO of Lambert et al. 2024, section 5, arXiv:2411.15124.
    """
    logits = beta * logps.margins
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def hinge_loss(logps: PairLogps, *, beta: float, label_smoothing: float | Tensor) -> Tensor:
    """SLiC hinge on the DPO margin: ``max(0, 1 - beta * margin)``, Liu et al. 2023 (RSO), eq. 10, arXiv:2309.06657."""
    return F.relu(1 - beta * logps.margins)


def ipo_loss(logps: PairLogps, *, beta: float, label_smoothing: float | Tensor) -> Tensor:
    """IPO: ``(margin - 1 / (2 beta))^2``, Azar et al. 2023, eq. 17, arXiv:2310.12036; ``beta`` is the paper's tau.

    The log-probs are averaged over tokens by default, as the authors confirmed for their experiments; the paper's
    equation holds for sums as well (``reduction="sum"``).
    """
    return (logps.margins - 1 / (2 * beta)) ** 2


def _zero_margin_sigmoid(beta: float) -> float:
    return math.log(2)


@dataclass(frozen=True)
class Loss:
    """One line of the table.

    Attributes:
        function: the loss.
        reduction: how it takes a response's log-probs.
        at_zero_margin: its value where the margin is 0.
        smooths_labels: whether it knows labels that are wrong with some probability, ``(pairs,)`` or one for all.
        takes_margins: whether it compares ``beta * margin`` with a bound that a pair's own margin may shift.
    """

    function: LossFunction
    reduction: Reduction
    at_zero_margin: Callable[[float], float]
    smooths_labels: bool = False
    takes_margins: bool = False


LOSSES: dict[str, Loss] = {
    "sigmoid": Loss(sigmoid_loss, "sum", _zero_margin_sigmoid, smooths_labels=True, takes_margins=True),
    "sigmoid_norm": Loss(sigmoid_loss, "mean", _zero_margin_sigmoid, smooths_labels=True, takes_margins=True),
    "hinge": Loss(hinge_loss, "sum", lambda beta: 1.0, takes_margins=True),
    "ipo": Loss(ipo_loss, "mean", lambda beta: 1 / (4 * beta**2)),
}


def preference_loss(
    logps: PairLogps,
    *,
    type: str,
    beta: float,
    label_smoothing: float = 0.0,
    reduction: Reduction | None = None,
    labels: PairLabels = _HARD_LABELS,
) -> PreferenceLoss:
    """Returns each pair's loss and implicit rewards ``beta * h``, Rafailov et al. 2023, section 5.1, arXiv:2305.18290.

    A soft label ``p`` makes the loss ``p l(x) + (1 - p) l(-x)``, which label smoothing ``e`` does for all pairs with
    ``p = 1 - e``; where both are given, the label is wrong where one of the two is: ``p (1 - e) + (1 - p) e`` takes
    the place of ``p``. A margin ``m`` is subtracted from ``x = beta * margin``: Touvron et al. 2023 (Llama 2), eq. 2,
    arXiv:2307.09288, for reward models, and for DPO the offset of Amini et al. 2024, arXiv:2402.10571. The hinge
    becomes ``max(0, 1 + m - beta * margin)``.

    Args:
        logps: summed log-probs of the pairs.
        type: a key of ``LOSSES``.
        beta: strength of the pull towards the reference, > 0.
        label_smoothing: probability that a label is wrong, in [0, 0.5); only where the loss knows it.
        reduction: whether a response's log-prob is the sum over its tokens or their mean; None takes the loss's own.
            The rewards are those that the loss compares, and no label changes them.
        labels: what the data say of each pair.

    Raises:
        ValueError: ``label_smoothing``, soft labels or margins are set for a loss that does not know them.
    """
    loss = LOSSES[type]
    if label_smoothing and not loss.smooths_labels:
        raise ValueError(f"label_smoothing must be 0 for the {type} loss, got {label_smoothing}")
    if labels.probabilities is not None and not loss.smooths_labels:
        raise ValueError(f"the {type} loss knows no soft labels")
    if labels.margins is not None and not loss.takes_margins:
        raise ValueError(f"the {type} loss knows no margins")
    if (reduction or loss.reduction) == "mean":
        logps = logps.averaged()
    is_wrong: float | Tensor = label_smoothing
    if labels.probabilities is not None:
        is_wrong = labels.probabilities * label_smoothing + (1 - labels.probabilities) * (1 - label_smoothing)
    judged = logps
    if labels.margins is not None:
        judged = replace(logps, reference_chosen=logps.reference_chosen + labels.margins / beta)
    losses = loss.function(judged, beta=beta, label_smoothing=is_wrong)
    return PreferenceLoss(
        losses=losses if labels.weights is None else losses * labels.weights,
        chosen_rewards=beta * logps.chosen_logratios.detach(),
        rejected_rewards=beta * logps.rejected_logratios.detach(),
    )


def starting_losses(labels: PairLabels, *, pairs: int, type: str, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Returns each pair's loss, as ``preference_loss`` does, where policy and reference are equal; ``(pairs,)``."""
    if all(values is None for values in labels):
        return torch.full((pairs,), LOSSES[type].at_zero_margin(beta))
    on_cpu = PairLabels(*(None if values is None else values.cpu() for values in labels))
    zeros, ones = torch.zeros(pairs), torch.ones(pairs)
    equal = PairLogps(zeros, zeros, zeros, zeros, ones, ones)
    return preference_loss(equal, type=type, beta=beta, label_smoothing=label_smoothing, labels=on_cpu).losses
