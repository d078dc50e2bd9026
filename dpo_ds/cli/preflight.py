"""Everything that can be checked before an engine exists: in seconds, in one process, with one clear line."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from dpo_ds.cli.plan import described
from dpo_ds.cli.schedules import block_schedule_of, schedule_of
from dpo_ds.config import DataSource, Run, RunConfig, flat, resolve_path, settle
from dpo_ds.data.blocks import BlockSchedule
from dpo_ds.data.preferences import Source
from dpo_ds.data.prepare import prepare
from dpo_ds.data.prepared import PreparedPairs, open_prepared
from dpo_ds.data.schedule import Schedule
from dpo_ds.data.stream import Stream, open_stream
from dpo_ds.data.tokenization import Tokenizer
from dpo_ds.engine.checkpoint import (
    CHECKPOINTS_FOLDER,
    check_origin,
    complete_checkpoints,
    problem_of,
    read_saved,
    step_of,
)
from dpo_ds.engine.ds_config import policy_ds_config, reference_ds_config, stated_values
from dpo_ds.engine.export import why_not_replaceable
from dpo_ds.engine.extensions import build_extensions
from dpo_ds.engine.optimizers import OptimizerSettings
from dpo_ds.engine.policy import swaps_to_files
from dpo_ds.engine.weight_files import stored_parameters
from dpo_ds.errors import UserError
from dpo_ds.models.adapters import Adapter, check_adapter
from dpo_ds.models.causal_lm import load_model_config, longest_sequence, vocabulary_size
from dpo_ds.models.hub import fetch, held
from dpo_ds.models.routing import why_no_routing_loss
from dpo_ds.models.row_parts import why_not_splittable
from dpo_ds.models.tokenizer import load_tokenizer
from dpo_ds.tracking import METRICS_FILE, SUMMARY_FILE
from dpo_ds.trainer import objective_of

if TYPE_CHECKING:
    from dpo_ds.cli.outlook import Machines

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
        reference_config: that of engines without an optimizer: the reference's, if there is one, and the export's.
        train: folder of the prepared training pairs; where they stream, of those of the first rows.
        stream: what is trained on where it does not fit a disk, else None.
        evaluation: folder of the prepared held-out pairs, or None.
        cache: folder of cached log-probs, None where none are kept.
        origin: what must be the same where a checkpoint of this run goes on, by the run file's keys.
        checkpoints: complete ones to go on from, in the order of preference; none where the run begins.
        allow_changed: keys of ``origin`` that may differ from a checkpoint's.
        commits: of the hub's models and tokenizers, by their ids.
        plan: what will happen, for a person to read.
    """

    config: RunConfig
    policy: str
    reference: str | None
    tokenizer: str
    policy_config: dict[str, Any]
    reference_config: dict[str, Any]
    train: Path
    stream: Stream | None
    evaluation: Path | None
    cache: Path | None
    origin: dict[str, Any]
    checkpoints: tuple[Path, ...]
    allow_changed: frozenset[str]
    commits: dict[str, str]
    plan: str

    @property
    def dtype(self) -> torch.dtype:
        """Of both models' weights."""
        return _DTYPES[self.config.model.dtype]

    @property
    def optimizer(self) -> OptimizerSettings:
        """What updates the policy."""
        return _optimizer(self.config)

    @property
    def adapter(self) -> Adapter | None:
        """What trains in place of the policy's own weights."""
        return _adapter(self.config)

    @property
    def exports_adapter(self) -> bool:
        """Whether the export is an adapter, not a model."""
        return self.config.adapter is not None and not self.config.export.merged

    @property
    def starts_at_reference(self) -> bool:
        """Whether policy and reference begin with equal weights, since they come from the same files."""
        continues = self.config.adapter is not None and self.config.adapter.path is not None
        return self.reference == self.policy and (not continues or self.config.reference.mode == "adapter")

    @property
    def facts(self) -> dict[str, str]:
        """What must be the same on all nodes, by names that a person understands."""
        engines = {"policy": self.policy_config, "reference": self.reference_config}
        return (
            {key: json.dumps(value) for key, value in self.origin.items()}
            | {f"deepspeed.{name}": json.dumps(config, default=str) for name, config in engines.items()}
            | {f"the hub's commit of {name}": commit for name, commit in self.commits.items()}
        )

    @property
    def export_folder(self) -> Path:
        """Where the trained model goes."""
        return _export_folder(self.config)

    @property
    def layout(self) -> Literal["auto", "packed", "padded"]:
        """How pairs may share rows."""
        # Packed rows bring an attention of their own, so that one that the user names speaks for padded rows.
        return self.config.train.layout if self.config.model.attention == "auto" else "padded"


