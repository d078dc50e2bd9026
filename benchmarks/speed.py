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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.ranks import ENVIRONMENT, ROOT, run_ranks

RANKS = 2
PAIRS_PER_STEP = 16
LEARNING_RATE = 1e-5
BETA = 0.1
LN2 = math.log(2)
# Equal models score equally; a program whose two forwards differ in their last bfloat16 bits may be off by this.
FIRST_LOSS_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Program:
    """One of those that are compared.

    Attributes:
        name: its row in the table.
        kind: ``dpo_ds``, ``padded_loop`` or ``trl_trainer``.
        micro_batch: of a rank: dpo_ds's in tokens, the others' in pairs. The defaults, 4096 and TRL's 8, are slower on
            a CPU.
        layout: dpo_ds's.
    """

    name: str
    kind: str
    micro_batch: int
    layout: str = ""


PROGRAMS = (
    Program("dpo_ds, packed", "dpo_ds", 2048, "packed"),
    Program("dpo_ds, padded", "dpo_ds", 2048, "padded"),
    Program("padded loop, 1 pair at a time", "padded_loop", 1),
    Program("padded loop, 4 pairs at a time", "padded_loop", 4),
    Program("TRL DPOTrainer", "trl_trainer", 1),
)


@dataclass
class Measured:
    """All runs of one program.

    Attributes:
        step_seconds: for each run, each step's; the first steps are not yet dropped.
        losses: of the last run, one a step.
        peak_rss: the largest of any rank in any run, in bytes.
        skipped: why it was not run, None if it was.
    """

    step_seconds: list[list[float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak_rss: int = 0
    skipped: str | None = None


def main() -> None:
    """Measures, prints the table, and writes the results and their picture."""
    args = _arguments()
    os.environ.update(ENVIRONMENT)  # this process opens DeepSpeed's configs, too
    work: Path = args.cache / "speed"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    given, backbone, head = _prepare(args, work)
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
                    folder=work / f"{number}-{program.kind}-{program.layout}{program.micro_batch}",
                )
    report = _report(measured, given, rates, backbone=backbone, head=head, warm_up=args.warm_up)
    print(table(report))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "speed.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(report, args.out / "speed.png")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, help="real pairs, in any form that data.train takes; default: synthetic ones")
    add("--tokenizer", type=Path, help="their tokenizer; needed with --data")
    add("--rounds", type=int, default=2, help="how often each program runs")
    add("--steps", type=int, default=5, help="steps of a run")
    add("--warm_up", type=int, default=1, help="first steps of a run that do not count")
    add("--only", nargs="+", choices=sorted({program.kind for program in PROGRAMS}), help="compare these")
    add("--cache", type=Path, default=ROOT / ".cache" / "benchmarks", help="folder for the model and the runs")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for speed.json and speed.png")
    args = parser.parse_args()
    if (args.data is None) != (args.tokenizer is None):
        parser.error("--data and --tokenizer go together")
    if args.steps <= args.warm_up:
        parser.error("--steps must be more than --warm_up")
    return args


def _prepare(args: argparse.Namespace, work: Path) -> tuple[dict[str, Any], int, int]:
    """Writes what all programs read; returns it with the parameters of the backbone and of the head."""
    from benchmarks import workload

    width, model = 512, args.cache / "llama-53m"
    parameters = workload.write_model(model, layers=12, width=width, inner=1280, heads=8, kv_heads=8, tied=True)
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
            # With the EOS of each response.
            "lengths": [[len(prompt), len(chosen) + 1, len(rejected) + 1] for prompt, chosen, rejected in pairs],
        },
        parameters - workload.VOCABULARY * width,
        workload.VOCABULARY * width,
    )


def _run(program: Program, measured: Measured, given: dict[str, Any], *, folder: Path) -> None:
    print(f"{program.name} ...", flush=True)
    folder.mkdir()
    arguments = _dpo_ds(program, given, folder) if program.kind == "dpo_ds" else _other(program, given, folder)
    log = folder / "log.txt"
    ended = run_ranks(arguments, ranks=RANKS, log=log, environment=MALLOC)
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
    run = {
        "model": {"policy": given["model"]},
        "data": {"train": given["pairs"], "max_length": 512, "shuffle": False},
        "loss": {"beta": BETA},
        "train": {
            "pairs_per_step": PAIRS_PER_STEP,
            "tokens_per_micro_batch": program.micro_batch,
            "layout": program.layout,
            "max_steps": given["steps"],
            "learning_rate": LEARNING_RATE,
            "schedule": "constant",
            "warmup_ratio": 0.0,
        },
        "deepspeed": {"policy": "ds_configs/zero3_cpu.json", "reference": "ds_configs/zero3_reference_cpu.json"},
        "tracking": {"wandb": "disabled"},
        "output_dir": str(folder / "run"),
    }
    config = folder / "run.yaml"
    config.write_text(json.dumps(run))  # JSON is YAML
    return ["launch/train.py", "--config", str(config)]


def _dpo_ds_results(folder: Path) -> tuple[list[float], list[float], list[str]]:
    from dpo_ds.data.prepare import open_prepared

    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["split"] == "train"]
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


