"""Who scores which pairs: every rank pairs of its own, or groups of ranks, each rank a part of every row (Ulysses)."""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from deepspeed.sequence.layer import DistributedAttention
from torch import Tensor

from dpo_ds.engine.world import World
from dpo_ds.models.row_parts import Attend

T = TypeVar("T")


class DataParallel:
    """The groups of ranks that score pairs of their own; without sequence parallelism each rank is one.

    Attributes:
        rank: of this rank's group among the groups.
        size: how many groups there are.
        row_parts: the ranks of this rank's group, None where it is alone.
    """

    def __init__(self, world: World, *, sequence_parallel_size: int = 1) -> None:
        """Makes the groups, of ranks that follow each other, as those of one machine do; collective.

        Args:
            world: the ranks.
            sequence_parallel_size: ranks of a group; it divides theirs.
        """
        self._world = world
        self._ranks_of_group = sequence_parallel_size
        self.rank = world.rank // sequence_parallel_size
        self.size = world.size // sequence_parallel_size
        self.row_parts = SequenceParallel(world, sequence_parallel_size) if sequence_parallel_size > 1 else None

    def sum(self, tensor: Tensor) -> Tensor:
        """Returns the sum of the groups' tensors, on every rank; all ranks of a group have the same; collective."""
        counts = self._world.rank % self._ranks_of_group == 0
        return self._world.sum(tensor if counts else torch.zeros_like(tensor))

    def gather(self, value: T) -> list[T]:
        """Returns every group's value, in the order of groups, on every rank; as ``World.gather``."""
        return self._world.gather(value)[:: self._ranks_of_group]


class SequenceParallel:
    """Ranks that compute the same rows, each the same columns of all of them: ``models.row_parts.RowParts``.

    Attention alone needs whole rows. For it the ranks exchange columns for heads and back: DeepSpeed Ulysses, Jacobs et
    al. 2023, section 3, arXiv:2309.14509.
    """

    def __init__(self, world: World, size: int) -> None:
        """Makes all groups, and keeps this rank's; collective.

        Args:
            world: the ranks.
            size: of a group.
        """
        groups = [world.group(range(first, first + size)) for first in range(0, world.size, size)]
        self.part, self.parts = world.rank % size, size
        self._group = groups[world.rank // size]
        self._exchanged = DistributedAttention(_attend_whole, self._group, scatter_idx=2, gather_idx=1)

    def attended(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Returns this rank's part of what ``attend`` makes of whole rows; collective in the group.

        Args:
            attend: of whole rows and some of the heads.
            query: ``(batch, heads, part, width)``; as many heads as ``parts`` divides.
            key: ``(batch, key_value_heads, part, width)``; where they are fewer than ``parts``, ranks share them.
            value: ``(batch, key_value_heads, part, value_width)``.

        Returns:
            ``(batch, part, heads, value_width)``.
        """
        copies = max(1, self.parts // key.shape[1])
        parts = (
            (query, *(x.repeat_interleave(copies, dim=1) for x in (key, value))) if copies > 1 else (query, key, value)
        )
        exchanged: Tensor = self._exchanged(*(x.transpose(1, 2) for x in parts), 0, None, attend)
        return exchanged

    def sum(self, values: Tensor) -> Tensor:
        """Returns the sum of the ranks' values; a rank's gradient is the sum's; collective in the group."""
        total: Tensor = _SumOfParts.apply(values, self._group)  # type: ignore[no-untyped-call]
        return total


def _attend_whole(query: Tensor, key: Tensor, value: Tensor, attend: Attend) -> Tensor:
    return attend(*(x.transpose(1, 2) for x in (query, key, value)))


class _SumOfParts(torch.autograd.Function):
    """Every rank goes on to the same loss, whose gradients the ranks then add up: each takes its own part's alone."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
