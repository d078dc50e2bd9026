"""DPO in plain PyTorch, one process, one response at a time: what the engines are compared with.

It shares no code with the package.
"""

import copy
import math
from dataclasses import dataclass

import torch


@dataclass
class PlainPair:
    """Token ids of one pair, and what its data say of it."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    probability: float = 1.0
    margin: float = 0.0
    weight: float = 1.0
    chosen_scored: list[bool] | None = None


def response_logp(
    model: torch.nn.Module, prompt: list[int], response: list[int], scored: list[bool] | None = None
) -> torch.Tensor:
    """Sum of the log-probs of a response's tokens, or of some of them, behind its prompt."""
    ids = torch.tensor([prompt + response])
    logps = torch.log_softmax(model(ids).logits[0].float(), dim=-1)
    kept = [n for n in range(len(response)) if scored is None or scored[n]]
    return torch.stack([logps[len(prompt) - 1 + n, response[n]] for n in kept]).sum()


def dpo_losses(
    model: torch.nn.Module,
    steps: list[list[PlainPair]],
    *,
    beta: float,
    learning_rate: float,
    clip: float,
    sync_every: int | None = None,
    sync_weight: float = 1.0,
) -> list[float]:
    """Trains the model and returns each step's mean loss, before its update; the reference may follow the policy."""
    reference = copy.deepcopy(model).eval()
    model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    losses = []
    for pairs in steps:
        optimizer.zero_grad()
        total = 0.0
        for pair in pairs:
            with torch.no_grad():
                reference_margin = response_logp(
                    reference, pair.prompt, pair.chosen, pair.chosen_scored
                ) - response_logp(reference, pair.prompt, pair.rejected)
            policy_margin = response_logp(model, pair.prompt, pair.chosen, pair.chosen_scored) - response_logp(
                model, pair.prompt, pair.rejected
            )
            logit = beta * (policy_margin - reference_margin) - pair.margin
            likely, unlikely = torch.nn.functional.logsigmoid(logit), torch.nn.functional.logsigmoid(-logit)
            mixed = pair.probability * likely + (1 - pair.probability) * unlikely
            loss = -pair.weight * mixed / len(pairs)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(total)
        if sync_every is not None and len(losses) % sync_every == 0:
            for mine, theirs in zip(reference.parameters(), model.parameters(), strict=True):
                mine.data = (1 - sync_weight) * mine.data + sync_weight * theirs.data
    assert all(math.isfinite(loss) for loss in losses)
    return losses
