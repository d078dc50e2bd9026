"""Runs one job on several machines over ssh: a node agent on each, one end for all.

A machine learns what to run from its standard input, so that no shell reads an argument and no secret is on a command
line. Names, keys, ports and users are ssh's own business (``~/.ssh/config``).
"""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from dpo_ds.errors import UserError
from dpo_ds.launcher.remote import NodeJob
from dpo_ds.launcher.together import Together

PASSED_ON = (
    *("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV", "LANG", "LC_*", "XDG_CACHE_HOME"),
    *("OMP_*", "MKL_*", "CUDA_*", "NCCL_*", "GLOO_*", "UCX_*", "FI_*", "TORCH*", "PYTORCH_*", "TRITON_*"),
    *("DS_*", "DEEPSPEED_*", "DPO_DS_*", "HF_*", "TRANSFORMERS_*", "TOKENIZERS_*", "WANDB_*"),
    *("*_proxy", "*_PROXY"),
)
"""Patterns of the variables that reach the other machines."""

_SSH = ("ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
_BEATS = 3  # in the time for which a machine may be silent
_SSH_FAILED = 255
_FAILED_GRACE_S = 30.0  # more than an agent gives its ranks


@dataclass(frozen=True)
class Host:
    """A machine as ssh knows it, and how many ranks it is to run."""

    name: str
    ranks: int


def read_hostfile(path: Path) -> list[Host]:
    """Reads DeepSpeed's hostfile: lines of ``NAME slots=RANKS``; ``#`` begins a comment.

    Raises:
        UserError: it cannot be read, or a line is of another form.
    """
    try:
        lines = [line.partition("#")[0].split() for line in path.read_text().splitlines()]
    except OSError as error:
        raise UserError(f"the hostfile {path} cannot be read ({error.strerror}); name one with --hostfile") from error
    hosts = []
    for number, words in enumerate(lines, start=1):
        if not words:
            continue
        slots = words[1].removeprefix("slots=") if len(words) == 2 else ""
        if not slots.isdecimal() or int(slots) == 0:
            raise UserError(f"{path} line {number} must be NAME slots=RANKS, got {' '.join(words)!r}")
        hosts.append(Host(words[0], int(slots)))
    names = [host.name for host in hosts]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UserError(f"the hostfile {path} must name each machine once, {sorted(twice)[0]} is there twice")
    if not hosts:
        raise UserError(f"the hostfile {path} names no machine; write a line NAME slots=RANKS for each")
    return hosts


def passed_on(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables that reach the other machines."""
    return {
        name: value for name, value in environment.items() if any(fnmatchcase(name, pattern) for pattern in PASSED_ON)
    }


def jobs_of_hosts(
    hosts: Sequence[Host],
    command: Sequence[str],
    *,
    folder: str,
    environment: Mapping[str, str],
    address: str | None = None,
    port: int | None = None,
    grace_s: float,
    silence_s: float,
) -> list[NodeJob]:
    """Returns what each machine is to run.

    Args:
        hosts: the machines; the first is node 0.
        command: a Python script and its arguments.
        folder: to work in, the same on all machines.
        environment: variables that the ranks get.
        address: where ranks meet; default: the first machine's name.
        port: the same; default: one that few jobs share.
        grace_s: seconds that ranks have to save when they are asked to stop.
        silence_s: seconds after which a silent network counts as lost on this side; the far side waits twice as long.

    Raises:
        UserError: the machines are to run different numbers of ranks.
    """
    ranks = {host.ranks for host in hosts}
    if len(ranks) > 1:
        raise UserError(
            "every machine must run as many ranks as the others, got "
            f"{', '.join(f'{host.name} {host.ranks}' for host in hosts)}; set one number with --gpus"
        )
    place = [
        *("--nodes", str(len(hosts)), "--ranks", str(ranks.pop())),
        *("--master_addr", address or hosts[0].name, "--master_port", str(port or 20000 + os.getpid() % 20000)),
        *("--grace", f"{grace_s:g}"),
    ]
    return [
        NodeJob(folder, dict(environment), [*place, "--node_rank", str(rank), "--", *command], 2 * silence_s)
        for rank in range(len(hosts))
    ]


def ssh_command(host: Host, *, silence_s: float) -> list[str]:
    """Returns the whole of what is on a command line: the same Python there, and nothing of the user's.

    Args:
        host: the machine.
        silence_s: seconds after which ssh gives up a machine that has lost its power, or its network: it says nothing.
    """
    alive = ["-o", f"ServerAliveInterval={max(1, round(silence_s / _BEATS))}", "-o", f"ServerAliveCountMax={_BEATS}"]
    return [*_SSH, *alive, host.name, f"exec {shlex.quote(sys.executable)} -u -m dpo_ds.launcher.remote"]


class SshJob(Together):
    """One agent a machine."""

    def __init__(self, hosts: Sequence[Host], jobs: Sequence[NodeJob], *, grace_s: float, silence_s: float) -> None:
        """Starts nothing yet.

        Args:
            hosts: the machines.
            jobs: what each is to run.
            grace_s: seconds from a signal, or from the first machine that has stopped, to the end of the others.
            silence_s: seconds after which a silent machine counts as lost.
        """
        super().__init__(grace_s=grace_s, failed_grace_s=min(_FAILED_GRACE_S, grace_s))
        self._hosts, self._jobs, self._silence_s = hosts, jobs, silence_s

    def _start(self) -> None:
        for host, job in zip(self._hosts, self._jobs, strict=True):
            # In a session of its own, so that Ctrl-C reaches the ranks through us, once.
            command = ssh_command(host, silence_s=self._silence_s)
            agent = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
            self._processes.append(agent)
            _write(agent, job.line())
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def _pass_on(self, process: "subprocess.Popen[bytes]", number: int) -> None:
        _write(process, f"{int(number)}\n".encode())

    def _end(self, process: "subprocess.Popen[bytes]") -> None:
        # The agent has more patience with its ranks than with this; ssh itself gives up a machine that is silent.
        self._pass_on(process, signal.SIGKILL)

    def _tell(self, place: int, code: int) -> None:
        if code == _SSH_FAILED:
            said = "ssh has ended with 255: the machine cannot be reached, is gone, or does not let us in"
            print(f"error: {self._hosts[place].name}: {said}", file=sys.stderr, flush=True)

    def _beat(self) -> None:
        while True:
            time.sleep(self._silence_s / _BEATS)
            for agent in self._processes:
                _write(agent, b"0\n")


def _write(agent: "subprocess.Popen[bytes]", line: bytes) -> None:
    assert agent.stdin is not None
    with suppress(BrokenPipeError):  # it has ended, which is seen elsewhere
        agent.stdin.write(line)
        agent.stdin.flush()
