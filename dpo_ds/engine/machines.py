"""How a run's machines fare while it trains."""

import os
import socket

import psutil
import torch
from deepspeed.accelerator import get_accelerator

from dpo_ds.engine.world import World

_KINDS = ("host_memory_gib", "load", "gpu_memory_gib")
_GIB = 2**30


class MachineMetrics:
    """Memory and load of each machine of a run. Every method is collective."""

    def __init__(self, world: World, *, local_rank: int, name: str | None = None) -> None:
        """Learns which ranks share a machine.

        Args:
            world: the ranks.
            local_rank: this rank's, on its machine.
            name: the machine's; None: its host name.
        """
        self._world, self._speaks = world, local_rank == 0
        said = world.gather((local_rank, name or socket.gethostname()))
        firsts = [rank for rank, (place, _) in enumerate(said) if place == 0]
        names = [said[rank][1] for rank in firsts]
        # Two of one name, as containers may be, are told apart.
        self._names = [name if names.count(name) == 1 else f"{name}-{n}" for n, name in enumerate(names)]
        self._mine = sum(rank <= world.rank for rank in firsts) - 1

    def measure(self) -> dict[str, float]:
        """Returns ``system/MACHINE/KIND`` of every machine, on every rank.

        Kinds: ``host_memory_gib`` that is not available to others, ``load`` of the last minute, and ``gpu_memory_gib``,
        the most that torch has allocated on all its GPUs together.
        """
        table = torch.zeros(len(self._names), len(_KINDS), dtype=torch.float64)
        if self._speaks:
            memory = psutil.virtual_memory()
            table[self._mine, :2] = torch.tensor([(memory.total - memory.available) / _GIB, os.getloadavg()[0]])
        if self._world.device.type != "cpu":
            table[self._mine, 2] = get_accelerator().max_memory_allocated() / _GIB
        found = self._world.sum(table.to(self._world.device)).tolist()
        kinds = _KINDS if self._world.device.type != "cpu" else _KINDS[:2]
        return {
            f"system/{name}/{kind}": value
            for name, values in zip(self._names, found, strict=True)
            for kind, value in zip(kinds, values, strict=False)
        }
