"""Runs whose data stream, on real ranks and in preflight."""

import json

import pytest
from filelock import FileLock

from dpo_ds.cli.preflight import preflight
from dpo_ds.config import parse_run
from dpo_ds.data.prepared import open_prepared
from dpo_ds.errors import UserError
from tests.test_resume import checkpoints, look, record, start, write_run

# 13 rows in blocks of 5, 5 and 3, which serve 2, 2 and 1 steps of 2 pairs: 5 steps an epoch.
STREAMED = {
    "data": {"streaming": {"rows_per_shard": 5, "keep": 2}},
    "train": {"pairs_per_step": 2, "epochs": 2, "eval_every": 5},
}


@pytest.mark.ranks
def test_a_killed_run_whose_data_stream_goes_on_to_the_bit(tiny_chat, tmp_path):
    calm = write_run(tmp_path / "calm", tiny_chat, **STREAMED, checkpoint={"every": None})
    start(calm).expect_success()
    expected = record(calm)
    assert [line["step"] for line in expected if line["split"] == "train"] == [*range(1, 11)]
    assert {line["pairs"] for line in expected if line["split"] == "train"} == {2}
    folder = write_run(tmp_path / "killed", tiny_chat, **STREAMED)
    start(folder, dying="step 8 1")
    assert checkpoints(folder) == ["step-00000004", "step-00000006"]
    finished = start(folder).expect_success()
    assert not any("leaked" in said for said in finished.errors)
    assert "going on behind step 6 of 10" in finished.outputs[0]
    assert record(folder) == expected
    weights = [some / "out/export/model.safetensors" for some in (folder, calm)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert "* pairs: streamed from 13 rows of `pairs.jsonl`, key `" in (folder / "out/export/README.md").read_text()
    for some in (folder, calm):
        (blocks,) = (some / "out/data").glob("stream-*/blocks")
        assert len([path for path in blocks.iterdir() if path.is_dir()]) <= 2


@pytest.mark.ranks
def test_what_was_learnt_is_saved_before_a_block_that_cannot_be_prepared(tiny_chat, tmp_path):
    in_order = {**STREAMED, "data": {**STREAMED["data"], "shuffle": False}, "checkpoint": {"every": None}}
    folder = write_run(tmp_path / "run", tiny_chat, **in_order)
    good = (folder / "pairs.jsonl").read_text().splitlines(keepends=True)
    bad = [line.replace('"chosen"', '"chosem"') for line in good[5:10]]
    (folder / "pairs.jsonl").write_text("".join([*good[:5], *bad, *good[10:]]))
    finished = start(folder)
    assert finished.codes[0] == 2
    assert "error: block 1 of" in finished.errors[0]
    assert checkpoints(folder) == ["step-00000002"]
    (folder / "pairs.jsonl").write_text("".join(good))
    # While somebody else has the right to write blocks, they are waited for; the run can be stopped all the same.
    (blocks,) = (folder / "out/data").glob("stream-*/blocks")
    with FileLock(blocks / ".lock"):
        finished = start(folder, "--stop_after", "1s")
    assert finished.codes[0] == 200
    assert "stopped by STOP_AFTER after step 2" in finished.outputs[0]
    assert "going on behind step 2 of 10" in start(folder).expect_success().outputs[0]


def test_preflight_reads_the_first_rows_and_leaves_the_rest_for_later(tiny_chat, tmp_path):
    folder = write_run(tmp_path / "run", tiny_chat, **STREAMED)
    inputs = look(folder)
    assert len(open_prepared(inputs.train)) == 5
    assert (inputs.stream.rows, [*inputs.stream.blocks.iterdir()]) == (13, [])
    assert "pairs  10 an epoch of 13 rows, 5 at a time, to train on, 5 held out" in inputs.plan
    assert "(of the first 5 pairs)" in inputs.plan
    assert inputs.origin["data.streaming"] == 5
    # A dry run leaves nothing.
    other = write_run(tmp_path / "other", tiny_chat, **STREAMED)
    preflight(parse_run(["--config", str(other / "run.yaml"), "--dry_run"]), ranks=2)
    assert not (other / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.streaming", "{rows_per_shard: 1, keep: 2}"], "rows_per_shard must give train.pairs_per_step"),
        (["--data.train", "pairs.csv"], "pairs.csv; convert it to Parquet or to JSON lines"),
        (["--reference.mode", "cache"], "reference.mode must be engine or none while data.streaming is set"),
        (["--train.tokens_per_micro_batch", "199"], "must be >= 200, twice data.max_length"),
    ],
)
def test_what_cannot_stream_is_refused_before_there_are_ranks(tiny_chat, tmp_path, arguments, message):
    folder = write_run(tmp_path / "run", tiny_chat, **STREAMED)
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    lines = [",".join(json.dumps(row[name]) for name in ("prompt", "chosen", "rejected")) for row in rows]
    (folder / "pairs.csv").write_text("\n".join(["prompt,chosen,rejected", *lines]))
    with pytest.raises(UserError, match=message):
        look(folder, *arguments)
    assert not (folder / "out").exists()
