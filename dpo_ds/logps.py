"""Log-probabilities of tokens and of responses: the one place that knows which logit predicts which token.

Tensors in, tensors out. No model, no config and no rank may enter.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]
"""Hidden states ``(tokens, width)`` -> logits ``(tokens, vocab)``."""


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

    The sum runs in float64, so that its order (a GPU's atomic adds, another layout) vanishes when it is rounded.

    Args:
        logps: ``(tokens,)``.
        response_of: ``(tokens,)``, which response each token belongs to.
        responses: how many responses there are.

    Returns:
        ``(responses,)``, float32.
    """
    sums = logps.new_zeros(responses, dtype=torch.float64)
    return sums.index_add(0, response_of, logps.double()).float()


def chunked_target_logps(hidden: Tensor, targets: Tensor, *, head: Head, chunk_tokens: int) -> Tensor:
    """Returns ``target_logps(head(hidden), targets)`` without ever holding more than one chunk of logits.

    Each chunk is recomputed in backward. Chunks are split evenly, since a chunk of few rows takes another kernel
    with another rounding.

    Args:
        hidden: ``(tokens, width)``, the hidden states that predict the targets.
        targets: ``(tokens,)``.
        head: maps hidden states to logits.
        chunk_tokens: rows of logits that may exist at a time.

    Returns:
        ``(tokens,)``, float32.
    """

    def score(hidden: Tensor, targets: Tensor) -> Tensor:
        return target_logps(head(hidden), targets)

    chunks = max(1, -(-len(targets) // chunk_tokens))
    pairs = zip(hidden.tensor_split(chunks), targets.tensor_split(chunks), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([score(h, t) for h, t in pairs])
    return torch.cat([checkpoint(score, h, t, use_reentrant=False) for h, t in pairs])
