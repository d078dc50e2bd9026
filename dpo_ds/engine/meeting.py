"""Where the ranks find one another before there is a process group, and wait until every node's checks have passed."""

import os
import time
from datetime import timedelta
from types import TracebackType

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from dpo_ds.errors import PeerError
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

    def vouch(self) -> None:
        """Says that this node's checks have passed."""
        self._may_refuse = False
        self.store.add("vouched", self._identity.local_size)

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
