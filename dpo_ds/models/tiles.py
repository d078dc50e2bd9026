"""MLPs that take a row's tokens some at a time, so that few tokens at once are as wide as an MLP is inside.

Bekman et al. 2025, "Arctic Long Sequence Training", arXiv:2506.13996, section 3.1 (TiledMLP).
"""

from collections.abc import Callable, Iterator
from functools import partial
from inspect import signature

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


def tile_mlps(model: nn.Module, *, tokens: int) -> None:
    """Lets each MLP take so many tokens at a time; in backward it computes a tile again. Called again, it changes them.

    Args:
        model: of which ``why_not_tileable`` says nothing.
        tokens: of a tile, >= 1.
    """
    for layer in _layers(model):
        for mlp in _mlps(layer):
            whole = mlp.forward.args[0] if isinstance(mlp.forward, _ByTiles) else mlp.forward
            mlp.forward = _ByTiles(_by_tiles, whole, tokens)


def why_not_tileable(model: nn.Module) -> str | None:
    """Returns why a model's MLPs cannot be tiled, None where there is one in every layer."""
    layers = [*_layers(model)]
    if not layers:
        return f"{type(model).__name__} has no layers of transformers' kind"
    without = next((type(layer).__name__ for layer in layers if not any(_mlps(layer))), None)
    return without and f"a {without} has no MLP of its own that is known to take every token alone"


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))


def _mlps(layer: nn.Module) -> Iterator[nn.Module]:
    for child in layer.children():
        if type(child).__name__.endswith("MLP") and len(signature(type(child).forward).parameters) == 2:
            yield child


class _ByTiles(partial[Tensor]):
    """Tells itself from other forwards that a module may be given."""


def _by_tiles(compute: Callable[[Tensor], Tensor], tokens: int, hidden: Tensor) -> Tensor:
    tiles = torch.split(hidden.flatten(0, -2).unsqueeze(0), tokens, dim=1)
    if torch.is_grad_enabled():
        compute = partial(checkpoint, compute, use_reentrant=False)
    return torch.cat([compute(tile) for tile in tiles], dim=1).view_as(hidden)
