"""The optimizers that a run can choose: how each is built, and what it keeps of every weight."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import deepspeed
import torch
from lion_pytorch import Lion
from torch.optim import Optimizer

Name = Literal["adamw", "lion", "rmsprop"]

TESTED = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
"""What DeepSpeed's config says of optimizers that DeepSpeed has not tried itself: this package's tests have."""


@dataclass(frozen=True)
class OptimizerSettings:
    """Which optimizer, and its numbers but for the learning rate, which every step sets.

    Attributes:
        name: ``adamw`` (Loshchilov and Hutter 2017, arXiv:1711.05101), ``lion`` (Chen et al. 2023, arXiv:2302.06675,
            algorithm 2) or ``rmsprop`` (Hinton 2012, lecture 6e), with which the authors of DPO trained.
        betas: decay rates. AdamW's are of the gradient's mean and of its square's; Lion weighs one mean with the first
            and keeps it with the second; RMSprop's mean of squares has the second.
        eps: what is added to the root of the mean square; Lion has none.
        weight_decay: decoupled decay of matrices; RMSprop has none.
    """

    name: Name = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    @property
    def states(self) -> tuple[str, ...]:
        """Under which names it keeps a number of every weight."""
        return _KINDS[self.name].states

    @property
    def bytes_per_weight(self) -> int:
        """What a weight's float32 master and states take, in memory and in a checkpoint."""
        return 4 * (1 + len(self.states))


def build_optimizer(
    settings: OptimizerSettings, groups: list[dict[str, Any]], *, on_host: bool, device: torch.device
) -> Optimizer:
    """Returns an optimizer for DeepSpeed to run over its flat partitions.

    Args:
        settings: which.
        groups: parameters, each with its own ``weight_decay``.
        on_host: whether masters and states stay in host memory, and are updated there.
        device: where they are else.
    """
    return _KINDS[settings.name].build(settings, groups, on_host, device)


def _adamw(settings: OptimizerSettings, groups: list[dict[str, Any]], on_host: bool, device: torch.device) -> Optimizer:
    numbers: Mapping[str, Any] = {"lr": 0.0, "betas": settings.betas, "eps": settings.eps}
    if on_host:
        # Updates masters and states where they are kept, in host memory.
        return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **numbers)  # type: ignore[no-any-return]
    return torch.optim.AdamW(groups, fused=device.type in ("cuda", "cpu"), **numbers)


def _lion(settings: OptimizerSettings, groups: list[dict[str, Any]], on_host: bool, device: torch.device) -> Optimizer:
    # Not DeepSpeed's: in host memory it moves a weight without a gradient, too, by the sign of 0.
    optimizer: Optimizer = Lion(groups, lr=1.0, betas=settings.betas)  # it refuses 0
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    return optimizer


def _rmsprop(
    settings: OptimizerSettings, groups: list[dict[str, Any]], on_host: bool, device: torch.device
) -> Optimizer:
    return torch.optim.RMSprop(groups, lr=0.0, alpha=settings.betas[1], eps=settings.eps)


class _Kind(NamedTuple):
    states: tuple[str, ...]
    build: Callable[[OptimizerSettings, list[dict[str, Any]], bool, torch.device], Optimizer]


_KINDS: Mapping[Name, _Kind] = {
    "adamw": _Kind(("exp_avg", "exp_avg_sq"), _adamw),
    "lion": _Kind(("exp_avg",), _lion),
    "rmsprop": _Kind(("square_avg",), _rmsprop),
}
