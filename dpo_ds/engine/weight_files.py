"""The safetensors files of a checkpoint: what they hold, and whether a sharded model is that."""

import json
import math
import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import cached_file

from dpo_ds.engine.shards import Shard, hollow, part_held, stored_buffers
from dpo_ds.errors import first_line
from dpo_ds.models.stored import as_stored

WEIGHTS = "model.safetensors"


INDEX = "model.safetensors.index.json"


def difference_from_files(model: PreTrainedModel, path: str | Path) -> str | None:
    """Compares a model with a checkpoint's safetensors files, bit for bit in its own dtype; collective.

    Returns:
        None if this rank's share is equal, else one line that names the first weight that is not.
    """
    files = tensor_files(path)
    if files is None:
        return f"{path} has no safetensors weights to verify the loaded ones against; convert it with save_pretrained"
    # A tied head may be stored beside its embedding.
    known = set(model.state_dict())
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **stored_buffers(model)}
    sources, divided = {}, {}
    for name, tensor in tensors.items():
        stored = stored_name(model, name, files)
        parts = {part: stored_name(model, part, files) for part in as_stored(model, name, hollow(tensor))}
        if stored in files:
            sources[name] = (files[stored], stored)
        elif all(part in files for part in parts.values()):
            divided[name] = {part: (files[source], source) for part, source in parts.items()}
            known |= parts.keys()
        else:
            return f"{path} holds no tensor for the weight {name}, which would stay random; name a complete checkpoint"
    known |= {name.removeprefix(f"{model.base_model_prefix}.") for name in known}
    # transformers does not report these under ZeRO-3.
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    for name in sorted(files.keys() - known):
        if not any(re.search(pattern, name) for pattern in ignored):
            return (
                f"{path} holds a tensor {name} that the model has no place for; name a checkpoint of this architecture"
            )
    problems = (
        difference_of_shards({name: part_held(tensors[name]) for name in sources}, sources),
        difference_of_divided(model, {name: tensors[name] for name in divided}, divided),
    )
    return problems[0] or problems[1]


def difference_of_divided(
    model: PreTrainedModel, weights: Mapping[str, Tensor], sources: Mapping[str, Mapping[str, tuple[str, str]]]
) -> str | None:
    """Compares weights that files hold in several tensors with these, bit for bit in their own dtype; collective.

    Each weight is gathered, and one rank compares it.

    Args:
        model: the one that has the weights.
        weights: by name.
        sources: of each weight's tensors, by the names of ``as_stored``, a safetensors file and the name in there.

    Returns:
        None if what this rank has compared is equal, else one line that names the first that is not.
    """
    problem = None
    for number, (name, weight) in enumerate(sorted(weights.items())):
        with deepspeed.zero.GatheredParameters([weight]):
            if problem is None and number % dist.get_world_size() == dist.get_rank():
                try:
                    problem = _difference_of_parts(as_stored(model, name, weight.detach()), sources[name])
                except (OSError, SafetensorError) as error:
                    problem = f"the file of {name} cannot be read: {first_line(error)}"
    return problem


def _difference_of_parts(parts: Mapping[str, Tensor], sources: Mapping[str, tuple[str, str]]) -> str | None:
    for part, values in parts.items():
        path, stored = sources[part]
        with safe_open(path, framework="pt") as file:
            expected = file.get_tensor(stored).to(values.dtype)
        if expected.shape != values.shape:
            return f"{path} holds {part} as {tuple(expected.shape)}, the model as {tuple(values.shape)}"
        if not torch.equal(expected, values.cpu()):
            return f"the weight {part} differs from the file {path}; the load or the file is broken"
    return None


def difference_of_shards(held: Mapping[str, Shard], sources: Mapping[str, tuple[str, str]]) -> str | None:
    """Compares shards with files bit for bit in their own dtype.

    Args:
        held: by name.
        sources: of each name, a safetensors file and the name in there.

    Returns:
        None if they are equal, else one line that names the first that is not.
    """
    for name, shard in held.items():
        path, stored = sources[name]
        with safe_open(path, framework="pt") as file:
            size = math.prod(file.get_slice(stored).get_shape())
            if size != shard.whole:
                return f"{path} holds {size} values for {name}, the model {shard.whole}"
            expected = part_of_file(file, stored, shard).to(shard.values.dtype)
        if not torch.equal(expected, shard.values.cpu()):
            return f"the weight {name} differs from the file {path}; the load or the file is broken"
    return None


def stored_name(model: PreTrainedModel, name: str, files: Container[str]) -> str:
    """Returns the name under which a checkpoint that holds these tensors would hold a weight, if it does."""
    # Some old checkpoints leave the backbone's own prefix out of their names.
    return name if name in files else name.removeprefix(f"{model.base_model_prefix}.")


def part_of_file(file: Any, name: str, shard: Shard) -> Tensor:
    """Returns ``(n,)``: the values that a file holds where a shard is, in the file's dtype.

    Args:
        file: opened by ``safe_open``.
        name: of the whole tensor in it.
        shard: of a parameter of as many values.
    """
    # safetensors maps the file: only the pages of this part are ever read.
    tensor: Tensor = file.get_tensor(name)
    return tensor.flatten()[shard.start : shard.start + shard.values.numel()]


def tensor_files(path: str | Path) -> dict[str, str] | None:
    """Returns which file holds each tensor, None where a checkpoint has no safetensors files."""
    if index := find_file(path, INDEX):
        weight_map: dict[str, str] = json.loads(Path(index).read_text())["weight_map"]
        return {name: str(find_file(path, file)) for name, file in weight_map.items()}
    if file := find_file(path, WEIGHTS):
        with safe_open(file, framework="pt") as opened:
            return dict.fromkeys(opened.keys(), file)
    return None


def stored_parameters(path: str | Path) -> int | None:
    """Returns how many values a checkpoint's safetensors files hold, None where they do not say."""
    total = 0
    try:
        for file in set((tensor_files(path) or {}).values()):
            with safe_open(file, framework="pt") as opened:
                total += sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, LookupError):
        return None  # loading has the better words for it
    return total or None


def find_file(path: str | Path, file: str) -> str | None:
    """Returns where a checkpoint's file is on this machine, None where the checkpoint has none of that name."""
    found: str | None = cached_file(str(path), file, _raise_exceptions_for_missing_entries=False)
    return found
