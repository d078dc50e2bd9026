"""Rows a second and memory of preparing pairs, beside `datasets.map` with the same tokenizer alone.

python -m benchmarks.preparing; each measurement is a process of its own, which this one starts with --way.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.memory import anonymous_bytes, watched
from benchmarks.ranks import ROOT

WAYS = {"prepare": "dpo_ds prepare", "map": "datasets.map"}
_PARTS = ("prompt", "chosen", "rejected")
_WORDS = 30_000
_TOKENS = 16_000
_SAMPLE_S = 0.02


def main() -> None:
    """Measures both ways in turns, then memory at two sizes, and prints tables; or is one measurement."""
    args = _arguments()
    if args.way:
        _measure(args)
        return
    work: Path = args.cache / "preparing"
    work.mkdir(parents=True, exist_ok=True)
    texts = work / f"texts-{args.rows}.jsonl"
    write_rows(texts, args.rows, words=(120, 70, 80))
    write_tokenizer(work / "tokenizer", texts)
    cores = len(os.sched_getaffinity(0))
    speed: dict[str, list[dict[str, Any]]] = {}
    for number in range(args.rounds):
        for processes in dict.fromkeys((1, cores)):
            for way in WAYS:
                print(f"round {number + 1}, {WAYS[way]}, {processes} processes ...", flush=True)
                speed.setdefault(f"{way} {processes}", []).append(_run(way, texts, processes, work))
    if len({run["tokens"] for runs in speed.values() for run in runs}) > 1:
        raise SystemExit("the two ways have found different numbers of tokens")
    memory = {}
    for rows in (args.few, args.many):
        print(f"memory, {rows} rows ...", flush=True)
        short = work / f"short-{rows}.jsonl"
        write_rows(short, rows, words=(6, 5, 5))
        memory[rows] = _run("prepare", short, cores, work)
    report = {"rows": args.rows, "bytes": texts.stat().st_size, "cores": cores, "speed": speed, "memory": memory}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "preparing.json").write_text(json.dumps(report, indent=2) + "\n")
    print(_tables(report))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preparing", description=__doc__)
    add = parser.add_argument
    add("--rows", type=int, default=30_000, help="rows of about 270 words whose tokenization is timed")
    add("--rounds", type=int, default=3, help="how often each way is taken")
    add("--few", type=int, default=10_000, help="rows of the first measurement of memory")
    add("--many", type=int, default=1_000_000, help="rows of the second")
    add("--cache", type=Path, default=ROOT / ".cache" / "benchmarks", help="folder for the rows and what is prepared")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for preparing.json")
    for name in ("--way", "--processes", "--data", "--tokenizer"):
        add(name, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_rows(file: Path, rows: int, *, words: tuple[int, int, int]) -> None:
    """Writes rows whose words are as frequent as a language's; lengths spread around ``words`` of each part."""
    random = np.random.RandomState(0)
    letters = np.array(list("etaoinshrdlcumwfgypbvk"))
    vocabulary = np.array(["".join(random.choice(letters, random.randint(2, 10))) for _ in range(_WORDS)])
    frequencies = 1 / np.arange(1, _WORDS + 1)
    with file.open("w") as out:
        for first in range(0, rows, 1000):
            count = min(1000, rows - first)
            lengths = 1 + random.poisson(np.array(words) - 1, (count, 3))
            drawn = random.choice(vocabulary, lengths.sum(), p=frequencies / frequencies.sum())
            ends = lengths.ravel().cumsum().reshape(count, 3)
            for row, stops in enumerate(ends):
                parts = (" ".join(drawn[stop - n : stop]) for stop, n in zip(stops, lengths[row], strict=True))
                number = first + row
                # No two responses are alike, or the pair would be dropped.
                print(
                    json.dumps(
                        {
                            name: f"{number} {place} {text}"
                            for place, (name, text) in enumerate(zip(_PARTS, parts, strict=True))
                        }
                    ),
                    file=out,
                )


