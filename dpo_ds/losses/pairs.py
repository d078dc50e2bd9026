"""What losses look at: pairs' log-probs, and what the data say of pairs. Tensors in, tensors out; no model, no rank."""

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Reduction = Literal["sum", "mean"]
Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]

LARGEST_EXPONENT = 80.0
"""Log-ratios are cut here before ``exp``, which float32 holds up to 88; their gradient is 0 beyond."""


@dataclass(frozen=True)
class PairLogps:
    """What the policy and the reference think of the same pairs; every tensor is ``(pairs,)``.

    ``h(x, y) = log pi(y|x) - log pi_ref(y|x)`` is a response's log-ratio. Without a reference its log-probs are zero,
    so that ``h`` is the policy's own log-prob.

    Attributes:
        is_mean: whether the log-probs are means over a response's tokens in place of sums.
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    is_mean: bool = False

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
        if self.is_mean:
            return self
        return replace(
            self,
            policy_chosen=self.policy_chosen / self.chosen_tokens,
            policy_rejected=self.policy_rejected / self.rejected_tokens,
            reference_chosen=self.reference_chosen / self.chosen_tokens,
            reference_rejected=self.reference_rejected / self.rejected_tokens,
            is_mean=True,
        )

    def unmoved(self) -> "PairLogps":
        """Returns what these pairs were if the policy still scored as the reference does."""
        return replace(self, policy_chosen=self.reference_chosen, policy_rejected=self.reference_rejected)

    def without_reference(self) -> "PairLogps":
        """Returns the same pairs with log-probs of 0 under the reference."""
        zeros = torch.zeros_like(self.reference_chosen)
        return replace(self, reference_chosen=zeros, reference_rejected=zeros)

    def under(self, divergence: Divergence, *, alpha: float) -> "PairLogps":
        """Returns the pairs with ``f'(pi / pi_ref)`` in place of every log-ratio, and without a reference.

        The reward under the constraint of another f-divergence than the reverse KL, up to terms that cancel in a pair:
        Wang et al. 2023, arXiv:2309.16240. With ``t = pi / pi_ref`` it is ``log t`` for the
        reverse KL, ``1 - 1/t`` for the forward KL, ``log(2t / (1 + t))`` for Jensen and Shannon's, and
        ``(t^(alpha - 1) - 1) / (alpha - 1)`` for an alpha-divergence, which tends to ``log t`` for ``alpha`` to 1 and
        is the forward KL's for ``alpha = 0``; the paper's own alpha is ``1 - alpha``.
        """
        if divergence == "reverse_kl":
            return self
        scores = [_slope_of(divergence, h, alpha=alpha) for h in (self.chosen_logratios, self.rejected_logratios)]
        return replace(self.without_reference(), policy_chosen=scores[0], policy_rejected=scores[1])


def _slope_of(divergence: Divergence, h: Tensor, *, alpha: float) -> Tensor:
    """Returns ``f'(exp(h))``."""
    if divergence == "js_divergence":
        return math.log(2) + F.logsigmoid(h)
    power = -1.0 if divergence == "forward_kl" else alpha - 1
    if power == 0:
        return h
    return torch.expm1((power * h).clamp(max=LARGEST_EXPONENT)) / power


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
