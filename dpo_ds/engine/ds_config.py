"""A ds_config file into what an engine gets: read, held against the keys that DeepSpeed knows, completed with ours.

Batch sizes, optimizer and schedule never come from here; dtype and clipping may, where the run agrees.
"""

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_args

from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import BaseModel, ValidationError

from dpo_ds.errors import UserError

_DTYPE_SECTIONS = {"bfloat16": "bf16", "float16": "fp16"}
_MODELS: dict[str, type[BaseModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "bf16": DeepSpeedBF16Config,
    "fp16": DeepSpeedFP16Config,
}
_REFUSALS = (AssertionError, AttributeError, DeepSpeedConfigError, KeyError, TypeError, ValueError)
_OWNED = {
    "train_batch_size": "train.pairs_per_step says how large a step is",
    "train_micro_batch_size_per_gpu": "train.tokens_per_micro_batch says how large a micro-batch is",
    "gradient_accumulation_steps": "it follows from train.pairs_per_step and train.tokens_per_micro_batch",
    "managed_gradient_accumulation": "the number of micro-batches varies from step to step",
    "scheduler": "train.schedule and train.warmup_ratio set the learning rate",
    "compile.deepcompile": "DeepCompile wants as many micro-batches in every step, whose number varies here",
    "tensor_parallel": "ZeRO-3 shards every weight over all ranks, and checkpoints, fingerprints and the export take "
    "them together from there; for rows that are too long for one rank there is train.sequence_parallel_size",
    "torch_autocast": "weights are of model.dtype, and the head's gradient knows no other",
    "bfloat16": 'its name is "bf16"',
    "bf16.bf16_master_weights_and_grads": "at DPO's learning rates most updates of bfloat16 masters round to nothing; "
    "offload float32 masters instead (ds_configs/zero3_offload_optimizer.json)",
}
_OWNED_BY_POLICY = _OWNED | {"optimizer": "train.optimizer and the keys beside it say what it is"}
_OWNED_BY_REFERENCE = _OWNED | {
    "optimizer": "a reference never moves; with an optimizer DeepSpeed would allocate its states",
    "gradient_clipping": "a reference has no gradients",
    "zero_optimization.offload_optimizer": "a reference has no optimizer",
}


def stated_values(path: str | Path) -> dict[str, str | float]:
    """Returns the run's values that a policy's ds_config states too, under the run's dotted keys.

    Args:
        path: the policy's ds_config.

    Raises:
        UserError: the file is missing or no ds_config.
    """
    values = _read(path)
    stated: dict[str, str | float] = {}
    for dtype, section in _DTYPE_SECTIONS.items():
        if isinstance(values.get(section), dict) and values[section].get("enabled") is True:
            stated["model.dtype"] = dtype
    if "gradient_clipping" in values:
        clipping = values["gradient_clipping"]
        if isinstance(clipping, bool) or not isinstance(clipping, int | float):
            raise UserError(f"{path}: gradient_clipping must be a number, got {json.dumps(clipping)}")
        stated["train.gradient_clipping"] = float(clipping)
    return stated


def policy_ds_config(path: str | Path, *, dtype: str, gradient_clipping: float) -> dict[str, Any]:
    """Returns the DeepSpeed config of the engine that trains.

    Args:
        path: the ds_config file.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        gradient_clipping: largest norm of a step's gradient, 0 for none.

    Raises:
        UserError: the file cannot be read, has a key that DeepSpeed does not know or that the run file owns, or
            contradicts ``dtype`` or ``gradient_clipping``.
    """
    values = _checked(path, owned=_OWNED_BY_POLICY, dtype=dtype)
    clipping = values.get("gradient_clipping", gradient_clipping)
    if clipping != gradient_clipping:
        raise UserError(f"{path}: gradient_clipping is {clipping}, but train.gradient_clipping is {gradient_clipping}")
    # ZeRO-3 would sum bf16 gradients in bf16.
    types = {"grad_accum_dtype": "fp32", **values.get("data_types", {})}
    if types["grad_accum_dtype"] != "fp32":
        raise UserError(
            f'{path}: data_types.grad_accum_dtype must be "fp32", got {json.dumps(types["grad_accum_dtype"])}: '
            "gradients are summed over micro-batches in fp32"
        )
    # A step may hold any number of micro-batches, so the trainer says when it ends and scales by its pairs.
    ours = {"managed_gradient_accumulation": False, "gradient_clipping": gradient_clipping, "data_types": types}
    return _accepted(path, {**values, **ours})


def reference_ds_config(path: str | Path, *, dtype: str) -> dict[str, Any]:
    """Returns the DeepSpeed config of the frozen engine; without an optimizer it only shards and fetches weights.

    Args:
        path: the ds_config file.
        dtype: ``float32``, ``bfloat16`` or ``float16``: the policy's.

    Raises:
        UserError: the file cannot be read, has a key that DeepSpeed does not know or that has no meaning for a
            reference, or contradicts ``dtype``.
    """
    return _accepted(path, _checked(path, owned=_OWNED_BY_REFERENCE, dtype=dtype))


def _checked(path: str | Path, *, owned: Mapping[str, str], dtype: str) -> dict[str, Any]:
    values = _read(path)
    _check_names(path, values)
    for key, value in _leaves(values):
        if value == "auto":
            raise UserError(f'{path}: {key} is "auto", which only other trainers fill in: write the value')
    for key, reason in owned.items():
        section, _, name = key.rpartition(".")
        if name in (values.get(section, {}) if section else values):
            raise UserError(f"{path}: {key} must not be here: {reason}")
    stage = values.get("zero_optimization", {}).get("stage")
    if stage != 3:
        raise UserError(f"{path}: zero_optimization.stage must be 3, got {json.dumps(stage)}: the weights are sharded")
    return _with_dtype(path, values, dtype=dtype)


def _with_dtype(path: str | Path, values: dict[str, Any], *, dtype: str) -> dict[str, Any]:
    for other, section in _DTYPE_SECTIONS.items():
        is_enabled = values.get(section, {}).get("enabled", other == dtype)
        if is_enabled != (other == dtype):
            state = json.dumps(is_enabled)
            raise UserError(f"{path}: {section}.enabled is {state}, but model.dtype is {dtype}: make them agree")
    if dtype in _DTYPE_SECTIONS:
        section = _DTYPE_SECTIONS[dtype]
        return {**values, section: {**values.get(section, {}), "enabled": True}}
    return values


def _accepted(path: str | Path, values: dict[str, Any]) -> dict[str, Any]:
    # DeepSpeed wants a batch size and gives it no meaning here; a step's pairs are planned by the run.
    config = {**values, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    try:
        DeepSpeedConfig(config)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        got = json.dumps(first["input"], default=str)
        raise UserError(f"{path}: {key or error.title}: {first['msg']}, got {got}") from None
    except _REFUSALS as error:
        raise UserError(f"{path}: DeepSpeed refuses it: {' '.join(str(error).split())}") from None
    return config


def _read(path: str | Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
        if twice is not None:
            raise UserError(f"{path}: {twice} is given twice")
        return dict(pairs)

    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {error.lineno}: not valid JSON: {error.msg}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a DeepSpeed config, which is an object, got {json.dumps(values)}")
    return values


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if parts is None:
        yield key, value
    else:
        for name, part in parts:
            yield from _leaves(part, f"{key}.{name}" if key else str(name))


def _check_names(path: str | Path, values: Mapping[str, Any]) -> None:
    _compare(path, values, _names_read(None), within="")
    for section, value in values.items():
        model, names = _MODELS.get(section), _names_read(section)
        if not isinstance(value, dict):
            if model or names:
                raise UserError(f"{path}: {section} must be an object, got {json.dumps(value)}")
        elif model:
            _compare_with_model(path, value, model, within=f"{section}.")
        elif names:
            _compare(path, value, names, within=f"{section}.")


def _compare_with_model(path: str | Path, values: Mapping[str, Any], model: type[BaseModel], *, within: str) -> None:
    names = {name for field, info in model.model_fields.items() for name in (field, info.alias) if name}
    _compare(path, values, names, within=within)
    for field, info in model.model_fields.items():
        for kind in (info.annotation, *get_args(info.annotation)):
            inner = values.get(field)
            if isinstance(kind, type) and issubclass(kind, BaseModel) and isinstance(inner, dict):
                _compare_with_model(path, inner, kind, within=f"{within}{field}.")


def _compare(path: str | Path, values: Iterable[str], names: Iterable[str], *, within: str) -> None:
    for name in values:
        if name not in names:
            nearest = difflib.get_close_matches(name, names, n=1, cutoff=0)[0]
            raise UserError(f"{path}: DeepSpeed knows no key {within}{name}; did you mean {within}{nearest}?")


class _Asked(dict[str, Any]):
    """A config that writes down which keys its reader asks for."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.names: set[str] = set()

    def __contains__(self, name: object) -> bool:
        self.names.add(str(name))
        return super().__contains__(name)

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)

    def keys(self) -> Any:
        return self


@cache
def _names_read(section: str | None) -> frozenset[str]:
    # DeepSpeed has no list of its keys, and ignores one that it does not know: it looks up those that it wants. So the
    # list is what its own reader looks up. A section with a pydantic model looks up nothing, and refuses by itself; a
    # key that is no section fails here.
    asked = _Asked()
    config = _Asked({"train_micro_batch_size_per_gpu": 1} | ({section: asked} if section else {}))
    try:
        DeepSpeedConfig(config)
    except _REFUSALS:
        return frozenset()
    return frozenset(asked.names if section else config.names)