def preflight(run: Run, *, ranks: int, trains: bool = True, machines: "Machines | None" = None) -> Inputs:
    """Checks a run and prepares its data.

    Args:
        run: the parsed command line.
        ranks: of the whole job.
        trains: whether the run begins or goes on; else a checkpoint of it is exported.
        machines: on which the plan shall say what the run takes, or None.

    Raises:
        UserError: the run cannot work; nothing that this call wrote is left.
        RunError: a process that prepares data was killed; what it had whole is gone on from.
    """
    folder = Path(run.config.output_dir)
    checkpoints = _checkpoints(run, folder) if trains else _checkpoints_to_export(run, folder)
    _check_export(run.config)
    created = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        inputs = _checked(run, folder, ranks, checkpoints, trains=trains, machines=machines)
    except UserError:
        _remove(created)
        raise
    if run.dry_run:
        _remove(created)
    if not trains:
        inputs = replace(inputs, plan=f"exporting {checkpoints[0]} to {inputs.export_folder}")
    return inputs


def _remove(created: Sequence[Path]) -> None:
    """Removes a folder, the first, and those above it unless another run works in there."""
    for place in created[:1]:
        shutil.rmtree(place, ignore_errors=True)
    for parent in created[1:]:
        with suppress(OSError):
            parent.rmdir()


def _checkpoints(run: Run, folder: Path) -> tuple[Path, ...]:
    """Returns the complete checkpoints that the run may go on from, in the order of preference."""
    resume = run.config.checkpoint.resume
    own, damaged = complete_checkpoints(folder / CHECKPOINTS_FOLDER)
    for problem in damaged if own else ():
        print(f"warning: {problem}; an older checkpoint is taken", flush=True)
    if resume == "never" or (folder / SUMMARY_FILE).exists():
        _refuse_another_run(folder)
        return ()
    if resume != "auto":
        named = Path(resolve_path(resume, key="checkpoint.resume", run_file=run.file))
        is_own = named.resolve().parent == (folder / CHECKPOINTS_FOLDER).resolve()
        if is_own or not own:
            _check_named(named, newer=[path for path in own if is_own and step_of(path) > step_of(named)])
            if not is_own:
                _refuse_another_run(folder)
            return (named,)
    if own:
        return tuple(own)
    if damaged:
        raise UserError(f"{damaged[0]}, and no other checkpoint is complete; put it back, or name another output_dir")
    # A run that was stopped before its first checkpoint begins again, and writes the same lines.
    if _last_step(folder / METRICS_FILE) > (run.config.checkpoint.every or 0):
        _refuse_another_run(folder)
    return ()


def _checkpoints_to_export(run: Run, folder: Path) -> tuple[Path, ...]:
    resume = run.config.checkpoint.resume
    if resume not in ("auto", "never"):
        named = Path(resolve_path(resume, key="checkpoint.resume", run_file=run.file))
        _check_named(named, newer=())
        return (named,)
    own, damaged = complete_checkpoints(folder / CHECKPOINTS_FOLDER)
    if not own:
        why = f": {damaged[0]}" if damaged else ""
        raise UserError(
            f"output_dir {folder} holds no complete checkpoint to export{why}; name one: --checkpoint.resume PATH"
        )
    for problem in damaged:
        print(f"warning: {problem}; an older checkpoint is taken", flush=True)
    return tuple(own)


