"""RMSNorms and gated MLPs that keep for backward what goes into them, and compute again what lies between.

They return what the model's own modules return, to the bit. Kernels that save as little: Hsu et al. 2024, "Liger
Kernel", arXiv:2410.10989, section 3.2.
"""

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn import functional as F

_WIDTH = 8  # of the probe that tells what a module computes
_SIZES = (1e-3, 1.0, 4096.0)  # of its tokens; a bound on large values shows in the last
_LINEAR = ("gate_proj", "up_proj", "down_proj")


def keep_little(model: nn.Module) -> None:
    """Lets those of a model's modules keep little that prove to be RMSNorms or gated MLPs as they are computed here.

    Args:
        model: its dropout off, with the adapter that it will have; what bounds its MLPs' tokens comes behind.
    """
    module: Any
    for module in model.modules():
        if _is_norm(module):
            module.forward = partial(_norm, module)
        elif _is_gated_mlp(module):
            module.down_proj.forward = partial(_gated_linear, module.down_proj)
            module.forward = partial(_mlp, module)


def _is_norm(module: Any) -> bool:
    if not isinstance(getattr(module, "variance_epsilon", None), float) or not _has_alone(module, "weight"):
        return False
    (weight,) = _probe((_WIDTH,))
    return _computes(module, {"weight": weight}, lambda hidden: _norm_of(hidden, weight, module.variance_epsilon))


def _is_gated_mlp(module: nn.Module) -> bool:
    if any(type(getattr(module, name, None)) is not nn.Linear for name in _LINEAR):
        return False
    weights = dict(zip((f"{name}.weight" for name in _LINEAR), _probe(*[(_WIDTH, _WIDTH)] * 3), strict=True))
    if not _has_alone(module, *weights):
        return False
    gate, up, down = weights.values()
    return _computes(
        module, weights, lambda hidden: _gated_linear_of(F.linear(hidden, gate), F.linear(hidden, up), down)
    )


def _has_alone(module: nn.Module, *names: str) -> bool:
    """Returns whether these are all tensors of a module, which is given one more."""
    own = [name for name, _ in [*module.named_parameters(), *module.named_buffers()]]
    return sorted(own) == sorted(names) and len(signature(module.forward).parameters) == 1


def _probe(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]


def _computes(module: nn.Module, weights: dict[str, Tensor], expected: Callable[[Tensor], Tensor]) -> bool:
    # bfloat16 tells where a module rounds.
    (hidden,) = _probe((1, len(_SIZES), _WIDTH))
    hidden *= torch.tensor(_SIZES)[:, None]
    try:
        found = functional_call(module, weights, (hidden,))
    except Exception:  # of code that may come with the weights, and need not know another width
        return False
    return isinstance(found, Tensor) and torch.equal(found, expected(hidden))


def _norm(module: Any, hidden: Tensor) -> Tensor:
    return _norm_of(hidden, module.weight, module.variance_epsilon)


def _mlp(module: Any, hidden: Tensor) -> Tensor:
    found: Tensor = module.down_proj(module.gate_proj(hidden), module.up_proj(hidden))
    return found


def _gated_linear(linear: nn.Linear, gate: Tensor, up: Tensor) -> Tensor:
    return _gated_linear_of(gate, up, linear.weight)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = hidden.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(hidden, weight, scale)
        return weight * (wide * scale).to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, scale = ctx.saved_tensors
        normed = hidden.float() * scale
        to_weight = (grad * normed.to(hidden.dtype)).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        # With n = x r, r = rsqrt(mean(x^2) + eps) and g the gradient by n: dx = r (g - n mean(g n)).
        slope = (grad * weight).float()
        along = (slope * normed).mean(-1, keepdim=True)
        return slope.sub_(normed.mul_(along)).mul_(scale).to(hidden.dtype), to_weight, None


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return F.linear(F.silu(gate).mul_(up), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        active, slope = F.silu(gate), grad @ weight
        to_weight = None
        if ctx.needs_input_grad[2]:
            to_weight = grad.flatten(0, -2).T @ (active * up).flatten(0, -2)
        to_gate = torch.ops.aten.silu_backward(slope * up, gate)
        return to_gate, slope.mul_(active), to_weight


def _norm_of(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    found: Tensor = _Norm.apply(hidden, weight, eps)  # type: ignore[no-untyped-call]
    return found


def _gated_linear_of(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
    found: Tensor = _GatedLinear.apply(gate, up, weight)  # type: ignore[no-untyped-call]
    return found
