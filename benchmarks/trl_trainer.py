"""DPO with TRL's ``DPOTrainer`` on DeepSpeed, to compare with; started by ``benchmarks.speed``."""

import json
import tempfile
import time
from typing import Any

import deepspeed
import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer  # type: ignore[attr-defined]

from benchmarks.workload import program_arguments, read_pairs
from dpo_ds.data.tokenization import TokenizedPair


class Clock(TrainerCallback):  # type: ignore[misc]
    """Keeps each step's seconds, from its first micro-batch to the update's end, and each logged loss."""

    def __init__(self) -> None:
        self.step_seconds: list[float] = []
        self.losses: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Starts the clock."""
        self._start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stops it."""
        self.step_seconds.append(time.perf_counter() - self._start)

    def on_log(self, *args: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        """Keeps a step's loss; the log at the end has none."""
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))


def main() -> None:
    """Trains, and writes each step's seconds and loss."""
    args = program_arguments()

    # On the CPU the trainer would take torch's own group, which DeepSpeed's engines do not find.
    deepspeed.init_distributed(verbose=False)
    ranks = torch.distributed.get_world_size()
    automatic = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    clock = Clock()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model=str(args.model),
            args=DPOConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=True,
                model_init_kwargs={"dtype": torch.bfloat16},
                deepspeed={**json.loads(args.policy_config.read_text()), **automatic},
                # Its default, to compute activations twice, would make it slower; no program here does.
                gradient_checkpointing=False,
                max_steps=args.steps,
                per_device_train_batch_size=args.pairs_per_micro_batch,
                gradient_accumulation_steps=args.pairs_per_step // (ranks * args.pairs_per_micro_batch),
                train_sampling_strategy="sequential",
                learning_rate=args.learning_rate,
                lr_scheduler_type="constant",
                beta=args.beta,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                dataloader_pin_memory=False,
            ),
            train_dataset=Dataset.from_list(read_pairs(args.pairs)),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        ids = [
            TokenizedPair.of(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]).id
            for row in trainer.train_dataset
        ]
        trainer.train()
    if torch.distributed.get_rank() == 0:
        args.out.write_text(json.dumps({"step_seconds": clock.step_seconds, "losses": clock.losses, "pairs": ids}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
