"""What the keys of a run file must be beyond their types, and which combinations make no sense."""

import math
import re

from dpo_ds.config.schema import RunConfig, flat, shown
from dpo_ds.errors import UserError

_UNAVAILABLE: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("model.dtype", ("float32", "bfloat16"), "float16's loss scaling skips steps that a schedule counts"),
)
"""Keys that exist for later versions: key, the values that this version knows, what it does."""


def check(config: RunConfig) -> None:
    """Checks what types cannot say.

    Raises:
        UserError: a value is out of its range, or not available in this version.
    """
    values = flat(config)
    for key, available, reason in _UNAVAILABLE:
        if values[key] not in available:
            options = " or ".join(map(shown, available))
            raise UserError(f"{key} must be {options} in this version, got {shown(values[key])}: {reason}")
    for key, value in values.items():
        numbers = value if isinstance(value, tuple) else (value,)
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise UserError(f"{key} must be finite, got {shown(value)}")
    data, loss, train, checkpoint = config.data, config.loss, config.train, config.checkpoint
    watchdogs = config.watchdogs
    rules = (
        ("data.max_length", data.max_length >= 2, ">= 2"),
        ("data.max_dropped", 0 <= data.max_dropped <= 1, ">= 0 and <= 1"),
        ("loss.beta", loss.beta > 0, "> 0"),
        ("loss.ld_alpha", loss.ld_alpha is None or 0 <= loss.ld_alpha <= 1, "null or >= 0 and <= 1"),
        (
            "loss.ld_reference",
            not loss.ld_reference or loss.ld_alpha in (None, 1) or config.reference.mode != "cache",
            "false where reference.mode is cache, which holds sums over all tokens",
        ),
        ("loss.router_aux", loss.router_aux >= 0, ">= 0"),
        ("loss.label_smoothing", 0 <= loss.label_smoothing < 0.5, ">= 0 and < 0.5"),
        ("train.pairs_per_step", train.pairs_per_step >= 1, ">= 1"),
        ("train.tokens_per_micro_batch", train.tokens_per_micro_batch >= 1, ">= 1"),
        ("train.sequence_parallel_size", train.sequence_parallel_size >= 1, ">= 1"),
        (
            "train.tokens_per_mlp_tile",
            train.tokens_per_mlp_tile is None or train.tokens_per_mlp_tile >= 1,
            ">= 1 or null",
        ),
        (
            "train.sequence_parallel_size",
            train.sequence_parallel_size == 1 or config.model.attention == "auto",
            "1 unless model.attention is auto, since attention runs on whole rows of some heads",
        ),
        (
            "loss.router_aux",
            train.sequence_parallel_size == 1 or loss.router_aux == 0,
            "0 where train.sequence_parallel_size is above 1, since a rank sees a part of the tokens that are balanced",
        ),
        (
            "reference.tokens_per_micro_batch",
            config.reference.tokens_per_micro_batch is None
            or config.reference.tokens_per_micro_batch >= train.tokens_per_micro_batch,
            "null or >= train.tokens_per_micro_batch",
        ),
        (
            "reference.sync_every",
            config.reference.sync_every is None or config.reference.sync_every >= 1,
            ">= 1 or null",
        ),
        (
            "reference.sync_every",
            config.reference.sync_every is None or config.reference.mode == "engine",
            "null where reference.mode is not engine: no weights could move",
        ),
        (
            "reference.sync_every",
            config.reference.sync_every is None or config.adapter is None,
            "null where adapter is set: the reference has no such weights",
        ),
        (
            "reference.sync_every",
            config.reference.sync_every != 1 or config.reference.sync_weight != 1,
            "above 1 where reference.sync_weight is 1: the reference would always be the policy",
        ),
        ("reference.sync_weight", 0 < config.reference.sync_weight <= 1, "> 0 and <= 1"),
        ("model.attention", config.model.attention == "auto" or train.layout != "packed", "auto where rows are packed"),
        (
            "data.eval",
            all(source.weight == 1 for source in data.eval or ()),
            "sources of weight 1, since an evaluation scores every pair once",
        ),
        *_streaming_rules(config),
        *_adapter_rules(config),
        ("data.processes", data.processes is None or data.processes >= 1, ">= 1 or null"),
        ("train.epochs", train.epochs >= 1, ">= 1"),
        ("train.max_steps", train.max_steps is None or train.max_steps >= 1, ">= 1 or null"),
        ("train.learning_rate", train.learning_rate > 0, "> 0"),
        ("train.warmup_ratio", 0 <= train.warmup_ratio <= 1, ">= 0 and <= 1"),
        ("train.betas", all(0 <= beta < 1 for beta in train.betas), "two numbers >= 0 and < 1"),
        ("train.eps", train.eps > 0, "> 0"),
        ("train.weight_decay", train.weight_decay >= 0, ">= 0"),
        (
            "train.weight_decay",
            train.weight_decay == 0 or train.optimizer != "rmsprop",
            "0 where train.optimizer is rmsprop, which has no decoupled decay",
        ),
        ("train.gradient_clipping", train.gradient_clipping >= 0, ">= 0 (0 switches it off)"),
        ("train.seed", train.seed >= 0, ">= 0"),
        ("train.eval_every", train.eval_every is None or train.eval_every >= 1, ">= 1 or null"),
        ("train.eval_every", train.eval_every is None or data.eval is not None, "null while data.eval is null"),
        ("checkpoint.every", checkpoint.every is None or checkpoint.every >= 1, ">= 1 or null"),
        ("checkpoint.keep", checkpoint.keep >= 1, ">= 1"),
        (
            "checkpoint.keep_every",
            checkpoint.keep_every is None
            or (checkpoint.keep_every >= 1 and _divides(checkpoint.every, checkpoint.keep_every)),
            "null or a multiple of checkpoint.every",
        ),
        (
            "checkpoint.keep_best",
            checkpoint.keep_best is None or _divides(train.eval_every, checkpoint.every),
            "null unless train.eval_every divides checkpoint.every",
        ),
        ("checkpoint.resume", bool(checkpoint.resume.strip()), "auto, never, or the path of a checkpoint"),
        ("export.folder", config.export.folder is None or bool(config.export.folder.strip()), "the name of a folder"),
        (
            "export.push_to_hub",
            config.export.push_to_hub is None or bool(re.fullmatch(r"[\w.-]+/[\w.-]+", config.export.push_to_hub)),
            "null or a hub id such as NAME/MODEL",
        ),
        ("tracking.log_every", config.tracking.log_every >= 1, ">= 1"),
        ("tracking.answers", config.tracking.answers >= 0, ">= 0"),
        ("tracking.answers", not config.tracking.answers or data.eval is not None, "0 while data.eval is null"),
        ("tracking.answer_tokens", config.tracking.answer_tokens >= 1, ">= 1"),
        (
            "watchdogs.not_moving_steps",
            watchdogs.not_moving_steps is None or watchdogs.not_moving_steps >= 1,
            ">= 1 or null",
        ),
        ("watchdogs.chosen_drop", watchdogs.chosen_drop is None or watchdogs.chosen_drop > 0, "> 0 or null"),
        *((key, values[key] > 0, "> 0") for key in values if key.startswith("timeouts.")),
        ("timeouts.silence_s", config.timeouts.silence_s >= 4, ">= 4"),
        ("output_dir", bool(config.output_dir.strip()), "the name of a folder"),
    )
    for key, holds, expectation in rules:
        if not holds:
            raise UserError(f"{key} must be {expectation}, got {shown(values[key])}")


