"""Log-probabilities of tokens and of responses: the one place that knows which logit predicts which token.

Tensors in, tensors out. No model, no config and no rank may enter.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Logits = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Hidden states ``(tokens, width)``, rows of a head's weight and of its bias -> logits ``(tokens, rows)``."""

Slope = Callable[[Tensor], Tensor]
"""Logits -> their derivative by the linear layer's output, of the same shape."""


def target_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns ``log softmax(logits)`` at the targets, computed in float32.

    Args:
        logits: ``(..., vocab)``, any floating dtype.
        targets: ``(...)``, token ids.
    """
    logits = logits.float()
    return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def sum_by_response(logps: Tensor, response_of: Tensor, *, responses: int) -> Tensor:
    """Sums token log-probs over each response: ``log pi(y|x)``, Rafailov et al. 2023, section 3, arXiv:2305.18290.

    The sum is one of float64, so that its order (a GPU's atomic adds, another layout, parts on several ranks) vanishes
    when it is rounded.

    Args:
        logps: ``(tokens,)``.
        response_of: ``(tokens,)``, which response each token belongs to.
        responses: how many responses there are.

    Returns:
        ``(responses,)``, float64, to be rounded.
    """
    sums = logps.new_zeros(responses, dtype=torch.float64)
    return sums.index_add(0, response_of, logps.double())


def chunked_target_logps(
    hidden: Tensor,
    targets: Tensor,
    *,
    weight: Tensor,
    bias: Tensor | None,
    logits: Logits,
    slope: Slope | None,
    chunk_bytes: int,
    kept_bytes: int = 0,
    wants_entropies: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Returns ``target_logps(logits(hidden, weight, bias), targets)`` without ever holding all logits.

    A chunk is all tokens by some of the vocabulary: each row of the weight is read once and its gradient written once,
    and the products have as many rows as there are tokens. What stays for backward is one log-sum-exp a token and the
    logits of the first chunks, in their own dtype; those of the others are computed again.

    Args:
        hidden: ``(tokens, width)``, the hidden states that predict the targets.
        targets: ``(tokens,)``.
        weight: ``(vocab, width)``, the head's.
        bias: ``(vocab,)``, the head's, or None.
        logits: the head.
        slope: what the head does to the output of its linear layer, told by its derivative; None: nothing.
        chunk_bytes: size of the float32 logits that may exist at a time.
        kept_bytes: of logits that may stay for backward, where there will be one.
        wants_entropies: whether the second value is wanted.

    Returns:
        ``(tokens,)``, float32, and the entropy of each token's distribution, ``(tokens,)``, in nats, without gradients.
    """
    columns = max(_COLUMNS, chunk_bytes // (4 * max(1, len(targets))) // _COLUMNS * _COLUMNS)
    kept = kept_bytes if torch.is_grad_enabled() else 0
    settings = (logits, slope, columns, kept, wants_entropies)
    found: tuple[Tensor, Tensor | None] = _ChunkedTargetLogps.apply(hidden, targets, weight, bias, *settings)  # type: ignore[no-untyped-call]
    return found


_COLUMNS = 64  # of a chunk; a multiple of what matrix-product kernels take at a time


class _ChunkedTargetLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        logits: Logits,
        slope: Slope | None,
        columns: int,
        kept_bytes: int,
        wants_entropies: bool,
    ) -> tuple[Tensor, Tensor | None]:
        sums, means, kept = [], [], []
        picked = hidden.new_zeros(len(targets), dtype=torch.float32)
        for chunk in _chunks(len(weight), columns):
            found = logits(hidden, weight[chunk], _part(bias, chunk))
            kept_bytes -= found.nbytes
            if kept_bytes >= 0:
                kept.append(found)
            # In float32 a kept one would be the one that is changed.
            values = found.to(torch.float32, copy=kept_bytes >= 0)
            at, within = _places(targets, chunk)
            picked += values.gather(1, at).squeeze(1).where(within, 0)
            largest = values.amax(1, keepdim=True)
            if wants_entropies:
                means.append((values.softmax(1) * values).sum(1))
            sums.append(values.sub_(largest).exp_().sum(1).log_().add_(largest.squeeze(1)))
        logsumexp = torch.stack(sums).logsumexp(0)
        entropies = None
        if wants_entropies:
            # H = log Z - E[x], and a chunk has exp(its log-sum-exp - log Z) of the probability.
            shares = (torch.stack(sums) - logsumexp).exp_()
            entropies = logsumexp - (shares * torch.stack(means)).sum(0)
            ctx.mark_non_differentiable(entropies)
        ctx.save_for_backward(hidden, targets, weight, bias, logsumexp, *kept)
        ctx.logits, ctx.slope, ctx.columns = logits, slope, columns
        return picked - logsumexp, entropies

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        hidden, targets, weight, bias, logsumexp, *kept = ctx.saved_tensors
        to_hidden, to_weight, to_bias = (
            torch.zeros_like(x, dtype=dtype) if ctx.needs_input_grad[place] else None
            for place, x, dtype in ((0, hidden, torch.float32), (2, weight, weight.dtype), (3, bias, weight.dtype))
        )
        for number, chunk in enumerate(_chunks(len(weight), ctx.columns)):
            is_kept = number < len(kept)
            found = kept[number] if is_kept else ctx.logits(hidden, weight[chunk], _part(bias, chunk))
            # d log softmax(x)_t / dx = onehot(t) - softmax(x)
            change = found.to(torch.float32, copy=True).sub_(logsumexp[:, None]).exp_().mul_(-grad[:, None])
            at, within = _places(targets, chunk)
            change.scatter_add_(1, at, (grad * within)[:, None])
            if ctx.slope is not None:
                change.mul_(ctx.slope(found.float()))
            change = change.to(weight.dtype)
            if to_hidden is not None:
                to_hidden += change @ weight[chunk]
            if to_weight is not None:
                torch.mm(change.T, hidden, out=to_weight[chunk])
            if to_bias is not None:
                to_bias[chunk] = change.sum(0)
        return None if to_hidden is None else to_hidden.to(hidden.dtype), None, to_weight, to_bias, *[None] * 5


def _part(bias: Tensor | None, chunk: slice) -> Tensor | None:
    return None if bias is None else bias[chunk]


def _chunks(vocab: int, columns: int) -> Iterator[slice]:
    for start in range(0, vocab, columns):
        yield slice(start, min(start + columns, vocab))


def _places(targets: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
    """Returns each target's column in the chunk, ``(tokens, 1)``, and whether it is there, ``(tokens,)``."""
    within = (targets >= chunk.start) & (targets < chunk.stop)
    return (targets - chunk.start).where(within, 0).unsqueeze(1), within
