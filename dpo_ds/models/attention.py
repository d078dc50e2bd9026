"""The attention of packed rows: pairs do not see each other, and the responses of a pair share their prompt.

It takes the place of a model's own attention through transformers' attention interface. No rank may enter.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dpo_ds.data.batch import Span
from dpo_ds.errors import UserError
from dpo_ds.models.row_parts import RowParts

ATTENTION = "shared_prompt"
"""Name under which transformers knows this attention."""

QUERY_BLOCK = 256
"""Queries whose scores exist at a time, where no kernel does without them."""

WHOLE_PAIR = 512
"""Tokens of a pair up to which all its scores are computed at once, those that count for nothing, too."""

_LAYERS = {"full_attention", "sliding_attention"}


def why_not_packable(model: PreTrainedModel) -> str | None:
    """Returns why pairs cannot share rows in this model, None where nothing speaks against it.

    It looks at the model's code and config only; ``Scorer.why_not_packed`` has the proof.
    """
    name = type(model).__name__
    if not model.is_backend_compatible():
        return f"{name} does not use transformers' attention interface"
    config = model.config.get_text_config()
    layers = set((config.layer_types if hasattr(config, "layer_types") else None) or ()) - _LAYERS
    if layers:
        return f"{name} has layers of another kind than full and sliding attention ({', '.join(sorted(layers))})"
    return None


def share_prompts(model: PreTrainedModel) -> None:
    """Gives the model the attention that packed batches need; plain batches score as before.

    Args:
        model: one of which ``why_not_packable`` says None.
    """
    AttentionInterface.register(ATTENTION, shared_prompt_attention)
    AttentionMaskInterface.register(ATTENTION, _window_of_mask)
    model.set_attn_implementation(ATTENTION)


def shares_prompts(model: PreTrainedModel) -> bool:
    """Whether the model has this attention."""
    return bool(model.config._attn_implementation == ATTENTION)


@contextmanager
def sharing_prompts(model: PreTrainedModel) -> Iterator[None]:
    """Gives the model this attention for a while."""
    own = model.config._attn_implementation
    share_prompts(model)
    try:
        yield
    finally:
        model.set_attn_implementation(own)


@contextmanager
def attending_alone(model: PreTrainedModel) -> Iterator[None]:
    """Gives the model an attention for a while that takes padding on the left and a cache, as generation needs."""
    own = model.config._attn_implementation
    if own == ATTENTION:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if own == ATTENTION:
            share_prompts(model)


def shared_prompt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: int | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    spans: tuple[Span, ...] = (),
    row_parts: RowParts | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attends within each pair, causally, from the rejected response past the chosen one.

    Wang & Hegde 2024, section 3, arXiv:2410.20305.

    Args:
        module: the layer.
        query: ``(batch, heads, length, width)``.
        key: ``(batch, key_value_heads, length, width)``.
        value: ``(batch, key_value_heads, length, value_width)``.
        attention_mask: what takes the mask's place: the layer's sliding window, or None.
        dropout: must be 0.
        scaling: factor on the scores; None: ``width ** -0.5``.
        sliding_window: the layer's window, used where the mask does not tell.
        softcap: bound of ``softcap * tanh(scores / softcap)`` (Gemma 2), or None.
        spans: the pairs of every row; without them a row is one sequence.
        row_parts: who has the other parts of the rows; None: nobody, ``length`` is theirs.
        others: what models hand to every attention.

    Returns:
        ``(batch, length, heads, value_width)``, and no weights.

    Raises:
        UserError: the layer wants something that packed pairs cannot have.
    """
    _refuse(module, query, key, attention_mask, dropout=dropout, others=others)
    attend = partial(
        _attended,
        module,
        window=sliding_window if attention_mask is None else attention_mask,
        scaling=scaling,
        softcap=softcap,
        spans=spans,
    )
    return (attend if row_parts is None else partial(row_parts.attended, attend))(query, key, value), None


def _attended(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int | None,
    scaling: float | None,
    softcap: float | None,
    spans: tuple[Span, ...],
) -> Tensor:
    """Returns the attention of whole rows."""
    longest = max((s.prompt + max(s.chosen, s.rejected) for s in spans), default=query.shape[2])
    if window is not None and window >= longest:
        window = None
    if not spans and window is None and softcap is None:
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling)[0]  # type: ignore[no-any-return]
    spans = spans or (Span(0, query.shape[2], 0, 0),)
    if query.device.type == "cuda":
        mask = block_mask(spans, window=window, device=query.device)
        return flex_attention_forward(module, query, key, value, mask, scaling=scaling, softcap=softcap)[0]  # type: ignore[no-any-return]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attended: Tensor = _BlockedAttention.apply(query, key, value, spans, window, scale, softcap)  # type: ignore[no-untyped-call]
    return attended


