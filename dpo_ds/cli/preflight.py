"""Everything that can be checked before an engine exists: in seconds, in one process, with one clear line."""

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from dpo_ds.config import DataSource, Run, RunConfig, resolve_path, settle
from dpo_ds.data.prepare import PreparedPairs, Source, prepare
from dpo_ds.data.schedule import Schedule
from dpo_ds.data.tokenization import Tokenizer
from dpo_ds.engine.ds_config import policy_ds_config, reference_ds_config, stated_values
from dpo_ds.engine.extensions import build_extensions
from dpo_ds.errors import UserError
from dpo_ds.losses import LOSSES
from dpo_ds.models.causal_lm import load_model_config, longest_sequence, vocabulary_size
from dpo_ds.models.tokenizer import load_tokenizer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Inputs:
    """What a run needs, found and checked.

    Attributes:
        config: the run's config, with what its ds_configs say and with the places where its paths were found.
        policy: folder or hub id of the model that trains.
        reference: folder or hub id of the frozen model, None for reference-free losses.
        tokenizer: folder, file or hub id.
        policy_config: the policy's resolved DeepSpeed config.
        reference_config: the reference's, None without one.
        train: folder of the prepared training pairs.
        evaluation: folder of the prepared held-out pairs, or None.
        cache: folder of cached log-probs, None where none are kept.
        plan: what will happen, for a person to read.
    """

    config: RunConfig
    policy: str
    reference: str | None
    tokenizer: str
    policy_config: dict[str, Any]
    reference_config: dict[str, Any] | None
    train: Path
    evaluation: Path | None
    cache: Path | None
    plan: str

    @property
    def dtype(self) -> torch.dtype:
        """Of both models' weights."""
        return _DTYPES[self.config.model.dtype]

    @property
    def layout(self) -> Literal["auto", "packed", "padded"]:
        """How pairs may share rows."""
        # Packed rows bring an attention of their own, so that one that the user names speaks for padded rows.
        return self.config.train.layout if self.config.model.attention == "auto" else "padded"


def preflight(run: Run, *, ranks: int) -> Inputs:
    """Checks a run and prepares its data.

    Args:
        run: the parsed command line.
        ranks: of the whole job.

    Raises:
        UserError: the run cannot work; nothing that this call wrote is left.
    """
    folder = Path(run.config.output_dir)
    if (folder / "metrics.jsonl").exists():
        raise UserError(f"output_dir {folder} already holds a run (metrics.jsonl); name another folder or remove it")
    created = [place for place in (folder, *folder.parents) if not place.exists()]
    inputs = None
    try:
        inputs = _checked(run, folder, ranks)
        return inputs
    finally:
        if created and (inputs is None or run.dry_run):
            shutil.rmtree(folder, ignore_errors=True)
            for parent in created[1:]:
                with suppress(OSError):  # another run works in there, or it never came to be
                    parent.rmdir()


def _checked(run: Run, folder: Path, ranks: int) -> Inputs:
    _check_loss(run.config)
    cache = _cache_folder(run.config, folder)
    run, policy_config, reference_config = _deepspeed_configs(run._replace(config=_located(run)))
    build_extensions(policy_config)
    config = run.config
    policy = config.model.policy
    reference = None if config.reference.mode == "none" else config.model.reference or policy
    tokenizer_path = config.model.tokenizer or policy
    tokenizer = load_tokenizer(tokenizer_path, trust_remote_code=config.model.trust_remote_code)
    _check_models(config, policy, reference, tokenizer)

    def prepared(sources: Sequence[DataSource]) -> PreparedPairs:
        return prepare(
            [Source(source.path, source.split or "train", source.columns, source.weight) for source in sources],
            tokenizer,
            max_length=config.data.max_length,
            truncation=config.data.truncation,
            max_dropped=config.data.max_dropped,
            folder=folder / "data",
        )

    train = prepared(config.data.train)
    evaluation = prepared(config.data.eval) if config.data.eval else None
    _check_sizes(config, train, evaluation)
    return Inputs(
        config=config,
        policy=policy,
        reference=reference,
        tokenizer=tokenizer_path,
        policy_config=policy_config,
        reference_config=reference_config,
        train=train.path,
        evaluation=evaluation.path if evaluation else None,
        cache=cache,
        plan=_plan(config, policy, reference, train, evaluation, ranks, cache),
    )


def _check_loss(config: RunConfig) -> None:
    loss = config.loss
    if loss.label_smoothing and not LOSSES[loss.type].smooths_labels:
        raise UserError(
            f"loss.label_smoothing must be 0 for the {loss.type} loss, which has no smoothed form, got "
            f"{loss.label_smoothing}"
        )


def _cache_folder(config: RunConfig, folder: Path) -> Path | None:
    if config.reference.mode != "cache":
        return None
    cache = Path(config.reference.cache_dir or folder / "reference").expanduser()
    # Nothing is tried out: another node may do the same in the same place.
    above = next(place for place in (cache, *cache.absolute().parents) if place.exists())
    if not above.is_dir():
        raise UserError(f"reference.cache_dir must be a folder, got {cache}: {above} is a file")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(
            f"reference.cache_dir {cache} cannot be written: no right to write in {above}; name another folder"
        )
    return cache


