"""The shards of a ZeRO-3 model's weights: loading them, fingerprinting them, and comparing them with files."""

import hashlib
import json
import math
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import set_z3_leaf_modules
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, modeling_utils
from transformers.integrations import HfDeepSpeedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import cached_file

from dpo_ds.engine.world import World
from dpo_ds.errors import RunError, UserError, first_line
from dpo_ds.models.adapters import Adapter, attach, starts_at_zero, weights_at_work
from dpo_ds.models.causal_lm import load_causal_lm
from dpo_ds.models.hub import held
from dpo_ds.models.scorer import Scorer
from dpo_ds.models.stored import as_stored

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Shard(NamedTuple):
    """One rank's part of one tensor.

    Attributes:
        values: ``(n,)``, a view of the live values.
        start: where the part begins in the flattened tensor.
        whole: how many values the whole tensor has.
    """

    values: Tensor
    start: int
    whole: int


# What DeepSpeed adds to torch's Parameter: ds_tensor (the shard), ds_numel and ds_shape (of the whole), ds_status.
ZeroParameter: TypeAlias = Any


def shard_of(parameter: ZeroParameter) -> Shard:
    """Returns this rank's part of a ZeRO-3 parameter, without the padding behind its end."""
    size = parameter.ds_tensor.ds_numel
    start = min(size * dist.get_rank(parameter.ds_process_group), parameter.ds_numel)
    end = min(start + size, parameter.ds_numel)
    # A small parameter stays whole between steps, and the model runs on that copy.
    if parameter.ds_status == ZeroParamStatus.AVAILABLE:
        return Shard(parameter.data.flatten()[start:end], start, parameter.ds_numel)
    return Shard(parameter.ds_tensor.data[: end - start], start, parameter.ds_numel)


def stored_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Returns the buffers that checkpoints hold, such as a router's correction bias; every rank has them whole."""
    stored = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in stored}


def part_held(tensor: Tensor) -> Shard:
    """Returns this rank's part of a ZeRO-3 parameter, or all of a buffer."""
    return shard_of(tensor) if isinstance(tensor, nn.Parameter) else _whole(tensor)


def _whole(buffer: Tensor) -> Shard:
    return Shard(buffer.flatten(), 0, buffer.numel())


def load_sharded(
    path: str,
    *,
    ds_config: Mapping[str, Any],
    dtype: torch.dtype,
    attention: str,
    trust_remote_code: bool,
    world: World,
    adapter: Adapter | None = None,
    keeps_start: bool = False,
) -> PreTrainedModel:
    """Loads a causal language model whose weights are sharded while they are read, and compares them with the files.

    Where the files' tensors are the model's weights, by name and shape, each rank reads its own parts of them alone.
    Otherwise, as with experts that must be fused, rank 0 reads all of them and sends them to the others. An adapter is
    small: every rank draws or reads it whole, and keeps its shards.

    Raises:
        UserError: the checkpoint cannot be opened, or some weight is not what the checkpoint says, or the adapter does
            not fit.
    """
    path, problem = held(path), None
    with _sharding_at_load(ds_config), _reading_parts(path, world) as ranks:
        try:
            model = load_causal_lm(path, dtype=dtype, attention=attention, trust_remote_code=trust_remote_code)
        except UserError as error:
            if not ranks.have_met:
                raise  # perhaps on this rank alone, whose disk has failed, with the others in the middle of collectives
            problem = str(error)
    world.agree(problem)  # where transformers sends whole weights, rank 0 alone sees that one does not fit
    unsharded = [name for name, parameter in model.named_parameters() if not hasattr(parameter, "ds_tensor")]
    if unsharded:
        raise RunError(f"{len(unsharded)} parameters of {path} were loaded without being sharded ({unsharded[0]} ...)")
    world.agree(difference_from_files(model, path))
    if adapter is not None:
        with _sharding_at_load(ds_config):
            try:
                attach(model, adapter, keeps_start=keeps_start)
            except UserError as error:
                problem = str(error)
        world.agree(problem)
        deepspeed.zero.Init(module=model, config_dict_or_path=dict(ds_config))
    return model


@contextmanager
def _sharding_at_load(ds_config: Mapping[str, Any]) -> Iterator[None]:
    # transformers keeps this object by weak reference only: while it lives, from_pretrained loads into shards.
    living = HfDeepSpeedConfig(dict(ds_config))
    yield
    del living


@dataclass
class _Ranks:
    """Whether the ranks have told one another what they can read."""

    have_met: bool = False


@contextmanager
def _reading_parts(path: str, world: World) -> Iterator[_Ranks]:
    # In from_pretrained rank 0 reads each weight and sends it to all, who cut their shards from it. There is no public
    # way around that, so this one step is replaced; all else (dtypes, buffers, ties, generation config) stays
    # transformers' own. A release without this step loads in its own way.
    ranks = _Ranks()
    if not hasattr(modeling_utils, "_load_state_dict_into_zero3_model"):
        yield ranks
        return
    send_whole = modeling_utils._load_state_dict_into_zero3_model

    def read_parts(model: PreTrainedModel, tensors: dict[str, Any], config: Any) -> tuple[list[str], set[str]]:
        sources = _sources(model, tensors, tensor_files(path), config)
        ranks.have_met = True
        if not all(world.gather(sources is not None)):
            return send_whole(model, tensors, config)  # type: ignore[no-any-return]
        assert sources is not None
        tensors.clear()  # unmaps the files: their pages would count as this rank's
        world.agree(_problem_of_reading(model, sources))
        problems, missing = send_whole(model, {}, config)
        return problems, missing - sources.keys()

    modeling_utils._load_state_dict_into_zero3_model = read_parts
    try:
        yield ranks
    finally:
        modeling_utils._load_state_dict_into_zero3_model = send_whole


