"""What `data.streaming` holds on disk and in memory, and how fast blocks come, with a million rows.

python -m benchmarks.streaming; a block is asked for as soon as the one before was mapped, which no training does.
"""

import argparse
import json
import time
from contextlib import suppress
from pathlib import Path

from benchmarks.memory import anonymous_bytes, watched
from benchmarks.preparing import write_rows, write_tokenizer
from benchmarks.ranks import ROOT
from dpo_ds.data.blocks import BlockSchedule
from dpo_ds.data.preferences import Source
from dpo_ds.data.stream import Stream, open_stream
from dpo_ds.data.supply import StreamFeed, Supplier
from dpo_ds.data.tokenization import Tokenizer
from dpo_ds.models.tokenizer import load_tokenizer

_SAMPLE_S = 0.02


def main() -> None:
    """Measures and prints one JSON object, which goes to streaming.json, too."""
    args = _arguments()
    work: Path = args.cache / "streaming"
    work.mkdir(parents=True, exist_ok=True)
    texts, folder = work / f"texts-{args.rows}.jsonl", work / f"data-{time.time_ns()}"
    write_rows(texts, args.rows, words=(6, 5, 5))
    write_tokenizer(work / "tokenizer", texts)
    tokenizer = load_tokenizer(str(work / "tokenizer"))
    report = {
        "rows": args.rows,
        "bytes": texts.stat().st_size,
        "rows_per_shard": args.rows_per_shard,
        "keep": args.keep,
    }
    for name in ("seconds/first look", "seconds/second look"):
        began = time.monotonic()
        stream = _opened(texts, tokenizer, folder, args)
        report[name] = time.monotonic() - began
    schedule = BlockSchedule.of_run(
        rows=stream.rows,
        rows_per_block=stream.rows_per_block,
        max_dropped=stream.max_dropped,
        pairs_per_step=int(args.rows_per_shard * 0.9),
        epochs=1,
        max_steps=args.blocks,
        seed=0,
        shuffle=True,
    )
    report |= _measured(stream, schedule, tokenizer)
    args.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=2)
    (args.out / "streaming.json").write_text(text + "\n")
    print(text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.streaming", description=__doc__)
    add = parser.add_argument
    add("--rows", type=int, default=1_000_000, help="rows of about 16 words in one file of JSON lines")
    add("--rows_per_shard", type=int, default=20_000, help="rows of a block")
    add("--keep", type=int, default=3, help="blocks that may be on disk")
    add("--blocks", type=int, default=12, help="blocks that are asked for")
    add("--cache", type=Path, default=ROOT / ".cache" / "benchmarks", help="folder for the rows and the blocks")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for streaming.json")
    return parser.parse_args()


def _opened(texts: Path, tokenizer: Tokenizer, folder: Path, args: argparse.Namespace) -> Stream:
    return open_stream(
        [Source(str(texts))],
        tokenizer,
        max_length=1024,
        truncation=None,
        scored="last_turn",
        max_dropped=0.05,
        rows_per_block=args.rows_per_shard,
        keep=args.keep,
        processes=1,
        folder=folder,
    )


def _measured(stream: Stream, schedule: BlockSchedule, tokenizer: Tokenizer) -> dict[str, float]:
    supplier = Supplier(stream, schedule, tokenizer, turn=0)

    def measure() -> tuple[int, int, int]:
        return (
            sum(path.is_dir() for path in stream.blocks.glob("*")),
            _bytes_of(stream.blocks),
            anonymous_bytes(supplier.pid),
        )

    feed = StreamFeed(stream, schedule, supplier=supplier, patience_s=600)
    came, block_bytes = [], 0
    try:
        with watched(measure, every_s=_SAMPLE_S) as seen:
            for step in range(1, schedule.steps + 1):
                pairs, _ = feed.of_step(step)
                came.append(time.monotonic())
                block_bytes = _bytes_of(pairs.path)
    finally:
        supplier.stop()
    names = ("most/blocks", "most/bytes", "most/anonymous bytes")
    return dict(zip(names, map(max, zip(*seen, strict=True)), strict=True)) | {
        "bytes of one block": block_bytes,
        "bytes of all blocks": block_bytes * schedule.rows / schedule.rows_per_block,
        "rows a second": schedule.rows_per_block * (len(came) - 1) / (came[-1] - came[0]),
    }


def _bytes_of(folder: Path) -> int:
    total = 0
    with suppress(FileNotFoundError):  # a block may be taken away while it is looked at
        for path in folder.rglob("*.arrow"):
            total += path.stat().st_size
    return total


if __name__ == "__main__":
    main()
