"""``launch/train.py``: from argv to a trained and exported model."""

import atexit
import errno
import gc
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from dpo_ds.config import Run, flat, parse_run
from dpo_ds.errors import PeerError, RunError, Stopped, UserError
from dpo_ds.launcher.allocator import restart_with_jemalloc
from dpo_ds.launcher.guard import end_with_launcher
from dpo_ds.launcher.identity import Identity
from dpo_ds.launcher.marker import STOPPED_CODE, unmark
from dpo_ds.launcher.signals import StopRequest, ignore_signals, job_time_left

if TYPE_CHECKING:
    from dpo_ds.cli.preflight import Inputs
    from dpo_ds.engine.meeting import Meeting

_GRACE_S = 30
_HEAD_START_S = 2  # of the rank that speaks
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one rank of a training run.

    Exits with 0 when done, 2 when the user's config or data is wrong, 1 when the run cannot be right, 200 when it was
    asked to stop and has saved what it needs to go on.

    Args:
        argv: the arguments behind the script's name; None takes the process's.
    """
    start(argv, _train)


def _train(inputs: "Inputs | None", identity: Identity, meeting: "Meeting", request: StopRequest) -> None:
    # Only now, so that --help and a mistyped key are answered at once.
    from dpo_ds.cli.run import train

    train(inputs, identity, meeting, request)


def start(
    argv: Sequence[str] | None,
    work: "Callable[[Inputs | None, Identity, Meeting, StopRequest], None]",
    *,
    more: Sequence[str] = (),
    trains: bool = True,
) -> None:
    """Checks a run on one rank of each node, lets all ranks work, and exits as ``main`` says; a dry run returns.

    Args:
        argv: the arguments behind the script's name; None takes the process's, which may start anew with them.
        work: what every rank does; the inputs are None on ranks that do not speak for their node.
        more: arguments behind them.
        trains: whether it begins a run or goes on with one; else it takes what a run has saved, and leaves its folder
            as it is.
    """
    if argv is None:
        restart_with_jemalloc()
        argv = sys.argv[1:]
    try:
        identity = Identity.from_environment()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    end_with_launcher()
    folder = None
    leave: Callable[[int], NoReturn] = sys.exit
    try:
        run = parse_run([*argv, *more])
        os.environ.update(run.config.env)
        # What an import makes stays: looking through it again and again would be a quarter of the start, and a third of
        # a second of each save, before which DeepSpeed collects.
        gc.disable()
        from dpo_ds.cli.preflight import preflight
        from dpo_ds.engine.meeting import Meeting

        gc.freeze()
        gc.enable()
        if run.dry_run:
            if identity.rank == 0:
                print(preflight(run, ranks=identity.size, trains=trains).plan)
            return
        folder = Path(run.config.output_dir) if trains else None
        request = StopRequest(stop_after_s=run.stop_after_s, job_time_left_s=job_time_left())
        inputs, config = None, run.config
        written = config.output_dir if trains or config.export.folder is None else config.export.folder
        with Meeting(identity) as meeting:
            if identity.speaks_for_node:
                with _node_named(identity):
                    # Reading and tokenizing may take hours.
                    meeting.compare(_facts(run, identity), folder=Path(written))
                    inputs = preflight(run, ranks=identity.size, trains=trains)
                meeting.vouch(inputs.facts)
            meeting.wait()
        if inputs is not None and identity.rank == 0:
            print(inputs.plan, flush=True)
        leave = _leave_at_once
        work(inputs, identity, meeting, request)
        leave(0)
    except PeerError:
        time.sleep(_HEAD_START_S)
        leave(2)
    except Stopped as stopped:
        # DeepSpeed's launcher ends the ranks that are a moment later than the first, whose 200 would become 143.
        ignore_signals()
        if identity.rank == 0:
            print(stopped, flush=True)
        leave(STOPPED_CODE)
    except (UserError, RunError) as error:
        leave(_refused(identity, error, folder))
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        place = error.filename or f"output_dir {run.config.output_dir}"
        mended = "make room and make it writable; the same command goes on from the last checkpoint"
        leave(_refused(identity, UserError(f"{place} cannot be written ({error.strerror}); {mended}"), folder))


def _facts(run: Run, identity: Identity) -> dict[str, str]:
    """Returns what must be the same on all nodes and takes no time to find, by names that a person understands."""
    from dpo_ds.engine.devices import kind_of_devices
    from dpo_ds.tracking import versions

    values = {key: repr(value) for key, value in flat(run.config).items() if key != "env"}
    # Secrets may be in there.
    values["a digest of env"] = sha256(json.dumps(run.config.env, sort_keys=True).encode()).hexdigest()[:8]
    values["the accelerator"] = kind_of_devices(identity.local_size)
    return values | {f"the version of {name}": str(version) for name, version in versions().items()}


@contextmanager
def _node_named(identity: Identity) -> Iterator[None]:
    """Adds the node's name to a mistake that perhaps this node alone has made."""
    try:
        yield
    except UserError as error:
        host = socket.gethostname()
        if identity.size == identity.local_size or host in str(error):
            raise
        raise UserError(f"{error} (on {host})") from error


def _refused(identity: Identity, error: UserError | RunError, folder: Path | None) -> int:
    """Says why the run ends, in time for the launcher, and returns the exit code."""
    if folder is not None and identity.rank == 0:
        unmark(folder)  # a scheduler that started this run again would meet the same error
    if not identity.speaks_for_node:
        # The rank that speaks meets the same error, and its exit makes the launcher end this one. To leave first would
        # make the launcher end that one instead, perhaps before it has spoken.
        time.sleep(_GRACE_S)
    print(f"error: {error}", file=sys.stderr, flush=True)
    return 2 if isinstance(error, UserError) else 1


def _leave_at_once(code: int) -> NoReturn:
    """Does what is registered for the end, and ends this process behind the interpreter's back.

    One of the process group's threads may still hold a tensor, even of a group that was destroyed. Letting it go while
    the interpreter ends would abort the process, and the code would be 134:
    https://github.com/pytorch/pytorch/issues/190489.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