def _check_export(config: RunConfig) -> None:
    folder = _export_folder(config)
    if problem := why_not_replaceable(folder):
        raise UserError(problem)
    if config.export.folder is not None:
        _check_writable(folder.parent, key="export.folder")


def _export_folder(config: RunConfig) -> Path:
    return Path(config.export.folder or Path(config.output_dir) / "export")


def _refuse_another_run(folder: Path) -> None:
    if (folder / METRICS_FILE).exists():
        raise UserError(f"output_dir {folder} already holds a run ({METRICS_FILE}); name another folder or remove it")


def _check_named(checkpoint: Path, *, newer: Sequence[Path]) -> None:
    problem = problem_of(checkpoint)
    if problem:
        raise UserError(f"checkpoint.resume must be auto, never, or the folder of a complete checkpoint: {problem}")
    if newer:
        raise UserError(
            f"checkpoint.resume is {checkpoint}, but {newer[0].name} beside it is newer, and the next start would go "
            "on from there; remove the newer ones, or name another output_dir"
        )


def _last_step(metrics: Path) -> float:
    """Returns the last step that a record tells of; infinity where that is not to be made out."""
    if not metrics.exists():
        return 0
    try:
        whole, _, _ = metrics.read_text().rpartition("\n")  # the end of a killed run's last line may be missing
        return max((float(json.loads(line)["step"]) for line in whole.splitlines()), default=0)
    except (ValueError, LookupError, TypeError):
        return float("inf")


def _checked(
    run: Run, folder: Path, ranks: int, checkpoints: tuple[Path, ...], *, trains: bool, machines: "Machines | None"
) -> Inputs:
    _check_loss(run.config)
    cache = _cache_folder(run.config, folder)
    run, policy_config, reference_config = _deepspeed_configs(run._replace(config=_located(run)))
    _check_offload(run.config, policy_config)
    build_extensions(policy_config, reference_config=reference_config, optimizer=run.config.train.optimizer)
    config = run.config
    policy = config.model.policy
    reference = None if config.reference.mode == "none" else config.model.reference or policy
    tokenizer_path = config.model.tokenizer or policy
    commits = _fetched(config, reference=reference, weights=not run.dry_run)
    tokenizer = load_tokenizer(tokenizer_path, trust_remote_code=config.model.trust_remote_code)
    _check_models(config, policy, reference, tokenizer)
    _check_sequence_parallel(config, reference, ranks=ranks)
    _check_room(config, folder, trains=trains)

    stream = _stream(config, tokenizer, folder / "data") if config.data.streaming else None
    train = open_prepared(stream.sample) if stream else _prepared(config, config.data.train, tokenizer, folder / "data")
    evaluation = _prepared(config, config.data.eval, tokenizer, folder / "data") if config.data.eval else None
    schedule = block_schedule_of(config, stream) if stream else schedule_of(config, train)
    _check_sizes(config, schedule, train, evaluation)
    origin = _origin(config, train.manifest.key if stream is None else stream.key, evaluation)
    if checkpoints:
        check_origin(checkpoints[0], read_saved(checkpoints[0]).origin, origin, allowed=run.allow_changed)
    return Inputs(
        config=config,
        policy=policy,
        reference=reference,
        tokenizer=tokenizer_path,
        policy_config=policy_config,
        reference_config=reference_config,
        train=train.path,
        stream=stream,
        evaluation=evaluation.path if evaluation else None,
        cache=cache,
        origin=origin,
        checkpoints=checkpoints,
        allow_changed=run.allow_changed,
        commits=commits,
        plan=described(
            config,
            policy=policy,
            reference=reference,
            schedule=schedule,
            train=train,
            evaluation=evaluation,
            ranks=ranks,
            cache=cache,
            checkpoints=checkpoints,
            more=_outlook(config, machines, schedule, train, policy_config, reference_config),
        ),
    )


