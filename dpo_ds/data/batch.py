"""From token ids to the tensors of one micro-batch. The layout of pairs in rows is decided here and nowhere else."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from dpo_ds.data.tokenization import TokenizedPair
from dpo_ds.losses import PairLabels


class Span(NamedTuple):
    """Where one pair lies in a packed row: ``prompt | chosen | rejected``, one behind the other.

    Attributes:
        start: position of the first prompt token.
        prompt: tokens of the prompt.
        chosen: tokens of the chosen response.
        rejected: tokens of the rejected response.
    """

    start: int
    prompt: int
    chosen: int
    rejected: int

    @property
    def end(self) -> int:
        """The position behind the last token."""
        return self.start + self.prompt + self.chosen + self.rejected


@dataclass(frozen=True)
class PairBatch:
    """Pairs laid out in rows, and where in those rows each response's tokens are predicted.

    A scorer needs only this: run the rows, pick the hidden states at ``predicted_at``, score ``targets`` with them, and
    sum by ``response_of``. How pairs share rows is the attention's business. Response ``i`` is pair ``i``'s chosen one,
    response ``pairs + i`` its rejected one.

    Attributes:
        input_ids: ``(rows, length)``, padded to the right with 0, which causal attention never lets a scored token see.
        predicted_at: ``(scored,)``, positions in ``input_ids.flatten()`` whose hidden state predicts a scored token.
        targets: ``(scored,)``, the scored tokens: those of the responses, less what others said between their turns.
        response_of: ``(scored,)``, in ``[0, 2 * pairs)``.
        response_tokens: ``(2 * pairs,)``, scored tokens of each response.
        weights: ``(pairs,)``, 1 for a real pair, 0 for a stand-in.
        probabilities: ``(pairs,)``, as in ``PairLabels``, as the next two are.
        margins: ``(pairs,)`` or None.
        loss_weights: ``(pairs,)`` or None.
        token_weights: ``(scored,)``, factors of the scored tokens' log-probs, or None where all count alike.
        tokens: tokens of the pairs, each prompt counted once, stand-ins not at all.
        filled: positions of ``input_ids`` that are neither padding nor a stand-in's.
        lengths: ``(rows,)``, tokens of each row, before its padding; None: no row has any.
        position_ids: ``(rows, length)``, each token's distance from the first token of its prompt; None: its column.
        spans: the pairs of the one packed row, in order and without gaps; empty where rows are plain sequences.
    """

    input_ids: Tensor
    predicted_at: Tensor
    targets: Tensor
    response_of: Tensor
    response_tokens: Tensor
    weights: Tensor
    tokens: int
    filled: int
    lengths: Tensor | None = None
    position_ids: Tensor | None = None
    spans: tuple[Span, ...] = ()
    probabilities: Tensor | None = None
    margins: Tensor | None = None
    loss_weights: Tensor | None = None
    token_weights: Tensor | None = None

    @property
    def labels(self) -> PairLabels:
        """What the data say of the pairs beside which response is the better one."""
        return PairLabels(self.probabilities, self.margins, self.loss_weights)

    def to(self, device: torch.device) -> "PairBatch":
        """Returns the batch with its tensors on ``device``."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        return replace(self, **moved)


def discounted(batch: PairBatch, alpha: float | None) -> PairBatch:
    """Returns the batch with what the longer response of a pair has more than the other one counting ``alpha``.

    LD-DPO: ``log pi(y_1 .. y_m) + alpha log pi(y_(m + 1) .. y_n)`` with ``m`` the length of the shorter response, Liu
    et al. 2024, arXiv:2409.06411.

    Args:
        batch: its pairs.
        alpha: in [0, 1]; None or 1 leaves the batch as it is.
    """
    if alpha is None or alpha == 1:
        return batch
    shorter = batch.response_tokens.view(2, -1).amin(0).repeat(2)
    first = batch.response_tokens.cumsum(0) - batch.response_tokens
    # Each response's tokens stand together and in order.
    place = torch.arange(len(batch.targets), device=batch.targets.device) - first[batch.response_of]
    is_shared = place < shorter[batch.response_of]
    weights = torch.where(is_shared, 1.0, alpha)
    return replace(batch, token_weights=weights)


def packed_batch(pairs: Sequence[TokenizedPair], *, weight: float = 1.0) -> PairBatch:
    """Lays all pairs out in one row, each as ``prompt | chosen | rejected``, without padding.

    Both responses follow the prompt that they share: Wang & Hegde 2024, section 3, arXiv:2410.20305. The model must run
    on an attention that keeps the pairs, and the two responses of a pair, apart.

    Args:
        pairs: the micro-batch's pairs.
        weight: 1, or 0 for stand-ins.
    """
    parts = [part for pair in pairs for part in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)]
    lengths = _lengths(pairs)
    prompt, chosen, _ = lengths.T
    ends = lengths.sum(1).cumsum()
    starts = ends - lengths.sum(1)
    input_ids = np.fromiter(chain.from_iterable(parts), np.int64, count=ends[-1])
    # A rejected token stands where it would stand if the chosen response were not there.
    origins = np.stack([starts, starts, starts + chosen], axis=1)
    position_ids = np.arange(ends[-1]) - np.repeat(origins.ravel(), lengths.ravel())
    first = starts + prompt
    return _batch(
        pairs,
        input_ids[None],
        first=np.concatenate([first, first + chosen]),
        # The last prompt token predicts the first token of both responses.
        before=np.concatenate([first, first]) - 1,
        lengths=lengths,
        weight=weight,
        filled=int(ends[-1]),
        position_ids=torch.from_numpy(position_ids[None]),
        spans=tuple(Span(start, *span) for start, span in zip(starts.tolist(), lengths.tolist(), strict=True)),
    )


