"""Two machines on this one: namespaces with a hostname, address, processes and sshd of their own, one cable between.

No route leads out of them. Killing a machine's first process is its power cut.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from tests.ranks import REPOSITORY

PROGRAMS = ("ip", "unshare", "nsenter", "sshd", "ssh-keygen")
NAMES = ("node0", "node1")
ADDRESSES = ("10.99.0.1", "10.99.0.2")
_SSH_CONFIG = """
Host node0 node1
  IdentityFile {folder}/id
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  ConnectTimeout 5
"""
_SSHD_CONFIG = """
HostKey {folder}/host
AuthorizedKeysFile {folder}/id.pub
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
MaxStartups 100
PidFile none
SetEnv PYTHONPATH={package}
"""
# Its own /etc, /dev/shm and processes; /sys stays, as Slurm's daemons want it.
_BOOT = """
hostname {name}
for file in hosts hostname ssh; do mount --bind {etc}/$file /etc/$file; done
mount -t tmpfs tmpfs /dev/shm
mkdir -p /run/sshd
exec {sshd} -D -e -f /etc/ssh/sshd_config
"""


def why_not() -> str | None:
    """Returns what this machine lacks to make two of it, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    lacking = [program for program in PROGRAMS if _found(program) is None]
    if lacking:
        return f"{', '.join(lacking)} not installed (apt install iproute2 util-linux openssh-server)"
    probe = f"dpo{os.getpid()}probe"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False).returncode != 0:
        return "this machine makes no network namespaces"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return None


class Nodes:
    """The two machines, which share this one's files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._spaces = [f"dpo{os.getpid()}{name}" for name in NAMES]
        self._machines: list[subprocess.Popen[bytes] | None] = [None, None]
        for key in ("id", "host"):
            _call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
        for name, space in zip(NAMES, self._spaces, strict=True):
            etc = folder / name
            (etc / "ssh").mkdir(parents=True)
            known = [f"{address} {other}" for address, other in zip(ADDRESSES, NAMES, strict=True)]
            (etc / "hosts").write_text("\n".join(["127.0.0.1 localhost", *known]) + "\n")
            (etc / "hostname").write_text(name + "\n")
            (etc / "ssh/ssh_config").write_text(_SSH_CONFIG.format(folder=folder))
            (etc / "ssh/sshd_config").write_text(_SSHD_CONFIG.format(folder=folder, package=REPOSITORY))
            _call("ip", "netns", "add", space)
        first, second = self._spaces
        _call("ip", "link", "add", "v0", "netns", first, "type", "veth", "peer", "name", "v0", "netns", second)
        for number, address in enumerate(ADDRESSES):
            _call("ip", "-n", self._spaces[number], "link", "set", "lo", "up")
            _call("ip", "-n", self._spaces[number], "address", "add", f"{address}/24", "dev", "v0")
            self.boot(number)

    def boot(self, number: int) -> None:
        """Switches a machine on."""
        name = NAMES[number]
        script = _BOOT.format(name=name, etc=self.folder / name, sshd=_found("sshd"))
        within = ["nsenter", f"--net=/run/netns/{self._spaces[number]}", "sh", "-c", script]
        own = ["--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with (self.folder / f"{name}.log").open("ab") as log:
            self._machines[number] = subprocess.Popen(
                ["unshare", *own, *within], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.plug(number, "up")
        # The other one may have learnt that nobody answers.
        _call("ip", "-n", self._spaces[1 - number], "neighbour", "flush", "dev", "v0")
        deadline = time.monotonic() + 10
        while self._first_process(number) is None:
            assert time.monotonic() < deadline, (self.folder / f"{name}.log").read_text()
            time.sleep(0.05)

    def plug(self, number: int, state: str) -> None:
        """Puts a machine's end of the cable ``up`` or ``down``."""
        _call("ip", "-n", self._spaces[number], "link", "set", "v0", state)

    def power_off(self, number: int) -> None:
        """Cuts a machine's power: all its processes are gone, and none of them has said a word."""
        machine, first = self._machines[number], self._first_process(number)
        if first is not None:
            # Before the processes go, so that the kernel tells nobody that their connections have ended.
            self.plug(number, "down")
            os.kill(first, signal.SIGKILL)
        if machine is not None:
            machine.wait(timeout=20)
        self._machines[number] = None

    def start(
        self, number: int, command: Sequence[str | Path], *, cwd: Path, env: Mapping[str, str] | None = None
    ) -> "subprocess.Popen[str]":
        """Starts a command as if logged in on a machine."""
        return subprocess.Popen(
            [*self._within(number, cwd), *map(str, command)],
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def processes(self, text: str) -> list[int]:
        """Returns all processes with a text on their command line, on both machines and outside."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if text.encode() in (process / "cmdline").read_bytes():
                    found.append(int(process.name))
        return found

    def remove(self) -> None:
        """Switches both machines off and takes the cable away."""
        for number in range(len(NAMES)):
            self.power_off(number)
        for space in self._spaces:
            _call("ip", "netns", "del", space)

    def _within(self, number: int, cwd: Path) -> list[str]:
        first = self._first_process(number)
        assert first is not None, f"{NAMES[number]} is off"
        return ["nsenter", "-t", str(first), "-m", "-u", "-n", "-p", f"--wd={cwd}", "--"]

    def _first_process(self, number: int) -> int | None:
        machine = self._machines[number]
        if machine is None:
            return None
        with suppress(OSError, IndexError):
            children = Path(f"/proc/{machine.pid}/task/{machine.pid}/children").read_text().split()
            if Path(f"/proc/{children[0]}/comm").read_text().strip() == "sshd":
                return int(children[0])
        return None


def _found(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _call(program: str, *arguments: str) -> None:
    done = subprocess.run([_found(program) or program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{program} {arguments}: {done.stderr}"
