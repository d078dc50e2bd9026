"""A real Slurm on this machine's loopback: one controller and two node daemons of one folder, ended with it."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "sacct", "munged")
_CONFIG = """
ClusterName=dpotest
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/ended.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=8
ReturnToService=2
InactiveLimit=0
MinJobAge=300
NodeName=node0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=low Nodes=node[0-1] Default=YES MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 State=UP
PartitionName=high Nodes=node[0-1] MaxTime=60 PriorityTier=10 PreemptMode=OFF State=UP
"""


def why_not() -> str | None:
    """Returns what this machine lacks to run Slurm's daemons, or None."""
    if os.geteuid() != 0:
        return "Slurm's daemons are started as root"
    path = f"{os.environ['PATH']}:/usr/sbin"
    lacking = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    return f"{', '.join(lacking)} not installed (apt install slurmctld slurmd slurm-client munge)" if lacking else None


class Slurm:
    """Two nodes of two CPUs; jobs of the partition ``high`` pre-empt those of ``low``, with a minute of grace."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        host = socket.gethostname().split(".")[0]
        for name in ("state", "spool.node0", "spool.node1", "munge"):
            (folder / name).mkdir()
        (folder / "slurm.conf").write_text(_CONFIG.format(host=host, folder=folder, ports=_free_ports(3)))
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:/usr/sbin",
        }
        self._start_munge()
        self._call("slurmctld", "-f", str(folder / "slurm.conf"))
        for node in ("node0", "node1"):
            self._call("slurmd", "-f", str(folder / "slurm.conf"), "-N", node)
        deadline = time.monotonic() + 30
        while self._call("sinfo", "-h", "-p", "low", "-o", "%D", "-t", "idle").strip() != "2":
            assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()
            time.sleep(0.1)

    def submit(self, *arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> str:
        """Submits a job and returns its number."""
        environment = {**self.environment, **(env or {})}
        done = subprocess.run(
            ["sbatch", "--parsable", *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def about(self, job: str) -> dict[str, str]:
        """Returns what Slurm knows about a job."""
        words = self._call("scontrol", "show", "job", "-o", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def accounted(self, job: str, field: str) -> str:
        """Returns what ``sacct`` tells of a job that has ended."""
        return self._call("sacct", "-c", "-n", "-P", "-j", job, "-o", field).strip()

    def wait(self, job: str, *states: str, timeout_s: float = 180) -> dict[str, str]:
        """Waits until a job's state is one of some."""
        deadline = time.monotonic() + timeout_s
        while (about := self.about(job))["JobState"] not in states:
            assert time.monotonic() < deadline, about
            time.sleep(0.2)
        return about

    def cancel(self, job: str) -> None:
        """Cancels a job."""
        self._call("scancel", job)

    def stop(self) -> None:
        """Ends the daemons, and waits for them."""
        files = [*self.folder.glob("slurmd.*.pid"), self.folder / "slurmctld.pid", self.folder / "munge/munged.pid"]
        pids: list[int] = []
        for file in files:
            with suppress(OSError, ValueError):
                pids.append(int(file.read_text()))
        for pid in pids:
            with suppress(OSError):
                os.kill(pid, signal.SIGTERM)
        for pid in pids:
            with suppress(OSError):
                _end(pid)

    def _start_munge(self) -> None:
        munge = self.folder / "munge"
        key = munge / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        munge.chmod(0o755)
        # As root: munged trusts folders of its own user and of root alone.
        files = [
            f"--{kind}-file={munge}/munged.{end}" for kind, end in (("pid", "pid"), ("log", "log"), ("seed", "seed"))
        ]
        self._call("munged", "--force", f"--socket={munge}/munge.sock", f"--key-file={key}", *files)

    def _call(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout


def _end(pid: int) -> None:
    for _ in range(100):
        time.sleep(0.1)
        os.kill(pid, 0)
    os.kill(pid, signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    ports = []
    for _ in range(count):
        with closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    return ports