def _refuse(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: object,
    *,
    dropout: float,
    others: dict[str, Any],
) -> None:
    causal = others.get("is_causal")
    wants = {
        "a mask of its own": isinstance(attention_mask, Tensor),
        "dropout": dropout > 0,
        "attention in both directions": causal is False or (causal is None and not getattr(module, "is_causal", True)),
        "a cache": key.shape[2] != query.shape[2],
        "attention sinks": others.get("s_aux") is not None,
        "a bias on the scores": others.get("position_bias") is not None,
    }
    for what, wanted in wants.items():
        if wanted:
            raise UserError(f"{type(module).__name__} wants {what}, which packed pairs cannot have; use padded rows")


def _window_of_mask(*_: Any, local_size: int | None = None, **__: Any) -> int | None:
    # Some models (Phi-3.5-MoE, Qwen2-MoE) tell their window to the mask and not to the attention.
    return local_size


@lru_cache(maxsize=8)  # all layers of a micro-batch share it, in forward and in backward
def block_mask(spans: tuple[Span, ...], *, window: int | None, device: torch.device) -> BlockMask:
    """Returns FlexAttention's mask of a packed row.

    Args:
        spans: the pairs.
        window: tokens that a token sees, itself included; None: all before it.
        device: of the row.
    """
    rule = _visible(spans, window=window, device=device)
    return create_block_mask(
        lambda _batch, _head, query, key: rule(query, key),
        None,
        None,
        spans[-1].end,
        spans[-1].end,
        device=device,
        _compile=device.type == "cuda",
    )


def _visible(
    spans: tuple[Span, ...], *, window: int | None, device: torch.device
) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns the rule of who sees whom, a function of the places of queries and keys in the row."""
    lengths = torch.tensor([(s.prompt, s.chosen, s.rejected) for s in spans])
    origins = torch.tensor([(s.start, s.start, s.start + s.chosen) for s in spans])
    part = torch.arange(3).repeat(len(spans)).repeat_interleave(lengths.flatten()).to(device)
    pair = torch.arange(len(spans)).repeat_interleave(lengths.sum(1)).to(device)
    position = (torch.arange(spans[-1].end) - origins.flatten().repeat_interleave(lengths.flatten())).to(device)

    def is_visible(query: Tensor, key: Tensor) -> Tensor:
        distance = position[query] - position[key]
        visible = (pair[query] == pair[key]) & ((part[key] == 0) | (part[key] == part[query])) & (distance >= 0)
        return visible if window is None else visible & (distance < window)

    return is_visible


class _Block(NamedTuple):
    """Queries and the keys that they see, of a whole short pair, or of a part of a long one.

    Attributes:
        rows: the queries.
        columns: the keys: the prompt's and the response's own, or both in one where they are neighbours.
        behind: of a part, how many of the keys lie before the first query.
        pair: of a whole pair, the tokens of its prompt, its chosen and its rejected response.
    """

    rows: slice
    columns: tuple[slice, ...]
    behind: int = 0
    pair: tuple[int, int, int] | None = None


def _blocks(spans: tuple[Span, ...], window: int | None) -> Iterator[_Block]:
    for span in spans:
        if span.end - span.start <= WHOLE_PAIR:
            whole = slice(span.start, span.end)
            yield _Block(whole, (whole,), pair=(span.prompt, span.chosen, span.rejected))
        else:
            yield from _blocks_of(span, window)


def _blocks_of(span: Span, window: int | None) -> Iterator[_Block]:
    prompt_and_chosen = span.prompt + span.chosen
    # Positions count from the prompt's first token; a rejected one lies `gap` tokens further in the row.
    for begin, end, gap in (
        (0, prompt_and_chosen, 0),
        (span.prompt, span.prompt + span.rejected, span.chosen),
    ):
        for first in range(begin, end, QUERY_BLOCK):
            last = min(first + QUERY_BLOCK, end)
            oldest = 0 if window is None else max(0, first - window + 1)
            shared = slice(span.start + oldest, span.start + span.prompt)
            own = slice(span.start + gap + max(oldest, span.prompt), span.start + gap + last)
            columns = (slice(shared.start, own.stop),) if gap == 0 else (shared, own)
            yield _Block(
                slice(span.start + gap + first, span.start + gap + last),
                tuple(c for c in columns if c.stop > c.start),
                behind=first - oldest,
            )


class _BlockedAttention(torch.autograd.Function):
    """Attention by plain matrix products over blocks of queries, written in place, with grouped heads never copied.

    For short rows on a CPU these products are several times as fast as the fused kernel, above all in backward.
    Weights of long rows are computed again in backward, so memory grows with the length and not with its square.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        spans: tuple[Span, ...],
        window: int | None,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        batch, heads, length, _ = query.shape
        out = query.new_empty(batch, length, heads, value.shape[-1])
        kept: list[Tensor | None] = []
        for block in _blocks(spans, window):
            queries, keys, values = _of_block(block, query, key, value)
            weights, _ = _weights(queries, keys, block, window=window, scale=scale, softcap=softcap)
            _put(out.transpose(1, 2)[:, :, block.rows], torch.bmm(weights, values))
            keep = weights.shape[-1] <= QUERY_BLOCK and softcap is None and any(ctx.needs_input_grad)
            kept.append(weights if keep else None)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.settings = (spans, window, scale, softcap)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        spans, window, scale, softcap = ctx.settings
        blocks = list(_blocks(spans, window))
        # The keys of a pair in several blocks gather from all of them.
        is_sum = any(block.pair is None for block in blocks)
        dquery = torch.empty_like(query)
        dkey, dvalue = (torch.zeros_like(x, dtype=torch.float32 if is_sum else x.dtype) for x in (key, value))
        for block, weights in zip(blocks, kept, strict=True):
            queries, keys, values = _of_block(block, query, key, value)
            slope = None
            if weights is None:
                weights, slope = _weights(queries, keys, block, window=window, scale=scale, softcap=softcap)
            dout = _fold(grad.transpose(1, 2)[:, :, block.rows], key)
            dweights = torch.bmm(dout, values.transpose(1, 2))
            dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
            if slope is not None:
                dscores.mul_(slope)
            _put(dquery[:, :, block.rows], torch.bmm(dscores, keys).mul_(scale))
            _add(dkey, block, torch.bmm(dscores.transpose(1, 2), queries).mul_(scale))
            _add(dvalue, block, torch.bmm(weights.transpose(1, 2), dout))
        return dquery, dkey.to(key.dtype), dvalue.to(value.dtype), None, None, None, None


