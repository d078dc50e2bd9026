"""Where ranks meet before there is a process group: they compare their nodes, and wait for every node's checks."""

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from dpo_ds.errors import PeerError, UserError
from dpo_ds.launcher.identity import Identity, name_meeting_place

_WAIT = timedelta(hours=24)  # one rank of a node may tokenize for hours
_SILENT_S = 60.0
_POLL_S = 0.2
_HEARD_S = 5.0
_SEEN_WITHIN_S = 10.0
"""Shared file systems show another node's new file after a few seconds."""


class Meeting:
    """A key-value store on global rank 0, in which each node's speaker vouches for its node or refuses.

    Leaving the ``with`` block by an exception before vouching refuses for all nodes. Where several refuse, the first
    one speaks.
    """

    def __init__(self, identity: Identity) -> None:
        """Opens the store on global rank 0, or waits for it to open.

        Args:
            identity: who this process is.

        Raises:
            UserError: the launcher has not said where the ranks meet.
        """
        self._identity = identity
        self._may_refuse = identity.speaks_for_node
        name_meeting_place(identity)
        store = self._opened()
        os.environ["MASTER_PORT"] = str(store.port)
        # torchrun's agent keeps its store when it starts its ranks again: what the former ones said is not for these.
        self.store = PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        self.store.set(f"here/{identity.rank}", "")

    def _opened(self) -> TCPStore:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # torchrun's agent has opened a store there already.
        opens = self._identity.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        with self._saying_so(f"still waiting for rank 0 at {address}:{port}"):
            return TCPStore(
                address,
                port,
                world_size=self._identity.size,
                is_master=opens,
                timeout=_WAIT,
                wait_for_workers=False,
                multi_tenant=True,
            )

    @contextmanager
    def _saying_so(self, line: str) -> Iterator[None]:
        over = threading.Event()

        def say() -> None:
            while not over.wait(_SILENT_S):
                self._say(line)

        threading.Thread(target=say, daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def _say(self, line: str) -> None:
        if self._identity.speaks_for_node:
            print(f"{line} (on {socket.gethostname()})", file=sys.stderr, flush=True)

    def __enter__(self) -> "Meeting":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or not self._may_refuse:
            return
        with _lost_with_its_store():
            self.store.set("refused", "")
            if self.store.add("refusals", 1) > 1 and isinstance(error, UserError):
                self.store.add("heard", 1)
                raise PeerError from error
            deadline = time.monotonic() + _HEARD_S
            # The store ends with the rank that holds it.
            while self._identity.rank == 0 and self.store.add("heard", 0) < self._identity.size - 1:
                if time.monotonic() > deadline:
                    break
                time.sleep(_POLL_S)

    def compare(self, facts: Mapping[str, str], *, folder: Path) -> None:
        """Compares this node with the first one, before anything takes long, and waits for all nodes.

        Args:
            facts: what must be the same on all nodes, by names that a person understands.
            folder: where ranks will write, which may not exist yet and must be one for all.

        Raises:
            UserError: a fact is another one on node 0, or the folder is.
            PeerError: another node has refused, which has said why.
        """
        if self._identity.size == self._identity.local_size:
            return
        with self._probed(folder) as probe:
            if self._identity.rank == 0:
                self._publish("node", {**facts, "probe": str(probe)})
            else:
                expected = self._compare("node", facts)
                self._see(Path(expected["probe"]), folder, first=expected["host"])
            self.store.add("compared", self._identity.local_size)
            self._wait_for("compared")

    @contextmanager
    def _probed(self, folder: Path) -> Iterator[Path | None]:
        if self._identity.rank != 0:
            yield None
            return
        # Beside a folder that is not there yet: who made it here would make every other node's look shared.
        above = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
        probe = above / f".dpo_ds-{uuid.uuid4().hex}"
        try:
            probe.touch()
        except OSError as error:
            raise UserError(f"{folder} cannot be written ({error.strerror}); name another folder") from error
        try:
            yield probe
        finally:
            with suppress(OSError):
                probe.unlink()

    def _see(self, probe: Path, folder: Path, *, first: str) -> None:
        deadline = time.monotonic() + _SEEN_WITHIN_S
        while not probe.exists():
            if time.monotonic() > deadline:
                raise UserError(
                    f"{folder} is not the same folder on {socket.gethostname()} as on {first}, the first "
                    "node; name one on a file system that all nodes share"
                )
            time.sleep(_POLL_S)

    def vouch(self, facts: Mapping[str, str]) -> None:
        """Says that this node's checks have passed.

        Args:
            facts: what must be the same on all nodes, by names that a person understands.

        Raises:
            UserError: a fact is another one on node 0.
            PeerError: node 0 has refused, which has said why.
        """
        if self._identity.rank == 0:
            self._publish("facts", facts)
        else:
            self._compare("facts", facts)
        self._may_refuse = False
        self.store.add("vouched", self._identity.local_size)

    def wait(self) -> None:
        """Waits until every node has vouched.

        Raises:
            PeerError: another rank refused, which has said why, or the rank that holds the store is gone.
        """
        self._wait_for("vouched")

    def _publish(self, key: str, facts: Mapping[str, str]) -> None:
        self.store.set(key, json.dumps({"host": socket.gethostname(), **facts}))

    def _compare(self, key: str, facts: Mapping[str, str]) -> dict[str, str]:
        with _lost_with_its_store():
            while not self.store.check([key]):
                self._leave_if_refused()
                time.sleep(_POLL_S)
            expected: dict[str, str] = json.loads(self.store.get(key))
        for name, value in facts.items():
            if value != expected.get(name):
                raise UserError(
                    f"{name} is {value} on {socket.gethostname()}, but {expected.get(name)} on {expected['host']}, the "
                    "first node; all nodes need the same"
                )
        return expected

    def _wait_for(self, key: str) -> None:
        said = time.monotonic()
        with _lost_with_its_store():
            while self.store.add(key, 0) < self._identity.size:
                self._leave_if_refused()
                time.sleep(_POLL_S)
                if self._identity.rank == 0 and time.monotonic() > said + _SILENT_S:
                    said = time.monotonic()
                    self._name_the_absent()

    def _name_the_absent(self) -> None:
        absent = [str(rank) for rank in range(self._identity.size) if not self.store.check([f"here/{rank}"])]
        if absent:
            self._say(f"still waiting for ranks {', '.join(absent)}")

    def _leave_if_refused(self) -> None:
        if self.store.check(["refused"]):
            self._may_refuse = False
            self.store.add("heard", 1)
            raise PeerError


@contextmanager
def _lost_with_its_store() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise PeerError from error
