"""What a run will do, for a person to read before it does."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from dpo_ds.config import AdapterConfig, RunConfig, source_names
from dpo_ds.data.blocks import BlockSchedule
from dpo_ds.data.prepared import PreparedPairs
from dpo_ds.data.schedule import Schedule


def described(
    config: RunConfig,
    *,
    policy: str,
    reference: str | None,
    schedule: Schedule | BlockSchedule,
    train: PreparedPairs,
    evaluation: PreparedPairs | None,
    ranks: int,
    cache: Path | None,
    checkpoints: Sequence[Path],
    more: Mapping[str, str],
) -> str:
    """Returns the lines of a plan.

    Args:
        config: the resolved run file.
        policy: the model that trains.
        reference: the frozen one, or None.
        schedule: of the steps.
        train: pairs to train on; where they stream, the first ones.
        evaluation: held-out pairs, or None.
        ranks: of the whole job.
        cache: folder of cached log-probs, or None.
        checkpoints: to go on from, the preferred one first.
        more: lines to add, by name.
    """
    settings, lengths = config.train, train.lengths
    rows = {
        "policy": f"{policy} in {config.model.dtype}" + (f", {_trained(config.adapter)}" if config.adapter else ""),
        "reference": f"{reference}, {_kept(config, cache)}" if reference else "none",
        "loss": _described(config),
        "pairs": f"{_trained_on(schedule, train)} to train on"
        + (f", {_usable(evaluation)} held out" if evaluation else ""),
        **_mixture(config, schedule),
        "tokens": f"prompt {lengths.prompt.mean():.0f}, chosen {lengths.chosen.mean():.0f}, "
        f"rejected {lengths.rejected.mean():.0f} on average; longest pair {lengths.tokens.max()}"
        + (f" (of the first {len(train)} pairs)" if isinstance(schedule, BlockSchedule) else ""),
        "steps": f"{schedule.steps} of {settings.pairs_per_step} pairs on {ranks} rank{'s' * (ranks > 1)}, "
        f"learning rate {settings.learning_rate:g} ({settings.schedule})",
        "output": config.output_dir,
        **({"goes on": f"from {checkpoints[0]}"} if checkpoints else {}),
        **more,
    }
    return "\n".join(f"{name:>10}  {text}" for name, text in rows.items())


def _trained(adapter: AdapterConfig) -> str:
    if adapter.path is not None:
        return f"frozen, with the adapter {adapter.path}"
    kind = ("rank-stabilized " if adapter.use_rslora else "") + ("DoRA" if adapter.use_dora else "LoRA")
    return f"frozen, with {kind} of rank {adapter.r}"


def _kept(config: RunConfig, cache: Path | None) -> str:
    if config.reference.mode == "adapter":
        start = config.adapter and config.adapter.path
        return "the policy's engine " + ("with the adapter as it was" if start else "without its adapter")
    return f"scored once into {cache}" if cache else "live and frozen"


def _described(config: RunConfig) -> str:
    loss = config.loss
    terms = [loss.type, *(f"{weight:g} x {name}" for name, weight in loss.add.items())]
    numbers = {"beta": loss.beta, **loss.parameters}
    if loss.ld_alpha is not None:
        numbers["ld_alpha"] = loss.ld_alpha
    extras = [word for word in (loss.divergence, loss.weighting) if word not in ("reverse_kl", "none")]
    return ", ".join([" + ".join(terms), *(f"{name} {number:g}" for name, number in numbers.items()), *extras])


def _mixture(config: RunConfig, schedule: Schedule | BlockSchedule) -> dict[str, str]:
    if isinstance(schedule, BlockSchedule):
        return {}
    parts = zip(source_names(config.data.train), schedule.parts, strict=True)
    if all(part.weight == 1 for part in schedule.parts):
        return {}
    return {"an epoch": ", ".join(f"{part.taken} of {name} ({part.pairs} x {part.weight:g})" for name, part in parts)}


def _trained_on(schedule: Schedule | BlockSchedule, train: PreparedPairs) -> str:
    if isinstance(schedule, Schedule):
        return _usable(train)
    an_epoch = schedule.steps_per_epoch * schedule.pairs_per_step
    return f"{an_epoch} an epoch of {schedule.rows} rows, {schedule.rows_per_block} at a time,"


def _usable(pairs: PreparedPairs) -> str:
    dropped = ", ".join(f"{count} {reason}" for reason, count in pairs.dropped.items())
    return f"{len(pairs)}" + (f" ({dropped} dropped)" if dropped else "")
