"""How a step's cost grows: with tokens a pair, pairs a step and ranks; what it moves; how long ranks wait.

python -m benchmarks.scaling runs dpo_ds through launch/train.py, a small model, every collective counted.
"""

import argparse
import json
import os
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.observed import plan_in_order
from benchmarks.ranks import ENVIRONMENT, ROOT, run_ranks
from benchmarks.traffic import counted
from benchmarks.training import TrainingRun, steps_of
from dpo_ds.data.schedule import Lengths, PackedRows, plan_training
from dpo_ds.launcher.allocator import preloaded
from dpo_ds.traffic import Sizes, Traffic, predicted

LAYERS, WIDTH, INNER, HEADS, KV_HEADS = 8, 256, 640, 4, 2
POSITIONS = 8192
PERSISTENT = 10_000  # so that matrices of a small model are sharded, and norms are not, as in a large one
TOKENS_OF_A_STEP = 16_384
CHAT_BUDGET = 2048
PREDICTED_WITHIN = 0.05
GIGA = 1e9


@dataclass(frozen=True)
class Point:
    """One run.

    Attributes:
        series: what it belongs to.
        ranks: how many.
        pairs_per_step: over all ranks.
        tokens_per_micro_batch: of a rank.
        tokens_per_pair: all pairs' alike; None for pairs as long as those of chats.
        planner: ``balanced`` or ``in_order``.
        cached: whether the reference's log-probs come from its cache.
    """

    series: str
    ranks: int = 2
    pairs_per_step: int = 16
    tokens_per_micro_batch: int = CHAT_BUDGET
    tokens_per_pair: int | None = None
    planner: str = "balanced"
    cached: bool = False


def main() -> None:
    """Runs every point, prints the tables, and writes the results and their picture."""
    args = _arguments()
    os.environ.update(ENVIRONMENT)
    from benchmarks import workload

    model = args.cache / "llama-scaling"
    parameters = workload.write_model(
        model,
        layers=LAYERS,
        width=WIDTH,
        inner=INNER,
        heads=HEADS,
        kv_heads=KV_HEADS,
        tied=False,
        positions=POSITIONS,
    )
    whole = (2 * LAYERS + 1) * WIDTH  # the norms
    sizes = Sizes(sharded=parameters - whole, whole=whole)
    work: Path = args.cache / "scaling"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    found = []
    for number, point in enumerate(_points(args)):
        found.append(_measured(point, model, sizes, folder=work / str(number), args=args))
        print(_line(found[-1]), flush=True)
    report = {
        "parameters": parameters,
        "points": found,
        "waiting_by_cost": [_waiting_by_cost(ranks) for ranks in (2, 8, 64)],
        "seventy_billion": [_seventy_billion(count, cached=cached) for count in (1, 2, 4) for cached in (False, True)],
    }
    print(tables(report))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "scaling.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(report, args.out / "scaling.png")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    add = parser.add_argument
    add("--steps", type=int, default=4, help="steps of a run")
    add("--warm_up", type=int, default=2, help="first steps of a run that do not count")
    add("--only", nargs="+", choices=("tokens", "pairs", "ranks", "traffic", "planner"), help="measure these")
    add("--longest", type=int, default=8192, help="longest pair")
    add("--cache", type=Path, default=ROOT / ".cache" / "benchmarks", help="folder for the model and the runs")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for scaling.json and scaling.png")
    args = parser.parse_args()
    if args.steps <= args.warm_up:
        parser.error("--steps must be more than --warm_up")
    return args


