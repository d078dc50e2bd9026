"""The far end of ``launcher/ssh.py``: runs the node agent as standard input says, and ends it when that falls silent.

The first line is a JSON object; what follows are numbers of signals to pass on, and zeros that only mean: still there.
"""

import io
import json
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from dpo_ds.errors import UserError
from dpo_ds.launcher.agent import Agent, agent_of


@dataclass(frozen=True)
class NodeJob:
    """What one node is to run.

    Attributes:
        folder: to work in.
        environment: variables that the ranks get beside those of this node.
        arguments: of the node agent.
        silence_s: for how long nothing may be heard of whoever started this.
    """

    folder: str
    environment: dict[str, str]
    arguments: list[str]
    silence_s: float

    def line(self) -> bytes:
        """Returns it as the line that ``main`` reads."""
        return json.dumps(asdict(self)).encode() + b"\n"


def main() -> None:
    """Runs a node's ranks to their end, and exits with their code."""
    told = io.FileIO(sys.stdin.fileno(), closefd=False)  # unbuffered: what comes after the line is read elsewhere
    try:
        job = _read(told.readline())
        os.environ.update(job.environment)
        try:
            os.chdir(job.folder)
        except OSError as error:
            raise UserError(
                f"the working folder is not there on {os.uname().nodename} ({error}); start the job in a folder that "
                "all nodes share"
            ) from error
        agent = agent_of(job.arguments)
        threading.Thread(target=_obey, args=(agent, job.silence_s), name="orders", daemon=True).start()
        code = agent.run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = 2
    sys.exit(code)


def _read(line: bytes) -> NodeJob:
    try:
        return NodeJob(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"dpo_ds on {os.uname().nodename} does not understand the one that launches ({error}); install the same "
            "version on all nodes"
        ) from error


def _obey(agent: Agent, silence_s: float) -> None:
    for number in orders_from(sys.stdin.fileno(), silence_s=silence_s):
        if number:
            agent.ask(number)
    # Whoever started the job is gone, or the network between us.
    agent.ask(signal.SIGTERM)


def orders_from(told: int, *, silence_s: float) -> Iterator[int]:
    """Yields the numbers that come from a descriptor, a line each.

    Args:
        told: the descriptor; its end is the end.
        silence_s: seconds of silence that are the end, too.
    """
    begun = b""
    while select.select([told], [], [], silence_s)[0]:
        if not (piece := os.read(told, 4096)):
            return
        # A read may end in the middle of a number, whose digits are other signals.
        *lines, begun = (begun + piece).split(b"\n")
        yield from map(int, lines)


if __name__ == "__main__":
    main()
