"""The tensors as which published checkpoints hold a model's weights, where those are not the weights themselves.

A mixture's experts are one tensor in transformers' models and one tensor each in files, which other programs read.
"""

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion


def as_stored(model: PreTrainedModel, name: str, weight: Tensor) -> dict[str, Tensor]:
    """Returns a weight as the tensors of a checkpoint, by their names there; most weights are one, under their own.

    Args:
        model: the one that has the weight.
        name: the weight's.
        weight: whole; it may have a shape alone, as on the device ``meta``.
    """
    stored: dict[str, Tensor] = revert_weight_conversion(model, {name: weight})
    return stored
