"""Files that are there complete or not at all."""

import os
import resource

import pytest

from dpo_ds.files import measured, write_whole


def test_a_file_that_does_not_fit_leaves_the_earlier_one_and_nothing_else(tmp_path):
    write_whole(tmp_path / "file", b"earlier")
    _, most = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, most))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_whole(tmp_path / "file", bytes(8192))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"earlier"}


def test_a_file_is_replaced_and_has_the_users_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "file", b"earlier")
        write_whole(tmp_path / "file", b"later")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert measured(tmp_path / "file") == (5, "1d9283d848ea941ace1fe0d2378ef8b70056a0d4d1648b95a322d90163e78285")
