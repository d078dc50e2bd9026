"""Sums and counts of what a step or an evaluation measures; one packed tensor carries them all across ranks."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dpo_ds.losses import PairLogps, PreferenceLoss


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
        """Returns sum / count for each name of a packed tensor, summed over ranks or not."""
        sums, counts = packed.cpu().unbind(1)
        return dict(zip(self._sums, (sums / counts).tolist(), strict=True))

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


def add_sources(
    tally: Tally, loss: PreferenceLoss, *, names: Mapping[int, str], sources: Tensor, weights: Tensor
) -> None:
    """Adds one micro-batch's losses and accuracies by source, as ``source/NAME/loss``.

    Args:
        tally: where to add.
        loss: the pairs' losses and rewards, each ``(pairs,)``.
        names: those of all sources, by number; a name is added where the micro-batch has no pair of it, too.
        sources: ``(pairs,)``, each pair's.
        weights: ``(pairs,)``, 0 for stand-ins.
    """
    for number, name in names.items():
        mine = weights * (sources == number)
        tally.add(f"source/{name}/loss", loss.losses, weights=mine)
        tally.add(f"source/{name}/rewards/accuracies", loss.accuracies, weights=mine)


def add_work(tally: Tally, *, tokens: int, filled: int, positions: int) -> None:
    """Adds what one micro-batch cost: its pairs' tokens, the positions they fill, and the positions computed."""
    for name, count in (("tokens", tokens), ("filled", filled), ("positions", positions)):
        tally.add(f"work/{name}", float(count))