def _report(
    measured: dict[Program, Measured],
    given: dict[str, Any],
    rates: list[float],
    *,
    backbone: int,
    head: int,
    warm_up: int,
) -> dict[str, Any]:
    timed = given["lengths"][warm_up * PAIRS_PER_STEP :]
    steps = given["steps"] - warm_up
    scored = sum(chosen + rejected for _, chosen, rejected in timed)
    # 6 operations for the policy's forward and backward, 2 for the reference's forward.
    flops = 8 * (backbone * sum(sum(pair) for pair in timed) + head * scored) / steps
    rate = max(rates)  # a bound; whatever else ran can only have lowered the others
    rows = []
    for program, found in measured.items():
        row: dict[str, Any] = {"program": program.name, "micro_batch": program.micro_batch, "skipped": found.skipped}
        if found.skipped is None:
            counted = [seconds[warm_up:] for seconds in found.step_seconds]
            # A step's seconds depend on its pairs, so steps are averaged, and runs are what noise is taken out of.
            row["seconds_a_step"] = statistics.median(statistics.mean(run) for run in counted)
            row["seconds_of_runs"] = [statistics.mean(run) for run in counted]
            row["step_seconds"] = found.step_seconds
            row["share_of_bound"] = flops / rate / row["seconds_a_step"]
            row["peak_gib_a_rank"] = found.peak_rss / 2**30
            row["losses"] = found.losses
        rows.append(row)
    return {
        "model": f"Llama, {given['parameters'] / 1e6:.1f} M parameters, random, bfloat16",
        "pairs": f"{given['data']}, {PAIRS_PER_STEP} a step",
        "mean_tokens": dict(
            zip(
                ("prompt", "chosen", "rejected"), map(statistics.mean, zip(*given["lengths"], strict=True)), strict=True
            )
        ),
        "ranks": RANKS,
        "processor": _processor(),
        "versions": _versions(),
        "matmul_gflops": [rate_of_round / 1e9 for rate_of_round in rates],
        "step_gflop": flops / 1e9,
        "bound_seconds": flops / rate,
        "programs": rows,
    }


def table(report: dict[str, Any]) -> str:
    """Returns the report's table, in Markdown."""
    ran = [row for row in report["programs"] if row["skipped"] is None]
    best = min(row["seconds_a_step"] for row in ran)
    lines = [
        "| program | seconds a step | times the fastest | share of the bound | peak RSS a rank | loss of the steps |",
        "|---|---|---|---|---|---|",
    ]
    for row in ran:
        runs = ", ".join(f"{seconds:.2f}" for seconds in row["seconds_of_runs"])
        losses = " ".join(f"{loss:.4f}" for loss in row["losses"])
        lines.append(
            f"| {row['program']} | {row['seconds_a_step']:.2f} ({runs}) | {row['seconds_a_step'] / best:.2f} "
            f"| {row['share_of_bound']:.0%} | {row['peak_gib_a_rank']:.2f} GiB | {losses} |"
        )
    lines += [f"| {row['program']} | skipped: {row['skipped']} |||||" for row in report["programs"] if row["skipped"]]
    tokens = report["mean_tokens"]
    lines.append(
        f"\n{report['model']}; pairs: {report['pairs']}, on average {tokens['prompt']:.0f} + {tokens['chosen']:.0f} + "
        f"{tokens['rejected']:.0f} tokens; {report['ranks']} ranks of one thread, {report['processor']}.\n"
        f"Matrix-product bound: {report['step_gflop']:.0f} GFLOP a step at "
        f"{max(report['matmul_gflops']):.0f} GFLOP/s = {report['bound_seconds']:.2f} s."
    )
    return "\n".join(lines)


def draw(report: dict[str, Any], file: Path) -> None:
    """Draws seconds a step and memory of each program as bars."""
    rows = [row for row in report["programs"] if row["skipped"] is None][::-1]
    names = [row["program"] for row in rows]
    figure = Figure(figsize=(9, 1.1 + 0.45 * len(rows)), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, key, title, form in (
        (left, "seconds_a_step", "seconds a step", "{:.1f}"),
        (right, "peak_gib_a_rank", "peak memory of a rank, GiB", "{:.1f}"),
    ):
        values = [row[key] for row in rows]
        colors = ["tab:blue" if name.startswith("dpo_ds") else "tab:gray" for name in names]
        bars = axes.barh(names, values, color=colors)
        axes.bar_label(bars, [form.format(value) for value in values], padding=3)
        axes.set_title(title, fontsize=10)
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    bound = report["bound_seconds"]
    left.axvline(bound, color="black", linewidth=0.8, linestyle="--")
    left.set_xlabel(f"dashed: the matrix products that a step needs, alone, {bound:.1f}", fontsize=8)
    figure.savefig(file)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown processor")


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "deepspeed", "transformers", "trl"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


# glibc would map every large tensor anew and hand it back when it is freed, which costs a CPU rank a quarter of a step;
# dpo_ds's ranks ask for the same by mallopt.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}

if __name__ == "__main__":
    main()
