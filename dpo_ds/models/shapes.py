"""What is known of a model without its weights: its sizes, and what a micro-batch makes it hold beside them.

The latter is found by running it on tensors without values. No rank may enter.
"""

import copy
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo_ds.data.batch import PairBatch, packed_batch, padded_batch, part_of_rows
from dpo_ds.data.tokenization import TokenizedPair
from dpo_ds.dropout import disable_dropout
from dpo_ds.memory import Parameters, Peaks
from dpo_ds.models.adapters import Adapter, attach
from dpo_ds.models.causal_lm import Checkpointing, checkpoint_activations
from dpo_ds.models.lean import keep_little
from dpo_ds.models.scorer import GPU_LOGIT_CHUNK_BYTES, LOGIT_CHUNK_BYTES, Scorer
from dpo_ds.models.tiles import tile_mlps

_SAMPLED_LAYERS = (2, 4)


def without_weights(
    config: PretrainedConfig, adapter: Adapter | None = None, *, dtype: torch.dtype = torch.bfloat16
) -> PreTrainedModel:
    """Returns the model that a config describes, perhaps with an adapter, of tensors that have shapes only."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if adapter is not None:
            attach(model, adapter)
    return model


def parameters_of(model: PreTrainedModel, *, threshold: int) -> Parameters:
    """Counts a model's values.

    Args:
        model: perhaps without values.
        threshold: tensors of fewer values stay whole.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    tensors = list(model.parameters())
    together = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    return Parameters(
        total=sum(p.numel() for p in tensors),
        trained=sum(p.numel() for p in tensors if p.requires_grad),
        whole=sum(p.numel() for p in tensors if p.numel() < threshold),
        largest=max([*together, *(p.numel() for p in tensors)]),
    )


def peaks_of_micro_batch(
    config: PretrainedConfig,
    pairs: Sequence[TokenizedPair],
    *,
    dtype: torch.dtype,
    packed: bool,
    checkpointing: Checkpointing | None,
    tile: int | None = None,
    parts: int = 1,
    adapter: Adapter | None = None,
    on_gpu: bool = False,
) -> Peaks:
    """Returns what a micro-batch takes, as its tensors' sizes say; what an allocator loses is not in it.

    Of a model with many layers two short ones are run, since each layer takes what the one before it does.

    Args:
        config: the model's.
        pairs: the micro-batch's.
        dtype: of the weights.
        packed: whether the pairs share a row, each its prompt.
        checkpointing: what layers keep for backward; None: there is no backward.
        tile: tokens that an MLP takes at a time, None: all.
        parts: ranks that share rows; the one counts that has the most to score.
        adapter: trains in place of the model's own weights.
        on_gpu: whether it will run on a GPU.
    """
    layers = config.get_text_config().num_hidden_layers
    fewer, more = _SAMPLED_LAYERS
    whole = (packed_batch if packed else padded_batch)(pairs)
    of_ranks = [part_of_rows(whole, part=part, parts=parts) for part in range(parts)] if parts > 1 else [whole]
    batch = max(of_ranks, key=lambda some: len(some.targets))
    run = partial(
        _run,
        real=batch,
        dtype=dtype,
        checkpointing=checkpointing,
        tile=tile,
        parts=parts,
        adapter=adapter,
        logit_chunk_bytes=GPU_LOGIT_CHUNK_BYTES if on_gpu else LOGIT_CHUNK_BYTES,
    )
    if layers <= more:
        return run(config)
    short, longer = (run(_shortened(config, count)) for count in _SAMPLED_LAYERS)
    training, scoring = (
        (b - a) * (layers - more) // (more - fewer)
        for a, b in ((short.training, longer.training), (short.scoring, longer.scoring))
    )
    if checkpointing == "offload":
        # All that grows with the layers is their inputs; those of the sampled ones stand for what is on its way.
        return Peaks(longer.training, longer.scoring + scoring, host=training)
    return Peaks(longer.training + training, longer.scoring + scoring)


def _shortened(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    shorter = copy.deepcopy(config)
    text = shorter.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return shorter


def _run(
    config: PretrainedConfig,
    *,
    real: PairBatch,
    dtype: torch.dtype,
    checkpointing: Checkpointing | None,
    tile: int | None,
    parts: int,
    adapter: Adapter | None,
    logit_chunk_bytes: int,
) -> Peaks:
    model = without_weights(config, adapter, dtype=dtype)
    disable_dropout(model)
    if checkpointing is not None:
        keep_little(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        model.tie_weights()
        _attend_fused(model, parts)
        if tile is not None:
            tile_mlps(model, tokens=tile)
        scorer = Scorer(model, logit_chunk_bytes=logit_chunk_bytes)
        batch = real.to(torch.device("cpu"))
        with torch.no_grad():
            scoring = _peak(lambda: scorer(batch), scorer)
        if checkpointing is None:
            return Peaks(training=0, scoring=scoring)
        checkpoint_activations(model, checkpointing)
        scorer.train()
        for parameter in filter(lambda some: some.requires_grad, scorer.parameters()):
            # As the engine does: a gradient leaves as soon as it is whole.
            parameter.register_post_accumulate_grad_hook(_drop_gradient)  # type: ignore[no-untyped-call]
        training = _peak(lambda: scorer(batch).sum().backward(), scorer)
    return Peaks(training=training, scoring=scoring)


class _Fused(torch.autograd.Function):
    """What a fused kernel keeps: its inputs, its output, and a log-sum-exp of every query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, _ = query.shape
        out = query.new_empty(batch, length, heads, value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(batch, heads, length, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _attend_fused(model: PreTrainedModel, parts: int) -> None:
    def attend(module: object, query: Tensor, *keys_and_values: Tensor, **_: object) -> tuple[Tensor, None]:
        # Ranks that share rows have few of the heads of whole rows: as many values, and those of the result twice.
        copies = max(1, parts // keys_and_values[0].shape[1])
        repeated = [some.repeat_interleave(copies, dim=1) if copies > 1 else some for some in keys_and_values[:2]]
        attended: Tensor = _Fused.apply(query, *repeated)  # type: ignore[no-untyped-call]
        return attended.clone() if parts > 1 else attended, None

    AttentionInterface.register("fused", attend)
    AttentionMaskInterface.register("fused", lambda *_, **__: None)
    model.set_attn_implementation("fused")


def _peak(run: Callable[[], object], scorer: Scorer) -> int:
    held = _Held(besides=[*scorer.parameters(), *scorer.buffers()])
    with held:
        run()
    return held.peak


class _Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of what operations make, as it was made, for as long as anybody holds it."""

    def __init__(self, *, besides: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._now = 0
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in besides)

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known.add(storage)
                self._change(storage.nbytes())
                weakref.finalize(storage, self._change, -storage.nbytes()).atexit = False
        return made

    def _change(self, size: int) -> None:
        self._now += size
        self.peak = max(self.peak, self._now)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None
