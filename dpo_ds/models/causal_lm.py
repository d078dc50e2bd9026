"""Loading a Hugging Face causal language model, and finding its backbone and its head.

No rank may enter: whoever wants the weights sharded opens that context around the call.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_ds.dropout import disable_dropout
from dpo_ds.errors import UserError, first_line
from dpo_ds.logps import Slope
from dpo_ds.models import x_transformer

x_transformer.register()


def load_model_config(path: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Reads a model's config without its weights.

    Raises:
        UserError: there is no such model, or it is no causal language model.
    """
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the model {path} cannot be opened ({first_line(error)}); name a folder with a config.json or a hub id"
        ) from error


def longest_sequence(config: PretrainedConfig) -> int | None:
    """Returns the number of positions the model was made for, None where its config names none."""
    text_config = config.get_text_config()
    return text_config.max_position_embeddings if hasattr(text_config, "max_position_embeddings") else None


def vocabulary_size(config: PretrainedConfig) -> int:
    """Returns the rows of the model's embedding."""
    return int(config.get_text_config().vocab_size)


def load_causal_lm(
    path: str, *, dtype: torch.dtype, attention: str = "auto", trust_remote_code: bool = False
) -> PreTrainedModel:
    """Loads a causal language model with its dropout off.

    Args:
        path: folder or hub id.
        dtype: of the weights.
        attention: ``auto``, or the name of an attention that transformers knows.
        trust_remote_code: whether code that comes with the weights may run.

    Raises:
        UserError: the checkpoint cannot be opened, or does not fill the model exactly.
    """
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=None if attention == "auto" else attention,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, UnpicklingError) as error:
        raise UserError(f"the weights of {path} cannot be loaded: {first_line(error)}") from error
    except RuntimeError as error:
        title, _, mismatch = str(error).partition(":\n")
        if title.startswith("Failed to apply weight conversion for"):
            raise UserError(f"the checkpoint {path} does not fill its model: {first_line(error)}") from error
        if not title.startswith("Error(s) in loading state_dict"):
            raise
        raise UserError(f"the checkpoint {path} does not fill its model: {mismatch.strip().splitlines()[0]}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if report[kind]:
            named = ", ".join(str(key) for key in sorted(report[kind])[:3])
            raise UserError(
                f"the checkpoint {path} does not fill its model: {len(report[kind])} {kind.replace('_', ' ')} "
                f"({named}); name a complete checkpoint of this architecture"
            )
    disable_dropout(model)
    # How names of old files were read, which says nothing of how to write any.
    vars(model).pop("_weight_conversions", None)
    return model


def products(model: PreTrainedModel, size: Callable[[Tensor], int] = Tensor.numel) -> tuple[int, int, int]:
    """Returns how many parameters multiply every token, how many the head has, and ``StepCost.attention``.

    Args:
        model: with a linear head.
        size: of a parameter that may be sharded.
    """
    head = head_of(model).weight
    lookups = {id(model.get_input_embeddings().weight), id(head)}
    config = model.config.get_text_config()
    attention = 2 * config.num_hidden_layers * config.hidden_size
    return sum(size(p) for p in model.parameters() if id(p) not in lookups), size(head), attention


Checkpointing = Literal["none", "full", "offload"]
"""What layers keep for backward: all; their inputs, and compute the rest again; these inputs, in host memory."""


def checkpoint_activations(model: PreTrainedModel, how: Checkpointing) -> None:
    """Lets each layer keep for backward what is said.

    Raises:
        UserError: the model's layers cannot compute anything again.
    """
    if how == "none":
        return
    if not model.supports_gradient_checkpointing:
        raise UserError(
            f"train.activation_checkpointing must be none for {type(model).__name__}, whose layers cannot compute "
            f"again, got {how}"
        )
    # The second is its name before transformers 5.23.
    renamed = hasattr(model, "activation_checkpointing_enable")
    enable = model.activation_checkpointing_enable if renamed else model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for layer in model.modules() if how == "offload" else ():
        if isinstance(layer, GradientCheckpointingLayer):
            layer._gradient_checkpointing_func = partial(_with_inputs_on_host, layer._gradient_checkpointing_func)


def _with_inputs_on_host(run: Callable[..., Any], *args: Any) -> Any:
    # Nothing but the inputs meets this hook: what is saved inside meets the checkpoint's own.
    with save_on_cpu(pin_memory=torch.cuda.is_available()):
        return run(*args)


@dataclass(frozen=True)
class Head:
    """Everything that a model does between its last hidden state and its logits.

    Attributes:
        weight: ``(vocab, width)``, perhaps tied to the embedding, perhaps sharded.
        bias: ``(vocab,)`` or None.
        scale: factor on the logits (Cohere, Granite).
        softcap: bound of ``softcap * tanh(logits / softcap)`` (Gemma 2), or None.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float
    softcap: float | None

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Maps hidden states ``(tokens, width)`` to the logits of some of the vocabulary, ``(tokens, rows)``.

        Args:
            hidden: the states.
            weight: rows of the weight, ``(rows, width)``.
            bias: the same rows of the bias, if there is one.
        """
        logits = F.linear(hidden, weight, bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    @property
    def slope(self) -> Slope | None:
        """The derivative of the logits by the linear layer's output, as ``chunked_target_logps`` wants it."""
        if self.softcap is None and self.scale == 1.0:
            return None
        return self._slope

    def _slope(self, logits: Tensor) -> Tensor:
        slope = torch.full_like(logits, self.scale)
        return slope if self.softcap is None else slope.mul_(1 - (logits / self.softcap).square_())


def head_of(model: PreTrainedModel) -> Head:
    """Returns the model's head. Whether it is all of it, a probe must tell: see ``Scorer``.

    Raises:
        UserError: the model has no linear head.
    """
    linear = model.get_output_embeddings()
    if not isinstance(linear, nn.Linear):
        raise UserError(f"model {type(model).__name__} has no linear language-model head; use a causal language model")
    config = model.config.get_text_config().to_dict()
    scale = float(config.get("logit_scale") or 1.0) / float(config.get("logits_scaling") or 1.0)
    softcap = config.get("final_logit_softcapping")
    return Head(linear.weight, linear.bias, scale, float(softcap) if softcap else None)
