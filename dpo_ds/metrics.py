"""Sums and counts of what a step or an evaluation measures; one packed tensor carries them all across ranks."""

from collections.abc import Mapping
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpo_ds.losses import PairLogps, PreferenceLoss

BIN_EDGES = (
    *(-100.0, -30.0, -10.0, -3.0, -1.0, -0.3, -0.1, -0.03, -0.01, 0.0),
    *(0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
)
"""Of histograms, the same for all so that ranks and evaluations add up; the outermost bins hold all that is beyond."""

SATURATED_BELOW = 0.01
"""A pair whose gradient has less than this of its full weight is learned, or given up."""

_MOMENTS, _BINS = "moments/", "bins/"
_SHORTEST_GROUP = 5


class Histogram(TypedDict):
    """Counts between edges: ``counts[i]`` values lie in ``[edges[i], edges[i + 1])``."""

    edges: list[float]
    counts: list[float]


class Tally:
    """Named (sum, count) pairs that stay on the device, in float64, until they are read.

    Every rank must add the same names in the same order: the packed tensors are summed over ranks position by position.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor | float, *, weights: Tensor | float = 1.0) -> None:
        """Adds values to a name.

        Args:
            name: the metric's name.
            values: ``(n,)`` or a number.
            weights: ``(n,)`` or a number; a weight of 0 leaves the value out, even if it is not finite.
        """
        value = torch.as_tensor(values, dtype=torch.float64, device=self._device).detach()
        weight = torch.as_tensor(weights, dtype=torch.float64, device=self._device).expand_as(value)
        counted = torch.where(weight > 0, value * weight, torch.zeros_like(value))
        entry = torch.stack([counted.sum(), weight.sum()])
        self._sums[name] = self._sums[name] + entry if name in self._sums else entry

    def packed(self) -> Tensor:
        """Returns ``(names, 2)``: a row of (sum, count) for each name, in the order of their first ``add``."""
        return torch.stack(list(self._sums.values()))

    def means(self, packed: Tensor) -> dict[str, float]:
        """Returns sum / count for each name of a packed tensor, summed over ranks or not, and the correlations."""
        sums, counts = packed.cpu().unbind(1)
        means = dict(zip(self._sums, (sums / counts).tolist(), strict=True))
        shown = {name: mean for name, mean in means.items() if not name.startswith((_MOMENTS, _BINS))}
        correlated = {name.split("/", 2)[2] for name in means if name.startswith(_MOMENTS)}
        return shown | {
            name: _correlation(*(means[f"{_MOMENTS}{part}/{name}"] for part in ("x", "y", "xx", "yy", "xy")))
            for name in sorted(correlated)
        }

    def histograms(self, packed: Tensor) -> dict[str, Histogram]:
        """Returns the histograms of a packed tensor, as ``histogram/NAME``."""
        counts: dict[str, list[float]] = {}
        for name, count in self.sums(packed).items():
            if name.startswith(_BINS):
                counts.setdefault(name.split("/", 2)[2], []).append(count)
        return {f"histogram/{name}": Histogram(edges=list(BIN_EDGES), counts=bins) for name, bins in counts.items()}

    def sums(self, packed: Tensor) -> dict[str, float]:
        """Returns the sum for each name of a packed tensor."""
        return dict(zip(self._sums, packed[:, 0].tolist(), strict=True))


def add_pairs(tally: Tally, loss: PreferenceLoss, logps: PairLogps, *, weights: Tensor) -> None:
    """Adds what one micro-batch says of its pairs, under the names that TRL made standard.

    Args:
        tally: where to add.
        loss: the pairs' losses and rewards, each ``(pairs,)``.
        logps: the pairs' summed log-probs.
        weights: ``(pairs,)``, 0 for stand-ins.
    """
    values = {
        "loss": loss.losses,
        "rewards/chosen": loss.chosen_rewards,
        "rewards/rejected": loss.rejected_rewards,
        "rewards/accuracies": loss.accuracies,
        "rewards/margins": loss.margins,
        "logps/chosen": logps.policy_chosen,
        "logps/rejected": logps.policy_rejected,
        "lengths/chosen": logps.chosen_tokens,
        "lengths/rejected": logps.rejected_tokens,
    }
    for name, value in values.items():
        tally.add(name, value, weights=weights)


def add_diagnostics(
    tally: Tally, loss: PreferenceLoss, logps: PairLogps, *, weights: Tensor, has_logratios: bool
) -> None:
    """Adds what one micro-batch says of DPO's known ways to fail.

    ``gradient_weight`` is the mean of ``sigmoid(-margin)``, the weight that a pair has in DPO's gradient (Rafailov et
    al. 2023, section 4, arXiv:2305.18290), and ``saturated`` the share of pairs where it is below ``SATURATED_BELOW``.
    ``length_correlation`` is Pearson's, between reward margins and differences in length. With log-ratios, ``kl/*``
    are mean log-ratios a token, which estimate the KL divergence of the policy from the reference where responses came
    from the policy, and ``displaced`` is the share of chosen responses that are less likely than under the reference.

    Args:
        tally: where to add.
        loss: the pairs' losses and rewards, each ``(pairs,)``.
        logps: the pairs' summed log-probs.
        weights: ``(pairs,)``, 0 for stand-ins.
        has_logratios: whether the log-probs are of the same tokens under the policy and under a reference.
    """
    gradient = torch.sigmoid(-loss.margins)
    tally.add("gradient_weight", gradient, weights=weights)
    tally.add("saturated", (gradient < SATURATED_BELOW).double(), weights=weights)
    if has_logratios:
        for name, logratios, tokens in (
            ("kl/chosen", logps.chosen_logratios, logps.chosen_tokens),
            ("kl/rejected", logps.rejected_logratios, logps.rejected_tokens),
        ):
            tally.add(name, logratios / tokens, weights=weights * tokens)
        tally.add("displaced", (logps.chosen_logratios < 0).double(), weights=weights)
    x, y = loss.margins.double(), (logps.chosen_tokens - logps.rejected_tokens).double()
    for part, value in (("x", x), ("y", y), ("xx", x * x), ("yy", y * y), ("xy", x * y)):
        tally.add(f"{_MOMENTS}{part}/length_correlation", value, weights=weights)


def _correlation(x: float, y: float, xx: float, yy: float, xy: float) -> float:
    """Returns Pearson's correlation from means; NaN where one of the two does not vary."""
    spreads = max(0.0, xx - x * x) * max(0.0, yy - y * y)
    return float((xy - x * y) / spreads**0.5) if spreads > 0 else float("nan")


