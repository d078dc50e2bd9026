"""Seconds a step and memory of DPO programs, one beside the other: python -m benchmarks.speed

Same model, same pairs in the same order, same ZeRO-3 config, two CPU ranks of one thread; the programs take turns.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.ranks import ENVIRONMENT, ROOT, run_ranks
from benchmarks.report import Measured, Program, draw, summary, table
from benchmarks.training import TrainingRun, steps_of
from dpo_ds.launcher.allocator import preloaded
from dpo_ds.throughput import StepCost

RANKS = 2
PAIRS_PER_STEP = 16
LEARNING_RATE = 1e-5
BETA = 0.1
LN2 = math.log(2)
# Equal models score equally; a program whose two forwards differ in their last bfloat16 bits may be off by this.
FIRST_LOSS_TOLERANCE = 1e-3


PROGRAMS = (
    Program("dpo_ds, packed", "dpo_ds", 2048, "packed"),
    Program("dpo_ds, padded", "dpo_ds", 2048, "padded"),
    Program("padded loop, 1 pair at a time", "padded_loop", 1),
    Program("padded loop, with jemalloc", "padded_loop", 1, preloads=True),
    Program("TRL DPOTrainer, 1 pair at a time", "trl_trainer", 1),
    Program("TRL DPOTrainer, with jemalloc", "trl_trainer", 1, preloads=True),
    Program("TRL DPOTrainer, 4 pairs at a time", "trl_trainer", 4),
)


def main() -> None:
    """Measures, prints the table, and writes the results and their picture."""
    args = _arguments()
    os.environ.update(ENVIRONMENT)  # this process opens DeepSpeed's configs, too
    work: Path = args.cache / "speed"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    given, cost = _prepare(args, work)
    programs = [program for program in PROGRAMS if args.only is None or program.kind in args.only]
    measured = {program: Measured() for program in programs}
    rates: list[float] = []
    for number in range(args.rounds):
        rates.append(_matmul_flops())
        for program in programs:
            if measured[program].skipped is None:
                _run(
                    program,
                    measured[program],
                    given,
                    folder=work / f"{number}-{program.name.replace(', ', '-').replace(' ', '_')}",
                )
    report = summary(measured, given, rates, cost=cost, ranks=RANKS, warm_up=args.warm_up)
    print(table(report))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "speed.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(report, args.out / "speed.png")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, help="real pairs, in any form that data.train takes; default: synthetic ones")
    add("--tokenizer", type=Path, help="their tokenizer; needed with --data")
    add("--rounds", type=int, default=1, help="how often each program runs")
    add("--steps", type=int, default=6, help="steps of a run")
    add("--warm_up", type=int, default=2, help="first steps of a run that do not count")
    add("--only", nargs="+", choices=sorted({program.kind for program in PROGRAMS}), help="compare these")
    add("--cache", type=Path, default=ROOT / ".cache" / "benchmarks", help="folder for the model and the runs")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for speed.json and speed.png")
    args = parser.parse_args()
    if (args.data is None) != (args.tokenizer is None):
        parser.error("--data and --tokenizer go together")
    if args.steps <= args.warm_up:
        parser.error("--steps must be more than --warm_up")
    return args


def _prepare(args: argparse.Namespace, work: Path) -> tuple[dict[str, Any], StepCost]:
    """Writes what all programs read; returns it with the operations that a pair needs."""
    from benchmarks import workload

    layers, width, model = 12, 512, args.cache / "llama-53m"
    parameters = workload.write_model(model, layers=layers, width=width, inner=1280, heads=8, kv_heads=8, tied=True)
    head = workload.VOCABULARY * width
    count = args.steps * PAIRS_PER_STEP
    if args.data is None:
        pairs = workload.synthetic_pairs(count)
    else:
        pairs = workload.real_pairs(args.data, args.tokenizer, count, work=work / "data")
    workload.write_pairs(pairs, work / "pairs.jsonl")
    policy, reference = workload.write_ds_configs(
        work,
        policy=ROOT / "ds_configs" / "zero3_cpu.json",
        reference=ROOT / "ds_configs" / "zero3_reference_cpu.json",
    )
    return (
        {
            "model": str(model),
            "parameters": parameters,
            "pairs": str(work / "pairs.jsonl"),
            "data": "synthetic" if args.data is None else args.data.name,
            "policy_config": str(policy),
            "reference_config": str(reference),
            "steps": args.steps,
            "pairs_per_step": PAIRS_PER_STEP,
            # With the EOS of each response.
            "lengths": [[len(prompt), len(chosen) + 1, len(rejected) + 1] for prompt, chosen, rejected in pairs],
        },
        # 6 operations for the policy's forward and backward, 2 for the reference's forward.
        StepCost(parameters - head, head, attention=2 * layers * width, passes=8),
    )


def _run(program: Program, measured: Measured, given: dict[str, Any], *, folder: Path) -> None:
    print(f"{program.name} ...", flush=True)
    allocator = preloaded({}) if program.preloads else {}
    if program.preloads and not allocator:
        measured.skipped = "the machine has no jemalloc"
        return
    folder.mkdir()
    arguments = _dpo_ds(program, given, folder) if program.kind == "dpo_ds" else _other(program, given, folder)
    log = folder / "log.txt"
    ended = run_ranks(arguments, ranks=RANKS, log=log, environment=allocator)
    if ended.status:
        lines = log.read_text().splitlines()
        refusals = [line for line in lines if line.startswith("error: ") or line.startswith("ModuleNotFoundError: ")]
        if not refusals:
            raise SystemExit(f"{program.name} ended with {ended.status}; see {log}")
        measured.skipped = refusals[0]
        print(f"  skipped: {refusals[0]}", flush=True)
        return
    seconds, losses, pairs = _dpo_ds_results(folder) if program.kind == "dpo_ds" else _other_results(folder)
    _check(program, given, losses, pairs)
    measured.step_seconds.append(seconds)
    measured.losses = losses
    measured.peak_rss = max(measured.peak_rss, *ended.memory.peak_rss.values())
    print(f"  {statistics.median(seconds):.2f} s a step, {ended.seconds:.0f} s in all", flush=True)


def _dpo_ds(program: Program, given: dict[str, Any], folder: Path) -> list[str]:
    run = TrainingRun(
        model=given["model"],
        pairs=given["pairs"],
        max_length=512,
        pairs_per_step=PAIRS_PER_STEP,
        tokens_per_micro_batch=program.micro_batch,
        steps=given["steps"],
        learning_rate=LEARNING_RATE,
        beta=BETA,
        layout=program.layout,
    )
    return ["launch/train.py", "--config", str(run.write(folder))]


def _dpo_ds_results(folder: Path) -> tuple[list[float], list[float], list[str]]:
    from dpo_ds.data.prepared import open_prepared

    steps = steps_of(folder)
    pairs = open_prepared(next(path.parent for path in (folder / "run" / "data").rglob("manifest.json")))
    ids = [pairs.pair(index).id for index in range(len(pairs))]
    return [line["step_seconds"] for line in steps], [line["loss"] for line in steps], ids


def _other(program: Program, given: dict[str, Any], folder: Path) -> list[str]:
    options = {
        "model": given["model"],
        "pairs": given["pairs"],
        "policy_config": given["policy_config"],
        "steps": given["steps"],
        "pairs_per_step": PAIRS_PER_STEP,
        "pairs_per_micro_batch": program.micro_batch,
        "learning_rate": LEARNING_RATE,
        "beta": BETA,
        "out": folder / "results.json",
    }
    if program.kind == "padded_loop":
        options["reference_config"] = given["reference_config"]
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return ["--module", f"benchmarks.{program.kind}", *arguments]


def _other_results(folder: Path) -> tuple[list[float], list[float], list[str]]:
    results = json.loads((folder / "results.json").read_text())
    return results["step_seconds"], results["losses"], results["pairs"]


def _check(program: Program, given: dict[str, Any], losses: list[float], pairs: list[str]) -> None:
    """Holds a program to equal work: the same tokens, as many steps, and the loss that equal models start with."""
    expected = given.setdefault("pair_ids", pairs)
    if pairs != expected:
        raise SystemExit(f"{program.name} trained on other tokens than the first program")
    if len(losses) != given["steps"]:
        raise SystemExit(f"{program.name} took {len(losses)} steps of {given['steps']}")
    if abs(losses[0] - LN2) > FIRST_LOSS_TOLERANCE:
        raise SystemExit(f"{program.name} starts at a loss of {losses[0]}, not at ln 2: its two models differ")


def _matmul_flops() -> float:
    """Returns the bfloat16 operations a second of all ranks' matrix products, measured on all at once."""
    command = [sys.executable, "-m", "benchmarks.matmul"]
    environment = {**os.environ, **ENVIRONMENT}
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(RANKS)
    ]
    return sum(float(process.communicate()[0]) for process in processes)


if __name__ == "__main__":
    main()
