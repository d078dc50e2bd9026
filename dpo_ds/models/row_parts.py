"""Rows that several ranks compute together, each a part of every row: what a model must be like, and what it asks for.

Who these ranks are is the engine's business.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor
from transformers import PretrainedConfig

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values ``(batch, heads, length, width)`` -> ``(batch, length, heads, width)``."""

_GLOBAL_ROPE = ("dynamic", "longrope")


class RowParts(Protocol):
    """The ranks that share rows, seen from one of them. Its methods are collective among them.

    Attributes:
        part: which part of every row is this rank's, in ``[0, parts)``.
        parts: how many ranks there are.
    """

    part: int
    parts: int

    def attended(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Returns this rank's part of what ``attend`` makes of whole rows, as parts of rows come in."""

    def sum(self, values: Tensor) -> Tensor:
        """Returns the sum of the ranks' values; each one's gradient is that of the sum."""


def why_not_splittable(config: PretrainedConfig, parts: int) -> str | None:
    """Returns why so many ranks cannot share the rows of a model, None where its config does not speak against it.

    Args:
        config: the model's.
        parts: how many ranks.
    """
    text = config.get_text_config()
    heads = text.num_attention_heads
    keys = getattr(text, "num_key_value_heads", None) or heads
    if heads % parts:
        return f"its {heads} attention heads cannot be dealt to {parts} ranks in equal parts"
    if keys % parts and parts % keys:
        return f"its {keys} heads of keys and values cannot be dealt to {parts} ranks in equal parts"
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = {str(of.get("rope_type")) for of in (rope, *rope.values()) if isinstance(of, dict)}
    for kind in _GLOBAL_ROPE:
        if kind in kinds:
            return f"its rotary positions ({kind}) depend on how long the row is, which no part of it tells"
    return None
