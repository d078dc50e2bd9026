"""Runs of launch/train.py: what a benchmark writes for one, and what it reads when it has ended."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TrainingRun:
    """A run whose learning rate is constant and whose pairs come in the file's order; the names are the run file's."""

    model: str
    pairs: str
    max_length: int
    pairs_per_step: int
    tokens_per_micro_batch: int
    steps: int
    learning_rate: float = 1e-5
    beta: float = 0.1
    layout: str = "auto"
    reference_mode: str = "engine"
    sequence_parallel_size: int = 1
    activation_checkpointing: str = "none"
    tokens_per_mlp_tile: int | None = None
    policy_config: str = "ds_configs/zero3_cpu.json"
    reference_config: str = "ds_configs/zero3_reference_cpu.json"

    def write(self, folder: Path) -> Path:
        """Writes the run file into a folder, where the run's output goes, too; returns its path."""
        run = {
            "model": {"policy": self.model},
            "data": {"train": self.pairs, "max_length": self.max_length, "shuffle": False},
            "loss": {"beta": self.beta},
            "reference": {"mode": self.reference_mode},
            "train": {
                "pairs_per_step": self.pairs_per_step,
                "tokens_per_micro_batch": self.tokens_per_micro_batch,
                "layout": self.layout,
                "sequence_parallel_size": self.sequence_parallel_size,
                "activation_checkpointing": self.activation_checkpointing,
                "tokens_per_mlp_tile": self.tokens_per_mlp_tile,
                "max_steps": self.steps,
                "learning_rate": self.learning_rate,
                "schedule": "constant",
                "warmup_ratio": 0.0,
            },
            "deepspeed": {"policy": self.policy_config, "reference": self.reference_config},
            "tracking": {"wandb": "disabled"},
            "output_dir": str(folder / "run"),
        }
        config = folder / "run.yaml"
        config.write_text(json.dumps(run))  # JSON is YAML
        return config


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """Returns the metrics of each optimizer step of a run that ``TrainingRun.write`` put into a folder."""
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == "train"]
