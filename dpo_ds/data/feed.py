"""What a run trains on, step by step: the one thing that training knows of its data. No rank may enter."""

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from dpo_ds.data.prepared import PreparedPairs
from dpo_ds.data.schedule import Schedule
from dpo_ds.data.tokenization import TokenizedPair


class StepPairs(NamedTuple):
    """What one optimizer step trains on.

    Attributes:
        pairs: among which they are.
        indices: which of these, ``(pairs of the step,)``.
    """

    pairs: PreparedPairs
    indices: NDArray[np.int64]


class Feed(Protocol):
    """What every step of a run trains on: a pure function of the seed and the step, whatever the number of ranks."""

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""

    @property
    def probe(self) -> TokenizedPair:
        """One pair, the same at any time."""

    def pairs_until(self, step: int) -> int:
        """Returns how many pairs the run trains on up to a step and with it, each as often as it comes."""

    def is_at_hand(self, step: int) -> bool:
        """Whether what ``step`` trains on lies beside what the step before did; the same on every rank."""

    def is_there(self, step: int) -> bool:
        """Whether what optimizer step ``step`` trains on need not be waited for; to be asked until it is so.

        Raises:
            UserError: it cannot be prepared.
            RunError: it is not there in time.
        """

    def of_step(self, step: int) -> StepPairs:
        """Returns what optimizer step ``step`` (from 1) trains on, once it is there.

        Raises:
            UserError: it cannot be prepared.
            RunError: it is not there in time.
        """


@dataclass(frozen=True)
class WholeFeed:
    """A feed of pairs that are all there.

    Attributes:
        pairs: all of them.
        schedule: their order.
    """

    pairs: PreparedPairs
    schedule: Schedule

    @property
    def steps(self) -> int:
        """As ``Feed`` says."""
        return self.schedule.steps

    @property
    def probe(self) -> TokenizedPair:
        """As ``Feed`` says."""
        return self.pairs.pair(0)

    def pairs_until(self, step: int) -> int:
        """As ``Feed`` says."""
        return replace(self.schedule, steps=step).total_pairs

    def is_at_hand(self, step: int) -> bool:
        """As ``Feed`` says."""
        return True

    def is_there(self, step: int) -> bool:
        """As ``Feed`` says."""
        return True

    def of_step(self, step: int) -> StepPairs:
        """As ``Feed`` says."""
        return StepPairs(self.pairs, self.schedule.pairs_of_step(step))
