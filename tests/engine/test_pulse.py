"""What the watch of other machines does on its own sockets; a cut link is in ``tests/cluster``."""

import socket
import time

import pytest

from dpo_ds.engine.pulse import Place, Pulse, watch_machines
from dpo_ds.launcher.identity import Identity


@pytest.fixture
def lost() -> list[str]:
    return []


@pytest.fixture
def pulse(lost, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    opened = Pulse(4, lost.append)
    yield opened
    opened.close()


def closes(connection: socket.socket) -> bool:
    connection.settimeout(5)
    return connection.recv(1) == b""


def test_a_machine_that_has_left_is_not_lost(pulse, lost):
    place = pulse.listen()
    other = Pulse(4, lost.append)
    other.connect(place)
    time.sleep(0.2)
    for connection in [key.fileobj for key in other._selector.get_map().values()]:
        connection.shutdown(socket.SHUT_RDWR)
    time.sleep(0.5)
    other.close()
    assert not lost
    assert len(pulse._selector.get_map()) == 1, "the server still holds a connection that has ended"


def test_who_does_not_know_the_word_is_not_heard(pulse, lost):
    place = pulse.listen()
    with socket.create_connection(("127.0.0.1", place.port)) as stranger:
        stranger.sendall(b"f" * 32 + b" node7\n")
        assert closes(stranger)
    assert not lost


def test_a_machine_that_cannot_be_reached_is_a_warning(pulse, capfd):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    pulse.connect(Place("node7", port, "word"))
    assert f"cannot reach node7 at port {port}" in capfd.readouterr().err


def test_ranks_of_one_machine_watch_nothing():
    assert watch_machines(Identity(0, 2, 0, 2), pytest.fail, silence_s=4)() is None