def _points(args: argparse.Namespace) -> list[Point]:
    points = [
        Point("tokens", pairs_per_step=TOKENS_OF_A_STEP // n, tokens_per_micro_batch=8192, tokens_per_pair=n)
        for n in (256, 512, 1024, 2048, 4096, 8192)
        if n <= args.longest
    ]
    points += [Point("pairs", pairs_per_step=pairs) for pairs in (4, 16, 64)]
    points += [Point("ranks", ranks=ranks) for ranks in (1, 2, 3, 4)]
    points += [Point("traffic", cached=True)]
    points += [Point("planner", pairs_per_step=32, planner=planner) for planner in 2 * ("balanced", "in_order")]
    return [point for point in points if args.only is None or point.series in args.only]


def _measured(point: Point, model: Path, sizes: Sizes, *, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Runs a point; returns what it took, a step, without its first steps."""
    from benchmarks import workload

    folder.mkdir()
    count = args.steps * point.pairs_per_step
    tokens = point.tokens_per_pair
    pairs = workload.synthetic_pairs(count) if tokens is None else workload.equal_pairs(count, tokens=tokens)
    workload.write_pairs(pairs, folder / "pairs.jsonl")
    run = TrainingRun(
        model=str(model),
        pairs=str(folder / "pairs.jsonl"),
        max_length=POSITIONS,
        pairs_per_step=point.pairs_per_step,
        tokens_per_micro_batch=point.tokens_per_micro_batch,
        steps=args.steps,
        layout="packed",
        reference_mode="cache" if point.cached else "engine",
        policy_config=_ds_config("zero3_cpu", folder),
        reference_config=_ds_config("zero3_reference_cpu", folder),
    )
    options = ["--observed", str(folder), "--planner", point.planner, "--config", str(run.write(folder))]
    ended = run_ranks(
        ["--module", "benchmarks.observed", *options],
        ranks=point.ranks,
        log=folder / "log.txt",
        environment=preloaded({}),  # what dpo_ds starts itself with; here it is a module's guest
    )
    if ended.status:
        raise SystemExit(f"{point} ended with {ended.status}; see {folder / 'log.txt'}")
    steps = steps_of(folder)[args.warm_up :]
    observed = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(point.ranks)]
    by_rank = [[one for one in rank["collectives"] if one["step"] > args.warm_up] for rank in observed]
    micro_batches = statistics.mean(observed[0]["micro_batches"][args.warm_up :])
    moved = counted(by_rank[0], ranks=point.ranks, steps=len(steps))
    expected = predicted(
        sizes,
        ranks=point.ranks,
        micro_batches=micro_batches,
        reference_micro_batches=0 if point.cached else micro_batches,
        gathers=2,
    )
    _check(point, moved, expected)
    seconds = statistics.mean(step["step_seconds"] for step in steps)
    return {
        **asdict(point),
        "step_seconds": [step["step_seconds"] for step in steps],
        "seconds": seconds,
        "pairs_per_second": point.pairs_per_step / seconds,
        "tokens_per_second": statistics.mean(step["tokens"] for step in steps) / seconds,
        "fill_rate": statistics.mean(step["fill_rate"] for step in steps),
        "micro_batches": micro_batches,
        "plan_seconds": statistics.mean(observed[0]["plan_seconds"][args.warm_up :]),
        "seconds_of": {
            name: statistics.mean(step[f"seconds/{name}"] for step in steps)
            for name in ("batches", "reference", "policy", "wait", "update")
        },
        "waited_seconds": _waited(by_rank) / len(steps),
        "collective_seconds": sum(one["seconds"] for rank in by_rank for one in rank) / point.ranks / len(steps),
        "peak_gib_a_rank": max(ended.memory.peak_rss.values()) / 2**30,
        "counted": asdict(moved),
        "predicted": asdict(expected),
    }


def _ds_config(name: str, folder: Path) -> str:
    """Writes one of the package's ds_configs with weights that are dropped after forward, as those of large models."""
    config = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
    zero = config["zero_optimization"]
    zero["stage3_param_persistence_threshold"] = PERSISTENT
    zero["stage3_max_reuse_distance"] = 0
    file = folder / f"{name}.json"
    file.write_text(json.dumps(config))
    return str(file)


def _check(point: Point, moved: Traffic, expected: Traffic) -> None:
    for kind, value in asdict(expected).items():
        if abs(asdict(moved)[kind] - value) > PREDICTED_WITHIN * value:
            raise SystemExit(f"{point}: {kind} are {asdict(moved)[kind]:.4g} bytes a step, predicted {value:.4g}")


def _waited(by_rank: Sequence[Sequence[dict[str, Any]]]) -> float:
    """Returns the seconds that a rank, on average, was held by collectives longer than the rank that came last."""
    held = np.array([[one["seconds"] for one in rank] for rank in by_rank])
    return float((held - held.min(0)).sum() / len(held))


def _waiting_by_cost(ranks: int) -> dict[str, Any]:
    """Returns, in terms of the planner's cost model, how much of the ranks' time each way of dealing leaves unused."""
    from benchmarks import workload

    pairs = workload.synthetic_pairs(50 * 16 * ranks)
    lengths = Lengths(*np.array([[len(p), len(c) + 1, len(r) + 1] for p, c, r in pairs]).T)
    # Costs as of a model of 7 billion parameters: 32 layers, 4096 wide, a head of 131 million.
    costs = 6.5e9 * lengths.tokens + 131e6 * lengths.scored + 2 * 32 * 4096 * lengths.attended
    rows = PackedRows(lengths.tokens, costs)
    found: dict[str, Any] = {"ranks": ranks}
    for name, plan_of in (("balanced", plan_training), ("in_order", plan_in_order)):
        useful = lasting = filled = positions = 0.0
        for step in range(50):
            indices = range(step * 16 * ranks, (step + 1) * 16 * ranks)
            plan = plan_of(indices, rows=rows, ranks=ranks, tokens_per_micro_batch=CHAT_BUDGET)
            useful += costs[list(indices)].sum() / ranks
            # Collectives in every layer hold the ranks together, so a round lasts as long as its costliest batch.
            lasting += sum(max(rows.cost(batch.pairs) for batch in round_) for round_ in zip(*plan, strict=True))
            filled += lengths.tokens[list(indices)].sum()
            positions += len(plan[0]) * ranks * CHAT_BUDGET
        found[name] = {"idle": 1 - useful / lasting, "budget_used": filled / positions}
    return found


def _seventy_billion(micro_batches: int, *, cached: bool) -> dict[str, Any]:
    """Returns what a step of Llama 3's 70 billion parameters on 64 GPUs would move."""
    layers, width, inner, kv_width, vocab = 80, 8192, 28_672, 1024, 128_256
    layer = 2 * width * width + 2 * width * kv_width + 3 * width * inner
    whole = (2 * layers + 1) * width
    sizes = Sizes(sharded=layers * layer + 2 * vocab * width, whole=whole)
    reference = 0 if cached else micro_batches
    traffic = predicted(sizes, ranks=64, micro_batches=micro_batches, reference_micro_batches=reference, gathers=2)
    return {"micro_batches": micro_batches, "cached": cached, **asdict(traffic), "total": traffic.total}


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['series']}: {row['ranks']} ranks, {row['pairs_per_step']} pairs of {row['tokens_per_pair'] or 'chat'} "
        f"tokens, {row['planner']}, {'cached' if row['cached'] else 'live'}: {row['seconds']:.2f} s a step"
    )


