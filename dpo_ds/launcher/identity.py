"""Who am I among the ranks, and where do they meet? Read once from what the launcher put into the environment."""

import os
import subprocess
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from dpo_ds.errors import UserError

# What each launcher calls rank, number of ranks, rank on the node, and number of ranks on the node.
_NAMES = {
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_TASKS_PER_NODE"),
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}


@dataclass(frozen=True)
class Identity:
    """One process's place among the ranks of a job."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.size and 0 <= self.local_rank < self.local_size <= self.size):
            raise UserError(
                f"the launcher says that this is rank {self.rank} of {self.size}, and rank {self.local_rank} of "
                f"{self.local_size} on its node, which cannot be; unset variables that another launcher has left"
            )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Identity":
        """Reads what this package's agent, ``deepspeed``, ``torchrun``, ``srun``, Open MPI or MPICH set, in this order.

        A process that none of them has started is the only rank.

        Raises:
            UserError: what the launcher says contradicts itself, or this process stands for a node and not for a rank.
        """
        # Whoever sets these two started this very process, perhaps from within a job of the others.
        if "RANK" in environment and "LOCAL_RANK" in environment:
            size = _number(environment, "WORLD_SIZE")
            # DeepSpeed's launcher says LOCAL_SIZE, the others LOCAL_WORLD_SIZE.
            local = next((name for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE") if name in environment), "WORLD_SIZE")
            return cls(
                _number(environment, "RANK"), size, _number(environment, "LOCAL_RANK"), _number(environment, local)
            )
        if "PET_NODE_RANK" in environment or ("RANK" in environment and "MASTER_ADDR" in environment):
            raise UserError(
                "the environment names this node and no rank of it, as in a Kubernetes job; start the node's ranks "
                "with python -m dpo_ds.launcher.agent -- launch/train.py --config RUN.yaml"
            )
        for launcher, (rank, size_name, local_rank, local_size) in _NAMES.items():
            if rank not in environment:
                continue
            if launcher == "srun" and "SLURM_STEP_ID" not in environment:
                continue  # a batch script, which is no task
            if launcher == "srun":
                tasks = ranks_of_nodes(environment["SLURM_TASKS_PER_NODE"])
                mine = tasks[_number(environment, "SLURM_NODEID")]
            else:
                mine = _number(environment, local_size)
            return cls(
                _number(environment, rank), _number(environment, size_name), _number(environment, local_rank), mine
            )
        return cls(0, 1, 0, 1)

    @property
    def speaks_for_node(self) -> bool:
        """One rank of each node validates and prints; the others wait for it."""
        return self.local_rank == 0


def name_meeting_place(identity: Identity, environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets ``MASTER_ADDR`` and ``MASTER_PORT`` where the launcher has not.

    Raises:
        UserError: the ranks have no way to know where they meet.
    """
    if identity.size == 1:
        environment.setdefault("MASTER_ADDR", "127.0.0.1")
        environment.setdefault("MASTER_PORT", "0")
        return
    if "MASTER_ADDR" not in environment and "SLURM_JOB_NODELIST" in environment:
        environment["MASTER_ADDR"] = first_slurm_node(environment)
    if "MASTER_ADDR" not in environment:
        raise UserError(
            f"MASTER_ADDR is not set, so {identity.size} ranks cannot meet; set it to the first node's address "
            "(mpirun -x MASTER_ADDR=..., mpiexec -genv MASTER_ADDR ...)"
        )
    environment.setdefault("MASTER_PORT", str(port_of_job(environment)))


def first_slurm_node(environment: Mapping[str, str]) -> str:
    """Returns the name of a Slurm job's first node.

    Raises:
        UserError: Slurm's own commands cannot be run here.
    """
    nodes = environment["SLURM_JOB_NODELIST"]
    try:
        named = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"the first of the nodes {nodes} is not known ({error}); set MASTER_ADDR to its address"
        ) from error
    return named.stdout.split()[0]


def port_of_job(environment: Mapping[str, str]) -> int:
    """Returns a port that two Slurm jobs on one node are unlikely to share; without a job's number, torch's default."""
    job = environment.get("SLURM_JOB_ID", "")
    return 20000 + int(job) % 20000 if job.isdecimal() else 29500


def ranks_of_nodes(tasks_per_node: str) -> list[int]:
    """Returns Slurm's ``SLURM_TASKS_PER_NODE``, such as ``2(x3),1``, as one number a node.

    Raises:
        UserError: it is written in another way.
    """
    found: list[int] = []
    for part in tasks_per_node.split(","):
        count, _, times = part.partition("(x")
        times = times.removesuffix(")") or "1"
        if not (count.isdecimal() and times.isdecimal()):
            raise UserError(f"SLURM_TASKS_PER_NODE must be such as 2(x3),1, got {tasks_per_node!r}")
        found += [int(count)] * int(times)
    return found


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name)
    if text is None:
        raise UserError(f"{name} is not set, although the launcher has set others of its kind; start the ranks anew")
    if not text.isdecimal():
        raise UserError(f"{name} must be a whole number, got {text!r}")
    return int(text)
