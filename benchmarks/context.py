"""Long pairs: what two ranks take for sequences of 8,192 tokens, each alone or together; what would fit on GPUs.

python -m benchmarks.context runs dpo_ds through launch/train.py on a tiny model; the GPUs' part is arithmetic.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig

from benchmarks.ranks import ENVIRONMENT, ROOT, run_ranks
from benchmarks.training import TrainingRun, steps_of
from dpo_ds.data.tokenization import TokenizedPair
from dpo_ds.memory import Peaks, peak, shares_of_policy, shares_of_reference
from dpo_ds.models.causal_lm import Checkpointing
from dpo_ds.models.shapes import parameters_of, peaks_of_micro_batch, without_weights

LENGTH = 8192
"""Tokens of a prompt, which is half of it, and a response."""

STEPS, WARM_UP = 4, 2
LAYERS, WIDTH, INNER, HEADS, KV_HEADS = 4, 256, 640, 4, 2
Way = tuple[Checkpointing, int | None]
MEASURED: tuple[Way, ...] = (("none", None), ("full", None), ("full", 512))
"""What layers keep, and tokens that an MLP takes at a time."""
AGREE_TO = 0.01

GPU_GIB = 80
PROGRAM_GIB = 2  # CUDA's context and NCCL's buffers; a guess
LENGTHS = (8192, 32_768, 65_536, 131_072)
FOUND_AT = (8192, 16_384)
SIZES = (1, 2, 4, 8)
COMPUTED: tuple[Way, ...] = (("full", None), ("offload", 1024))
# The shapes of Llama 3.1, as published.
MODELS = {
    "8B on 8 GPUs": (8, {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "heads": 32}),
    "70B on 64 GPUs": (64, {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "heads": 64}),
}


class Held(NamedTuple):
    """GiB of a GPU and, for it, of its host."""

    device: float
    host: float


def main() -> None:
    """Runs, computes, prints both tables and writes the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.context", description=__doc__)
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "benchmarks", help="folder for model and runs")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for context.json")
    args = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    work: Path = args.cache / "context"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    measured = [
        _measured(work, args.cache / "llama-context", size=size, way=way) for way in MEASURED for size in (1, 2)
    ]
    first = [run["losses"][0] for run in measured]
    if max(first) - min(first) > AGREE_TO:
        raise SystemExit(f"the first losses differ: {first}")
    print(_measured_table(measured), flush=True)
    fitting = [_fitting(name, *MODELS[name]) for name in MODELS]
    print(_fitting_table(fitting))
    args.out.mkdir(parents=True, exist_ok=True)
    report = {"measured": measured, "arithmetic": fitting}
    (args.out / "context.json").write_text(json.dumps(report, indent=2) + "\n")


def _measured(work: Path, model: Path, *, size: int, way: Way) -> dict[str, Any]:
    from benchmarks import workload

    workload.write_model(
        model,
        layers=LAYERS,
        width=WIDTH,
        inner=INNER,
        heads=HEADS,
        kv_heads=KV_HEADS,
        tied=False,
        positions=LENGTH,
    )
    checkpointing, tile = way
    folder = work / f"{checkpointing}-{tile}-{size}"
    folder.mkdir()
    tokens = LENGTH // 2 * 3
    prompt, response = LENGTH // 2, LENGTH // 2 - 1
    pairs = [
        (ids[:prompt], ids[prompt : prompt + response], ids[prompt + response : prompt + 2 * response])
        for drawn in workload.equal_pairs(2 * STEPS, tokens=2 * tokens)
        for ids in ([token for part in drawn for token in part],)
    ]
    workload.write_pairs(pairs, folder / "pairs.jsonl")
    run = TrainingRun(
        model=str(model),
        pairs=str(folder / "pairs.jsonl"),
        max_length=LENGTH,
        pairs_per_step=2,
        tokens_per_micro_batch=tokens,
        steps=STEPS,
        layout="packed",
        sequence_parallel_size=size,
        activation_checkpointing=checkpointing,
        tokens_per_mlp_tile=tile,
    )
    arguments = ["launch/train.py", "--config", str(run.write(folder))]
    ended = run_ranks(arguments, ranks=2, log=folder / "log.txt")
    if ended.status:
        raise SystemExit(f"a run ended with {ended.status}; see {folder / 'log.txt'}")
    steps = steps_of(folder)
    return {
        "sequence_parallel_size": size,
        "activation_checkpointing": checkpointing,
        "tokens_per_mlp_tile": tile,
        "seconds": statistics.mean(step["step_seconds"] for step in steps[WARM_UP:]),
        "peak_gib_a_rank": max(ended.memory.peak_rss.values()) / 2**30,
        "losses": [step["loss"] for step in steps],
    }


