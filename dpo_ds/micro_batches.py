"""Pairs into scored micro-batches: dealt to ranks, laid out in rows, scored by the policy and the reference."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpo_ds.config import RunConfig
from dpo_ds.data.batch import PairBatch, discounted, packed_batch, padded_batch
from dpo_ds.data.prepared import PreparedPairs
from dpo_ds.data.schedule import PackedRows, PaddedRows, Plan, Rows, plan_evaluation, plan_training, regroup
from dpo_ds.data.tokenization import TokenizedPair
from dpo_ds.engine import DataParallel, Engines
from dpo_ds.engine.reference_cache import CachedReference
from dpo_ds.losses import PairLogps
from dpo_ds.throughput import StepCost


class MicroBatches:
    """How a run's pairs reach its models. Scoring is collective; all else is not, and the same on every rank."""

    def __init__(
        self,
        engines: Engines,
        config: RunConfig,
        *,
        data_parallel: DataParallel,
        device: torch.device,
        packed: bool,
        cached: CachedReference | None,
        heed: Callable[[], None],
    ) -> None:
        """Composes them.

        Args:
            engines: the policy's and, unless the loss is reference-free, the reference's.
            config: the resolved run file.
            data_parallel: which ranks score which pairs.
            device: of the models.
            packed: whether all pairs of a micro-batch share one row, and its responses their prompt.
            cached: the reference's log-probs where it has no engine.
            heed: called before a model scores, on every rank; leaves where the run was asked to stop.
        """
        self._engines = engines
        self._config = config
        self._data_parallel = data_parallel
        self._device = device
        self._packed = packed
        self._cached = cached
        self._heed = heed
        self._cost = StepCost(*engines.policy.products(), passes=6 if engines.reference is None else 8)
        # One, lest pairs that the feed has done with stay mapped.
        self.flops = lru_cache(maxsize=1)(self._flops_of)
        self._rows = lru_cache(maxsize=1)(self._rows_of)

    def plan(self, among: PreparedPairs, indices: NDArray[np.int64]) -> Plan:
        """Deals a step's pairs to the ranks."""
        return plan_training(
            indices,
            rows=self._rows(among),
            ranks=self._data_parallel.size,
            tokens_per_micro_batch=self._config.train.tokens_per_micro_batch,
        )

    def plan_evaluation(self, pairs: PreparedPairs) -> Plan:
        """Deals all pairs of a set to the ranks."""
        return plan_evaluation(
            range(len(pairs)),
            rows=self._rows(pairs),
            ranks=self._data_parallel.size,
            tokens_per_micro_batch=self._config.train.tokens_per_micro_batch,
        )

    def laid_out(self, pairs: PreparedPairs, plan: Plan) -> Iterator[PairBatch]:
        """Yields this rank's micro-batches of a plan."""
        for micro_batch in plan[self._data_parallel.rank]:
            yield self.lay_out([pairs.pair(index) for index in micro_batch.pairs], weight=micro_batch.weight)

    def lay_out(self, pairs: Sequence[TokenizedPair], *, weight: float = 1.0) -> PairBatch:
        """Returns one micro-batch; stand-ins weigh 0."""
        in_rows = packed_batch if self._packed else padded_batch
        return in_rows(pairs, weight=weight).to(self._device)

    def reference_logps_of_step(self, among: PreparedPairs, plan: Plan, batches: Sequence[PairBatch]) -> list[Tensor]:
        """Returns the reference's log-probs, ``(2, pairs)``, of each of this rank's micro-batches.

        It has its own, larger ones where ``reference.tokens_per_micro_batch`` says so.
        """
        budget = self._config.reference.tokens_per_micro_batch
        mine = plan[self._data_parallel.rank]
        if budget is None or self._engines.reference is None:
            return [
                self._reference_logps(among, micro_batch.pairs, batch)
                for micro_batch, batch in zip(mine, batches, strict=True)
            ]
        larger = regroup(plan, rows=self._rows(among), tokens_per_micro_batch=budget)
        logps = {
            pair: scores
            for micro_batch, batch in zip(larger[self._data_parallel.rank], self.laid_out(among, larger), strict=True)
            for pair, scores in zip(
                micro_batch.pairs, self._engines.reference.score(self.for_reference(batch)).T, strict=True
            )
        }
        return [torch.stack([logps[pair] for pair in micro_batch.pairs], dim=1) for micro_batch in mine]

    def scored_by_reference(self, pairs: PreparedPairs, plan: Plan) -> Iterator[tuple[PairBatch, Tensor]]:
        """Yields this rank's micro-batches of a plan and the reference's log-probs of each."""
        for micro_batch, batch in zip(plan[self._data_parallel.rank], self.laid_out(pairs, plan), strict=True):
            yield batch, self._reference_logps(pairs, micro_batch.pairs, batch)

    def score(self, batch: PairBatch, reference: Tensor) -> PairLogps:
        """Returns a micro-batch's log-probs by the policy, with gradients, beside those of the reference."""
        self._heed()
        policy = self._engines.policy.score(discounted(batch, self._config.loss.ld_alpha))
        return pair_logps(batch, policy, reference)

    def for_reference(self, batch: PairBatch) -> PairBatch:
        """Returns a micro-batch as the reference scores it."""
        loss = self._config.loss
        return discounted(batch, loss.ld_alpha if loss.ld_reference else None)

    def _reference_logps(self, pairs: PreparedPairs, indices: Sequence[int], batch: PairBatch) -> Tensor:
        if self._cached is not None:
            return self._cached.logps(pairs, indices).to(self._device)
        if self._engines.reference is None:
            return torch.zeros(2, len(batch.weights), device=self._device)
        self._heed()
        return self._engines.reference.score(self.for_reference(batch))

    def _flops_of(self, pairs: PreparedPairs) -> NDArray[np.float64]:
        """Returns ``(pairs,)``: operations of a step that each pair costs."""
        lengths = pairs.lengths
        return self._cost.flops(tokens=lengths.tokens, scored=lengths.scored, attended=lengths.attended)

    def _rows_of(self, pairs: PreparedPairs) -> Rows:
        if self._packed:
            return PackedRows(pairs.lengths.tokens, self.flops(pairs))
        return PaddedRows(pairs.lengths.longer)


def pair_logps(batch: PairBatch, policy: Tensor, reference: Tensor) -> PairLogps:
    """Returns a micro-batch's log-probs, each model's ``(2, pairs)``."""
    return PairLogps(*policy, *reference, *batch.response_tokens.view(2, -1))
