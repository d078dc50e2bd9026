"""Which pairs a step holds, and how ranks and micro-batches share them.

Pure functions of (seed, epoch, step) and of lengths. No token and no tensor may enter, and ranks are a number here.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class Part(NamedTuple):
    """A source's pairs, which follow those of the source before in the data.

    A source of n pairs and weight w is an endless row of passes over its pairs, each pass in an order of its own, of
    which every epoch takes the next w * n pairs (rounded to the nearest, half up; at least 1). So weight 2 is each pair
    twice an epoch, weight 0.5 a random half of them and in the next epoch the other half, and over a run no pair of a
    source comes more than once oftener than another.

    Attributes:
        pairs: how many it has.
        weight: > 0.
    """

    pairs: int
    weight: float = 1.0

    @property
    def taken(self) -> int:
        """How many pairs an epoch takes, each as often as it comes."""
        return max(1, math.floor(self.weight * self.pairs + 0.5)) if self.pairs else 0

    def pairs_of_epoch(self, epoch: int, *, seed: Sequence[int], shuffle: bool) -> NDArray[np.int64]:
        """Returns which of its pairs, counted from 0, an epoch (from 0) takes, ``(taken,)``."""
        if self.taken == self.pairs:
            return np.arange(self.pairs)
        passes, places = np.divmod(np.arange(epoch * self.taken, (epoch + 1) * self.taken), self.pairs)
        if not shuffle:
            return places
        orders = [permutation([*seed, number], self.pairs) for number in range(passes[0], passes[-1] + 1)]
        return np.concatenate([order[places[passes == passes[0] + n]] for n, order in enumerate(orders)])


@dataclass(frozen=True)
class Schedule:
    """What every optimizer step holds: a pure function of the seed and the step, whatever the number of ranks.

    Attributes:
        parts: the data's sources.
        pairs_per_step: pairs of one optimizer step over all ranks; the last step of an epoch takes what is left.
        steps: optimizer steps of the whole run.
        seed: seeds each epoch's order.
        shuffle: False keeps the order of the file, one source behind the other.
    """

    parts: tuple[Part, ...]
    pairs_per_step: int
    steps: int
    seed: int
    shuffle: bool

    @classmethod
    def of_run(
        cls,
        *,
        parts: Iterable[Part],
        pairs_per_step: int,
        epochs: int,
        max_steps: int | None,
        seed: int,
        shuffle: bool,
    ) -> "Schedule":
        """Returns the schedule of ``epochs`` passes over the data, or of exactly ``max_steps`` steps if that is set."""
        one = cls(parts=tuple(parts), pairs_per_step=pairs_per_step, steps=1, seed=seed, shuffle=shuffle)
        return replace(one, steps=max_steps if max_steps is not None else epochs * one.steps_per_epoch)

    @property
    def pairs(self) -> int:
        """Pairs of an epoch, each as often as it comes."""
        return sum(part.taken for part in self.parts)

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
        order = _order_of_epoch(self, epoch)
        return order[position * self.pairs_per_step : (position + 1) * self.pairs_per_step].copy()


@lru_cache(maxsize=1)
def _order_of_epoch(schedule: Schedule, epoch: int) -> NDArray[np.int64]:
    seed, shuffle = schedule.seed, schedule.shuffle
    starts = np.cumsum([0, *(part.pairs for part in schedule.parts)])
    pairs = np.concatenate(
        [
            start + part.pairs_of_epoch(epoch, seed=[seed, number], shuffle=shuffle)
            for number, (start, part) in enumerate(zip(starts, schedule.parts, strict=False))
        ]
    )
    return np.sort(pairs)[permutation([seed, epoch], len(pairs))] if shuffle else pairs


def permutation(seed: Sequence[int], length: int) -> NDArray[np.int64]:
    """Returns the numbers from 0 in an order that follows from the seed alone, ``(length,)``."""
    # RandomState, not Generator: NumPy promises (NEP 19) that its stream never changes, so a resumed run sees the same
    # order under another NumPy.
    return np.random.RandomState(seed).permutation(length)


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


class Lengths(NamedTuple):
    """Tokens of each pair's parts, ``(pairs,)`` each."""

    prompt: NDArray[np.int64]
    chosen: NDArray[np.int64]
    rejected: NDArray[np.int64]

    @property
    def longer(self) -> NDArray[np.int64]:
        """Tokens of prompt + longer response."""
        return self.prompt + np.maximum(self.chosen, self.rejected)

    @property
    def scored(self) -> NDArray[np.int64]:
        """Tokens of both responses."""
        return self.chosen + self.rejected

    @property
    def tokens(self) -> NDArray[np.int64]:
        """Tokens of the pair, its prompt counted once."""
        return self.prompt + self.scored

    @property
    def attended(self) -> NDArray[np.float64]:
        """How many (token, earlier token) products attention takes where the responses share their prompt."""
        prompt, chosen, rejected = (part.astype(np.float64) for part in self)
        return prompt**2 / 2 + sum(response * (prompt + response / 2) for response in (chosen, rejected))


