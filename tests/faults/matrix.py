"""Faults of every kind in every phase of a run under DeepSpeed's launcher, and what must be true behind each of them.

The next start of the same command goes on and ends well; its record is that of a run that nobody disturbed; no process,
no unfinished file and no shared-memory segment is left.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dpo_ds.engine.checkpoint import complete_checkpoints, step_of
from tests.ranks import REPOSITORY, run_ranks
from tests.test_resume import assert_equal_to_rounding, record, write_run
from tests.test_run import TRAIN

AT = REPOSITORY / "tests/faults/at.py"
PHASES = ("load", "prepare", "cache", "train", "eval", "save", "export", "convert")
DISKS = ("full disk", "read-only")
TARGETS = ("rank 0", "rank 1", "launch.py", "deepspeed")
# In loading, a rank that fails alone lets the one that speaks go first, for half a minute.
LIMITS = {"load_s": 45, "cache_s": 10, "train_s": 10, "save_s": 10}
_MARK = "DPO_DS_FAULT_ID"


@dataclass(frozen=True)
class Fault:
    """One cell of the matrix.

    Attributes:
        phase: when.
        kind: what: ``KILL``, ``TERM``, ``raise``, ``hang``, ``jump``, or a damage's name.
        target: to whom: a rank, or one of the launcher's processes.
    """

    phase: str
    kind: str
    target: str = "rank 1"

    def __str__(self) -> str:
        return f"{self.phase}: {self.kind} {self.target}"


def _signals() -> Iterator[Fault]:
    for phase in PHASES:
        for kind in ("KILL", "TERM"):
            for target in TARGETS:
                yield Fault(phase, kind, target)
        for target in ("rank 0", "rank 1"):
            if (phase, target) != ("prepare", "rank 1"):  # one rank of a node prepares
                yield Fault(phase, "raise", target)
        if phase != "prepare":  # no clock runs there: large sets take their time
            yield Fault(phase, "hang", "rank 1")
    yield from (Fault(phase, "jump", "rank 0") for phase in ("train", "eval", "save", "export"))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "missing": Path.unlink,
    "flipped": lambda file: file.write_bytes(_flipped(file.read_bytes())),
}
FILES = ("*rank_1_mp_rank_00_optim_states.pt", "*rank_0_mp_rank_00_model_states.pt", "state.json", "COMPLETE")
MATRIX = (
    *_signals(),
    *(Fault("restore", damage, pattern) for damage in DAMAGES for pattern in FILES),
    *(Fault(phase, "full disk", "-") for phase in ("prepare", "load", "train", "save", "export")),
    *(Fault(phase, "read-only", "-") for phase in ("prepare", "save")),
    Fault("train", "two runs", "-"),
)
ONE_A_PHASE = (
    Fault("load", "raise", "rank 1"),
    Fault("prepare", "KILL", "rank 0"),
    Fault("cache", "TERM", "rank 1"),
    Fault("train", "KILL", "launch.py"),
    Fault("eval", "TERM", "deepspeed"),
    Fault("save", "hang", "rank 1"),
    Fault("export", "KILL", "rank 0"),
    Fault("convert", "raise", "rank 0"),
)


@dataclass
class Job:
    """A run under ``deepspeed``, and all of its processes."""

    folder: Path
    fault: Fault
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def start(self) -> None:
        """Starts it."""
        with closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        environment = {
            **{key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")},
            **{"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", _MARK: self.mark, "PYTHONPATH": str(REPOSITORY)},
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        does = self.fault.kind if self.fault.kind in ("raise", "hang", "jump") else "wait"
        comes = "0" if self.fault.phase == "prepare" or self.fault.target == "rank 0" else "1"
        environment |= {"FAULT": f"{self.fault.phase} {does}", "FAULT_RANK": comes}
        environment["FAULT_MARK"] = str(self.folder / "moment")
        command = ["deepspeed", "--num_accelerators", "2", "--master_port", str(self.port), str(AT)]
        with (self.folder / "said").open("w") as said:
            self.front = subprocess.Popen(
                [*command, "--config", str(self.folder / "run.yaml")],
                cwd=self.folder,
                env=environment,
                stdout=said,
                stderr=subprocess.STDOUT,
            )

    def wait_for(self, moment: Path, timeout_s: float = 90) -> None:
        """Waits until a rank has come to the moment."""
        deadline = time.monotonic() + timeout_s
        while not moment.exists():
            assert self.front.poll() is None, (self.folder / "said").read_text()
            assert time.monotonic() < deadline, (self.folder / "said").read_text()
            time.sleep(0.05)

    def pid_of(self, target: str) -> int:
        """Returns the process that a target names."""
        if target == "deepspeed":
            return self.front.pid
        for pid, variables, words in self._processes():
            is_rank = b"RANK" in variables and b"launcher.launch" not in words
            if target == "launch.py" and b"deepspeed.launcher.launch" in words:
                return pid
            if is_rank and target == f"rank {variables[b'RANK'].decode()}" and self._is_first(pid):
                return pid
        raise LookupError(f"there is no {target}; {(self.folder / 'said').read_text()[-2000:]}")

    def expect_none_left(self, timeout_s: float) -> None:
        """Waits until no process of the job is there, nor its shared memory."""
        deadline = time.monotonic() + timeout_s
        while left := [(pid, words) for pid, _, words in self._processes()]:
            assert time.monotonic() < deadline, left
            with suppress(subprocess.TimeoutExpired):
                self.front.wait(0.1)
        assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{self.port}*"))

    def end(self) -> None:
        """Ends what a failed test has left."""
        for pid, *_ in self._processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.front.wait()

    def _processes(self) -> list[tuple[int, dict[bytes, bytes], bytes]]:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                variables = dict(
                    word.split(b"=", 1) for word in (process / "environ").read_bytes().split(b"\0") if b"=" in word
                )
                state = (process / "stat").read_bytes().rpartition(b")")[2].split()[0]
                if variables.get(_MARK.encode()) == self.mark.encode() and state != b"Z":
                    found.append((int(process.name), variables, (process / "cmdline").read_bytes()))
        return found

    def _is_first(self, pid: int) -> bool:
        # Not a helper that a rank has started.
        parent = int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
        return b"launcher.launch" in Path(f"/proc/{parent}/cmdline").read_bytes()


class Runs:
    """Runs to compare with and to begin from, in a folder each, made when they are first asked for."""

    def __init__(self, model: Path, folder: Path) -> None:
        self._model, self._folder = model, folder

    @cached_property
    def calm(self) -> Path:
        """Nobody disturbs it."""
        return self._finished("calm")

    @cached_property
    def cached(self) -> Path:
        """The same, its reference scored once into a cache."""
        return self._finished("cached", reference={"mode": "cache"})

    @cached_property
    def halted(self) -> Path:
        """It was ended in its fifth step, with checkpoints of the second and the fourth."""
        return self._halted("halted", ranks=2)

    @cached_property
    def alone(self) -> Path:
        """The same on one rank."""
        return self._halted("alone", ranks=1)

    def _written(self, name: str, **sections: dict[str, Any]) -> Path:
        always: dict[str, dict[str, Any]] = {"timeouts": LIMITS, "checkpoint": {"every": 2, "keep": 9}}
        return write_run(self._folder / name, self._model, **always, **sections)

    def _finished(self, name: str, **sections: dict[str, Any]) -> Path:
        run = self._written(name, **sections)
        run_ranks(2, [TRAIN, "--config", run / "run.yaml"], folder=run).expect_success()
        return run

    def _halted(self, name: str, *, ranks: int) -> Path:
        run = self._written(name)
        fault = {"FAULT": "train raise", "FAULT_RANK": "0", "FAULT_MARK": str(run / "moment")}
        ended = run_ranks(ranks, [AT, "--config", run / "run.yaml"], folder=run, env=fault)
        assert ended.codes[0] == 1, ended.errors
        (run / "moment").unlink()
        return run


def suffer(fault: Fault, runs: Runs, folder: Path) -> None:
    """Lets a fault happen to a run, and checks what must be true behind it."""
    begun = getattr(runs, {"restore": "halted", "convert": "alone", "cache": "cached"}.get(fault.phase, "calm"))
    compared, out = runs.cached if fault.phase == "cache" else runs.calm, folder / "out"
    skipped = ("rank*",) if fault.phase in ("restore", "convert") else ("rank*", "out")
    shutil.copytree(begun, folder, ignore=shutil.ignore_patterns(*skipped))
    (folder / "run.yaml").write_text((folder / "run.yaml").read_text().replace(str(begun), str(folder)))
    with _disk_of_its_own(out) if fault.kind in DISKS else nullcontext():
        if fault.phase == "restore":
            DAMAGES[fault.kind](next((out / "checkpoints/step-00000004").glob(fault.target)))
        elif fault.kind == "two runs":
            _meet(folder)
        else:
            _strike(fault, folder)
        last = 2 if fault.phase == "restore" else _last_step(out)
        again = run_ranks(2, [TRAIN, "--config", folder / "run.yaml"], folder=folder)
        if again.codes[0] == 2 and (out / "summary.json").exists():
            assert "already holds a run" in again.errors[0]  # it came to its end all the same
        else:
            said = again.expect_success().outputs[0]
            assert f"going on behind step {last} of" in said if last else "going on" not in said
        if fault.phase == "convert":
            assert_equal_to_rounding(record(folder), record(compared), 1e-5)
        else:
            assert record(folder) == record(compared)
        assert _names(out) == _names(compared / "out")


def _last_step(out: Path) -> int:
    found, _ = complete_checkpoints(out / "checkpoints")
    return step_of(found[0]) if found else 0


def _names(out: Path) -> set[str]:
    """Every file, wherever its content's hash has put it."""
    names = {str(path.relative_to(out)) for path in out.rglob("*") if "checkpoints" not in path.parts}
    return {re.sub(r"[0-9a-f]{32,64}", "HASH", name) for name in names}


