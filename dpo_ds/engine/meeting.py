"""Where ranks meet before there is a process group: they compare their nodes, and wait for every node's checks."""

import json
import os
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from dpo_ds.errors import PeerError, UserError
from dpo_ds.launcher.identity import Identity, name_meeting_place

_WAIT = timedelta(hours=24)  # one rank of a node may tokenize for hours
_POLL_S = 0.2
_HEARD_S = 5.0


class Meeting:
    """A key-value store on global rank 0, in which each node's speaker vouches for its node or refuses.

    Leaving the ``with`` block by an exception before vouching refuses for all nodes.
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
        # torchrun's agent has opened a store there already.
        opens = identity.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self.store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            world_size=identity.size,
            is_master=opens,
            timeout=_WAIT,
            wait_for_workers=False,
            multi_tenant=True,
        )
        os.environ["MASTER_PORT"] = str(self.store.port)

    def __enter__(self) -> "Meeting":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or not self._may_refuse:
            return
        self.store.set("refused", "")
        deadline = time.monotonic() + _HEARD_S
        # The store ends with the rank that holds it.
        while self._identity.rank == 0 and self.store.add("heard", 0) < self._identity.size - 1:
            if time.monotonic() > deadline:
                break
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
            self.store.set("facts", json.dumps({"host": socket.gethostname(), **facts}))
        else:
            self._compare(facts)
        self._may_refuse = False
        self.store.add("vouched", self._identity.local_size)

    def _compare(self, facts: Mapping[str, str]) -> None:
        try:
            while not self.store.check(["facts"]):
                if self.store.check(["refused"]):
                    self._may_refuse = False
                    self.store.add("heard", 1)
                    raise PeerError
                time.sleep(_POLL_S)
            expected = json.loads(self.store.get("facts"))
        except RuntimeError as error:
            raise PeerError from error
        for name, value in facts.items():
            if value != expected.get(name):
                raise UserError(
                    f"{name} is {value} on {socket.gethostname()}, but {expected.get(name)} on {expected['host']}, the "
                    "first node; all nodes need the same"
                )

    def wait(self) -> None:
        """Waits until every node has vouched.

        Raises:
            PeerError: another rank refused, which has said why, or the rank that holds the store is gone.
        """
        try:
            while self.store.add("vouched", 0) < self._identity.size:
                if self.store.check(["refused"]):
                    self.store.add("heard", 1)
                    raise PeerError
                time.sleep(_POLL_S)
        except RuntimeError as error:
            raise PeerError from error