def padded_batch(pairs: Sequence[TokenizedPair], *, weight: float = 1.0) -> PairBatch:
    """Lays every response out in a row of its own behind its prompt: chosen rows first, then rejected rows.

    Args:
        pairs: the micro-batch's pairs.
        weight: 1, or 0 for stand-ins.
    """
    rows = [pair.prompt_ids + pair.chosen_ids for pair in pairs] + [p.prompt_ids + p.rejected_ids for p in pairs]
    lengths = _lengths(pairs)
    input_ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for row, ids in enumerate(rows):
        input_ids[row, : len(ids)] = ids
    first = np.arange(len(rows)) * input_ids.shape[1] + np.tile(lengths[:, 0], 2)
    batch = _batch(
        pairs,
        input_ids,
        first=first,
        before=first - 1,
        lengths=lengths,
        weight=weight,
        filled=sum(map(len, rows)),
    )
    return replace(batch, lengths=torch.tensor([len(row) for row in rows]))


def part_of_rows(batch: PairBatch, *, part: int, parts: int) -> PairBatch:
    """Returns the columns of every row that one of several ranks computes, and the scored tokens predicted there.

    Rows are made longer until the ranks' parts are alike. ``spans`` stay those of whole rows, which attention sees.

    Args:
        batch: whole rows.
        part: which rank's, in ``[0, parts)``; its columns lie next to each other.
        parts: how many ranks there are.
    """
    rows, length = batch.input_ids.shape
    width = -(-length // parts)
    added = width * parts - length
    positions = batch.position_ids
    if positions is None:
        positions = torch.arange(length, device=batch.input_ids.device).expand(rows, length)
    mine = slice(part * width, (part + 1) * width)
    row, column = batch.predicted_at // length, batch.predicted_at % length
    is_mine = column // width == part
    return replace(
        batch,
        input_ids=pad(batch.input_ids, (0, added))[:, mine],
        position_ids=pad(positions, (0, added))[:, mine],
        spans=(*batch.spans, *[Span(length, added, 0, 0)] * bool(batch.spans and added)),
        predicted_at=(row * width + column - mine.start)[is_mine],
        targets=batch.targets[is_mine],
        response_of=batch.response_of[is_mine],
        token_weights=None if batch.token_weights is None else batch.token_weights[is_mine],
    )


def _lengths(pairs: Sequence[TokenizedPair]) -> NDArray[np.int64]:
    """Returns ``(pairs, 3)``: tokens of prompt, chosen and rejected response."""
    return np.array([(len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs])


def _batch(
    pairs: Sequence[TokenizedPair],
    input_ids: NDArray[np.int64],
    *,
    first: NDArray[np.int64],
    before: NDArray[np.int64],
    lengths: NDArray[np.int64],
    weight: float,
    filled: int,
    position_ids: Tensor | None = None,
    spans: tuple[Span, ...] = (),
) -> PairBatch:
    """Points at the scored tokens: response ``i`` starts at ``first[i]`` and is predicted from ``before[i]`` on."""
    response_tokens = np.concatenate([lengths[:, 1], lengths[:, 2]])
    response_of = np.repeat(np.arange(len(first)), response_tokens)
    starts = response_tokens.cumsum() - response_tokens
    target_at = np.arange(len(response_of)) + (first - starts)[response_of]
    predicted_at = target_at - 1
    predicted_at[starts] = before
    masks = [(pair.chosen_ids, pair.chosen_scored) for pair in pairs]
    masks += [(pair.rejected_ids, pair.rejected_scored) for pair in pairs]
    if any(mask for _, mask in masks):
        scored = np.concatenate([np.ones(len(ids), bool) if mask is None else mask for ids, mask in masks])
        target_at, predicted_at, response_of = target_at[scored], predicted_at[scored], response_of[scored]
        response_tokens = np.bincount(response_of, minlength=len(first))
    return PairBatch(
        input_ids=torch.from_numpy(input_ids),
        predicted_at=torch.from_numpy(predicted_at),
        targets=torch.from_numpy(input_ids.ravel()[target_at]),
        response_of=torch.from_numpy(response_of),
        response_tokens=torch.from_numpy(response_tokens),
        weights=torch.full((len(pairs),), weight),
        tokens=int(lengths.sum()) if weight else 0,
        filled=filled if weight else 0,
        position_ids=position_ids,
        spans=spans,
        probabilities=_numbers([pair.probability for pair in pairs], otherwise=1),
        margins=_numbers([pair.margin for pair in pairs], otherwise=0),
        loss_weights=_numbers([pair.weight for pair in pairs], otherwise=1),
    )


def _numbers(values: Sequence[float | None], *, otherwise: float) -> Tensor | None:
    """Returns ``(pairs,)``, None where no pair has such a number."""
    if all(value is None for value in values):
        return None
    return torch.tensor([otherwise if value is None else value for value in values], dtype=torch.float32)
