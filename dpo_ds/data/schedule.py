"""Which pairs a step holds, and how ranks and micro-batches share them.

Pure functions of (seed, epoch, step) and of lengths. No token and no tensor may enter, and ranks are a number here.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Schedule:
    """What every optimizer step holds: a pure function of the seed and the step, whatever the number of ranks.

    Attributes:
        pairs: how many pairs the data holds.
        pairs_per_step: pairs of one optimizer step over all ranks; the last step of an epoch takes what is left.
        steps: optimizer steps of the whole run.
        seed: seeds each epoch's order.
        shuffle: False keeps the order of the file.
    """

    pairs: int
    pairs_per_step: int
    steps: int
    seed: int
    shuffle: bool

    @classmethod
    def of_run(
        cls, *, pairs: int, pairs_per_step: int, epochs: int, max_steps: int | None, seed: int, shuffle: bool
    ) -> "Schedule":
        """Returns the schedule of ``epochs`` passes over the data, or of exactly ``max_steps`` steps if that is set."""
        steps = max_steps if max_steps is not None else epochs * -(-pairs // pairs_per_step)
        return cls(pairs=pairs, pairs_per_step=pairs_per_step, steps=steps, seed=seed, shuffle=shuffle)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the data."""
        return -(-self.pairs // self.pairs_per_step)

    @property
    def total_pairs(self) -> int:
        """Pairs that the whole run trains on, each as often as it comes."""
        epochs, rest = divmod(self.steps, self.steps_per_epoch)
        return epochs * self.pairs + min(rest * self.pairs_per_step, self.pairs)

    def pairs_of_step(self, step: int) -> NDArray[np.int64]:
        """Returns the indices of the pairs that optimizer step ``step`` (from 1) trains on, ``(pairs,)``."""
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        order = self._order_of_epoch(epoch)
        return order[position * self.pairs_per_step : (position + 1) * self.pairs_per_step]

    def _order_of_epoch(self, epoch: int) -> NDArray[np.int64]:
        if not self.shuffle:
            return np.arange(self.pairs)
        # RandomState, not Generator: NumPy promises (NEP 19) that its stream never changes, so a resumed run sees the
        # same order under another NumPy.
        return np.random.RandomState([self.seed, epoch]).permutation(self.pairs)


class MicroBatch(NamedTuple):
    """Pairs that one rank scores at once.

    Attributes:
        pairs: indices into the data.
        weight: 1, or 0 for a stand-in that keeps the ranks' collectives in step and counts for nothing.
    """

    pairs: tuple[int, ...]
    weight: float = 1.0


Plan = tuple[tuple[MicroBatch, ...], ...]
"""``plan[rank]`` are that rank's micro-batches; every rank has as many, or ZeRO-3's collectives would hang."""


def plan_training(
    pairs: Iterable[int], *, row_lengths: NDArray[np.int64], ranks: int, tokens_per_micro_batch: int
) -> Plan:
    """Splits one step over ranks and micro-batches under a token budget, balancing the ranks' padded tokens.

    Args:
        pairs: indices of the step's pairs.
        row_lengths: ``(all pairs,)``, tokens of prompt + longer response.
        ranks: number of ranks.
        tokens_per_micro_batch: bound on a micro-batch's tokens, padding included, per rank.
    """
    pairs = sorted(pairs)
    wanted = -(-len(_fill(pairs, row_lengths, tokens_per_micro_batch)) // ranks) * ranks
    # The smallest budget that needs no more micro-batches makes the costliest one as cheap as it can be.
    smallest = 2 * int(row_lengths[pairs].max())
    budgets = range(smallest, max(smallest, tokens_per_micro_batch) + 1)
    balanced = bisect_left(budgets, -wanted, key=lambda budget: -len(_fill(pairs, row_lengths, budget)))
    batches = _fill(pairs, row_lengths, budgets[balanced])
    while len(batches) < wanted and any(len(batch) > 1 for batch in batches):
        costliest = max((b for b in batches if len(b) > 1), key=lambda batch: _cost(batch, row_lengths))
        batches.remove(costliest)
        middle = len(costliest) // 2
        batches += [costliest[:middle], costliest[middle:]]
    return _deal(batches, row_lengths, ranks)


def plan_evaluation(
    pairs: Iterable[int], *, row_lengths: NDArray[np.int64], ranks: int, tokens_per_micro_batch: int
) -> Plan:
    """Splits an evaluation into micro-batches that do not depend on the number of ranks, then deals them to the ranks.

    A pair's log-probs depend in the last bits on the batch that it is in, so equal micro-batches make an evaluation's
    result the same on any number of ranks. Arguments as for ``plan_training``.
    """
    return _deal(_fill(pairs, row_lengths, tokens_per_micro_batch), row_lengths, ranks)


def _fill(pairs: Iterable[int], row_lengths: NDArray[np.int64], budget: int) -> list[tuple[int, ...]]:
    longest_first = sorted(pairs, key=lambda pair: (-row_lengths[pair], pair))
    batches = []
    while longest_first:
        # Two rows a pair, padded to the first, which is the longest. A pair over the budget is refused at preflight.
        size = max(1, budget // (2 * int(row_lengths[longest_first[0]])))
        batches.append(tuple(int(pair) for pair in longest_first[:size]))
        longest_first = longest_first[size:]
    return batches


def _deal(batches: Sequence[tuple[int, ...]], row_lengths: NDArray[np.int64], ranks: int) -> Plan:
    costliest_first = sorted(batches, key=lambda batch: (-_cost(batch, row_lengths), batch))
    rounds = -(-len(batches) // ranks)
    shortest = min((pair for batch in batches for pair in batch), key=lambda pair: (row_lengths[pair], pair))
    stand_ins = [MicroBatch((shortest,), weight=0.0)] * (rounds * ranks - len(batches))
    dealt = [MicroBatch(batch) for batch in costliest_first] + stand_ins
    # In a round all ranks hold batches of about one cost, so that none waits long; the direction alternates, so that
    # no rank always holds the costliest.
    by_round = [dealt[start : start + ranks] for start in range(0, len(dealt), ranks)]
    return tuple(
        tuple(batch[rank if number % 2 == 0 else ranks - 1 - rank] for number, batch in enumerate(by_round))
        for rank in range(ranks)
    )


def _cost(batch: tuple[int, ...], row_lengths: NDArray[np.int64]) -> int:
    return 2 * len(batch) * max(int(row_lengths[pair]) for pair in batch)
