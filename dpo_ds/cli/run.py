"""Composes the rooms of one training run, once, on every rank."""

import resource
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from dpo_ds.cli.preflight import Inputs
from dpo_ds.cli.reference import cached_reference
from dpo_ds.config import dump_yaml
from dpo_ds.data.prepare import open_prepared
from dpo_ds.engine import World, initialize
from dpo_ds.engine.export import export
from dpo_ds.engine.meeting import Meeting
from dpo_ds.gate import check_heads, choose_layout
from dpo_ds.launcher.identity import Identity
from dpo_ds.models.causal_lm import load_model_config
from dpo_ds.models.tokenizer import load_tokenizer
from dpo_ds.report import plot_curves
from dpo_ds.throughput import matmul_flops
from dpo_ds.tracking import Tracker, open_tracker, versions, write_summary
from dpo_ds.trainer import Trained, Trainer


def train(found: Inputs | None, identity: Identity, meeting: Meeting) -> None:
    """Builds the engines, trains, evaluates, exports and sums up; collective.

    Args:
        found: what preflight found, on the rank that speaks for its node; None on the others.
        identity: who this process is.
        meeting: where the ranks have met.

    Raises:
        UserError: a checkpoint cannot be used.
        RunError: the run cannot be right.
    """
    world = World.join(identity, meeting)
    inputs: Inputs = world.broadcast(found)
    config, folder = inputs.config, Path(inputs.config.output_dir)
    # First, so that its weights are gone before the policy's come.
    cached = cached_reference(inputs, world=world) if config.reference.mode == "cache" else None
    engines = initialize(
        inputs.policy,
        world=world,
        policy_config=inputs.policy_config,
        reference=None if cached else inputs.reference,
        reference_config=inputs.reference_config,
        dtype=inputs.dtype,
        attention=config.model.attention,
        trust_remote_code=config.model.trust_remote_code,
        activation_checkpointing=config.train.activation_checkpointing == "full",
        betas=config.train.betas,
        eps=config.train.eps,
        weight_decay=config.train.weight_decay,
    )
    pairs = open_prepared(inputs.train)
    check_heads(engines, pairs.pair(0), world=world)
    packed = choose_layout(engines, pairs.pair(0), layout=inputs.layout, world=world)
    speed = float(world.sum(torch.tensor(matmul_flops(world.device, inputs.dtype), device=world.device)))
    tracker = _tracker(inputs, world)
    trainer = Trainer(
        engines,
        config,
        train=pairs,
        evaluation=open_prepared(inputs.evaluation) if inputs.evaluation else None,
        world=world,
        tracker=tracker,
        matmul_flops=speed,
        packed=packed,
        cached=cached,
    )
    if trainer.pass_the_gate(same_source=inputs.reference == inputs.policy) and world.rank == 0:
        print("step-0 gate: policy and reference have equal weights and score alike", flush=True)
    trained = trainer.run()
    export(
        engines.policy,
        load_tokenizer(inputs.tokenizer, trust_remote_code=config.model.trust_remote_code),
        folder / "export",
        config=load_model_config(inputs.policy, trust_remote_code=config.model.trust_remote_code),
        world=world,
    )
    summary = _summary(trained, world)
    if world.rank == 0:
        write_summary(folder, summary)
        plot_curves(folder / "metrics.jsonl", folder / "curves.png")
        # Last, since wandb may take its time.
        tracker.finish(summary)
        print(f"exported to {folder / 'export'}, curves in {folder / 'curves.png'}")
    world.leave()


def _tracker(inputs: Inputs, world: World) -> Tracker:
    if world.rank != 0:
        return Tracker()
    config, folder = inputs.config, Path(inputs.config.output_dir)
    # What the workers get in their environment may be secret, and stays out of files.
    (folder / "config.yaml").write_text(dump_yaml(replace(config, env={})))
    shown = {section: values for section, values in asdict(config).items() if section != "env"}
    return open_tracker(folder, wandb=config.tracking.wandb, project=config.tracking.project, config=shown)


def _summary(trained: Trained, world: World) -> dict[str, object]:
    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = world.gather(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
    return {
        "status": "complete",
        "steps": trained.steps,
        "pairs": trained.pairs,
        "tokens": trained.tokens,
        "train_seconds": trained.train_seconds,
        "pairs_per_second": trained.pairs / trained.train_seconds,
        "peak_host_bytes_per_rank": peaks,
        "world_size": world.size,
        "versions": versions(),
    }
