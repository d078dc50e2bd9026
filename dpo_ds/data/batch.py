"""From token ids to the tensors of one micro-batch. The layout of pairs in rows is decided here and nowhere else."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from dpo_ds.data.tokenization import TokenizedPair


@dataclass(frozen=True)
class PairBatch:
    """Pairs laid out in rows, and where in those rows each response's tokens are predicted.

    A scorer needs only this: run the rows, pick the hidden states at ``predicted_at``, score ``targets`` with them, and
    sum by ``response_of``. It does not know how pairs share rows. Response ``i`` is pair ``i``'s chosen one, response
    ``pairs + i`` its rejected one.

    Attributes:
        input_ids: ``(rows, length)``, padded to the right with 0, which causal attention never lets a scored token see.
        predicted_at: ``(scored,)``, positions in ``input_ids.flatten()`` whose hidden state predicts a response token.
        targets: ``(scored,)``, the response tokens.
        response_of: ``(scored,)``, in ``[0, 2 * pairs)``.
        response_tokens: ``(2 * pairs,)``, tokens of each response.
        weights: ``(pairs,)``, 1 for a real pair, 0 for a stand-in.
        ids: the pairs' names, for messages.
        tokens: tokens of the pairs, each prompt counted once, stand-ins not at all.
        filled: positions of ``input_ids`` that are neither padding nor a stand-in's.
    """

    input_ids: Tensor
    predicted_at: Tensor
    targets: Tensor
    response_of: Tensor
    response_tokens: Tensor
    weights: Tensor
    ids: tuple[str, ...]
    tokens: int
    filled: int

    def to(self, device: torch.device) -> "PairBatch":
        """Returns the batch with its tensors on ``device``."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.type is Tensor}
        return replace(self, **{name: t.to(device, non_blocking=True) for name, t in tensors.items()})


def padded_batch(pairs: Sequence[TokenizedPair], *, weight: float = 1.0) -> PairBatch:
    """Lays every response out in a row of its own behind its prompt: chosen rows first, then rejected rows.

    Args:
        pairs: the micro-batch's pairs.
        weight: 1, or 0 for stand-ins.
    """
    rows = [(pair.prompt_ids, pair.chosen_ids) for pair in pairs] + [(p.prompt_ids, p.rejected_ids) for p in pairs]
    length = max(len(prompt) + len(response) for prompt, response in rows)
    input_ids = torch.zeros(len(rows), length, dtype=torch.long)
    predicted_at, targets, response_of = [], [], []
    for row, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        input_ids[row, :end] = torch.tensor([*prompt, *response])
        # The token at position t is predicted at t - 1: the first response token by the last prompt token.
        predicted_at.append(row * length + torch.arange(len(prompt) - 1, end - 1))
        targets.append(input_ids[row, len(prompt) : end])
        response_of.append(torch.full((len(response),), row))
    lengths = [len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs]
    return PairBatch(
        input_ids=input_ids,
        predicted_at=torch.cat(predicted_at),
        targets=torch.cat(targets),
        response_of=torch.cat(response_of),
        response_tokens=torch.tensor([len(response) for _, response in rows]),
        weights=torch.full((len(pairs),), weight),
        ids=tuple(pair.id for pair in pairs),
        tokens=sum(lengths) if weight else 0,
        filled=sum(len(prompt) + len(response) for prompt, response in rows) if weight else 0,
    )