def _sources(
    model: PreTrainedModel, tensors: Mapping[str, Any], files: Mapping[str, str] | None, config: Any
) -> dict[str, tuple[str, str]] | None:
    """Returns for each weight and stored buffer its file and its name there; None where that is not all of loading."""
    if files is None or files.keys() != tensors.keys():
        return None
    # A transposition, say, may keep name and shape.
    if any(
        set(conversion.source_patterns) & set(conversion.target_patterns) for conversion in config.weight_mapping or ()
    ):
        return None
    # Ties come last: a tied head is still a weight of its own here, stored or not.
    tied = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    sources = {}
    for name, weight in model.state_dict(keep_vars=True).items():
        stored = stored_name(model, name, files)
        if stored in files:
            if not _can_be_read(weight, tensors[stored].shape):
                return None
            sources[name] = (files[stored], stored)
        elif name not in tied:
            return None
    return sources


def _can_be_read(tensor: Tensor, shape: torch.Size) -> bool:
    if not isinstance(tensor, nn.Parameter):
        return tensor.shape == shape
    weight: ZeroParameter = tensor
    # Shards may also be in files (NVMe), quantized, or kept a second time (hpZ).
    return bool(
        hasattr(weight, "ds_tensor")
        and weight.ds_shape == shape
        and weight.ds_tensor.dtype == weight.dtype
        and weight.ds_tensor.final_location is None
        and weight.ds_secondary_tensor is None
    )


@torch.no_grad()
def _problem_of_reading(model: PreTrainedModel, sources: Mapping[str, tuple[str, str]]) -> str | None:
    weights: dict[str, ZeroParameter] = model.state_dict(keep_vars=True)
    try:
        for name, (path, stored) in sources.items():
            weight = weights[name]
            with safe_open(path, framework="pt") as file:
                if isinstance(weight, nn.Parameter):
                    shard = shard_of(weight)
                    shard.values.copy_(part_of_file(file, stored, shard))
                else:
                    weight.copy_(file.get_tensor(stored))
            weight._is_hf_initialized = True  # otherwise transformers would draw it at random
    except (OSError, SafetensorError) as error:
        return f"the weights of {model.name_or_path} cannot be loaded: {first_line(error)}"
    return None


def register_modules(scorer: Scorer) -> None:
    """Tells ZeRO-3 when a scorer needs which weights, which it cannot see for itself."""
    # The head is used outside of its own module.
    for parameter in (scorer.head.weight, scorer.head.bias):
        if parameter is not None:
            deepspeed.zero.register_external_parameter(scorer, parameter)
    # A layer's weights come and go together: one gather in place of one a matrix, and no rank may be the only one to
    # skip an expert.
    set_z3_leaf_modules(scorer.model, [GradientCheckpointingLayer], raise_if_not_found=False)


def fingerprint(model: nn.Module, world: World) -> str:
    """Returns a digest of all weights at work and buffers: of every bit and its place, not of the number of ranks.

    An adapter that changes nothing yet does not count, so that a model with one has its base's fingerprint.

    Each rank mixes each of its weights' bits with the weight's position and adds them up; sums of 64-bit integers wrap
    and commute, so they add over shards.
    """
    own, added = weights_at_work(model)
    if not _differs_from_zero([weight for name, weight in added.items() if starts_at_zero(name)], world):
        added = {}
    shards = [shard_of(parameter) for _, parameter in [*sorted(own.items()), *sorted(added.items())]]
    buffers = [_whole(buffer) for _, buffer in sorted(stored_buffers(model).items())]
    counted_once = [buffer if world.rank == 0 else buffer._replace(values=buffer.values[:0]) for buffer in buffers]
    return fingerprint_of([*shards, *counted_once], world)


def _differs_from_zero(weights: Sequence[ZeroParameter], world: World) -> bool:
    if not weights:
        return False
    values = (shard_of(weight).values.count_nonzero() for weight in weights)
    return bool(world.sum(torch.stack([count.to(world.device) for count in values]).sum()))


def fingerprint_of(shards: Iterable[Shard], world: World) -> str:
    """Returns the digest of tensors of which each rank has a part, the ranks' parts being disjoint."""
    total = world.sum(torch.stack([_mixed_sum(shard).to(world.device) for shard in shards]))
    return hashlib.sha256(total.cpu().numpy().tobytes()).hexdigest()


_CHUNK = 2**18  # elements; the mix needs a few 8-byte copies of each, which should stay in the cache


def _mixed_sum(shard: Shard) -> Tensor:
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[shard.values.element_size()]
    total = torch.zeros((), dtype=torch.int64, device=shard.values.device)
    for offset in range(0, shard.values.numel(), _CHUNK):
        bits = shard.values[offset : offset + _CHUNK].view(integer).long()
        place = torch.arange(len(bits), device=bits.device) + (shard.start + offset)
        # The finalizer of splitmix64 (Steele et al. 2014), on the bits offset by a multiple of the golden ratio.
        mixed = bits + (place + 1) * -7046029254386353131
        mixed = (mixed ^ (mixed >> 30)) * -4658895280553007687
        mixed = (mixed ^ (mixed >> 27)) * -7723592293110705685
        total += (mixed ^ (mixed >> 31)).sum()
    return total


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


def hollow(tensor: Tensor) -> Tensor:
    """Returns a tensor, of a parameter that may be sharded the whole one, without values: its shape and its dtype."""
    shape = cast(ZeroParameter, tensor).ds_shape if isinstance(tensor, nn.Parameter) else tensor.shape
    return torch.empty(shape, dtype=tensor.dtype, device="meta")


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
