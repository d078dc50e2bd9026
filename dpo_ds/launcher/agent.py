"""Starts the ranks of one node, passes signals on to them, and ends them all when one fails.

python -m dpo_ds.launcher.agent [--ranks N] -- launch/train.py --config RUN.yaml; once on each node, under ``srun``, as
a pod's command, or by hand. It exits with the code of the first rank that failed.
"""

import argparse
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from dpo_ds.errors import UserError
from dpo_ds.launcher.guard import STARTED_BY_AGENT
from dpo_ds.launcher.identity import first_slurm_node, port_of_job
from dpo_ds.launcher.network import interface_to
from dpo_ds.launcher.together import Together

_FAILED_GRACE_S = 20.0  # longer than a rank needs to find its peer gone and to say so
_SHOWN_LINES = 40


@dataclass(frozen=True)
class Node:
    """One machine's place in a job.

    Attributes:
        rank: of the node.
        count: how many nodes there are.
        ranks: how many ranks this node, as every other, starts.
        address: where the ranks meet: node 0.
        port: the same; 0 takes a free one, on a single node.
    """

    rank: int
    count: int
    ranks: int
    address: str
    port: int

    def environment_of(self, local_rank: int) -> dict[str, str]:
        """Returns what one rank finds in its environment, under the names that DeepSpeed and torchrun use."""
        return {
            "RANK": str(self.rank * self.ranks + local_rank),
            "WORLD_SIZE": str(self.count * self.ranks),
            "LOCAL_RANK": str(local_rank),
            "LOCAL_WORLD_SIZE": str(self.ranks),
            "LOCAL_SIZE": str(self.ranks),
            "CROSS_RANK": str(self.rank),
            "CROSS_SIZE": str(self.count),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a node's ranks to their end, and exits with their code.

    Args:
        argv: the arguments; None takes the process's.
    """
    try:
        code = agent_of(argv).run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = 2
    sys.exit(code)


def agent_of(argv: Sequence[str] | None) -> "Agent":
    """Returns the agent that a command line asks for.

    Args:
        argv: the arguments; None takes the process's.

    Raises:
        UserError: this node's place is not known.
    """
    args = _arguments(argv)
    node = node_from(
        os.environ,
        ranks=args.ranks,
        nodes=args.nodes,
        node_rank=args.node_rank,
        address=args.master_addr,
        port=args.master_port,
    )
    return Agent(args.command, node, logs=args.logs, grace_s=args.grace)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m dpo_ds.launcher.agent", description=__doc__)
    add = parser.add_argument
    add("--ranks", type=int, help="ranks on this node; default: what the scheduler says, else one a device")
    add("--nodes", type=int, help="number of nodes; default: what the scheduler says, else 1")
    add("--node_rank", type=int, help="this node's, from 0; default: what the scheduler says")
    add("--master_addr", help="address of node 0; default: what the scheduler says")
    add("--master_port", type=int, help="a free port there; default: one derived from the job's number")
    add("--logs", type=Path, help="folder for the output of all ranks but the node's first, a file each")
    add("--grace", type=float, default=600.0, help="seconds that ranks have to save when a signal asks them to stop")
    add("command", nargs="+", help="a Python script and its arguments, behind --")
    return parser.parse_args(argv)


def node_from(
    environment: Mapping[str, str],
    *,
    ranks: int | None = None,
    nodes: int | None = None,
    node_rank: int | None = None,
    address: str | None = None,
    port: int | None = None,
) -> Node:
    """Returns this node's place: as the arguments say, else Kubeflow's variables, else a Slurm step's, else alone.

    Raises:
        UserError: something is missing, or is no number.
    """
    found = _scheduled(environment)
    count = nodes if nodes is not None else int(found.get("nodes", 1))
    rank = node_rank if node_rank is not None else int(found.get("node_rank", 0))
    if not 0 <= rank < count:
        raise UserError(f"node_rank must be from 0 to {count - 1} on {count} nodes, got {rank}")
    address = address or environment.get("MASTER_ADDR") or found.get("address")
    if address is None and count > 1:
        if "SLURM_JOB_NODELIST" not in environment:
            raise UserError(f"--master_addr is not given, so {count} nodes cannot meet; name the first node's address")
        address = first_slurm_node(environment)
    if port is None:
        given = environment.get("MASTER_PORT") or found.get("port")
        port = int(given) if given else port_of_job(environment) if count > 1 else 0
    return Node(rank, count, ranks or int(found.get("ranks", 0)) or _devices(), address or "127.0.0.1", port)


def _scheduled(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns what is known of nodes, node_rank, ranks, address and port, as text."""
    if "PET_NODE_RANK" in environment or "PET_NNODES" in environment:
        names = {
            "nodes": "PET_NNODES",
            "node_rank": "PET_NODE_RANK",
            "address": "PET_MASTER_ADDR",
            "port": "PET_MASTER_PORT",
        }
        found = {key: environment[name] for key, name in names.items() if name in environment}
        if environment.get("PET_NPROC_PER_NODE", "").isdecimal():  # it may say auto, cpu or gpu
            found["ranks"] = environment["PET_NPROC_PER_NODE"]
    elif "JOB_COMPLETION_INDEX" in environment:
        found = {"node_rank": environment["JOB_COMPLETION_INDEX"]}
    elif "SLURM_STEP_ID" in environment:
        found = {"nodes": environment["SLURM_STEP_NUM_NODES"], "node_rank": environment["SLURM_NODEID"]}
        if environment.get("SLURM_STEP_NUM_TASKS") != found["nodes"]:
            raise UserError(
                f"srun has started {environment.get('SLURM_STEP_NUM_TASKS')} tasks on {found['nodes']} nodes, where "
                "the agent is to run once on each; add --ntasks-per-node=1, or let srun start the script itself"
            )
        if environment.get("SLURM_GPUS_ON_NODE", "").isdecimal():
            found["ranks"] = environment["SLURM_GPUS_ON_NODE"]
    else:
        found = {}
    if "nodes" in found and not found["nodes"].isdecimal():
        raise UserError(f"PET_NNODES must be a whole number, got {found['nodes']!r}: a run does not change its size")
    return found


def _devices() -> int:
    # torch takes seconds to import; nvidia-smi and the device files do not.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible:
        return len(visible.split(","))
    return len(list(Path("/dev").glob("nvidia[0-9]*"))) or 1


class Agent(Together):
    """The processes of one node's ranks."""

    def __init__(self, command: Sequence[str], node: Node, *, logs: Path | None = None, grace_s: float = 600.0) -> None:
        """Starts nothing yet.

        Args:
            command: a Python script and its arguments.
            node: this one.
            logs: folder for the output of all ranks but the first of the node, which speaks here.
            grace_s: seconds from a signal to the end of ranks that are still there.
        """
        super().__init__(grace_s=grace_s, failed_grace_s=min(_FAILED_GRACE_S, grace_s))
        if node.port == 0 and node.count == 1:
            node = replace(node, port=_free_port())
        self._command, self._node, self._logs = [sys.executable, "-u", *command], node, logs

    def _start(self) -> None:
        # gloo would take the interface that this machine's own name leads to, which often is the loopback.
        interface = interface_to(self._node.address) if self._node.count > 1 else None
        inherited = ({"GLOO_SOCKET_IFNAME": interface} if interface else {}) | os.environ | {STARTED_BY_AGENT: "1"}
        for local_rank in range(self._node.ranks):
            environment = inherited | self._node.environment_of(local_rank)
            with ExitStack() as stack:
                log = None
                if path := self._log_of(local_rank):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    log = stack.enter_context(path.open("ab"))
                self._processes.append(
                    subprocess.Popen(self._command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
                )

    def _pass_on(self, process: "subprocess.Popen[bytes]", number: int) -> None:
        process.send_signal(number)

    def _tell(self, place: int, code: int) -> None:
        path = self._log_of(place)
        if path is not None:
            last = path.read_text(errors="replace").splitlines()[-_SHOWN_LINES:]
            print("\n".join(last), file=sys.stderr)
        rank, host = self._node.environment_of(place)["RANK"], socket.gethostname()
        print(f"rank {rank} on {host} has ended with code {code}", file=sys.stderr, flush=True)

    def _log_of(self, local_rank: int) -> Path | None:
        if self._logs is None or local_rank == 0:
            return None
        return self._logs / f"rank-{self._node.environment_of(local_rank)['RANK']}.log"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


if __name__ == "__main__":
    main()