def _strike(fault: Fault, folder: Path) -> None:
    job, out = Job(folder, fault), folder / "out"
    spoilt = out / ("data" if fault.phase == "prepare" else "checkpoints")
    job.start()
    try:
        job.wait_for(folder / "moment")
        if fault.kind in ("KILL", "TERM"):
            os.kill(job.pid_of(fault.target), signal.SIGKILL if fault.kind == "KILL" else signal.SIGTERM)
            time.sleep(0.5)  # so that the moment lasts
        elif fault.kind == "full disk":
            _fill(out / "filler")
        elif fault.kind == "read-only":
            _call("mount", "--bind", spoilt, spoilt)
            _call("mount", "-o", "remount,bind,ro", spoilt)
        (folder / "moment.sent").touch()
        job.expect_none_left(120)
        code, said = job.front.wait(), (folder / "said").read_text()
    finally:
        job.end()
        if fault.kind == "read-only":
            _call("umount", spoilt)
    (out / "filler").unlink(missing_ok=True)
    if fault.kind == "jump":
        assert code == 0, said
    elif fault.kind == "raise":
        assert code not in (0, 200), said
        assert "the disk is on fire" in said, said
    elif fault.kind == "hang":
        assert code not in (0, 200), said
        assert "has made no progress in phase" in said, said
    elif fault.kind in DISKS:
        assert code == 2, said
        assert said.count("error: ") == 1, said
    elif fault.kind == "TERM" and fault.phase in ("cache", "train", "eval", "save"):
        marker = json.loads((out / "RESUME.json").read_text())
        assert marker["status"] == "stopped"
        assert marker["step"] == _last_step(out)
        assert marker["step"] > 0 or fault.phase == "cache"


def _call(*command: str | Path) -> None:
    subprocess.run(command, check=True)


def _meet(folder: Path) -> None:
    job = Job(folder, Fault("train", "meet"))
    job.start()
    try:
        job.wait_for(folder / "moment")
        other = run_ranks(2, [TRAIN, "--config", folder / "run.yaml"], folder=folder)
        assert other.codes[0] == 2
        assert "is in use by another run" in "".join(other.errors)
        (folder / "moment.sent").touch()
        job.expect_none_left(120)
        assert job.front.wait() == 0, (folder / "said").read_text()
    finally:
        job.end()


@contextmanager
def _disk_of_its_own(place: Path) -> Iterator[None]:
    place.mkdir()
    _call("mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", place)
    try:
        yield
    finally:
        _call("umount", place)


def _fill(file: Path) -> None:
    with suppress(OSError), file.open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(2**16))


def _flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