def _of_block(block: _Block, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    keys, values = (_joined([x[:, :, columns] for columns in block.columns]) for x in (key, value))
    return _fold(query[:, :, block.rows], key), _fold(keys, key), _fold(values, key)


def _joined(parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    # torch.cat of strided parts takes several times as long on a CPU as copying them does.
    whole = parts[0].new_empty(*parts[0].shape[:2], sum(part.shape[2] for part in parts), parts[0].shape[3])
    for target, part in zip(torch.split(whole, [part.shape[2] for part in parts], dim=2), parts, strict=True):
        target.copy_(part)
    return whole


def _fold(x: Tensor, key: Tensor) -> Tensor:
    """``(batch, heads, n, width)`` -> ``(batch * key_value_heads, heads per key * n, width)``."""
    return x.reshape(key.shape[0] * key.shape[1], -1, x.shape[-1]).contiguous()


def _put(target: Tensor, folded: Tensor) -> None:
    target.copy_(folded.view(target.shape))


def _add(target: Tensor, block: _Block, folded: Tensor) -> None:
    grads = folded.view(*target.shape[:2], -1, target.shape[-1])
    parts = torch.split(grads, [c.stop - c.start for c in block.columns], dim=2)
    for columns, part in zip(block.columns, parts, strict=True):
        target[:, :, columns].add_(part)


def _weights(
    queries: Tensor, keys: Tensor, block: _Block, *, window: int | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Returns the attention weights of a block and, with a softcap, the slope of the capped scores."""
    mask = _mask(block, window=window, dtype=queries.dtype, device=queries.device)
    scores = queries.new_empty(len(queries), queries.shape[1], keys.shape[1])
    by_head = scores.view(len(queries), -1, *mask.shape)  # the heads that share a key lie below each other
    if softcap is None:
        by_head.copy_(mask)
        return scores.baddbmm_(queries, keys.transpose(1, 2), alpha=scale).softmax(-1), None
    capped = torch.bmm(queries, keys.transpose(1, 2)).mul_(scale / softcap).tanh_()
    torch.mul(capped, softcap, out=scores)
    by_head.add_(mask)
    return scores.softmax(-1), 1 - capped.square()


def _mask(block: _Block, *, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    if block.pair is not None:
        return _mask_of_pair(block.pair, window=window, dtype=dtype, device=device)
    rows, columns = block.rows.stop - block.rows.start, sum(c.stop - c.start for c in block.columns)
    hidden = torch.full((rows, columns), -torch.inf, dtype=dtype, device=device)
    mask = hidden.triu(block.behind + 1)
    return mask if window is None else mask.add_(hidden.tril_(block.behind - window))


@lru_cache(maxsize=64)  # all layers of a micro-batch share it, in forward and in backward
def _mask_of_pair(
    pair: tuple[int, int, int], *, window: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    place = torch.arange(sum(pair), device=device)
    visible = _visible((Span(0, *pair),), window=window, device=device)(place[:, None], place[None, :])
    return torch.zeros((), dtype=dtype, device=device).where(visible, -torch.inf)
