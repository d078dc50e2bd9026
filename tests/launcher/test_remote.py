"""What the far end of a job over ssh understands."""

import os
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from dpo_ds.launcher.remote import orders_from


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    with ExitStack() as stack:
        stack.callback(os.close, reader)
        yield reader, writer


def test_a_number_that_comes_in_two_pieces_is_one_signal(pipe):
    reader, writer = pipe
    orders = orders_from(reader, silence_s=10)
    os.write(writer, b"0\n1")
    assert next(orders) == 0
    os.write(writer, b"5\n10\n")
    assert [next(orders), next(orders)] == [15, 10]
    os.close(writer)
    assert list(orders) == []


def test_who_is_silent_for_too_long_gives_no_orders_any_more(pipe):
    reader, writer = pipe
    os.write(writer, b"15\n")
    assert list(orders_from(reader, silence_s=0.05)) == [15]
    os.close(writer)
