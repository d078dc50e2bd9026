"""Which block of rows a step trains on, and which of its pairs: pure functions of the seed and the step.

So a step's place is known before anything was read, where the data do not fit a disk. No row and no file may enter.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpo_ds.data.schedule import permutation
from dpo_ds.errors import UserError


class Place(NamedTuple):
    """Where a step's pairs are.

    Attributes:
        turn: how many blocks the run has gone through before.
        epoch: from 0.
        block: its number in the order of the rows, from 0.
        position: how many steps the block has served before, in this epoch.
    """

    turn: int
    epoch: int
    block: int
    position: int


@dataclass(frozen=True)
class BlockSchedule:
    """What every optimizer step holds, where rows are tokenized block by block.

    A block serves as many whole steps as it has pairs at least, when as many of its rows are dropped as are allowed:
    how many pairs it has in fact is not known before it was tokenized. Shuffled, each epoch takes other ones of them.

    Attributes:
        rows: of all sources.
        rows_per_block: the last block has what is left; where that makes no whole step, it is left out.
        max_dropped: share of a block's rows that may be dropped.
        pairs_per_step: pairs of one optimizer step over all ranks.
        steps: optimizer steps of the whole run.
        seed: seeds the order of an epoch's blocks and that of a block's pairs.
        shuffle: False keeps the order of the files.
    """

    rows: int
    rows_per_block: int
    max_dropped: float
    pairs_per_step: int
    steps: int
    seed: int
    shuffle: bool

    @classmethod
    def of_run(
        cls,
        *,
        rows: int,
        rows_per_block: int,
        max_dropped: float,
        pairs_per_step: int,
        epochs: int,
        max_steps: int | None,
        seed: int,
        shuffle: bool,
    ) -> "BlockSchedule":
        """Returns the schedule of ``epochs`` passes over the blocks, or of exactly ``max_steps`` steps if that is set.

        Raises:
            UserError: no block serves a single step.
        """
        one = cls(rows, rows_per_block, max_dropped, pairs_per_step, 1, seed, shuffle)
        if not one.steps_per_epoch:
            raise UserError(
                f"data.streaming.rows_per_shard must give train.pairs_per_step ({pairs_per_step}) pairs although a "
                f"share of {max_dropped:g} of the {rows} rows may be dropped, got {rows_per_block}; raise it, lower "
                "data.max_dropped or train.pairs_per_step, or give more data"
            )
        return replace(one, steps=max_steps if max_steps is not None else epochs * one.steps_per_epoch)

    @cached_property
    def steps_of_blocks(self) -> NDArray[np.int64]:
        """How many steps each block serves an epoch, ``(blocks,)``, at least 1."""
        whole, rest = divmod(self.rows, self.rows_per_block)
        steps = [self._least_pairs(rows) // self.pairs_per_step for rows in (self.rows_per_block, rest)]
        return np.array([steps[0]] * whole * bool(steps[0]) + [steps[1]] * bool(steps[1]), dtype=np.int64)

    def _least_pairs(self, rows: int) -> int:
        # With the very comparison that refuses a block: dropped <= max_dropped * rows.
        return rows - math.floor(self.max_dropped * rows)

    @property
    def blocks(self) -> int:
        """How many blocks an epoch goes through."""
        return len(self.steps_of_blocks)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the blocks."""
        return int(self.steps_of_blocks.sum())

    @property
    def turns(self) -> int:
        """How many blocks the run goes through, one as often as it comes."""
        return self.place(self.steps).turn + 1

    def rows_of_block(self, block: int) -> range:
        """Returns a block's rows, all sources' counted from 0."""
        return range(block * self.rows_per_block, min((block + 1) * self.rows_per_block, self.rows))

    def block_of_turn(self, turn: int) -> int:
        """Returns the block that has a turn, counted from 0."""
        epoch, place = divmod(turn, self.blocks)
        return int(_order_of_blocks(self, epoch)[place])

    def blocks_of_turns(self, turns: Iterable[int]) -> set[int]:
        """Returns the blocks that have one of some turns."""
        return {self.block_of_turn(turn) for turn in turns}

    def place(self, step: int) -> Place:
        """Returns where optimizer step ``step`` (from 1) has its pairs."""
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        order = _order_of_blocks(self, epoch)
        ends = np.cumsum(self.steps_of_blocks[order])
        place = int(np.searchsorted(ends, position, side="right"))
        before = int(ends[place - 1]) if place else 0
        return Place(epoch * self.blocks + place, epoch, int(order[place]), position - before)

    def pairs_of_step(self, step: int, *, pairs: int) -> NDArray[np.int64]:
        """Returns which of its block's pairs optimizer step ``step`` (from 1) trains on, ``(pairs_per_step,)``.

        Args:
            step: the step.
            pairs: how many its block has.
        """
        place = self.place(step)
        order = _order_of_pairs(self, place.epoch, place.block, pairs)
        return order[place.position * self.pairs_per_step : (place.position + 1) * self.pairs_per_step].copy()


@lru_cache(maxsize=4)
def _order_of_blocks(schedule: BlockSchedule, epoch: int) -> NDArray[np.int64]:
    blocks = schedule.blocks
    return permutation([schedule.seed, epoch], blocks) if schedule.shuffle else np.arange(blocks)


@lru_cache(maxsize=1)
def _order_of_pairs(schedule: BlockSchedule, epoch: int, block: int, pairs: int) -> NDArray[np.int64]:
    return permutation([schedule.seed, epoch, block], pairs) if schedule.shuffle else np.arange(pairs)
