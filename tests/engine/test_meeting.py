"""Two nodes, of which one finds a mistake: both leave, soon, and only that one speaks."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from socket import socket

import pytest
from torch.distributed import TCPStore

from dpo_ds.engine import meeting as rooms
from dpo_ds.engine.meeting import Meeting
from dpo_ds.errors import PeerError, UserError
from dpo_ds.launcher.identity import Identity
from tests.ranks import REPOSITORY

RANK = """
import sys
from dpo_ds.engine.meeting import Meeting
from dpo_ds.errors import PeerError, UserError
from dpo_ds.launcher.identity import Identity

identity = Identity.from_environment()
try:
    with Meeting(identity) as meeting:
        if identity.speaks_for_node:
            if sys.argv[1] == str(identity.rank):
                raise UserError("the disk is full")
            meeting.vouch({"torch": "2.13"})
        meeting.wait()
        meeting.store.add("gone on", 1)
        while identity.rank == 0 and meeting.store.add("gone on", 0) < identity.size:
            pass  # the store ends with this rank
except PeerError:
    sys.exit(2)
except UserError as error:
    sys.exit(f"error: {error}")
"""


def meet(refusing: str) -> tuple[list[int], list[str]]:
    """Four ranks on two nodes; the speaker with that rank refuses."""
    with closing(socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    places = [(rank, rank % 2) for rank in range(4)]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, refusing],
            cwd=REPOSITORY,
            env={
                **os.environ,
                **{"RANK": str(rank), "LOCAL_RANK": str(local), "WORLD_SIZE": "4", "LOCAL_SIZE": "2"},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, local in places
    ]
    said = [process.communicate(timeout=100)[1] for process in ranks]
    return [process.returncode for process in ranks], said


@pytest.mark.parametrize("refusing", [0, 2])
def test_one_nodes_mistake_ends_all_nodes_and_is_said_once(refusing):
    codes, said = meet(str(refusing))
    assert [code for rank, code in enumerate(codes) if rank != refusing] == [2, 2, 2]
    assert said[refusing] == "error: the disk is full\n"
    assert not any(line for rank, line in enumerate(said) if rank != refusing)


def together(
    check: Callable[[Meeting, int], dict[str, str] | None], monkeypatch: pytest.MonkeyPatch, *, late: int | None = None
) -> list[str | None]:
    """Two nodes of one rank, as threads of this process, that check and vouch for what is found: what they raise."""
    with closing(socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(probe.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    stores = []  # they end together

    def node(rank: int) -> str | None:
        time.sleep(2 * (rank == late))
        try:
            with Meeting(Identity(rank, 2, 0, 1)) as meeting:
                stores.append(meeting.store)
                meeting.vouch(check(meeting, rank) or {})
                meeting.wait()
        except (UserError, PeerError) as error:
            return f"{type(error).__name__}: {error}"
        return None

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(node, (0, 1)))


def test_nodes_with_one_folder_are_alike_and_leave_no_trace_in_it(tmp_path, monkeypatch):
    for folder in (tmp_path, tmp_path / "not/yet/there"):
        said = together(lambda meeting, rank, folder=folder: meeting.compare({"a": "b"}, folder=folder), monkeypatch)
        assert said == [None, None]
    assert not list(tmp_path.iterdir())


def test_a_folder_that_a_node_has_for_itself_is_found_before_anything_else(tmp_path, monkeypatch):
    monkeypatch.setattr(rooms, "_SEEN_WITHIN_S", 0.1)

    def check(meeting: Meeting, rank: int) -> None:
        if rank == 1:
            # What node 0 has put there is not here.
            while not (probes := list(tmp_path.iterdir())):
                time.sleep(0.01)
            probes[0].unlink()
        meeting.compare({}, folder=tmp_path)

    first, second = together(check, monkeypatch)
    assert first == "PeerError: "
    host = os.uname().nodename
    expected = f"UserError: {tmp_path} is not the same folder on {host} as on {host}, the first node"
    assert str(second).startswith(expected)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("late", [False, True])
def test_a_node_with_another_version_names_it_and_ends_all(tmp_path, monkeypatch, late):
    def check(meeting: Meeting, rank: int) -> dict[str, str]:
        facts = {"torch": "2.12" if rank else "2.13"}
        meeting.compare({} if late else facts, folder=tmp_path)
        assert late, "nobody may come this far"
        return facts

    host = os.uname().nodename
    complaint = f"UserError: torch is 2.12 on {host}, but 2.13 on {host}, the first node; all nodes need the same"
    assert together(check, monkeypatch) == ["PeerError: ", complaint]


def test_a_mistake_that_all_nodes_make_is_said_by_one(monkeypatch):
    def check(meeting: Meeting, rank: int) -> None:
        raise UserError("the data is empty")

    assert sorted(map(str, together(check, monkeypatch))) == ["PeerError: ", "UserError: the data is empty"]


LATE = {1: "still waiting for ranks 1 (on ", 0: "still waiting for rank 0 at 127.0.0.1:"}


@pytest.mark.parametrize("late", LATE)
def test_who_is_missing_is_said(monkeypatch, capfd, late):
    monkeypatch.setattr(rooms, "_SILENT_S", 0.5)
    assert together(lambda meeting, rank: None, monkeypatch, late=late) == [None, None]
    assert LATE[late] in capfd.readouterr().err


def test_ranks_that_torchrun_starts_again_do_not_hear_the_former_ones(monkeypatch):
    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(agent.port))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for attempt, error in (("0", UserError("the disk is full")), ("1", None)):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        with suppress(UserError), Meeting(Identity(0, 1, 0, 1)) as meeting:
            assert not meeting.store.check(["refused"])
            if error:
                raise error
