"""Log-probabilities of tokens and of responses: the one place that knows which logit predicts which token.

Tensors in, tensors out. No model, no config and no rank may enter.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Logits = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Hidden states ``(tokens, width)``, rows of a head's weight and of its bias -> logits ``(tokens, rows)``."""


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
    hidden: Tensor, targets: Tensor, *, weight: Tensor, bias: Tensor | None, logits: Logits, chunk_bytes: int
) -> Tensor:
    """Returns ``target_logps(logits(hidden, weight, bias), targets)`` without ever holding all logits.

    A chunk is all tokens by some of the vocabulary: each row of the weight is read once and its gradient written once,
    and the products have as many rows as there are tokens. What stays for backward is one log-sum-exp a token; the
    logits of a chunk are computed again.

    Args:
        hidden: ``(tokens, width)``, the hidden states that predict the targets.
        targets: ``(tokens,)``.
        weight: ``(vocab, width)``, the head's.
        bias: ``(vocab,)``, the head's, or None.
        logits: the head.
        chunk_bytes: size of the float32 logits that may exist at a time.

    Returns:
        ``(tokens,)``, float32.
    """
    columns = max(_COLUMNS, chunk_bytes // (4 * max(1, len(targets))) // _COLUMNS * _COLUMNS)
    logps: Tensor = _ChunkedTargetLogps.apply(hidden, targets, weight, bias, logits, columns)  # type: ignore[no-untyped-call]
    return logps


_COLUMNS = 64  # of a chunk; a multiple of what matrix-product kernels take at a time


class _ChunkedTargetLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, logits: Logits, columns: int
    ) -> Tensor:
        sums = []
        picked = hidden.new_zeros(len(targets), dtype=torch.float32)
        for chunk in _chunks(len(weight), columns):
            values = logits(hidden, weight[chunk], None if bias is None else bias[chunk]).float()
            at, within = _places(targets, chunk)
            picked += values.gather(1, at).squeeze(1).where(within, 0)
            largest = values.amax(1, keepdim=True)
            sums.append(values.sub_(largest).exp_().sum(1).log_().add_(largest.squeeze(1)))
        logsumexp = torch.stack(sums).logsumexp(0)
        ctx.save_for_backward(hidden, targets, weight, bias, logsumexp)
        ctx.logits, ctx.columns = logits, columns
        return picked - logsumexp

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, targets, weight, bias, logsumexp = ctx.saved_tensors
        needs = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
        grads = [
            torch.zeros_like(hidden, dtype=torch.float32) if needs[0] else None,
            torch.empty_like(weight) if needs[1] else None,
            torch.empty_like(bias) if needs[2] else None,
        ]
        for chunk in _chunks(len(weight), ctx.columns):
            inputs = [
                None if value is None else value.detach().requires_grad_(needed)
                for value, needed in zip(
                    (hidden, weight[chunk], None if bias is None else bias[chunk]), needs, strict=True
                )
            ]
            with torch.enable_grad():
                values = ctx.logits(*inputs)
            # d log softmax(x)_t / dx = onehot(t) - softmax(x)
            slope = values.detach().float().sub_(logsumexp[:, None]).exp_().mul_(-grad[:, None])
            at, within = _places(targets, chunk)
            slope.scatter_add_(1, at, (grad * within)[:, None])
            wanted = [value for value in inputs if value is not None and value.requires_grad]
            found = iter(torch.autograd.grad(values, wanted, slope.to(values.dtype)))
            if grads[0] is not None:
                grads[0] += next(found)
            for whole in grads[1:]:
                if whole is not None:
                    whole[chunk] = next(found)
        return None if grads[0] is None else grads[0].to(hidden.dtype), None, grads[1], grads[2], None, None


def _chunks(vocab: int, columns: int) -> Iterator[slice]:
    for start in range(0, vocab, columns):
        yield slice(start, min(start + columns, vocab))


def _places(targets: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
    """Returns each target's column in the chunk, ``(tokens, 1)``, and whether it is there, ``(tokens,)``."""
    within = (targets >= chunk.start) & (targets < chunk.stop)
    return (targets - chunk.start).where(within, 0).unsqueeze(1), within