def _streaming_rules(config: RunConfig) -> tuple[tuple[str, bool, str], ...]:
    data, streaming = config.data, config.data.streaming
    if streaming is None:
        return ()
    return (
        ("data.streaming", streaming.rows_per_shard >= 1 and streaming.keep >= 2, "of rows_per_shard >= 1, keep >= 2"),
        (
            "data.train",
            all(source.weight == 1 for source in data.train),
            "sources of weight 1 while data.streaming is set, since what a source has is not known before its turn",
        ),
        (
            "reference.mode",
            config.reference.mode != "cache",
            "engine or none while data.streaming is set, since a cache is filled before training, of all pairs",
        ),
        (
            "train.tokens_per_micro_batch",
            config.train.tokens_per_micro_batch >= 2 * data.max_length,
            f">= {2 * data.max_length}, twice data.max_length, while data.streaming is set, since the longest pair is "
            "not known",
        ),
    )


def _adapter_rules(config: RunConfig) -> tuple[tuple[str, bool, str], ...]:
    adapter, mode = config.adapter, config.reference.mode
    if adapter is None:
        return (
            ("reference.mode", mode != "adapter", "engine, cache or none while adapter is null"),
            ("export.merged", not config.export.merged, "false while adapter is null"),
        )
    return (
        ("adapter", adapter.r >= 1 and adapter.alpha > 0, "of r >= 1, alpha > 0"),
        (
            "model.reference",
            mode != "adapter" or config.model.reference is None,
            "null where reference.mode is adapter: the reference is the policy without its adapter",
        ),
    )


def _divides(steps: int | None, others: int | None) -> bool:
    return steps is not None and others is not None and steps >= 1 and others % steps == 0