def add_histogram(tally: Tally, name: str, values: Tensor, *, weights: Tensor) -> None:
    """Adds values to a histogram, ``(pairs,)``, with weights 0 for stand-ins."""
    edges = torch.tensor(BIN_EDGES, dtype=values.dtype, device=values.device)
    bins = (torch.bucketize(values, edges, right=True) - 1).clamp(0, len(BIN_EDGES) - 2)
    for number in range(len(BIN_EDGES) - 1):
        tally.add(f"{_BINS}{number:02d}/{name}", (bins == number).double(), weights=weights)


def add_groups(
    tally: Tally, loss: PreferenceLoss, *, kind: str, names: Mapping[int, str], groups: Tensor, weights: Tensor
) -> None:
    """Adds one micro-batch's losses and accuracies by group, as ``KIND/NAME/loss``.

    Args:
        tally: where to add.
        loss: the pairs' losses and rewards, each ``(pairs,)``.
        kind: what the groups are, such as ``source``.
        names: those of all groups, by number; a name is added where the micro-batch has no pair of it, too.
        groups: ``(pairs,)``, each pair's.
        weights: ``(pairs,)``, 0 for stand-ins.
    """
    for number, name in names.items():
        mine = weights * (groups == number)
        tally.add(f"{kind}/{name}/loss", loss.losses, weights=mine)
        tally.add(f"{kind}/{name}/rewards/accuracies", loss.accuracies, weights=mine)


def length_groups(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns each length's group: 5 up to 32 tokens, 6 up to 64, 7 up to 128, and so on."""
    return np.maximum(np.ceil(np.log2(np.maximum(tokens, 1))), _SHORTEST_GROUP).astype(np.int64)


def length_names(groups: NDArray[np.int64]) -> dict[int, str]:
    """Returns the names of the groups that have lengths, such as ``33-64``; none where there is one group only."""
    found = sorted(set(groups.tolist()))
    if len(found) == 1:
        return {}
    return {group: f"{1 if group == _SHORTEST_GROUP else 2 ** (group - 1) + 1}-{2**group}" for group in found}


def add_work(tally: Tally, *, tokens: int, filled: int, positions: int) -> None:
    """Adds what one micro-batch cost: its pairs' tokens, the positions they fill, and the positions computed."""
    for name, count in (("tokens", tokens), ("filled", filled), ("positions", positions)):
        tally.add(f"work/{name}", float(count))
