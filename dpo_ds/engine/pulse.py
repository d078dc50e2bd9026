"""Hears within a bounded time that another machine is gone, its link or its power cut, which no collective says.

The first rank of every machine holds an idle connection to rank 0, and the kernels on both sides ask one another
whether the other one is there: a stopped or busy process answers, too. A process that ends closes its connection, which
is no loss: whoever has started it knows.
"""

import errno
import hmac
import os
import secrets
import selectors
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from dpo_ds.launcher.identity import Identity

_QUESTIONS = 3
"""How many questions to the other kernel go without an answer before it is gone."""

_POLL_S = 1.0
_GREETING_S = 10.0
_LONGEST_GREETING = 400
_GONE = {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH}


@dataclass(frozen=True)
class Place:
    """Where rank 0 hears the other machines, and the word by which it knows them."""

    host: str
    port: int
    token: str


class Pulse:
    """This machine's end of the connections; only the first rank of a machine has one."""

    def __init__(self, silence_s: float, lost: Callable[[str], None]) -> None:
        """Opens nothing yet.

        Args:
            silence_s: seconds without an answer after which a machine is gone, at least 4.
            lost: called once, in a thread of its own, with the name of the machine that is gone.
        """
        self._silence_s = silence_s
        self._lost = lost
        self._over = threading.Event()
        self._selector = selectors.DefaultSelector()
        self._token = secrets.token_hex(16)

    def listen(self) -> Place | None:
        """Listens for the other machines, on rank 0, and returns where; where it cannot, it warns."""
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        try:
            server = socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=1024)
        except OSError as error:
            _warn(f"cannot listen for the other machines ({error})")
            return None
        server.setblocking(False)
        self._selector.register(server, selectors.EVENT_READ, partial(self._accept, server))
        self._start()
        return Place(socket.gethostname(), server.getsockname()[1], self._token)

    def connect(self, place: Place) -> None:
        """Connects to rank 0's machine, or warns that it cannot be reached."""
        try:
            connection = socket.create_connection((os.environ["MASTER_ADDR"], place.port), timeout=_GREETING_S)
            connection.sendall(f"{place.token} {socket.gethostname()}\n".encode())
        except OSError as error:
            _warn(f"cannot reach {place.host} at port {place.port} ({error})")
            return
        self._hold(connection, place.host)
        self._start()

    def close(self) -> None:
        """Holds no machine for lost from now on."""
        self._over.set()

    def _start(self) -> None:
        threading.Thread(target=self._watch, name="pulse", daemon=True).start()

    def _watch(self) -> None:
        while not self._over.is_set():
            for ready, _ in self._selector.select(_POLL_S):
                ready.data()
        for key in [*self._selector.get_map().values()]:
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    def _accept(self, server: socket.socket) -> None:
        with suppress(OSError):
            connection, _ = server.accept()
            connection.settimeout(_GREETING_S)
            greeting = connection.makefile("rb").readline(_LONGEST_GREETING).decode(errors="replace").strip()
            token, _, host = greeting.partition(" ")
            if hmac.compare_digest(token.encode(), self._token.encode()):
                self._hold(connection, host)
            else:
                connection.close()

    def _hold(self, connection: socket.socket, host: str) -> None:
        each_s = max(1, round(self._silence_s / (_QUESTIONS + 1)))
        for level, option, value in (
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
            (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, each_s),
            (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, each_s),
            (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _QUESTIONS),
            # For the greeting, which is no question.
            (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(self._silence_s * 1000)),
        ):
            connection.setsockopt(level, option, value)
        self._selector.register(connection, selectors.EVENT_READ, partial(self._hear, connection, host))

    def _hear(self, connection: socket.socket, host: str) -> None:
        try:
            connection.recv(1)
        except OSError as error:
            if error.errno in _GONE and not self._over.is_set():
                self._over.set()
                self._lost(host)
        self._selector.unregister(connection)
        connection.close()


def watch_machines(
    identity: Identity, share: Callable[[Place | None], Place | None], *, silence_s: float
) -> Callable[[], None]:
    """Ends this process when another machine is gone; where all ranks are on one machine, nothing.

    Collective.

    Args:
        identity: who this process is.
        share: returns what rank 0 has given it, on every rank.
        silence_s: seconds without an answer after which a machine is gone.

    Returns:
        what ends the watch.
    """
    if identity.size == identity.local_size:
        return lambda: None
    pulse = Pulse(silence_s, partial(_end, identity.rank, silence_s))
    place = share(pulse.listen() if identity.rank == 0 else None)
    if place is not None and identity.rank != 0 and identity.speaks_for_node:
        pulse.connect(place)
    return pulse.close


def _warn(what: str) -> None:
    consequence = "a cut link ends this run by the other timeouts.* alone"
    print(f"warning: {socket.gethostname()} {what}: {consequence}", file=sys.stderr, flush=True)


def _end(rank: int, silence_s: float, host: str) -> None:
    print(
        f"error: rank {rank} on {socket.gethostname()} has heard nothing of {host} for {silence_s:g} s "
        "(timeouts.silence_s): its link or its power is gone; the same command goes on from the last checkpoint",
        file=sys.stderr,
        flush=True,
    )
    # Nothing that runs at exit may wait for the other ranks.
    os._exit(1)
