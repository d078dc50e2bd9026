"""``launch/train.py``: from argv to a trained and exported model."""

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Protocol, TypeVar

from dpo_ds.config import Run, flat, parse_run
from dpo_ds.errors import PeerError, RunError, Stopped, UserError
from dpo_ds.launcher.guard import end_with_launcher
from dpo_ds.launcher.identity import Identity
from dpo_ds.launcher.marker import STOPPED_CODE, unmark
from dpo_ds.launcher.signals import StopRequest, ignore_signals, job_time_left

if TYPE_CHECKING:
    from dpo_ds.cli.preflight import Inputs
    from dpo_ds.engine.meeting import Meeting

_GRACE_S = 30
_HEAD_START_S = 2  # of the rank that speaks


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one rank of a training run.

    Exits with 0 when done, 2 when the user's config or data is wrong, 1 when the run cannot be right, 200 when it was
    asked to stop and has saved what it needs to go on.

    Args:
        argv: the arguments behind the script's name; None takes the process's.
    """
    start(sys.argv[1:] if argv is None else argv, _train, check=checked)


def checked(run: Run, *, ranks: int) -> "Inputs":
    """Does what ``preflight`` does, which takes torch to be imported."""
    from dpo_ds.cli.preflight import preflight

    return preflight(run, ranks=ranks)


def _train(inputs: "Inputs | None", identity: Identity, meeting: "Meeting", request: StopRequest) -> None:
    # Only now, so that --help and a mistyped key are answered at once.
    from dpo_ds.cli.run import train

    train(inputs, identity, meeting, request)


class Checked(Protocol):
    """What a check of a run has found."""

    @property
    def plan(self) -> str:
        """What will happen, for a person to read."""

    @property
    def facts(self) -> dict[str, str]:
        """What must be the same on all nodes, by names that a person understands."""


Found = TypeVar("Found", bound=Checked)


def start(
    argv: Sequence[str],
    work: "Callable[[Found | None, Identity, Meeting, StopRequest], None]",
    *,
    check: "Callable[..., Found]",
) -> None:
    """Checks a run on one rank of each node, lets all ranks work, and exits as ``main`` says.

    Args:
        argv: the arguments behind the script's name.
        work: what every rank does; what was found is None on ranks that do not speak for their node.
        check: called with the run and, as ``ranks``, the number of ranks, before any engine is built.
    """
    try:
        identity = Identity.from_environment()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    end_with_launcher()
    folder = None
    try:
        run = parse_run(argv)
        os.environ.update(run.config.env)
        if run.dry_run:
            if identity.rank == 0:
                print(check(run, ranks=identity.size).plan)
            return
        folder = Path(run.config.output_dir)
        request = StopRequest(stop_after_s=run.stop_after_s, job_time_left_s=job_time_left())
        from dpo_ds.engine.meeting import Meeting

        inputs = None
        with Meeting(identity) as meeting:
            if identity.speaks_for_node:
                with _node_named(identity):
                    # Reading and tokenizing may take hours.
                    meeting.compare(_facts(run, identity), folder=folder)
                    inputs = check(run, ranks=identity.size)
                meeting.vouch(inputs.facts)
            meeting.wait()
        if inputs is not None and identity.rank == 0:
            print(inputs.plan, flush=True)
        work(inputs, identity, meeting, request)
    except PeerError:
        time.sleep(_HEAD_START_S)
        sys.exit(2)
    except Stopped as stopped:
        # DeepSpeed's launcher ends the ranks that are a moment later than the first, whose 200 would become 143.
        ignore_signals()
        if identity.rank == 0:
            print(stopped, flush=True)
        sys.exit(STOPPED_CODE)
    except (UserError, RunError) as error:
        if folder is not None and identity.rank == 0:
            unmark(folder)  # a scheduler that started this run again would meet the same error
        _leave(identity, error)


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


def _leave(identity: Identity, error: UserError | RunError) -> NoReturn:
    if not identity.speaks_for_node:
        # The rank that speaks meets the same error, and its exit makes the launcher end this one. To leave first would
        # make the launcher end that one instead, perhaps before it has spoken.
        time.sleep(_GRACE_S)
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(2 if isinstance(error, UserError) else 1)
