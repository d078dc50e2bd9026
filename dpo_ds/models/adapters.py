"""Low-rank adapters by peft: what trains beside a frozen base, and the base, or the adapter's start, as the reference.

peft's layers take the place of a model's own; the model stays the object that it was. No rank may enter.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from dpo_ds.errors import UserError, first_line

if TYPE_CHECKING:
    from peft import LoraConfig  # a second and a half, for runs that have an adapter

ALL_LINEAR = "all-linear"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
_TRAINED = "default"  # what peft calls an adapter that nobody named
_START = "reference"
_PART = re.compile(r"\.(lora_[AB]|lora_magnitude_vector)\.(\w+)\.weight$")


@dataclass(frozen=True)
class Adapter:
    """LoRA (Hu et al. 2021, arXiv:2106.09685) and its kin.

    Attributes:
        r: rank of the update.
        alpha: the update counts ``alpha / r`` times, or ``alpha / sqrt(r)`` times with ``use_rslora``.
        target_modules: names of the linear layers that get one, or ``all-linear`` for all but the head.
        use_dora: whether magnitudes train apart from directions (Liu et al. 2024, arXiv:2402.09353).
        use_rslora: whether the scale is that of rank-stabilized LoRA (Kalajdzievski 2023, arXiv:2312.03732).
        init: distribution of ``A``: ``default`` is Kaiming's uniform one; ``B`` is 0, so the start changes nothing.
        seed: of ``A``; the values depend on nothing else.
        path: folder of an adapter to go on from, which decides all of the above; None begins anew.
    """

    r: int = 16
    alpha: float = 32
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    use_dora: bool = False
    use_rslora: bool = False
    init: Literal["default", "gaussian"] = "default"
    seed: int = 0
    path: str | None = None

    def peft_config(self) -> "LoraConfig":
        """Returns the same in peft's terms.

        Raises:
            UserError: ``path`` holds no LoRA adapter.
        """
        from peft import LoraConfig

        if self.path is not None:
            return _stored_config(self.path)
        targets = self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)
        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            target_modules=targets,
            use_dora=self.use_dora,
            use_rslora=self.use_rslora,
            init_lora_weights=True if self.init == "default" else self.init,
            task_type="CAUSAL_LM",
        )


def attach(model: PreTrainedModel, adapter: Adapter, *, keeps_start: bool = False) -> None:
    """Gives a model an adapter, whose weights alone train from now on.

    Args:
        model: one without an adapter; its own weights may be sharded, the adapter's are whole.
        adapter: which.
        keeps_start: whether the adapter as it is now stays beside it, frozen, as the reference.

    Raises:
        UserError: the adapter does not fit the model.
    """
    from peft import inject_adapter_in_model

    config = adapter.peft_config()
    names = [_START, _TRAINED] if keeps_start else [_TRAINED]
    with torch.random.fork_rng(devices=[]):
        for name in names:  # the last one is the one at work
            torch.manual_seed(adapter.seed)
            try:
                inject_adapter_in_model(config, model, adapter_name=name)
            except ValueError as error:
                raise UserError(f"the adapter does not fit {type(model).__name__}: {first_line(error)}") from error
    if adapter.path is not None:
        for name in names:
            _fill(_of_adapter(model, name), adapter.path)
    for layer in _layers(model):
        layer.set_adapter(_TRAINED)
    # Hooks that free a sharded layer behind its backward wait for the gradient of its input, which a frozen embedding's
    # output would not have.
    model.enable_input_require_grads()


def check_adapter(adapter: Adapter, config: PretrainedConfig) -> None:
    """Finds out, without weights, whether a model can have an adapter.

    Raises:
        UserError: it cannot; unknown modules are named with the nearest that the model has.
    """
    targets = adapter.peft_config().target_modules
    if targets is None or isinstance(targets, str):
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    ends = sorted({name.split(".")[-1] for name in linear})
    head = model.get_output_embeddings()
    heads = [name for name, module in model.named_modules() if module is head]
    for target in sorted(targets):
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            nearest = difflib.get_close_matches(target, ends, n=1, cutoff=0)[0]
            raise UserError(
                f"adapter.target_modules must name linear layers of the model ({', '.join(ends)}), or be "
                f"{ALL_LINEAR}, got {target!r}; did you mean {nearest}?"
            )
        if target in heads:
            raise UserError(f"adapter.target_modules must not name the head, got {target!r}: it is applied in chunks")


@contextmanager
def as_reference(model: nn.Module) -> Iterator[None]:
    """Makes a model compute what its adapter began with, for a while: the base, or the adapter that it went on from."""
    layers = list(_layers(model))
    has_start = any(_START in layer.lora_A for layer in layers)
    for layer in layers:
        if has_start:
            layer.set_adapter(_START, inference_mode=True)
        else:
            layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
            layer.set_adapter(_TRAINED)


def weights_at_work(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Returns the weights that a forward uses now: the model's own, by their names without an adapter, and those of it.

    A model without an adapter has no second part, nor has one whose adapter is switched off.
    """
    active = {name for layer in _layers(model) if not layer.disable_adapters for name in layer.active_adapters}
    own, added = {}, {}
    for name, parameter in model.named_parameters():
        part = _PART.search(name)
        if part is None:
            own[name.replace(".base_layer.", ".")] = parameter
        elif part[2] in active:
            added[name.replace(f".{part[2]}.", ".")] = parameter
    return own, added


