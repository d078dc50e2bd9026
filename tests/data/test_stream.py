import json
import os
import shutil
import signal
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest

from dpo_ds.data.blocks import BlockSchedule
from dpo_ds.data.feed import Feed
from dpo_ds.data.preferences import Source
from dpo_ds.data.prepare import prepare
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
def feed_of(stream, schedule, tokenizer, *, behind=0, patience_s=60.0):
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
    # The tokens are those that preparing everything gives.
    whole = prepare(sources, tokenizer, max_dropped=0.0, folder=tmp_path / "whole", **SETTINGS)
    tokens = {whole.where(index): whole.pair(index) for index in range(len(whole))}
    assert all(tokens[where] == pair for rows in expected.values() for where, pair in rows)
    epochs = [[where for step in steps for where, _ in expected[step]] for steps in (range(1, 9), range(9, 17))]
    assert all(len(set(epoch)) == 32 for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert (feed.pairs_until(7), feed.steps, feed.probe) == (28, 16, whole.pair(0))


@contextmanager
def measured(stream):
    """Gives the largest number of blocks, and of all their bytes, that are on disk until it ends."""
    most, over = [0, 0], threading.Event()

    def measure() -> None:
        while not over.wait(0.002):
            # A folder may go while it is looked at.
            with suppress(FileNotFoundError):
                most[0] = max(most[0], len(blocks_on_disk(stream)))
                most[1] = max(most[1], sum(path.stat().st_size for path in stream.blocks.rglob("*.arrow")))

    watching = threading.Thread(target=measure)
    watching.start()
    try:
        yield most
    finally:
        over.set()
        watching.join()


def wait_until(holds):
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def many(tokenizer, tmp_path):
    """16 blocks of 500 rows, three of which may be on disk."""
    rows = [{"prompt": f"{n}:", "chosen": "yes", "rejected": "no"} for n in range(8000)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return opened([Source(str(tmp_path / "rows.jsonl"))], tokenizer, tmp_path / "data", rows_per_block=500, keep=3)


def test_the_folder_never_holds_more_blocks_than_it_may(many, tokenizer):
    schedule = scheduled(many, pairs_per_step=450, max_steps=20)
    assert schedule.turns == 20
    with measured(many) as most, feed_of(many, schedule, tokenizer) as (feed, _):
        for step in range(1, 21):
            pairs, _ = feed.of_step(step)
            if step in (1, 9):
                # As long as it needs to be ahead as far as it may, and a while for one too many.
                wait_until(lambda: len(list(many.blocks.glob("block-*/manifest.json"))) == 3)
                time.sleep(0.5)
        one = (pairs.path / "pairs-00000.arrow").stat().st_size
    assert most[0] == 3
    assert 2.5 * one < most[1] < 3.5 * one


def test_two_nodes_that_share_the_folder_share_its_blocks(many, tokenizer):
    schedule = scheduled(many, pairs_per_step=450, epochs=1)
    expected = []
    with (
        measured(many) as most,
        feed_of(many, schedule, tokenizer) as (first, _),
        feed_of(many, schedule, tokenizer) as (second, _),
    ):
        for step in range(1, 17):
            # As collectives see to it, no node begins a step before the other has read what it needs of the last.
            expected.append(first.of_step(step).pairs.manifest)
            time.sleep(0.05)
            assert second.of_step(step).pairs.manifest == expected[-1]
    assert most[0] <= 3
    assert len({manifest.key for manifest in expected}) == 16


def kill(supplier):
    os.kill(supplier.pid, signal.SIGKILL)
    time.sleep(0.2)


def test_a_supplier_that_is_killed_is_replaced_and_goes_on(many, tokenizer, tmp_path):
    schedule = scheduled(many, pairs_per_step=450, epochs=1)
    by_hand = prepared_by_hand(replace(many, folder=tmp_path / "elsewhere"), schedule, tokenizer)
    pids = set()
    with feed_of(many, schedule, tokenizer) as (feed, supplier):
        for step in range(1, 17):
            found, expected = feed.of_step(step), by_hand.of_step(step)
            assert found.pairs.manifest.shards == expected.pairs.manifest.shards
            assert found.indices.tolist() == expected.indices.tolist()
            pids.add(supplier.pid)
            if step in (1, 5):
                kill(supplier)
                # Half a block and half a removal, which another kill may leave.
                (many.blocks / ".block-000099").mkdir(exist_ok=True)
                (many.blocks / f".{'0' * 32}").mkdir(exist_ok=True)
    assert len(pids) == 3
    assert not [path for path in many.blocks.glob(".*") if path.is_dir()]


def test_a_supplier_that_is_killed_again_and_again_is_an_error(many, tokenizer):
    schedule = scheduled(many, pairs_per_step=450)
    with feed_of(many, schedule, tokenizer) as (_, supplier):
        for _ in range(2):
            kill(supplier)
            supplier.needs(0)
        kill(supplier)
        with pytest.raises(RunError, match=r"prepares data ended 3 times \(the last time with code -9\)"):
            supplier.needs(0)


def test_a_run_that_goes_on_gets_the_blocks_that_were_removed_behind_it(sources, tokenizer, tmp_path):
    stream = opened(sources, tokenizer, tmp_path / "data")
    schedule = scheduled(stream)
    with feed_of(stream, schedule, tokenizer) as (feed, _):
        before = {step: rows_of(feed, step) for step in range(1, 9)}
    gone = schedule.place(3).block
    assert not stream.path(gone).exists()
    # The last checkpoint was that of step 2.
    with feed_of(stream, schedule, tokenizer, behind=2) as (feed, _):
        assert {step: rows_of(feed, step) for step in range(3, 9)} == {step: before[step] for step in range(3, 9)}


def test_a_block_with_too_many_bad_rows_is_named_where_the_run_comes_to_it(tokenizer, tmp_path, capfd):
    rows = [*ROWS[:10], {**ROWS[10], "rejected": "yes"}, {**ROWS[11], "chosen": ""}, *ROWS[12:]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream = opened([Source(str(tmp_path / "rows.jsonl"))], tokenizer, tmp_path / "data")
    schedule = scheduled(stream, shuffle=False)
    message = (
        r"block 1 of data.streaming \(rows 11 to 20 of data.train\): 2 of 10 rows of .*rows.jsonl cannot be used: "
        r".*empty response 1 \(first: .*row 12\).*raise data.max_dropped"
    )
    with feed_of(stream, schedule, tokenizer) as (feed, _):
        assert len(feed.of_step(2).indices) == 4
        with pytest.raises(UserError, match=message):
            feed.of_step(3)
    assert "warning: the run will end where it comes to this: block 1 of" in capfd.readouterr().err
    # Mended in place; what was said of the block is not believed any more.
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    mended = opened([Source(str(tmp_path / "rows.jsonl"))], tokenizer, tmp_path / "data")
    with feed_of(mended, schedule, tokenizer, behind=2) as (feed, _):
        assert len(feed.of_step(3).indices) == 4


def test_rows_that_have_gone_meanwhile_are_missed(sources, tokenizer, tmp_path):
    stream = opened(sources, tokenizer, tmp_path / "data")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[17:25]))
    files, parts = stream.open_sources()
    stream.prepare(1, range(10, 20), files, parts, tokenizer)
    with pytest.raises(
        UserError, match=r"block 2 .*: the sources have lost rows since the run began, when they had 43"
    ):
        stream.prepare(2, range(20, 30), files, parts, tokenizer)


def test_a_block_is_waited_for_with_patience_that_has_an_end(sources, tokenizer, tmp_path):
    stream = opened(sources, tokenizer, tmp_path / "data")
    feed = StreamFeed(stream, scheduled(stream), supplier=None, patience_s=0.3)
    with pytest.raises(RunError, match=r"blocks/block-00000\d is not there after 0.3 s \(timeouts.data_s\)"):
        feed.of_step(1)


def test_the_key_follows_names_sizes_order_and_settings(sources, tokenizer, tmp_path):
    def key(*args, **more):
        return opened(*args, tokenizer, tmp_path / "data", **more).key

    plain = key(sources)
    (tmp_path / "moved").mkdir()
    moved = [Source(str(shutil.copy(source.path, tmp_path / "moved"))) for source in sources]
    assert key(moved) == key(sources, keep=5) == key(sources, processes=2) == plain
    others = [
        key(sources[::-1]),
        key(sources[:1]),
        key(sources, max_length=19),
        key(sources, rows_per_block=11),
        key(sources, max_dropped=0.2),
        key([sources[0], Source(sources[1].path, columns={"chosen": "rejected", "rejected": "chosen"})]),
    ]
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write("\n")
    others.append(key(sources))
    assert len({plain, *others}) == 1 + len(others)


def test_first_rows_without_a_usable_one_are_refused_before_training(tokenizer, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({**ROWS[0], "chosen": ""}) + "\n")
    with pytest.raises(UserError, match=r"1 of 1 rows .* cannot be used: empty response 1"):
        opened([Source(str(tmp_path / "rows.jsonl"))], tokenizer, tmp_path / "data")
