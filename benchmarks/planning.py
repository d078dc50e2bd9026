"""Whether ``python -m dpo_ds plan`` says what ranks then allocate.

python -m benchmarks.planning trains a 0.2 B-parameter Llama two steps in several ways, on two CPU ranks.
"""

import argparse
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.ranks import ENVIRONMENT, ROOT, run_ranks

RANKS = 2
WITHIN = 0.15


@dataclass(frozen=True)
class Way:
    """One way to train.

    Attributes:
        name: what the table calls it.
        changes: of the run file, by dotted key.
    """

    name: str
    changes: dict[str, Any] = field(default_factory=dict)


WAYS = (
    Way("as it is"),
    Way("activations computed again", {"train.activation_checkpointing": "full"}),
    Way("optimizer in host memory", {"deepspeed.policy": "ds_configs/zero3_offload_optimizer.json"}),
    Way("float32", {"model.dtype": "float32"}),
    Way("twice the tokens a micro-batch", {"train.tokens_per_micro_batch": 4096}),
    Way("no reference", {"reference.mode": "none", "loss.type": "simpo"}),
    Way("an adapter", {"adapter": {"r": 16}, "reference.mode": "adapter"}),
)


def main() -> None:
    """Trains in every way, prints the table and writes it."""
    args = _arguments()
    os.environ.update(ENVIRONMENT)
    from benchmarks import workload

    model = args.cache / "llama-plan"
    parameters = workload.write_model(model, layers=12, width=1024, inner=2816, heads=16, kv_heads=4, tied=False)
    work: Path = args.cache / "planning"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    workload.write_pairs(workload.synthetic_pairs(64), work / "pairs.jsonl")
    rows = []
    print(f"{'GiB a rank':<34}{'planned':>10}{'allocated':>11}{'planned / allocated':>21}{'resident':>10}")
    for way in WAYS:
        row = _measured(way, model, work)
        rows.append(row)
        ratio = row["planned_gib"] / row["allocated_gib"]
        print(
            f"{way.name:<34}{row['planned_gib']:>10.2f}{row['allocated_gib']:>11.2f}{ratio:>21.2f}"
            f"{row['resident_gib']:>10.2f}",
            flush=True,
        )
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "planning.json").write_text(json.dumps({"parameters": parameters, "ways": rows}, indent=2) + "\n")
    off = [row["way"] for row in rows if abs(row["planned_gib"] / row["allocated_gib"] - 1) > WITHIN]
    if off:
        raise SystemExit(f"planned and allocated bytes differ by more than {WITHIN:.0%}: {', '.join(off)}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planning", description=__doc__)
    add = parser.add_argument
    add("--cache", type=Path, default=ROOT / ".cache" / "benchmarks", help="folder for the model and the runs")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for planning.json")
    return parser.parse_args()


def _measured(way: Way, model: Path, work: Path) -> dict[str, Any]:
    folder = work / way.name.replace(" ", "_")
    folder.mkdir()
    run = _run(model, work / "pairs.jsonl", folder / "run")
    for key, value in way.changes.items():
        section, _, name = key.partition(".")
        run[section] = {**run.get(section, {}), name: value} if name else value
    (folder / "run.yaml").write_text(json.dumps(run))  # JSON is YAML
    planned = _planned(folder / "run.yaml")
    program = ["benchmarks/allocated.py", "--allocated", str(folder), "--config", str(folder / "run.yaml")]
    environment = {"PYTHONPATH": str(ROOT)}
    ended = run_ranks(program, ranks=RANKS, log=folder / "log.txt", environment=environment)
    if ended.status:
        raise SystemExit(f"launch/train.py ended with {ended.status}; see {folder / 'log.txt'}")
    found = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)]
    return {
        "way": way.name,
        "planned_gib": planned / 2**30,
        "allocated_gib": max(rank["peak"] - rank["before"] for rank in found) / 2**30,
        "resident_gib": max(ended.memory.peak_rss.values()) / 2**30,
    }


def _run(model: Path, pairs: Path, output: Path) -> dict[str, Any]:
    return {
        "model": {"policy": str(model)},
        "data": {"train": str(pairs), "max_length": 512, "shuffle": False},
        "train": {"pairs_per_step": 32, "tokens_per_micro_batch": 2048, "max_steps": 2, "learning_rate": 1e-5},
        "deepspeed": {
            "policy": "ds_configs/zero3_cpu.json",
            "reference": "ds_configs/zero3_reference_cpu.json",
        },
        "tracking": {"wandb": "disabled"},
        "output_dir": str(output),
    }


def _planned(run_file: Path) -> float:
    from dpo_ds.cli.outlook import Machines, Needs
    from dpo_ds.cli.preflight import preflight
    from dpo_ds.cli.schedules import schedule_of
    from dpo_ds.config import parse_run
    from dpo_ds.data.prepared import open_prepared
    from dpo_ds.memory import peak

    inputs = preflight(parse_run(["--config", str(run_file)]), ranks=RANKS)
    train = open_prepared(inputs.train)
    needs = Needs(inputs.config, schedule_of(inputs.config, train), train, ranks=RANKS)
    machines = Machines(nodes=1, gpus=RANKS, gpu_gib=None, host_gib=None)
    _, *shares = needs.shares(machines, inputs.config, inputs.policy_config, inputs.reference_config)
    return peak(shares).host


if __name__ == "__main__":
    main()
