"""Composes an export, of a run that has ended or of a checkpoint: the files, their card, their proof, and the hub."""

import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from dpo_ds.cli.model_card import last_evaluation, model_card
from dpo_ds.cli.preflight import Inputs
from dpo_ds.data.batch import packed_batch, padded_batch
from dpo_ds.data.prepared import open_prepared
from dpo_ds.engine import PolicyEngine, World, initialize
from dpo_ds.engine.checkpoint import CHECKPOINTS_FOLDER, Checkpoints
from dpo_ds.engine.export import Probe, export
from dpo_ds.engine.meeting import Meeting
from dpo_ds.errors import first_line
from dpo_ds.gate import PACKED_BOUND, PER_TOKEN_BOUND
from dpo_ds.launcher.identity import Identity
from dpo_ds.models.causal_lm import load_model_config
from dpo_ds.models.tokenizer import load_tokenizer
from dpo_ds.tracking import versions


def export_policy(
    inputs: Inputs,
    policy: PolicyEngine,
    *,
    step: int,
    tokens: int,
    evaluation: Mapping[str, Any] | None,
    packed: bool,
    world: World,
) -> None:
    """Exports the policy as it is now to the run's place; collective.

    Args:
        inputs: of the run.
        policy: the engine.
        step: after which its weights are what they are.
        tokens: trained on until then.
        evaluation: means over the held-out pairs, None where there are none.
        packed: whether the policy has the attention of packed rows.
        world: the ranks.

    Raises:
        UserError: the folder cannot be written.
        RunError: what was written is not what the policy is.
    """
    config, pair = inputs.config, open_prepared(inputs.train).pair(0)
    trust = config.model.trust_remote_code
    export(
        policy,
        load_tokenizer(inputs.tokenizer, trust_remote_code=trust),
        inputs.export_folder,
        config=load_model_config(inputs.policy, trust_remote_code=trust),
        card=model_card(inputs, step=step, tokens=tokens, evaluation=evaluation),
        probe=Probe(
            (packed_batch if packed else padded_batch)([pair]).to(world.device),
            inputs.reference_config,
            config.model.attention,
            trust,
            bound=_bound(inputs, world),
            adapter_of=inputs.policy if inputs.exports_adapter else None,
        ),
        world=world,
    )


def _bound(inputs: Inputs, world: World) -> float:
    if inputs.config.export.merged:
        return PACKED_BOUND[inputs.dtype]  # every product of an adapted layer rounds in another order
    # Elsewhere a kernel may depend on where in memory a weight lies.
    return 0.0 if world.device.type == "cpu" else PER_TOKEN_BOUND[inputs.dtype]


def export_checkpoint(found: Inputs | None, identity: Identity, meeting: Meeting) -> None:
    """Exports a checkpoint without training; collective. Nothing else in the run's folder changes.

    The policy's engine is the one that trains, since the masters and Adam's moments come with the weights: the file of
    the masters, which the weights follow from, holds all three, and the whole is checked as when a run goes on.

    Args:
        found: what preflight found, on the rank that speaks for its node; None on the others.
        identity: who this process is.
        meeting: where the ranks have met.

    Raises:
        UserError: a checkpoint cannot be used, or the folder not be written.
        RunError: what was written is not what was saved.
    """
    world = World.join(identity, meeting)
    inputs: Inputs = world.broadcast(found)
    config = inputs.config
    world.allow(asdict(config.timeouts))
    policy = initialize(
        inputs.policy,
        world=world,
        policy_config=inputs.policy_config,
        reference=None,
        reference_config=None,
        dtype=inputs.dtype,
        attention=config.model.attention,
        trust_remote_code=config.model.trust_remote_code,
        optimizer=inputs.optimizer,
        adapter=inputs.adapter,
    ).policy
    checkpoints = Checkpoints(
        Path(config.output_dir) / CHECKPOINTS_FOLDER,
        policy=policy,
        world=world,
        origin=inputs.origin | {"model.policy": policy.fingerprint()},
        versions=versions(),
    )
    progress = checkpoints.restore(inputs.checkpoints, allowed=inputs.allow_changed)
    world.enter("save")
    run_folder = inputs.checkpoints[0].parent.parent
    export_policy(
        inputs,
        policy,
        step=progress.step,
        tokens=progress.tokens,
        evaluation=progress.evaluation or last_evaluation(run_folder, step=progress.step),
        packed=False,
        world=world,
    )
    if world.rank == 0:
        print(f"exported step {progress.step} to {inputs.export_folder}", flush=True)
    world.leave()
    if world.rank == 0:
        push_to_hub(inputs)


def push_to_hub(inputs: Inputs) -> None:
    """Uploads an export if the run says so; a failure is a warning. A new repository is private.

    It may take its time: the other ranks must not wait for it.

    Args:
        inputs: of the run.
    """
    repository, folder = inputs.config.export.push_to_hub, inputs.export_folder
    if repository is None:
        return
    again = f"the export is in {folder}; to push it: hf upload {repository} {folder} ."
    token = os.environ.get("HF_TOKEN")
    if not token:
        print(f"warning: HF_TOKEN is not set, so nothing is pushed to {repository}; {again}", file=sys.stderr)
        return
    try:
        hub = HfApi(token=token)
        if not hub.repo_exists(repository):
            hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Export by dpo_ds",
            # What an earlier export had otherwise would be loaded beside this one, or in its place.
            delete_patterns=["model*.safetensors", "model.safetensors.index.json", "adapter_*"],
        )
    except Exception as error:  # the model is safe, and which library speaks HTTP is the hub's affair
        print(f"warning: {repository} was not pushed ({first_line(error)}); {again}", file=sys.stderr, flush=True)
        return
    print(f"pushed to {repository}", flush=True)
