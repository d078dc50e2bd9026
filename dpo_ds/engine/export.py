"""Writing the policy as a Hugging Face folder, and reading it back to prove it."""

import json
import shutil
from pathlib import Path

import deepspeed
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import PretrainedConfig, PreTrainedModel

from dpo_ds.data.tokenization import Tokenizer
from dpo_ds.engine.policy import PolicyEngine
from dpo_ds.engine.shards import INDEX, difference_from_files, stored_buffers
from dpo_ds.engine.world import World
from dpo_ds.errors import RunError


def export(policy: PolicyEngine, tokenizer: Tokenizer, folder: Path, *, config: PretrainedConfig, world: World) -> None:
    """Writes weights, config, generation config and tokenizer; collective.

    Rank 0 writes aside, holding one file's weights at a time; the folder appears when every rank has found its own live
    shards in the files again. A tied head is stored once, as transformers does.

    Args:
        policy: the engine.
        tokenizer: the run's.
        folder: where the model goes; an older export there is replaced.
        config: what the model was loaded with; the live one has its dropout off.
        world: the ranks.

    Raises:
        RunError: the files do not hold the live weights.
    """
    # The last forward has asked for weights of a backward that never came: gathering one of them again would fail.
    policy.engine.empty_partition_cache()
    model = policy.model.model
    aside = folder.with_name(folder.name + ".tmp")
    if world.rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        config.dtype = model.dtype
        config.save_pretrained(aside)
        if model.can_generate():
            model.generation_config.save_pretrained(aside)
        tokenizer.save(aside)
    _write_weights(model, aside, world=world)
    world.barrier()
    problems = [found for found in world.gather(difference_from_files(model, aside)) if found]
    if problems:
        raise RunError(f"the export to {folder} does not hold the policy's weights: {problems[0]}")
    if world.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    world.barrier()


def _write_weights(model: PreTrainedModel, folder: Path, *, world: World) -> None:
    parameters = dict(model.named_parameters())
    # Planned on tensors without data, so that the live ones need to be gathered one file at a time only.
    hollow = {name: torch.empty(p.ds_shape, dtype=p.dtype, device="meta") for name, p in parameters.items()}
    buffers = stored_buffers(model)
    plan = split_torch_state_dict_into_shards(hollow | {name: buffer.to("meta") for name, buffer in buffers.items()})
    for file, names in plan.filename_to_tensors.items():
        tensors = {}
        for name in names:
            if name in buffers:
                tensors[name] = buffers[name].to("cpu")
                continue
            with deepspeed.zero.GatheredParameters([parameters[name]]):
                if world.rank == 0:
                    tensors[name] = parameters[name].detach().to("cpu", copy=True)
        if world.rank == 0:
            save_file(tensors, folder / file, metadata={"format": "pt"})
    if plan.is_sharded and world.rank == 0:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2))
