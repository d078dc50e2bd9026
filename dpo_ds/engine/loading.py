"""Loading a model into the shards of ZeRO-3, each rank its own parts of the files where that can be."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.utils import groups
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, modeling_utils
from transformers.integrations import HfDeepSpeedConfig

from dpo_ds.engine.shards import ZeroParameter, shard_of
from dpo_ds.engine.weight_files import difference_from_files, part_of_file, stored_name, tensor_files
from dpo_ds.engine.world import World
from dpo_ds.errors import RunError, UserError, first_line
from dpo_ds.models.adapters import Adapter, attach
from dpo_ds.models.causal_lm import load_causal_lm
from dpo_ds.models.hub import held


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
        _forget_group_of_hpz()
        deepspeed.zero.Init(module=model, config_dict_or_path=dict(ds_config))
    return model


def _forget_group_of_hpz() -> None:
    # DeepSpeed keeps one for the whole process: a second model with hpZ would be refused, and one without take part.
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


@contextmanager
def _sharding_at_load(ds_config: Mapping[str, Any]) -> Iterator[None]:
    _forget_group_of_hpz()
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