def write_tokenizer(folder: Path, texts: Path) -> None:
    """Trains a byte-level BPE on the first rows and saves it as Hugging Face tokenizers are."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=_TOKENS, special_tokens=["</s>"], show_progress=False)
    with texts.open() as lines:
        rows = (json.loads(line) for _, line in zip(range(5000), lines, strict=False))
        backend.train_from_iterator((row[part] for row in rows for part in _PARTS), trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(folder)


def _run(way: str, data: Path, processes: int, work: Path) -> dict[str, Any]:
    results = work / "measured.json"
    results.unlink(missing_ok=True)
    options = {"--way": way, "--processes": processes, "--data": data, "--tokenizer": work / "tokenizer"}
    options |= {"--cache": work, "--out": results}
    arguments = [str(part) for option in options.items() for part in option]
    quiet = {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HOME": str(work / "hf"), "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run(
        [sys.executable, "-m", "benchmarks.preparing", *arguments], env={**os.environ, **quiet}, cwd=ROOT, check=True
    )
    found: dict[str, Any] = json.loads(results.read_text())
    return found


def _tables(report: dict[str, Any]) -> str:
    mib, speed = 2**20, report["speed"]
    lines = [
        "| way | processes | rows/s | MiB/s | times datasets.map | by CPU seconds | seconds | CPU seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in speed.items():
        way, processes = name.split()
        seconds = [run["seconds"] for run in runs]
        median = statistics.median(seconds)
        pairs = list(zip(speed[f"map {processes}"], runs, strict=True))
        ratios = [
            f"{statistics.median(other[key] / own[key] for other, own in pairs):.2f}" for key in ("seconds", "cpu")
        ]
        rate = f"{report['rows'] / median:,.0f} | {report['bytes'] / mib / median:.2f}"
        listed = (", ".join(f"{run[key]:.1f}" for run in runs) for key in ("seconds", "cpu"))
        lines.append(f"| {' | '.join([WAYS[way], processes, rate, *ratios, *listed])} |")
    lines += ["", "| short rows | rows/s | peak anonymous memory, all processes |", "|---|---|---|"]
    for rows, run in report["memory"].items():
        lines.append(f"| {int(rows):,} | {int(rows) / run['seconds']:,.0f} | {run['peak'] / mib:.0f} MiB |")
    return "\n".join(lines)


def _measure(args: argparse.Namespace) -> None:
    prepared = args.cache / "prepared"
    shutil.rmtree(prepared, ignore_errors=True)
    prepare_or_map = _prepare if args.way == "prepare" else _map
    with watched(partial(anonymous_bytes, os.getpid()), every_s=_SAMPLE_S) as seen:
        seconds, cpu, tokens = prepare_or_map(args.data, args.tokenizer, int(args.processes), prepared)
    args.out.write_text(json.dumps({"seconds": seconds, "cpu": cpu, "tokens": tokens, "peak": max(seen)}))
    shutil.rmtree(prepared, ignore_errors=True)


def _prepare(data: str, tokenizer: str, processes: int, folder: Path) -> tuple[float, float, int]:
    """All that the command does: counts the rows, hashes them, tokenizes, checks, writes."""
    from dpo_ds.data.preferences import Source
    from dpo_ds.data.prepare import prepare
    from dpo_ds.models.tokenizer import load_tokenizer

    opened = load_tokenizer(tokenizer)
    start, worked = time.perf_counter(), _cpu_seconds()
    pairs = prepare(
        [Source(data)],
        opened,
        max_length=4096,
        truncation=None,
        max_dropped=0.0,
        folder=folder,
        processes=processes,
    )
    seconds, cpu = time.perf_counter() - start, _cpu_seconds() - worked
    # Less the EOS that each response gets.
    return seconds, cpu, int(pairs.lengths.tokens.sum()) - 2 * len(pairs)


def _map(data: str, tokenizer: str, processes: int, folder: Path) -> tuple[float, float, int]:
    """The map alone: the rows were converted to Arrow before, and nothing is checked, shortened or ended."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    opened = AutoTokenizer.from_pretrained(tokenizer)
    rows = load_dataset("json", data_files=data, split="train", cache_dir=str(folder))
    columns = rows.column_names

    def tokenized(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {
            f"{part}_ids": opened(batch[part], add_special_tokens=False, return_attention_mask=False)["input_ids"]
            for part in _PARTS
        }

    start, worked = time.perf_counter(), _cpu_seconds()
    mapped = rows.map(
        tokenized,
        batched=True,
        num_proc=processes if processes > 1 else None,
        remove_columns=columns,
        load_from_cache_file=False,
    )
    seconds, cpu = time.perf_counter() - start, _cpu_seconds() - worked
    lengths = (len(ids) for batch in mapped.iter(1000) for part in _PARTS for ids in batch[f"{part}_ids"])
    return seconds, cpu, sum(lengths)


def _cpu_seconds() -> float:
    """Returns what this process and those that it started and that have ended have worked, others' work left out."""
    return sum(os.times()[:4])


if __name__ == "__main__":
    main()