def tables(report: dict[str, Any]) -> str:
    """Returns the report's tables, in Markdown."""
    points = report["points"]
    lines = [
        "",
        "| series | ranks | pairs a step | tokens a pair | micro-batches | s a step | pairs/s | tokens/s | waited, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['series']} | {row['ranks']} | {row['pairs_per_step']} | {row['tokens_per_pair'] or 'as chats'} "
        f"| {row['micro_batches']:.1f} | {row['seconds']:.2f} | {row['pairs_per_second']:.2f} "
        f"| {row['tokens_per_second']:.0f} | {row['waited_seconds']:.2f} |"
        for row in points
        if row["series"] in ("tokens", "pairs", "ranks")
    ]
    lines += [
        "",
        "| ranks | reference | micro-batches | MB gathered: policy | reference | MB reduced | all, MB | predicted |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in points:
        if row["series"] in ("ranks", "traffic"):
            moved, expected = Traffic(**row["counted"]), Traffic(**row["predicted"])
            lines.append(
                f"| {row['ranks']} | {'cached' if row['cached'] else 'live'} "
                f"| {row['micro_batches']:.1f} | {moved.policy_gathers / 1e6:.1f} "
                f"| {moved.reference_gathers / 1e6:.1f} | {moved.gradients / 1e6:.1f} | {moved.total / 1e6:.1f} "
                f"| {expected.total / 1e6:.1f} |"
            )
    lines += [
        "",
        "| planner | s a step | waited, s | share | seconds/wait | planning, ms | share | fill rate | micro-batches |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['planner']} | {row['seconds']:.2f} | {row['waited_seconds']:.2f} "
        f"| {row['waited_seconds'] / row['seconds']:.1%} | {row['seconds_of']['wait']:.3f} "
        f"| {1000 * row['plan_seconds']:.2f} | {row['plan_seconds'] / row['seconds']:.3%} | {row['fill_rate']:.1%} "
        f"| {row['micro_batches']:.1f} |"
        for row in points
        if row["series"] == "planner"
    ]
    lines += [
        "",
        "| ranks | idle by the cost model: balanced | in order | budget used: balanced | in order |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['ranks']} | {row['balanced']['idle']:.1%} | {row['in_order']['idle']:.1%} "
        f"| {row['balanced']['budget_used']:.1%} | {row['in_order']['budget_used']:.1%} |"
        for row in report["waiting_by_cost"]
    ]
    lines += [
        "",
        "| 70 B on 64 GPUs: micro-batches | reference | GB gathered: policy | reference | GB reduced | all, GB |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['micro_batches']} | {'cached' if row['cached'] else 'live'} | {row['policy_gathers'] / GIGA:.0f} "
        f"| {row['reference_gathers'] / GIGA:.0f} | {row['gradients'] / GIGA:.0f} | {row['total'] / GIGA:.0f} |"
        for row in report["seventy_billion"]
    ]
    return "\n".join(lines)


def draw(report: dict[str, Any], file: Path) -> None:
    """Draws the three series and the bytes of a step."""
    by_series: dict[str, list[dict[str, Any]]] = {}
    for row in report["points"]:
        by_series.setdefault(row["series"], []).append(row)
    figure = Figure(figsize=(11, 6), dpi=150, layout="constrained")
    panels = figure.subplots(2, 2)
    for axes, series, across, value, label in (
        (panels[0, 0], "tokens", "tokens_per_pair", "tokens_per_second", "tokens a pair"),
        (panels[0, 1], "pairs", "pairs_per_step", "pairs_per_second", "pairs a step"),
        (panels[1, 0], "ranks", "ranks", "pairs_per_second", "ranks, on two cores"),
    ):
        rows = by_series.get(series, [])
        axes.plot([row[across] for row in rows], [row[value] for row in rows], marker="o")
        if series != "ranks":
            axes.set_xscale("log", base=2)
        axes.set_xticks([row[across] for row in rows], [str(row[across]) for row in rows])
        axes.set_xlabel(label)
        axes.set_ylabel(value.replace("_per_second", "/s"))
        axes.set_ylim(bottom=0)
    rows = by_series.get("ranks", []) + by_series.get("traffic", [])
    names = [f"{row['ranks']} ranks, {'cached' if row['cached'] else 'live'}" for row in rows]
    bytes_axes, start = panels[1, 1], np.zeros(len(rows))
    for kind in ("policy_gathers", "reference_gathers", "gradients"):
        megabytes = np.array([row["counted"][kind] / 1e6 for row in rows])
        bytes_axes.barh(names, megabytes, left=start, label=kind.replace("_", " "))
        start += megabytes
    expected = [Traffic(**row["predicted"]).total / 1e6 for row in rows]
    bytes_axes.plot(expected, names, "k|", markersize=12, label="predicted")
    bytes_axes.set_xlabel("MB a rank receives in a step, counted")
    bytes_axes.legend(fontsize=7)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file)


if __name__ == "__main__":
    main()