def _outlook(config: RunConfig, machines: "Machines | None", *found: Any) -> dict[str, str]:
    if machines is None:
        return {}
    # Only here: it rests on tools of torch's that may move, which no run shall depend on.
    from dpo_ds.cli.outlook import outlook

    return outlook(config, machines, *found)


def _prepared(config: RunConfig, sources: Sequence[DataSource], tokenizer: Tokenizer, folder: Path) -> PreparedPairs:
    return prepare(
        _data_sources(sources),
        tokenizer,
        max_length=config.data.max_length,
        truncation=config.data.truncation,
        scored=config.data.scored,
        max_dropped=config.data.max_dropped,
        folder=folder,
        processes=config.data.processes,
    )


def _stream(config: RunConfig, tokenizer: Tokenizer, folder: Path) -> Stream:
    assert config.data.streaming is not None
    return open_stream(
        _data_sources(config.data.train),
        tokenizer,
        max_length=config.data.max_length,
        truncation=config.data.truncation,
        scored=config.data.scored,
        max_dropped=config.data.max_dropped,
        rows_per_block=config.data.streaming.rows_per_shard,
        keep=config.data.streaming.keep,
        # Ranks need the other cores while it works.
        processes=config.data.processes or 1,
        folder=folder,
    )


def _data_sources(sources: Sequence[DataSource]) -> list[Source]:
    return [Source(source.path, source.split or "train", source.columns) for source in sources]


def _check_loss(config: RunConfig) -> None:
    loss = config.loss
    try:
        objective = objective_of(config)
    except ValueError as error:
        raise UserError(f"loss.{error}") from None
    named = " + ".join(objective.losses)
    if not objective.needs_reference and config.reference.mode != "none":
        raise UserError(
            f"reference.mode must be none for the {named} loss, whose equation has no reference, got "
            f"{config.reference.mode!r}"
        )
    if config.reference.mode == "none" and loss.divergence != "reverse_kl":
        raise UserError(
            f"loss.divergence must be reverse_kl where reference.mode is none, got {loss.divergence!r}: there is "
            "nothing to diverge from"
        )
    if objective.needs_whole_step and config.train.pairs_per_step < 2:
        raise UserError(
            f"train.pairs_per_step must be >= 2 for the {named} loss, which compares the pairs "
            f"of a step with each other, got {config.train.pairs_per_step}"
        )
    if loss.ld_alpha is not None and objective.averages:
        raise UserError(
            f"loss.ld_alpha must be null where log-probs are averaged over tokens, got {loss.ld_alpha}: their lengths "
            "are out of it already"
        )
    knows = {
        "probability": objective.takes_soft_labels,
        "margin": objective.takes_margins,
        "weight": objective.takes_weights,
    }
    for key, sources in (("data.train", config.data.train), ("data.eval", config.data.eval or ())):
        for place, source in enumerate(sources):
            for name in knows:
                if name in source.columns and not knows[name]:
                    raise UserError(
                        f"{key}[{place}].columns.{name} must be left out for the {named} loss, which knows no "
                        f"{name}, got {source.columns[name]!r}; loss.type sigmoid knows it"
                    )


def _check_offload(config: RunConfig, policy_config: Mapping[str, Any]) -> None:
    if config.checkpoint.every is not None and swaps_to_files(policy_config):
        raise UserError(
            f"checkpoint.every must be null where {config.deepspeed.policy} offloads to nvme, got "
            f"{config.checkpoint.every}: DeepSpeed does not bring such a policy's weights back; offload to cpu"
        )

    ratio = (policy_config["zero_optimization"].get("offload_optimizer") or {}).get("ratio", 1.0)
    if ratio != 1.0:
        raise UserError(
            f"offload_optimizer.ratio must be 1 in {config.deepspeed.policy}, got {ratio}: DeepSpeed leaves the states "
            "that stay on the device out of its checkpoints"
        )


