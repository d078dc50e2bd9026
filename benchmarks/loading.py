"""Seconds and memory of loading a model into the shards of two CPU ranks, beside transformers' own way.

python -m benchmarks.loading; the deepspeed launcher starts it once more as each rank, with --way.
"""

import argparse
import json
import os
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.memory import anonymous_bytes, watched
from benchmarks.ranks import ROOT, run_ranks

RANKS = 2
WAYS = {"parts": "dpo_ds: each rank reads its parts", "whole": "from_pretrained under HfDeepSpeedConfig"}
_CONFIG = ROOT / "ds_configs" / "zero3_reference_cpu.json"
_SAMPLE_S = 0.005


def main() -> None:
    """Loads the model in each way, in turns, and prints a table; or is a rank that loads it."""
    args = _arguments()
    if args.way:
        _load(args)
        return
    from benchmarks import workload

    args.model = args.cache / f"llama-large-{args.layers}"
    parameters = workload.write_model(
        args.model, layers=args.layers, width=2048, inner=5632, heads=32, kv_heads=4, tied=False
    )
    work: Path = args.cache / "loading"
    work.mkdir(parents=True, exist_ok=True)
    for file in args.model.glob("*.safetensors"):
        _read_once(file)
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for number in range(args.rounds):
        for way in WAYS:
            print(f"round {number + 1}, {WAYS[way]} ...", flush=True)
            runs[way].append(_run(way, args.model, work))
    fingerprints = {run["fingerprint"] for found in runs.values() for run in found}
    if len(fingerprints) > 1:
        raise SystemExit("the two ways have loaded different weights")
    report = {"parameters": parameters, "bytes": 2 * parameters, "ranks": RANKS, "runs": runs}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "loading.json").write_text(json.dumps(report, indent=2) + "\n")
    print(_table(report))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loading", description=__doc__)
    add = parser.add_argument
    add("--layers", type=int, default=22, help="22 make 1.1 billion parameters, 4 make 0.3")
    add("--rounds", type=int, default=3, help="how often each way is taken")
    add("--cache", type=Path, default=ROOT / ".cache" / "benchmarks", help="folder for the model and the runs")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for loading.json")
    add("--way", choices=WAYS, help=argparse.SUPPRESS)
    add("--model", type=Path, help=argparse.SUPPRESS)
    add("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def _read_once(file: Path) -> None:
    # From memory both ways read alike; what a disk gives is no matter of either.
    with file.open("rb") as opened:
        while opened.read(2**24):
            pass


def _run(way: str, model: Path, work: Path) -> dict[str, Any]:
    results, log = work / f"{way}.json", work / f"{way}.txt"
    results.unlink(missing_ok=True)
    arguments = ["--module", "benchmarks.loading", "--way", way, "--model", str(model), "--out", str(results)]
    ended = run_ranks(arguments, ranks=RANKS, log=log, environment={})
    if ended.status:
        raise SystemExit(f"loading ended with {ended.status}; see {log}")
    found: dict[str, Any] = json.loads(results.read_text())
    return found


def _table(report: dict[str, Any]) -> str:
    gib = 2**30
    lines = ["| way | seconds | peak anonymous memory of a rank above its start | of it left |", "|---|---|---|---|"]
    for way, runs in report["runs"].items():
        seconds = [run["seconds"] for run in runs]
        peak, left = (statistics.median(max(run[key]) for run in runs) / gib for key in ("peak", "left"))
        listed = ", ".join(f"{s:.1f}" for s in seconds)
        lines.append(f"| {WAYS[way]} | {statistics.median(seconds):.1f} ({listed}) | {peak:.2f} GiB | {left:.2f} GiB |")
    lines.append(
        f"\n{report['parameters'] / 1e9:.2f} billion parameters, {report['bytes'] / gib:.2f} GiB; a share of "
        f"{report['ranks']} ranks is {report['bytes'] / gib / report['ranks']:.2f} GiB."
    )
    return "\n".join(lines)


def _load(args: argparse.Namespace) -> None:
    import torch
    from transformers.integrations import HfDeepSpeedConfig

    from dpo_ds.engine import World
    from dpo_ds.engine.ds_config import reference_ds_config
    from dpo_ds.engine.loading import load_sharded
    from dpo_ds.engine.meeting import Meeting
    from dpo_ds.engine.shards import fingerprint
    from dpo_ds.engine.weight_files import difference_from_files
    from dpo_ds.launcher.identity import Identity
    from dpo_ds.models.causal_lm import load_causal_lm

    identity = Identity.from_environment()
    world = World.join(identity, Meeting(identity))
    config = reference_ds_config(_CONFIG, dtype="bfloat16")
    path, dtype = str(args.model), torch.bfloat16
    world.barrier()
    before, start = anonymous_bytes(os.getpid()), time.perf_counter()
    with watched(partial(anonymous_bytes, os.getpid()), every_s=_SAMPLE_S) as seen:
        if args.way == "parts":
            model = load_sharded(
                path, ds_config=config, dtype=dtype, attention="auto", trust_remote_code=False, world=world
            )
        else:
            living = HfDeepSpeedConfig(config)
            model = load_causal_lm(path, dtype=dtype)
            del living
            world.agree(difference_from_files(model, path))
    seconds = time.perf_counter() - start
    world.trim_memory()
    mine = (seconds, max(seen) - before, anonymous_bytes(os.getpid()) - before)
    times, peaks, lefts = zip(*world.gather(mine), strict=True)
    found = {"seconds": max(times), "peak": peaks, "left": lefts, "fingerprint": fingerprint(model, world)}
    if world.rank == 0:
        args.out.write_text(json.dumps(found))
    world.leave()


if __name__ == "__main__":
    main()