def _located(run: Run) -> RunConfig:
    """Returns the run's config with every path where it was found, so that it means the same anywhere."""
    config = run.config

    def found(value: str, key: str) -> str:
        return resolve_path(value, key=key, run_file=run.file, hub=key.startswith(("model.", "data.")))

    def maybe(value: str | None, key: str) -> str | None:
        return found(value, key) if value else None

    def sources(values: Sequence[DataSource], key: str) -> tuple[DataSource, ...]:
        return tuple(replace(source, path=found(source.path, key)) for source in values)

    model, data, deepspeed = config.model, config.data, config.deepspeed
    return replace(
        config,
        model=replace(
            model,
            policy=found(model.policy, "model.policy"),
            reference=maybe(model.reference, "model.reference"),
            tokenizer=maybe(model.tokenizer, "model.tokenizer"),
        ),
        data=replace(
            data,
            train=sources(data.train, "data.train"),
            eval=sources(data.eval, "data.eval") if data.eval else None,
        ),
        deepspeed=replace(
            deepspeed,
            policy=found(deepspeed.policy, "deepspeed.policy"),
            reference=found(deepspeed.reference, "deepspeed.reference"),
        ),
    )


def _deepspeed_configs(run: Run) -> tuple[Run, dict[str, Any], dict[str, Any] | None]:
    policy = run.config.deepspeed.policy
    run = settle(run, stated_values(policy), source=policy)
    dtype, clipping = run.config.model.dtype, run.config.train.gradient_clipping
    policy_config = policy_ds_config(policy, dtype=dtype, gradient_clipping=clipping)
    if run.config.reference.mode == "none":
        return run, policy_config, None
    return run, policy_config, reference_ds_config(run.config.deepspeed.reference, dtype=dtype)


def _check_models(config: RunConfig, policy: str, reference: str | None, tokenizer: Tokenizer) -> None:
    trust = config.model.trust_remote_code
    policy_config = load_model_config(policy, trust_remote_code=trust)
    rows = vocabulary_size(policy_config)
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"the tokenizer {tokenizer.name} knows {tokenizer.vocab_size} tokens, but the embedding of model.policy "
            f"{policy} has {rows} rows; name the model's own tokenizer, or resize the embedding and save the model"
        )
    models = {"model.policy": policy_config}
    if reference not in (None, policy):
        models["model.reference"] = load_model_config(str(reference), trust_remote_code=trust)
        others = vocabulary_size(models["model.reference"])
        if others != rows:
            raise UserError(
                f"model.reference {reference} has a vocabulary of {others}, model.policy {policy} one of {rows}; "
                "log-probs of the same tokens need the same vocabulary"
            )
    for key, model_config in models.items():
        positions = longest_sequence(model_config)
        if positions is not None and config.data.max_length > positions:
            raise UserError(
                f"data.max_length must be <= {positions}, the positions of {key}, got {config.data.max_length}"
            )


def _check_sizes(config: RunConfig, train: PreparedPairs, evaluation: PreparedPairs | None) -> None:
    wanted = config.train.pairs_per_step
    if len(train) < wanted:
        raise UserError(
            f"train.pairs_per_step is {wanted}, but data.train has only {len(train)} usable pairs; "
            "lower train.pairs_per_step or give more data"
        )
    lengths = [pairs.lengths for pairs in (train, evaluation) if pairs is not None]
    if config.train.layout == "packed":
        least, what = max(int(some.tokens.max()) for some in lengths), "the tokens"
    else:
        least, what = max(2 * int(some.longer.max()) for some in lengths), "the two rows"
    budget = config.train.tokens_per_micro_batch
    if least > budget:
        raise UserError(
            f"train.tokens_per_micro_batch must be >= {least}, {what} of the longest pair, got {budget}; "
            "raise it, or lower data.max_length"
        )


def _plan(
    config: RunConfig,
    policy: str,
    reference: str | None,
    train: PreparedPairs,
    evaluation: PreparedPairs | None,
    ranks: int,
    cache: Path | None,
) -> str:
    settings = config.train
    schedule = Schedule.of_run(
        pairs=len(train),
        pairs_per_step=settings.pairs_per_step,
        epochs=settings.epochs,
        max_steps=settings.max_steps,
        seed=settings.seed,
        shuffle=config.data.shuffle,
    )
    lengths = train.lengths
    rows = {
        "policy": f"{policy} in {config.model.dtype}",
        "reference": f"{reference}, {f'scored once into {cache}' if cache else 'live and frozen'}"
        if reference
        else "none",
        "loss": f"{config.loss.type}, beta {config.loss.beta:g}",
        "pairs": f"{_usable(train)} to train on" + (f", {_usable(evaluation)} held out" if evaluation else ""),
        "tokens": f"prompt {lengths.prompt.mean():.0f}, chosen {lengths.chosen.mean():.0f}, "
        f"rejected {lengths.rejected.mean():.0f} on average; longest pair {lengths.tokens.max()}",
        "steps": f"{schedule.steps} of {settings.pairs_per_step} pairs on {ranks} rank{'s' * (ranks > 1)}, "
        f"learning rate {settings.learning_rate:g} ({settings.schedule})",
        "output": config.output_dir,
    }
    return "\n".join(f"{name:>10}  {text}" for name, text in rows.items())


def _usable(pairs: PreparedPairs) -> str:
    dropped = ", ".join(f"{count} {reason}" for reason, count in pairs.dropped.items())
    return f"{len(pairs)}" + (f" ({dropped} dropped)" if dropped else "")
