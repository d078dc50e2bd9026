"""Composes the rooms of one training run, once, on every rank."""

import resource
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from dpo_ds.cli.feed import open_feed
from dpo_ds.cli.model_card import last_evaluation
from dpo_ds.cli.preflight import Inputs
from dpo_ds.cli.publish import export_policy, push_to_hub
from dpo_ds.cli.reference import cached_reference
from dpo_ds.config import dump_yaml
from dpo_ds.data.prepared import PreparedPairs, open_prepared
from dpo_ds.engine import DataParallel, Engines, ReferenceEngine, World, initialize
from dpo_ds.engine.answers import greedy_answers
from dpo_ds.engine.checkpoint import CHECKPOINTS_FOLDER, Checkpoints, Progress
from dpo_ds.engine.export import lack_of_room
from dpo_ds.engine.machines import MachineMetrics
from dpo_ds.engine.meeting import Meeting
from dpo_ds.engine.reference_cache import CachedReference
from dpo_ds.engine.stopping import Agreement, stoppable
from dpo_ds.errors import Stopped, UserError
from dpo_ds.files import write_whole
from dpo_ds.gate import check_heads, choose_layout, split_rows, tile_mlps
from dpo_ds.launcher.identity import Identity
from dpo_ds.launcher.signals import StopRequest
from dpo_ds.models.tokenizer import load_tokenizer
from dpo_ds.throughput import matmul_flops
from dpo_ds.tracking import METRICS_FILE, Mark, Tracker, open_tracker, versions, write_summary
from dpo_ds.trainer import Trained, Trainer

_CLOCKS_S = 30.0
"""By how much the nodes' clocks may differ before it is worth a warning."""


def train(found: Inputs | None, identity: Identity, meeting: Meeting, request: StopRequest) -> None:
    """Builds the engines, goes on where a checkpoint was saved, trains, exports and sums up; collective.

    Args:
        found: what preflight found, on the rank that speaks for its node; None on the others.
        identity: who this process is.
        meeting: where the ranks have met.
        request: whether this process was asked to stop.

    Raises:
        UserError: a checkpoint cannot be used or written, or another run is in the output folder.
        RunError: the run cannot be right.
        Stopped: the run was asked to stop.
    """
    world = World.join(identity, meeting)
    inputs: Inputs = world.broadcast(found)
    world.allow(asdict(inputs.config.timeouts))
    _introduce(world)
    folder = Path(inputs.config.output_dir)
    lock = _occupied(folder, world)
    with stoppable(request, world=world, folder=folder) as agreement:
        _train(inputs, agreement, world, identity)
    if world.rank == 0:
        # In this order: who waits for it must not come to hold a file without a name.
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
    world.leave()
    if world.rank == 0:
        push_to_hub(inputs)


def _introduce(world: World) -> None:
    """Says which ranks are where, and whether their clocks differ."""
    world.barrier()
    told = world.gather((socket.gethostname(), time.time()))
    ranks_of: dict[str, list[int]] = {}
    for rank, (host, _) in enumerate(told):
        ranks_of.setdefault(host, []).append(rank)
    if world.rank != 0 or len(ranks_of) == 1:
        return
    print(
        "ranks: " + ", ".join(f"{min(ranks)} to {max(ranks)} on {host}" for host, ranks in ranks_of.items()), flush=True
    )
    (behind, early), (ahead, late) = min(told, key=lambda one: one[1]), max(told, key=lambda one: one[1])
    if late - early > _CLOCKS_S:
        print(f"warning: the clock of {ahead} is {late - early:.0f} s ahead of that of {behind}", flush=True)


