import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from contextlib import contextmanager

import pytest

from dpo_ds.data.blocks import BlockSchedule
from dpo_ds.data.feed import Feed
from dpo_ds.data.prepare import Source, open_prepared, prepare
from dpo_ds.data.stream import open_stream
from dpo_ds.data.supply import StreamFeed, Supplier
from dpo_ds.errors import RunError, UserError
from tests.data.small_tokenizer import small_tokenizer

ROWS = [{"prompt": f"{n}:", "chosen": "yes", "rejected": "no"} for n in range(43)]
SETTINGS = {"max_length": 20, "truncation": None, "scored": "last_turn"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def sources(tmp_path):
    """43 rows in two files; blocks of 10 have rows of both."""
    for name, some in (("a", ROWS[:17]), ("b", ROWS[17:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return [Source(str(tmp_path / "a.jsonl")), Source(str(tmp_path / "b.jsonl"))]


def opened(sources, tokenizer, folder, **more):
    values = {"max_dropped": 0.1, "rows_per_block": 10, "keep": 2, "processes": 1, **SETTINGS, **more}
    return open_stream(sources, tokenizer, folder=folder, **values)


def scheduled(stream, **more):
    values = {"pairs_per_step": 4, "epochs": 2, "max_steps": None, "seed": 1, "shuffle": True, **more}
    return BlockSchedule.of_run(
        rows=stream.rows, rows_per_block=stream.rows_per_block, max_dropped=stream.max_dropped, **values
    )


@contextmanager
def feed_of(stream, schedule, tokenizer, *, behind=0, patience_s=30.0):
    """A feed and the process that prepares for it, as a rank that goes on behind a step has them."""
    supplier = Supplier(stream, schedule, tokenizer, turn=schedule.place(behind + 1).turn)
    try:
        yield StreamFeed(stream, schedule, supplier=supplier, patience_s=patience_s), supplier
    finally:
        supplier.stop()


def rows_of(feed: Feed, step):
    """Which rows a step trains on, and their tokens."""
    pairs, indices = feed.of_step(step)
    return [(pairs.where(int(index)), pairs.pair(int(index))) for index in indices]


def prepared_by_hand(stream, schedule, tokenizer):
    """Prepares every block at once, into a folder without a bound."""
    files, parts = stream.open_sources()
    for block in range(schedule.blocks):
        stream.prepare(block, schedule.rows_of_block(block), files, parts, tokenizer)
    return StreamFeed(stream, schedule, supplier=None, patience_s=1.0)


def blocks_on_disk(stream):
    return {path.name for path in stream.blocks.iterdir() if path.is_dir()}


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.arrow")}


def test_a_step_holds_the_same_pairs_whatever_was_read_before(sources, tokenizer, tmp_path):
    stream = opened(sources, tokenizer, tmp_path / "data")
    schedule = scheduled(stream)
    assert (stream.rows, schedule.blocks, schedule.steps) == (43, 4, 2 * 4 * 2)
    by_hand = prepared_by_hand(opened(sources, tokenizer, tmp_path / "elsewhere"), schedule, tokenizer)
    expected = {step: rows_of(by_hand, step) for step in range(1, schedule.steps + 1)}
    # In another order, and of a feed that knows no other step.
    assert [rows_of(by_hand, step) for step in (16, 3, 9)] == [expected[step] for step in (16, 3, 9)]
    with feed_of(stream, schedule, tokenizer) as (feed, _):
        assert {step: rows_of(feed, step) for step in expected} == expected
    with feed_of(stream, schedule, tokenizer, behind=6) as (feed, _):
        assert {step: rows_of(feed, step) for step in range(7, 17)} == {n: expected[n] for n in range(7, 17)}
    # The tokens are those that preparing everything gives.
    whole = prepare(sources, tokenizer, max_dropped=0.0, folder=tmp_path / "whole", **SETTINGS)
    tokens = {whole.where(index): whole.pair(index) for index in range(len(whole))}
    assert all(tokens[where] == pair for rows in expected.values() for where, pair in rows)
    epochs = [[where for step in steps for where, _ in expected[step]] for steps in (range(1, 9), range(9, 17))]
    assert all(len(set(epoch)) == 32 for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert (feed.pairs_until(7), feed.steps, feed.probe) == (28, 16, whole.pair(0))


def test_the_folder_never_holds_more_blocks_than_it_may(tokenizer, tmp_path):
    rows = [{"prompt": f"{n}:", "chosen": "yes", "rejected": "no"} for n in range(12_000)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream = opened([Source(str(tmp_path / "rows.jsonl"))], tokenizer, tmp_path / "data", rows_per_block=1000, keep=3)
    schedule = scheduled(stream, pairs_per_step=300)
    most, over = [], threading.Event()

    def measure() -> None:
        while not over.is_set():
            sizes = []
            for path in stream.blocks.rglob("*"):
                try:
                    sizes.append(path.stat().st_size)
                except FileNotFoundError:
                    continue
            most.append((len(blocks_on_disk(stream)), sum(sizes)))
            time.sleep(0.002)

    watching = threading.Thread(target=measure)
    watching.start()
    with feed_of(stream, schedule, tokenizer) as (feed, _):
        for step in range(1, schedule.steps + 1):
            pairs, _ = feed.of_step(step)
            time.sleep(0.01)
        one = sum(path.stat().st_size for path in pairs.path.iterdir())
    over.set()
    watching.join()
    blocks, sizes = map(max, zip(*most, strict=True))
    assert schedule.turns == 24
    assert blocks == 3
    # And what else there is beside the files themselves.
    assert sizes < 3 * one * 1.1 + 50_000
