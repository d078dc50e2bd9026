"""The loss of a mixture of experts' routers, which keeps few experts from getting all tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func


def why_no_routing_loss(config: PretrainedConfig) -> str | None:
    """Returns why a model of this config has no such loss, or None."""
    if getattr(config.get_text_config(), "router_aux_loss_coef", None) is not None:
        return None
    return f"a model of type {config.model_type} has no routers that transformers would balance"


def routing_loss(
    model: PreTrainedModel, router_logits: Sequence[Tensor], lengths: Tensor | None, *, row: int
) -> Tensor:
    """Returns ``experts * sum_i f_i P_i``: Fedus et al. 2021, equations 4 to 6, arXiv:2101.03961; a scalar.

    ``f_i`` is the share of tokens that expert i got, ``P_i`` the mean of its probabilities, over all layers at once, as
    Mixtral's authors train it. Tokens of this micro-batch are balanced, not those of the step.

    Args:
        model: a mixture of experts.
        router_logits: of each layer, ``(rows * row, experts)``.
        lengths: ``(rows,)``, tokens of each row, the rest being padding; None: all are tokens.
        row: positions of a row.
    """
    is_token = None if lengths is None else torch.arange(row, device=lengths.device) < lengths[:, None]
    loss: Tensor = load_balancing_loss_func(
        tuple(router_logits), model.num_experts, model.num_experts_per_tok, is_token
    )
    return loss
