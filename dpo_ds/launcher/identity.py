"""Who am I among the ranks? Read once from what the launcher put into the environment."""

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Identity:
    """One process's place among the ranks of a job."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Identity":
        """Reads what ``deepspeed`` and ``torchrun`` set; a process that nobody launched is the only rank."""
        size = int(environment.get("WORLD_SIZE", 1))
        # DeepSpeed's launcher says LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE.
        local_size = environment.get("LOCAL_SIZE") or environment.get("LOCAL_WORLD_SIZE") or size
        return cls(
            rank=int(environment.get("RANK", 0)),
            size=size,
            local_rank=int(environment.get("LOCAL_RANK", 0)),
            local_size=int(local_size),
        )

    @property
    def speaks_for_node(self) -> bool:
        """One rank of each node validates and prints; the others wait for it."""
        return self.local_rank == 0
