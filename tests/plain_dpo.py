"""DPO in plain PyTorch, one process, one response at a time: what the engines are compared with.

It shares no code with the package.
"""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

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


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of arXiv:2302.06675, line by line."""

    def __init__(self, params: Any, *, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                mean = self.state[weight].setdefault("m", torch.zeros_like(weight))
                first, second = group["betas"]
                update = torch.sign(first * mean + (1 - first) * weight.grad)
                decay = group["weight_decay"] if weight.dim() > 1 else 0.0
                weight -= group["lr"] * (update + decay * weight)
                mean.copy_(second * mean + (1 - second) * weight.grad)


class RMSprop(torch.optim.Optimizer):
    """Hinton's lecture 6e: the gradient by the root of its mean square."""

    def __init__(self, params: Any, *, lr: float, decay: float, eps: float) -> None:
        super().__init__(params, {"lr": lr, "decay": decay, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                square = self.state[weight].setdefault("v", torch.zeros_like(weight))
                square.copy_(group["decay"] * square + (1 - group["decay"]) * weight.grad**2)
                weight -= group["lr"] * weight.grad / (square.sqrt() + group["eps"])


def adamw(parameters: Iterable[torch.nn.Parameter], *, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)


def dpo_losses(
    model: torch.nn.Module,
    steps: list[list[PlainPair]],
    *,
    beta: float,
    learning_rate: float,
    clip: float,
    sync_every: int | None = None,
    sync_weight: float = 1.0,
    optimizer_of: Callable[..., torch.optim.Optimizer] = adamw,
) -> list[float]:
    """Trains the model and returns each step's mean loss, before its update; the reference may follow the policy."""
    reference = copy.deepcopy(model).eval()
    model.eval()
    optimizer = optimizer_of(model.parameters(), lr=learning_rate)
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