_CHANGEABLE = {
    *("data.train", "data.eval", "data.max_dropped", "data.processes", "data.streaming"),
    *("train.activation_checkpointing", "train.layout", "train.tokens_per_micro_batch"),
    *("train.tokens_per_mlp_tile", "train.sequence_parallel_size", "train.eval_every"),
}


def _origin(config: RunConfig, train: str, evaluation: PreparedPairs | None) -> dict[str, Any]:
    """Returns all that decides what a step computes, but for rounding and the models' weights."""
    sections = ("data.", "loss.", "train.", "model.dtype")
    values = {key: value for key, value in flat(config).items() if key.startswith(sections) and key not in _CHANGEABLE}
    if streaming := config.data.streaming:
        # How many steps a block serves.
        values |= {"data.streaming": streaming.rows_per_shard, "data.max_dropped": config.data.max_dropped}
    # What the pairs are, wherever they lie.
    values["data.train"] = [train, *(source.weight for source in config.data.train)]
    values["data.eval"] = evaluation and evaluation.manifest.key
    reference = config.reference
    values["reference.mode"] = "none" if reference.mode == "none" else "engine or cache"
    values["reference.sync_every"] = reference.sync_every
    if reference.sync_every is not None:
        values["reference.sync_weight"] = reference.sync_weight
    if config.adapter is not None:
        values["adapter"] = asdict(config.adapter)
        if config.adapter.path and config.reference.mode == "adapter":
            values["reference.mode"] = "adapter"
    return values


def _cache_folder(config: RunConfig, folder: Path) -> Path | None:
    if config.reference.mode != "cache":
        return None
    cache = Path(config.reference.cache_dir or folder / "reference").expanduser()
    _check_writable(cache, key="reference.cache_dir")
    return cache


def _check_writable(folder: Path, *, key: str) -> None:
    # Nothing is tried out: another node may do the same in the same place.
    above = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not above.is_dir():
        raise UserError(f"{key} must be a folder, got {folder}: {above} is a file")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{key} {folder} cannot be written: no right to write in {above}; name another folder")


