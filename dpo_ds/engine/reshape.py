"""Reads a policy's shards that another number of ranks has saved: each rank takes its own parts out of their files.

A parameter of n values lies on N ranks in parts of ceil(n / N), each rank's parts one behind the other in flat groups.
What a rank needs thus lies in few files, which are mapped: nothing else is read, and nothing is written or converted.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_ds.engine.shards import ZeroParameter

_OPTIMIZER = "optimizer_state_dict"  # of DeepSpeed's state, and within it of torch's
_MASTERS = "fp32_flat_groups"


class _Place(NamedTuple):
    """Where a parameter's part begins in the flat groups of every rank that saved it."""

    group: int
    offset: int


class ReshapingReader:
    """Stands in for DeepSpeed's reader while ``load_checkpoint`` runs, with the files that it would find on its own."""

    def __init__(self, optimizer: Any, *, rank: int, ranks: int, saved_ranks: int) -> None:
        """Opens nothing yet.

        Args:
            optimizer: DeepSpeed's, of the live engine, whose groups the state is laid out for.
            rank: this one.
            ranks: how many there are.
            saved_ranks: how many there were.
        """
        self._groups: list[list[ZeroParameter]] = optimizer.fp16_groups
        self._group_of: Mapping[int, int] = optimizer.sub_group_to_group_id
        self._rank, self._ranks, self._saved_ranks = rank, ranks, saved_ranks
        self._opened = cache(_mapped)

    def load(self, path: str, map_location: object = None) -> dict[str, Any]:
        """Returns what this rank would have saved into a file, had it been one of as many as there are now."""
        state = dict(self._opened(self._file_of(path, 0)))
        if "dp_world_size" in state:  # everything but the weights, which follow from their masters
            return state | {"dp_world_size": self._ranks}
        return state | {_OPTIMIZER: self._optimizer_state(path)}

    def _file_of(self, path: str, rank: int) -> Path:
        file = Path(path)
        return file.with_name(file.name.replace(f"zero_pp_rank_{self._rank}_", f"zero_pp_rank_{rank}_"))

    def _optimizer_state(self, path: str) -> dict[str, Any]:
        first = self._opened(self._file_of(path, 0))[_OPTIMIZER]
        places = self._places([len(flat) for flat in first[_MASTERS]])

        def flats(state: Mapping[str, Any], name: str | None) -> Sequence[Tensor]:
            if name is None:
                return state[_MASTERS]  # type: ignore[no-any-return]
            of_groups: Mapping[int, Mapping[str, Tensor]] = state[_OPTIMIZER]["state"]
            return [of_groups[group][name] for group in range(len(state[_MASTERS]))]

        def mine(group: int, name: str | None) -> Tensor:
            parts = []
            for parameter in self._groups[group]:
                place, size = places[id(parameter)], parameter.partition_numel()
                part = torch.zeros(size)  # with the padding behind a parameter's end
                saved_size = -(-parameter.ds_numel // self._saved_ranks)
                start, end = self._rank * size, min((self._rank + 1) * size, parameter.ds_numel)
                while start < end:
                    rank, within = divmod(start, saved_size)
                    count = min(end - start, saved_size - within)
                    source = flats(self._opened(self._file_of(path, rank))[_OPTIMIZER], name)[place.group]
                    offset = start - self._rank * size
                    part[offset : offset + count] = source[place.offset + within : place.offset + within + count]
                    start += count
                parts.append(part)
            return torch.cat(parts)

        saved = first[_OPTIMIZER]
        fields: Mapping[str, Any] = saved["state"].get(0, {})  # before the first step there are none
        flat_fields = {name for name, value in fields.items() if isinstance(value, Tensor) and value.dim()}
        state = {
            # Copies: torch would take a step count of several groups as one, and count it up once for each.
            group: {name: mine(group, name) if name in flat_fields else deepcopy(fields[name]) for name in fields}
            for group in range(len(self._groups))
            if fields
        }
        groups = [
            settings | {"params": [group for group in range(len(self._groups)) if self._group_of[group] == number]}
            for number, settings in enumerate(saved["param_groups"])
        ]
        masters = [mine(group, None) for group in range(len(self._groups))]
        return dict(first) | {_MASTERS: masters, _OPTIMIZER: {"state": state, "param_groups": groups}}

    def _places(self, sizes: Sequence[int]) -> dict[int, _Place]:
        """Returns where each parameter lies in the saved groups, whose borders depend on the number of ranks.

        Raises:
            ValueError: these groups do not hold these parameters.
        """
        places, group, offset = {}, 0, 0
        for parameter in (parameter for parameters in self._groups for parameter in parameters):
            if group < len(sizes) and offset == sizes[group]:
                group, offset = group + 1, 0
            places[id(parameter)] = _Place(group, offset)
            offset += -(-parameter.ds_numel // self._saved_ranks)
            if group >= len(sizes) or offset > sizes[group]:
                raise ValueError("its shards hold other parameters than this model has, or in another order")
        if (group, offset) != (len(sizes) - 1, sizes[-1]):
            raise ValueError("its shards hold more than this model's parameters")
        return places


def _mapped(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return state
