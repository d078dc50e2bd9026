"""Whether 20 GiB are enough for DPO of a 1.1 B-parameter Llama with a live reference on two CPU ranks.

python -m benchmarks.large runs launch/train.py; masters and Adam's states live in files under --nvme.
"""

import argparse
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from benchmarks.ranks import ENVIRONMENT, ROOT, run_ranks

RANKS = 2
LIMIT_GIB = 20
FIRST_LOSS_TOLERANCE = 1e-3
_CONFIG = ROOT / "ds_configs" / "zero3_large_cpu.json"


def main() -> None:
    """Trains a few steps and writes what memory that took."""
    args = _arguments()
    os.environ.update(ENVIRONMENT)
    from benchmarks import workload

    model = args.cache / f"llama-large-{args.layers}"
    parameters = workload.write_model(
        model, layers=args.layers, width=2048, inner=5632, heads=32, kv_heads=4, tied=False
    )
    work: Path = args.cache / "large"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    states = args.nvme / "dpo_ds-large"
    _check_room(parameters, args.nvme)
    workload.write_pairs(workload.synthetic_pairs(args.steps * args.pairs_per_step), work / "pairs.jsonl")
    config = json.loads(_CONFIG.read_text())
    config["zero_optimization"]["offload_optimizer"]["nvme_path"] = str(states)
    (work / "policy.json").write_text(json.dumps(config))
    (work / "run.yaml").write_text(json.dumps(_run(args, model, work)))  # JSON is YAML
    states.mkdir()
    try:
        ended = run_ranks(
            ["launch/train.py", "--config", str(work / "run.yaml")],
            ranks=RANKS,
            log=work / "log.txt",
            environment={},
            limit=LIMIT_GIB * 2**30,
        )
    finally:
        shutil.rmtree(states)
    held = ended.memory.peak_sum / 2**30
    if held > LIMIT_GIB:
        raise SystemExit(f"ended: the ranks held {held:.1f} GiB together, over {LIMIT_GIB}; see {work / 'log.txt'}")
    if ended.status:
        raise SystemExit(f"launch/train.py ended with {ended.status}; see {work / 'log.txt'}")
    lines = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    report = {
        "parameters": parameters,
        "ranks": RANKS,
        "peak_gib_all_ranks": held,
        "peak_rss_gib": [memory / 2**30 for _, memory in sorted(ended.memory.peak_rss.items())],
        "seconds": ended.seconds,
        "step_seconds": [line["step_seconds"] for line in lines],
        "pairs_per_step": args.pairs_per_step,
        "losses": [line["loss"] for line in lines],
        "grad_norms": [line["grad_norm"] for line in lines],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "large.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    if abs(report["losses"][0] - math.log(2)) > FIRST_LOSS_TOLERANCE:
        raise SystemExit(f"the first loss is {report['losses'][0]}, not ln 2: policy and reference differ")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large", description=__doc__)
    add = parser.add_argument
    add("--layers", type=int, default=22, help="22 make 1.1 billion parameters, 4 make 0.3")
    add("--steps", type=int, default=5)
    add("--pairs_per_step", type=int, default=8)
    add("--nvme", type=Path, default=Path("/tmp"), help="folder on a local disk for the optimizer's states")
    add("--cache", type=Path, default=ROOT / ".cache" / "benchmarks", help="folder for the model and the run")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for large.json")
    return parser.parse_args()


def _run(args: argparse.Namespace, model: Path, work: Path) -> dict[str, Any]:
    return {
        "model": {"policy": str(model)},
        "data": {"train": str(work / "pairs.jsonl"), "max_length": 512},
        "train": {
            "pairs_per_step": args.pairs_per_step,
            "tokens_per_micro_batch": 1024,
            "activation_checkpointing": "full",
            "max_steps": args.steps,
            "learning_rate": 1e-6,
        },
        "deepspeed": {
            "policy": str(work / "policy.json"),
            "reference": "ds_configs/zero3_reference_cpu.json",
        },
        "tracking": {"wandb": "disabled"},
        "output_dir": str(work / "run"),
    }


def _check_room(parameters: int, nvme: Path) -> None:
    # Masters, two states and gradients, 4 bytes each; the export is in the cache folder.
    wanted = 16 * parameters
    if shutil.disk_usage(nvme).free < wanted:
        raise SystemExit(f"--nvme {nvme} must have {wanted / 1e9:.0f} GB free for the optimizer's states")
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = 1024 * int(meminfo["MemAvailable"].split()[0])
    # Weights of both models, fp32 gradients, and what two processes and a layer's work take.
    needed = (2 + 2 + 4) * parameters + 5 * 2**30
    if available < needed:
        raise SystemExit(f"{needed / 2**30:.0f} GiB of memory must be available, there are {available / 2**30:.0f}")


if __name__ == "__main__":
    main()