def _located(run: Run) -> RunConfig:
    """Returns the run's config with every path where it was found, so that it means the same anywhere."""
    config = run.config

    def found(value: str, key: str) -> str:
        return resolve_path(value, key=key, run_file=run.file, hub=key.startswith(("model.", "data.")))

    def maybe(value: str | None, key: str) -> str | None:
        return found(value, key) if value else None

    def sources(values: Sequence[DataSource], key: str) -> tuple[DataSource, ...]:
        return tuple(replace(source, path=found(source.path, key)) for source in values)

    model, data, deepspeed, adapter = config.model, config.data, config.deepspeed, config.adapter
    return replace(
        config,
        adapter=adapter and replace(adapter, path=maybe(adapter.path, "adapter.path")),
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


def _fetched(config: RunConfig, *, reference: str | None, weights: bool) -> dict[str, str]:
    """Fetches what is on the hub, and returns the commits by id."""
    model = config.model
    wanted = {"model.tokenizer": model.tokenizer, "model.policy": model.policy, "model.reference": reference}
    found = {}
    for key, name in wanted.items():
        if name is not None and name not in found:
            only_tokens = key == "model.tokenizer" and name != model.policy
            found[name] = fetch(name, key=key, weights=weights and not only_tokens, code=model.trust_remote_code)
    return {name: commit for name, commit in found.items() if commit is not None}


def _check_room(config: RunConfig, folder: Path, *, trains: bool) -> None:
    """Looks, long before the engines do, for room for the export, and for a checkpoint where one will be saved."""
    if config.adapter is not None:
        return  # checkpoints are small, and the engines know the export's size
    weights = Path(held(config.model.policy))
    parameters = stored_parameters(weights) if weights.exists() else None
    if parameters is None:
        return
    wanted = {_export_folder(config): parameters * _DTYPES[config.model.dtype].itemsize}
    if trains and config.checkpoint.every is not None:
        moved = 0 if config.reference.sync_every is None else _DTYPES[config.model.dtype].itemsize
        wanted[folder / CHECKPOINTS_FOLDER] = parameters * (_optimizer(config).bytes_per_weight + moved)
    needed: dict[int, int] = {}  # by file system
    for place, size in wanted.items():
        above = next(there for there in (place.absolute(), *place.absolute().parents) if there.exists())
        system = above.stat().st_dev
        needed[system] = needed.get(system, 0) + size
        free = shutil.disk_usage(above).free
        if free < needed[system]:
            raise UserError(
                f"{place} needs about {needed[system] / 2**30:.1f} GiB for {parameters / 1e6:.0f} million parameters, "
                f"and {free / 2**30:.1f} GiB are free; make room, or name another folder"
            )


def _deepspeed_configs(run: Run) -> tuple[Run, dict[str, Any], dict[str, Any]]:
    policy = run.config.deepspeed.policy
    run = settle(run, stated_values(policy), source=policy)
    dtype, clipping = run.config.model.dtype, run.config.train.gradient_clipping
    policy_config = policy_ds_config(policy, dtype=dtype, gradient_clipping=clipping)
    return run, policy_config, reference_ds_config(run.config.deepspeed.reference, dtype=dtype)


def _optimizer(config: RunConfig) -> OptimizerSettings:
    train = config.train
    return OptimizerSettings(train.optimizer, train.betas, train.eps, train.weight_decay)


def _adapter(config: RunConfig) -> Adapter | None:
    return None if config.adapter is None else Adapter(**vars(config.adapter), seed=config.train.seed)


def _check_models(config: RunConfig, policy: str, reference: str | None, tokenizer: Tokenizer) -> None:
    trust = config.model.trust_remote_code
    policy_config = load_model_config(policy, trust_remote_code=trust)
    rows = vocabulary_size(policy_config)
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"the tokenizer {tokenizer.name} knows {tokenizer.vocab_size} tokens, but the embedding of model.policy "
            f"{policy} has {rows} rows; name the model's own tokenizer, or give the model rows for this one: "
            f"python -m dpo_ds resize --model {policy} --tokenizer {tokenizer.name} --out FOLDER"
        )
    if (adapter := _adapter(config)) is not None:
        check_adapter(adapter, policy_config)
    if config.loss.router_aux and (problem := why_no_routing_loss(policy_config)) is not None:
        raise UserError(f"loss.router_aux must be 0 for model.policy {policy}, got {config.loss.router_aux}: {problem}")
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


def _check_sequence_parallel(config: RunConfig, reference: str | None, *, ranks: int) -> None:
    size, model = config.train.sequence_parallel_size, config.model
    if ranks % size:
        raise UserError(f"train.sequence_parallel_size must divide the number of ranks, {ranks}, got {size}")
    for key, path in {"model.policy": model.policy, "model.reference": reference}.items():
        if path is not None and size > 1:
            problem = why_not_splittable(load_model_config(path, trust_remote_code=model.trust_remote_code), size)
            if problem is not None:
                raise UserError(f"train.sequence_parallel_size cannot be {size} for {key} {path}: {problem}")


def _check_sizes(
    config: RunConfig, schedule: Schedule | BlockSchedule, train: PreparedPairs, evaluation: PreparedPairs | None
) -> None:
    wanted = config.train.pairs_per_step
    if isinstance(schedule, Schedule) and schedule.pairs < wanted:
        usable = schedule.pairs
        weighted = " an epoch by its weights" * (usable != len(train))
        raise UserError(
            f"train.pairs_per_step is {wanted}, but data.train has only {usable} usable pairs{weighted}; "
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