def _measured_table(measured: list[dict[str, Any]]) -> str:
    lines = [
        f"\nTwo ranks without a GPU, two pairs a step, prompts and responses of {LENGTH // 2} tokens each",
        "| ranks that share a row | activation checkpointing | tokens of an MLP's tile | seconds a step "
        "| peak memory a rank, GiB |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {run['sequence_parallel_size']} | {run['activation_checkpointing']} "
        f"| {run['tokens_per_mlp_tile'] or 'all'} | {run['seconds']:.1f} | {run['peak_gib_a_rank']:.2f} |"
        for run in measured
    ]
    return "\n".join(lines)


def _fitting(name: str, gpus: int, shape: dict[str, int]) -> dict[str, Any]:
    """Returns what a GPU and its host would hold, in GiB, by way, sequence parallel size and length."""
    sizes = {key: value for key, value in shape.items() if key != "heads"}
    config = LlamaConfig(
        vocab_size=128_256,
        num_attention_heads=shape["heads"],
        num_key_value_heads=8,
        max_position_embeddings=max(LENGTHS),
        **sizes,
    )
    policy, reference = (
        json.loads((ROOT / "ds_configs" / f"{file}.json").read_text()) for file in ("zero3", "zero3_reference")
    )
    parameters = parameters_of(without_weights(config), threshold=100_000)
    rows = []
    for way, size in itertools.product(COMPUTED, SIZES):
        shorter, longer = (_peaks(config, length, way=way, parts=size) for length in FOUND_AT)
        held = []
        for length in LENGTHS:
            # What grows, grows with the tokens.
            further = (length - FOUND_AT[1]) / (FOUND_AT[1] - FOUND_AT[0])
            peaks = Peaks(*(round(b + further * (b - a)) for a, b in zip(shorter, longer, strict=True)))
            shares = [
                *shares_of_policy(parameters, policy, itemsize=2, ranks=gpus, activations=peaks),
                *shares_of_reference(parameters, reference, itemsize=2, ranks=gpus, activations=peaks),
            ]
            held.append(Held(PROGRAM_GIB + peak(shares).device / 2**30, peak(shares).host / 2**30))
        rows.append({"way": way, "sequence_parallel_size": size, "held": held})
    return {"model": name, "parameters": parameters.total, "lengths": LENGTHS, "rows": rows}


def _peaks(config: LlamaConfig, length: int, *, way: Way, parts: int) -> Peaks:
    ids = (5,) * (length // 2)
    pair = TokenizedPair("0", ids, ids, ids)
    checkpointing, tile = way
    sizes: dict[str, Any] = {"tile": tile, "parts": parts, "on_gpu": True}
    return peaks_of_micro_batch(config, [pair], dtype=torch.bfloat16, packed=True, checkpointing=checkpointing, **sizes)


def _fitting_table(fitting: list[dict[str, Any]]) -> str:
    lines = [
        f"\nBy arithmetic, GiB on a GPU of {GPU_GIB} (bold: fits), one pair a micro-batch, half of a sequence prompt,\n"
        "both models in bfloat16 under ds_configs/zero3*.json; behind +: in host memory, for this GPU",
        "| Llama 3.1 | activation checkpointing | tokens of an MLP's tile | ranks that share a row | "
        + " | ".join(f"{length:,} tokens" for length in LENGTHS)
        + " |",
        "|---" * (4 + len(LENGTHS)) + "|",
    ]
    for model in fitting:
        for row in model["rows"]:
            checkpointing, tile = row["way"]
            cells = [model["model"], checkpointing, tile or "all", row["sequence_parallel_size"]]
            lines.append("| " + " | ".join(map(str, [*cells, *map(_cell, row["held"])])) + " |")
    return "\n".join(lines)


def _cell(held: Held) -> str:
    device = f"**{held.device:.0f}**" if held.device <= GPU_GIB else f"{held.device:.0f}"
    return device + (f" + {held.host:.0f}" if held.host else "")


if __name__ == "__main__":
    main()
