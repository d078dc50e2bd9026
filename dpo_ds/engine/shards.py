"""The shards of a ZeRO-3 model's weights: this rank's parts of tensors, and fingerprints of all of them."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_ds.engine.world import World
from dpo_ds.models.adapters import starts_at_zero, weights_at_work
from dpo_ds.models.scorer import Scorer


class Shard(NamedTuple):
    """One rank's part of one tensor.

    Attributes:
        values: ``(n,)``, a view of the live values.
        start: where the part begins in the flattened tensor.
        whole: how many values the whole tensor has.
    """

    values: Tensor
    start: int
    whole: int


# What DeepSpeed adds to torch's Parameter: ds_tensor (the shard), ds_numel and ds_shape (of the whole), ds_status.
ZeroParameter: TypeAlias = Any


def shard_of(parameter: ZeroParameter) -> Shard:
    """Returns this rank's part of a ZeRO-3 parameter, without the padding behind its end."""
    size = parameter.ds_tensor.ds_numel
    start = min(size * dist.get_rank(parameter.ds_process_group), parameter.ds_numel)
    end = min(start + size, parameter.ds_numel)
    # A small parameter stays whole between steps, and the model runs on that copy.
    if parameter.ds_status == ZeroParamStatus.AVAILABLE:
        return Shard(parameter.data.flatten()[start:end], start, parameter.ds_numel)
    return Shard(parameter.ds_tensor.data[: end - start], start, parameter.ds_numel)


def stored_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Returns the buffers that checkpoints hold, such as a router's correction bias; every rank has them whole."""
    stored = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in stored}


def part_held(tensor: Tensor) -> Shard:
    """Returns this rank's part of a ZeRO-3 parameter, or all of a buffer."""
    return shard_of(tensor) if isinstance(tensor, nn.Parameter) else _whole(tensor)


def _whole(buffer: Tensor) -> Shard:
    return Shard(buffer.flatten(), 0, buffer.numel())


def register_modules(scorer: Scorer) -> None:
    """Tells ZeRO-3 when a scorer needs which weights, which it cannot see for itself."""
    # The head is used outside of its own module.
    for parameter in (scorer.head.weight, scorer.head.bias):
        if parameter is not None:
            deepspeed.zero.register_external_parameter(scorer, parameter)
    # A layer's weights come and go together: one gather in place of one a matrix, and no rank may be the only one to
    # skip an expert.
    set_z3_leaf_modules(scorer.model, [GradientCheckpointingLayer], raise_if_not_found=False)


def fingerprint(model: nn.Module, world: World) -> str:
    """Returns a digest of all weights at work and buffers: of every bit and its place, not of the number of ranks.

    An adapter that changes nothing yet does not count, so that a model with one has its base's fingerprint.

    Each rank mixes each of its weights' bits with the weight's position and adds them up; sums of 64-bit integers wrap
    and commute, so they add over shards.
    """
    own, added = weights_at_work(model)
    if not _differs_from_zero([weight for name, weight in added.items() if starts_at_zero(name)], world):
        added = {}
    shards = [shard_of(parameter) for _, parameter in [*sorted(own.items()), *sorted(added.items())]]
    buffers = [_whole(buffer) for _, buffer in sorted(stored_buffers(model).items())]
    counted_once = [buffer if world.rank == 0 else buffer._replace(values=buffer.values[:0]) for buffer in buffers]
    return fingerprint_of([*shards, *counted_once], world)


def _differs_from_zero(weights: Sequence[ZeroParameter], world: World) -> bool:
    if not weights:
        return False
    values = (shard_of(weight).values.count_nonzero() for weight in weights)
    return bool(world.sum(torch.stack([count.to(world.device) for count in values]).sum()))


def fingerprint_of(shards: Iterable[Shard], world: World) -> str:
    """Returns the digest of tensors of which each rank has a part, the ranks' parts being disjoint."""
    total = world.sum(torch.stack([_mixed_sum(shard).to(world.device) for shard in shards]))
    return hashlib.sha256(total.cpu().numpy().tobytes()).hexdigest()


_CHUNK = 2**18  # elements; the mix needs a few 8-byte copies of each, which should stay in the cache


def _mixed_sum(shard: Shard) -> Tensor:
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[shard.values.element_size()]
    total = torch.zeros((), dtype=torch.int64, device=shard.values.device)
    for offset in range(0, shard.values.numel(), _CHUNK):
        bits = shard.values[offset : offset + _CHUNK].view(integer).long()
        place = torch.arange(len(bits), device=bits.device) + (shard.start + offset)
        # The finalizer of splitmix64 (Steele et al. 2014), on the bits offset by a multiple of the golden ratio.
        mixed = bits + (place + 1) * -7046029254386353131
        mixed = (mixed ^ (mixed >> 30)) * -4658895280553007687
        mixed = (mixed ^ (mixed >> 27)) * -7723592293110705685
        total += (mixed ^ (mixed >> 31)).sum()
    return total


def hollow(tensor: Tensor) -> Tensor:
    """Returns a tensor, of a parameter that may be sharded the whole one, without values: its shape and its dtype."""
    shape = cast(ZeroParameter, tensor).ds_shape if isinstance(tensor, nn.Parameter) else tensor.shape
    return torch.empty(shape, dtype=tensor.dtype, device="meta")