class Rows(Protocol):
    """How pairs share the rows of a micro-batch, and what that costs."""

    def split(self, pairs: Sequence[int], *, budget: int, multiple_of: int) -> list[tuple[int, ...]]:
        """Returns micro-batches of at most ``budget`` positions; ``multiple_of`` divides their number if it can."""

    def cost(self, pairs: Sequence[int]) -> float:
        """Returns the cost of one micro-batch, in any unit."""


@dataclass(frozen=True)
class PaddedRows:
    """Two rows a pair, padded to the longest.

    Attributes:
        longer: ``(all pairs,)``, tokens of prompt + longer response.
    """

    longer: NDArray[np.int64]

    def cost(self, pairs: Sequence[int]) -> float:
        """Returns the positions of one micro-batch, padding included."""
        return 2 * len(pairs) * max(int(self.longer[pair]) for pair in pairs)

    def split(self, pairs: Sequence[int], *, budget: int, multiple_of: int) -> list[tuple[int, ...]]:
        """Returns micro-batches of pairs of about one length."""
        longest_first = sorted(pairs, key=lambda pair: (-self.longer[pair], pair))
        wanted = _rounded_up(len(self._filled(longest_first, budget)), multiple_of)
        # The smallest budget that needs no more micro-batches makes the costliest one as cheap as it can be.
        smallest = 2 * int(self.longer[longest_first[0]])
        budgets = range(smallest, max(smallest, budget) + 1)
        balanced = bisect_left(budgets, -wanted, key=lambda budget: -len(self._filled(longest_first, budget)))
        batches = self._filled(longest_first, budgets[balanced])
        while len(batches) < wanted and any(len(batch) > 1 for batch in batches):
            costliest = max((batch for batch in batches if len(batch) > 1), key=self.cost)
            batches.remove(costliest)
            middle = len(costliest) // 2
            batches += [costliest[:middle], costliest[middle:]]
        return batches

    def _filled(self, longest_first: Sequence[int], budget: int) -> list[tuple[int, ...]]:
        batches = []
        while longest_first:
            # A pair over the budget is refused at preflight.
            size = max(1, budget // (2 * int(self.longer[longest_first[0]])))
            batches.append(tuple(longest_first[:size]))
            longest_first = longest_first[size:]
        return batches


@dataclass(frozen=True)
class PackedRows:
    """All pairs in one row, each with its prompt once, without padding.

    Attributes:
        tokens: ``(all pairs,)``, tokens of prompt, chosen and rejected response.
        costs: ``(all pairs,)``, what a pair costs, in any unit.
    """

    tokens: NDArray[np.int64]
    costs: NDArray[np.float64]

    def cost(self, pairs: Sequence[int]) -> float:
        """Returns the sum of the pairs' costs."""
        return float(self.costs[list(pairs)].sum())

    def split(self, pairs: Sequence[int], *, budget: int, multiple_of: int) -> list[tuple[int, ...]]:
        """Returns as few micro-batches as hold the pairs, of about one cost.

        The costliest pair goes first, always to the micro-batch that is cheapest so far (Graham 1969).
        """
        costliest_first = sorted(pairs, key=lambda pair: (-self.costs[pair], pair))
        fewest = -(-int(self.tokens[costliest_first].sum()) // budget)
        for count in range(_rounded_up(max(1, fewest), multiple_of), len(pairs), multiple_of):
            batches = self._spread(costliest_first, count, budget)
            if batches is not None:
                return batches
        return [(pair,) for pair in costliest_first]

    def _spread(self, costliest_first: Sequence[int], count: int, budget: int) -> list[tuple[int, ...]] | None:
        costs, room = np.zeros(count), np.full(count, budget)
        batches: list[tuple[int, ...]] = [()] * count
        for pair in costliest_first:
            fitting = room >= self.tokens[pair]
            if not fitting.any():
                return None
            cheapest = int(np.where(fitting, costs, np.inf).argmin())
            batches[cheapest] += (pair,)
            costs[cheapest] += self.costs[pair]
            room[cheapest] -= self.tokens[pair]
        return batches


def plan_training(pairs: Iterable[int], *, rows: Rows, ranks: int, tokens_per_micro_batch: int) -> Plan:
    """Splits one step over ranks and micro-batches under a token budget, balancing what they cost.

    Args:
        pairs: indices of the step's pairs.
        rows: how pairs share rows.
        ranks: number of ranks.
        tokens_per_micro_batch: bound on a micro-batch's positions, padding included, per rank.
    """
    pairs = sorted(int(pair) for pair in pairs)
    return _deal(rows.split(pairs, budget=tokens_per_micro_batch, multiple_of=ranks), rows, ranks)


def regroup(plan: Plan, *, rows: Rows, tokens_per_micro_batch: int) -> Plan:
    """Returns the plan with each rank's pairs in micro-batches of another budget, as many on every rank.

    Args:
        plan: whose ranks keep their pairs.
        rows: how pairs share rows.
        tokens_per_micro_batch: bound on a micro-batch's positions.
    """
    by_rank = [sorted({pair for micro_batch in rank for pair in micro_batch.pairs}) for rank in plan]
    split = [rows.split(pairs, budget=tokens_per_micro_batch, multiple_of=1) for pairs in by_rank]
    most = max(map(len, split))
    return tuple(
        tuple(MicroBatch(batch) for batch in batches) + (MicroBatch((pairs[0],), weight=0.0),) * (most - len(batches))
        for pairs, batches in zip(by_rank, split, strict=True)
    )


def plan_evaluation(pairs: Iterable[int], *, rows: Rows, ranks: int, tokens_per_micro_batch: int) -> Plan:
    """Splits an evaluation into micro-batches that do not depend on the number of ranks, then deals them to the ranks.

    A pair's log-probs depend in the last bits on the batch that it is in, so equal micro-batches make an evaluation's
    result the same on any number of ranks. Arguments as for ``plan_training``.
    """
    pairs = sorted(int(pair) for pair in pairs)
    return _deal(rows.split(pairs, budget=tokens_per_micro_batch, multiple_of=1), rows, ranks)


def _deal(batches: Sequence[tuple[int, ...]], rows: Rows, ranks: int) -> Plan:
    costliest_first = sorted(batches, key=lambda batch: (-rows.cost(batch), batch))
    rounds = -(-len(batches) // ranks)
    cheapest = min((pair for batch in batches for pair in batch), key=lambda pair: (rows.cost([pair]), pair))
    stand_ins = [MicroBatch((cheapest,), weight=0.0)] * (rounds * ranks - len(batches))
    dealt = [MicroBatch(batch) for batch in costliest_first] + stand_ins
    # In a round all ranks hold batches of about one cost, so that none waits long; the direction alternates, so that
    # no rank always holds the costliest.
    by_round = [dealt[start : start + ranks] for start in range(0, len(dealt), ranks)]
    return tuple(
        tuple(batch[rank if number % 2 == 0 else ranks - 1 - rank] for number, batch in enumerate(by_round))
        for rank in range(ranks)
    )


def _rounded_up(count: int, multiple_of: int) -> int:
    return -(-count // multiple_of) * multiple_of
