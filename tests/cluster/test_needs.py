"""What a machine lacks for a cluster skips tests, or fails them where it must be there."""

import pytest

from tests.cluster import needs


def test_what_is_lacking_is_the_reason_to_skip(monkeypatch):
    monkeypatch.delenv("DPO_DS_REQUIRE_CLUSTER", raising=False)
    assert needs("no sshd").mark.kwargs["reason"] == "no sshd"
    assert needs("no sshd").mark.args == (True,)
    assert needs(None).mark.args == (False,)


def test_what_must_be_there_fails(monkeypatch):
    monkeypatch.setenv("DPO_DS_REQUIRE_CLUSTER", "1")
    assert needs(None).mark.args == (False,)
    with pytest.raises(AssertionError, match="no sshd"):
        needs("no sshd")