def starts_at_zero(name: str) -> bool:
    """Says whether one of an adapter's weights begins as 0; while all such are 0, the adapter changes nothing."""
    return ".lora_B." in name


class Published(NamedTuple):
    """What of a model is exported.

    Attributes:
        weights: by the names that they have in files.
        pattern: names of the files.
        is_whole: whether they are a model, to which buffers belong, too.
    """

    weights: Mapping[str, nn.Parameter]
    pattern: str
    is_whole: bool


def published(model: PreTrainedModel, *, adapter_alone: bool) -> Published:
    """Returns a model's own weights, or those of its adapter by peft's names for files.

    Args:
        model: with or without an adapter.
        adapter_alone: whether it is the adapter that is exported; else those of ``merging`` are to be merged.
    """
    if not adapter_alone:
        return Published(weights_at_work(model)[0], "model{suffix}.safetensors", is_whole=True)
    return Published(_of_adapter(model, _TRAINED), ADAPTER_WEIGHTS.replace(".", "{suffix}.", 1), is_whole=False)


def merging(model: nn.Module) -> dict[str, Any]:
    """Returns the layers that have an adapter, by the names that their weights have without one."""
    return {
        f"{name}.weight".replace(".base_layer.", "."): layer
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A")
    }


@torch.no_grad()
def merged(layer: Any) -> Tensor:
    """Returns what a layer's weight would be with its adapter merged into it; the layer stays as it is.

    Args:
        layer: one of ``merging``, with whole weights.
    """
    weight = layer.get_base_layer().weight
    own = weight.data
    layer.merge(safe_merge=True, adapter_names=[_TRAINED])
    found: Tensor = weight.data
    weight.data = own
    layer.merged_adapters.clear()
    return found


def save_configs(model: PreTrainedModel, config: PretrainedConfig, folder: Path, *, adapter_of: str | None) -> None:
    """Writes what belongs to ``published`` weights beside them: a model's config, or its adapter's.

    Args:
        model: with or without an adapter.
        config: what the model was loaded with.
        folder: where they go.
        adapter_of: folder or hub id of the adapter's base; None for a model.
    """
    if adapter_of is not None:
        adapter = model.peft_config[_TRAINED]
        adapter.base_model_name_or_path = adapter_of
        adapter.inference_mode = True
        adapter.save_pretrained(folder)
        return
    config.dtype = model.dtype
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _layers(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if hasattr(module, "lora_A"))


def _of_adapter(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    found = {}
    for name, parameter in model.named_parameters():
        part = _PART.search(name)
        if part is not None and part[2] == adapter:
            # peft's files leave the adapter's name out, and of a magnitude the attribute, too.
            end = "" if part[1] == "lora_magnitude_vector" else ".weight"
            found[f"base_model.model.{name[: part.start()]}.{part[1]}{end}"] = parameter
    return found


@torch.no_grad()
def _fill(weights: Mapping[str, nn.Parameter], path: str) -> None:
    try:
        stored: dict[str, Tensor] = load_file(Path(path) / ADAPTER_WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"adapter.path {path} cannot be read: {first_line(error)}") from error
    odd = sorted(stored.keys() ^ weights.keys())
    odd += [name for name in sorted(stored.keys() & weights.keys()) if stored[name].shape != weights[name].shape]
    if odd:
        raise UserError(f"adapter.path {path} does not fit model.policy: {odd[0]}; name the adapter's own base")
    for name, weight in weights.items():
        weight.copy_(stored[name])


def _stored_config(path: str) -> "LoraConfig":
    from peft import LoraConfig

    if not (Path(path) / ADAPTER_CONFIG).is_file():
        raise UserError(f"adapter.path must be a folder with an {ADAPTER_CONFIG}, got {path}")
    try:
        config = LoraConfig.from_pretrained(path)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"adapter.path {path} holds no LoRA adapter: {first_line(error)}") from error
    if config.peft_type != "LORA":
        raise UserError(f"adapter.path {path} must hold a LoRA adapter, got {config.peft_type}")
    unknown = {"lora_dropout": config.lora_dropout, "modules_to_save": config.modules_to_save, "bias": config.bias}
    for name, value in unknown.items():
        if value not in (None, 0, "none"):
            raise UserError(f"adapter.path {path} has {name} {value!r}, which is not supported; go on without it")
    config.inference_mode = False
    return config