def _train(inputs: Inputs, agreement: Agreement, world: World, identity: Identity) -> None:
    config, folder = inputs.config, Path(inputs.config.output_dir)
    data_parallel = DataParallel(world, sequence_parallel_size=config.train.sequence_parallel_size)
    cached = None
    if config.reference.mode == "cache":
        # First, so that its weights are gone before the policy's come.
        cached = cached_reference(inputs, world=world, data_parallel=data_parallel, agreement=agreement)
    engines = initialize(
        inputs.policy,
        world=world,
        policy_config=inputs.policy_config,
        reference=inputs.reference if config.reference.mode == "engine" else None,
        reference_config=inputs.reference_config,
        dtype=inputs.dtype,
        attention=config.model.attention,
        trust_remote_code=config.model.trust_remote_code,
        activation_checkpointing=config.train.activation_checkpointing,
        optimizer=inputs.optimizer,
        balances_experts=config.loss.router_aux > 0,
        measures_entropy=config.tracking.entropy,
        adapter=inputs.adapter,
        adapter_start_is_reference=config.reference.mode == "adapter",
    )
    # The one that may follow the policy; an adapter's reference is the policy's own base.
    own_reference = engines.reference if isinstance(engines.reference, ReferenceEngine) else None
    if config.reference.sync_every is not None and own_reference is not None:
        own_reference.check_it_can_follow(engines.policy)
    pair = _same_pairs(inputs.train, world).pair(0)
    check_heads(engines, pair, world=world)
    tile = config.train.tokens_per_mlp_tile
    tile_mlps(engines.scorers, pair, tokens=tile, dtype=inputs.dtype, world=world)
    packed = choose_layout(engines.scorers, pair, layout=inputs.layout, dtype=inputs.dtype, world=world)
    row_parts = data_parallel.row_parts
    split_rows(engines.scorers, pair, row_parts=row_parts, packed=packed, dtype=inputs.dtype, world=world)
    speed = float(world.sum(torch.tensor(matmul_flops(world.device, inputs.dtype), device=world.device)))
    checkpoints = Checkpoints(
        folder / CHECKPOINTS_FOLDER,
        policy=engines.policy,
        reference=own_reference,
        world=world,
        origin=inputs.origin | _weights(engines, cached),
        versions=versions(),
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
        keep_best=config.checkpoint.keep_best,
        background=config.checkpoint.background,
    )
    # A signal saves even where checkpoint.every is null.
    checkpoints.check_place(will_save=config.checkpoint.every is not None)
    room = partial(lack_of_room, engines.policy, inputs.export_folder, adapter_alone=inputs.exports_adapter)
    world.agree(room() if world.rank == 0 else None)
    start = Progress()
    if inputs.checkpoints:
        # Only now: how rows are laid out was decided with the weights that the run began with.
        start = checkpoints.restore(inputs.checkpoints, allowed=inputs.allow_changed)
    tracker = _tracker(inputs, world, start)
    opened = partial(_same_pairs, world=world)
    with open_feed(inputs, behind=start.step, supplies=identity.speaks_for_node, opened=opened) as feed:
        trainer = Trainer(
            engines,
            config,
            train=feed,
            evaluation=opened(inputs.evaluation) if inputs.evaluation else None,
            world=world,
            data_parallel=data_parallel,
            tracker=tracker,
            checkpoints=checkpoints,
            matmul_flops=speed,
            packed=packed,
            cached=cached,
            agreement=agreement,
            answers=_answers(inputs, engines, world) if config.tracking.answers else None,
            machines=MachineMetrics(world, local_rank=identity.local_rank).measure
            if config.tracking.machines
            else None,
        )
        try:
            if start.step:
                if world.rank == 0:
                    print(f"going on behind step {start.step} of {feed.steps}", flush=True)
            elif trainer.pass_the_gate(same_source=inputs.starts_at_reference) and world.rank == 0:
                print("step-0 gate: policy and reference have equal weights and score alike", flush=True)
            trained = trainer.run(start)
        except Stopped as stopped:
            # Here, so that the other ranks wait for what wandb takes.
            tracker.finish({"status": "stopped", "reason": stopped.reason, "steps": stopped.step})
            raise
    if engines.reference is not None:
        engines.reference.free()  # the export is loaded again in its place
    export_policy(
        inputs,
        engines.policy,
        step=trained.steps,
        tokens=trained.tokens,
        evaluation=last_evaluation(folder, step=trained.steps),
        packed=packed,
        world=world,
    )
    summary = _summary(trained, world)
    if world.rank == 0:
        from dpo_ds.report import plot_curves  # half a second that the other ranks need not spend

        plot_curves(folder / METRICS_FILE, folder / "curves.png")
        write_summary(folder, summary)  # last: it says that the run is complete
        # Behind all else, since wandb may take its time.
        tracker.finish(summary)
        print(f"exported to {inputs.export_folder}, curves in {folder / 'curves.png'}")


def _same_pairs(path: Path, world: World) -> PreparedPairs:
    """Maps pairs that each node may have prepared for itself, with libraries of its own."""
    pairs = open_prepared(path)
    held = world.gather(tuple(pairs.manifest.shards.values()))
    if len(set(held)) > 1:
        raise UserError(
            f"the pairs in {path} differ between nodes; install the same tokenizers and transformers on all, and "
            "delete the folder on each"
        )
    return pairs


def _answers(inputs: Inputs, engines: Engines, world: World) -> Callable[[], list[dict[str, str]]]:
    """Returns what lets the policy answer the first held-out prompts."""
    assert inputs.evaluation is not None  # the config's rules say so
    wanted, trust = inputs.config.tracking, inputs.config.model.trust_remote_code
    tokenizer = load_tokenizer(inputs.tokenizer, trust_remote_code=trust)
    held_out = open_prepared(inputs.evaluation)
    pairs = [held_out.pair(number) for number in range(min(wanted.answers, len(held_out)))]

    def answers() -> list[dict[str, str]]:
        prompts = [pair.prompt_ids for pair in pairs]
        longest = wanted.answer_tokens
        said = greedy_answers(engines.policy, prompts, longest=longest, eos_id=tokenizer.eos_id, world=world)
        return [
            {
                "prompt": tokenizer.decode(pair.prompt_ids),
                "answer": tokenizer.decode(answer),
                "chosen": tokenizer.decode(pair.chosen_ids),
                "rejected": tokenizer.decode(pair.rejected_ids),
            }
            for pair, answer in zip(pairs, said, strict=True)
        ]

    return answers


def _occupied(folder: Path, world: World) -> FileLock:
    """Keeps other runs out of a folder until this process ends."""
    lock, problem = FileLock(folder / ".lock"), None
    if world.rank == 0:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            problem = f"output_dir {folder} is in use by another run; wait for its end, or name another folder"
        except NotImplementedError:  # this file system has no locks
            pass
    world.agree(problem)
    return lock


def _weights(engines: Engines, cached: CachedReference | None) -> dict[str, str | None]:
    reference = cached or engines.reference
    return {
        "model.policy": engines.policy.fingerprint(),
        "model.reference": reference.fingerprint if reference else None,
    }


def _tracker(inputs: Inputs, world: World, start: Progress) -> Tracker:
    if world.rank != 0:
        return Tracker()
    config, folder = inputs.config, Path(inputs.config.output_dir)
    # What the workers get in their environment may be secret, and stays out of files.
    write_whole(folder / "config.yaml", dump_yaml(replace(config, env={})).encode())
    shown = {section: values for section, values in asdict(config).items() if section != "env"}
    return open_tracker(
        folder,
        wandb=config.tracking.wandb,
        project=config.tracking.project,
        config=shown,
        behind=Mark(start.metrics_bytes, start.wandb_run_id),
    )


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
