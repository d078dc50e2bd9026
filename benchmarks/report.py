"""What a comparison measured: one table, one picture, one file."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dpo_ds.data.schedule import Lengths
from dpo_ds.throughput import StepCost


@dataclass(frozen=True)
class Program:
    """One of those that are compared.

    Attributes:
        name: its row in the table.
        kind: ``dpo_ds``, ``padded_loop`` or ``trl_trainer``.
        micro_batch: of a rank: dpo_ds's in tokens, the others' in pairs. The defaults, 4096 and TRL's 8, are slower on
            a CPU.
        layout: dpo_ds's.
        preloads: whether it gets the allocator that dpo_ds starts itself with.
    """

    name: str
    kind: str
    micro_batch: int
    layout: str = ""
    preloads: bool = False


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


def summary(
    measured: Mapping[Program, Measured],
    given: Mapping[str, Any],
    rates: Sequence[float],
    *,
    cost: StepCost,
    ranks: int,
    warm_up: int,
) -> dict[str, Any]:
    """Returns all that was measured, ready to be written as JSON.

    Args:
        measured: the programs' runs.
        given: what all of them read.
        rates: operations a second of all ranks' matrix products, one of each round.
        cost: operations that a pair needs.
        ranks: how many.
        warm_up: first steps of a run that do not count.
    """
    pairs = given["pairs_per_step"]
    timed = Lengths(*np.array(given["lengths"][warm_up * pairs :]).T)
    flops = cost.flops(tokens=timed.tokens, scored=timed.scored, attended=timed.attended).sum()
    flops /= given["steps"] - warm_up
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
        "pairs": f"{given['data']}, {pairs} a step",
        "mean_tokens": dict(
            zip(
                ("prompt", "chosen", "rejected"), map(statistics.mean, zip(*given["lengths"], strict=True)), strict=True
            )
        ),
        "ranks": ranks,
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
