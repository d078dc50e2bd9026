"""What a run takes of its machines, found without weights, and what to change where they have too little."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dpo_ds.config import RunConfig, resolve_path
from dpo_ds.data.blocks import BlockSchedule
from dpo_ds.data.prepared import PreparedPairs
from dpo_ds.data.schedule import PackedRows, PaddedRows, Rows, Schedule, plan_training
from dpo_ds.engine.ds_config import policy_ds_config, reference_ds_config
from dpo_ds.engine.optimizers import OptimizerSettings
from dpo_ds.memory import (
    Parameters,
    Peaks,
    Share,
    keeps_for_backward,
    peak,
    shares_of_policy,
    shares_of_reference,
)
from dpo_ds.models.adapters import Adapter
from dpo_ds.models.attention import why_not_packable
from dpo_ds.models.causal_lm import Checkpointing, load_model_config, products
from dpo_ds.models.shapes import parameters_of, peaks_of_micro_batch, without_weights
from dpo_ds.throughput import StepCost
from dpo_ds.traffic import Sizes, predicted

_GIB = 2**30
_SAMPLED_STEPS = 8
_MOST_NODES = 256
_TOO_LITTLE_TO_SHOW = 2**23
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_PROGRAM_OF_CPU_RANK = 0.7 * _GIB
"""Python, torch and DeepSpeed themselves, measured on ranks without a GPU."""

_PROGRAM_OF_GPU_RANK = Share("program (assumed)", device=2 * _GIB, host=4 * _GIB)
"""CUDA's context and NCCL's buffers; a guess."""

_CHECKPOINTING = ("train.activation_checkpointing", "full")
_INPUTS_AWAY = ("train.activation_checkpointing", "offload")
_REFERENCE_AWAY = ("deepspeed.reference", "ds_configs/zero3_reference_offload.json")
_OPTIMIZER_AWAY = ("deepspeed.policy", "ds_configs/zero3_offload_optimizer.json")
_WEIGHTS_AWAY = ("deepspeed.policy", "ds_configs/zero3_offload_parameters.json")
_WAYS_TO_FIT = (
    (_CHECKPOINTING,),
    (_INPUTS_AWAY,),
    (_REFERENCE_AWAY,),
    (_CHECKPOINTING, _REFERENCE_AWAY),
    (_INPUTS_AWAY, _REFERENCE_AWAY),
    (_OPTIMIZER_AWAY,),
    (_CHECKPOINTING, _OPTIMIZER_AWAY),
    (_CHECKPOINTING, _REFERENCE_AWAY, _OPTIMIZER_AWAY),
    (_INPUTS_AWAY, _REFERENCE_AWAY, _OPTIMIZER_AWAY),
    (_CHECKPOINTING, _REFERENCE_AWAY, _WEIGHTS_AWAY),
    (_INPUTS_AWAY, _REFERENCE_AWAY, _WEIGHTS_AWAY),
)
"""From what costs little time to what costs much."""


@dataclass(frozen=True)
class Machines:
    """What a run would get.

    Attributes:
        nodes: machines.
        gpus: ranks on each.
        gpu_gib: memory of a GPU, None where ranks compute on the CPU.
        host_gib: memory of a machine, None where it is not known.
    """

    nodes: int
    gpus: int
    gpu_gib: float | None
    host_gib: float | None

    @property
    def ranks(self) -> int:
        """Ranks of the whole job."""
        return self.nodes * self.gpus


def outlook(
    config: RunConfig,
    machines: Machines,
    schedule: Schedule | BlockSchedule,
    train: PreparedPairs,
    policy_config: Mapping[str, Any],
    reference_config: Mapping[str, Any],
) -> dict[str, str]:
    """Returns lines of a plan: what the run takes of its machines, and whether they have it.

    Args:
        config: the resolved run file.
        machines: what there is.
        schedule: of the steps.
        train: pairs to train on; where they stream, the first ones.
        policy_config: resolved.
        reference_config: resolved.
    """
    needs = Needs(config, schedule, train, ranks=machines.ranks)
    exchanges = "" if config.train.sequence_parallel_size == 1 else ", beside what it exchanges for attention"
    shares = needs.shares(machines, config, policy_config, reference_config)
    micro_batches = needs.micro_batches
    moved = predicted(
        needs.sizes(policy_config),
        ranks=machines.ranks,
        micro_batches=round(micro_batches),
        reference_micro_batches=round(micro_batches) if config.reference.mode in ("engine", "adapter") else 0,
        gathers=1 if keeps_for_backward(needs.parameters(policy_config), policy_config["zero_optimization"]) else 2,
        weight_bytes=needs.itemsize,
        gradient_bytes=needs.itemsize,
    )
    trained = needs.parameters(policy_config).trained
    ranks = "ranks without a GPU"
    if machines.gpu_gib is not None:
        ranks = f"GPU{'s' * (machines.gpus > 1)} of {machines.gpu_gib:g} GiB"
    return {
        "machines": f"{machines.nodes} of {machines.gpus} {ranks}",
        "parameters": f"{needs.parameters(policy_config).total / 1e9:.3g} billion"
        + (f", {trained / 1e6:.3g} million of them train" if config.adapter else ""),
        "memory": _table(machines, shares),
        "fits": _verdict(needs, machines, shares, config, policy_config, reference_config),
        "a step": f"{needs.flops / 1e12:,.1f} TFLOP in all; a rank takes {micro_batches:.3g} "
        f"micro-batch{'es' * (micro_batches > 1)} and receives {moved.total / _GIB:,.1f} GiB{exchanges}",
        "checkpoint": f"{trained * needs.state_bytes / _GIB:.3g} GiB",
    }


class Needs:
    """What a run needs on any machines, under any ds_configs; what does not depend on these is found once."""

    def __init__(
        self, config: RunConfig, schedule: Schedule | BlockSchedule, train: PreparedPairs, *, ranks: int
    ) -> None:
        """Looks at the models' configs, not at their weights.

        Args:
            config: the resolved run file.
            schedule: of the steps.
            train: pairs to train on; where they stream, the first ones.
            ranks: that share a step.
        """
        self._config, self._schedule, self._train = config, schedule, train
        model, trust = config.model, config.model.trust_remote_code
        self._policy = load_model_config(model.policy, trust_remote_code=trust)
        self._reference = load_model_config(model.reference or model.policy, trust_remote_code=trust)
        self._adapter = Adapter(**vars(config.adapter), seed=config.train.seed) if config.adapter else None
        self._model = without_weights(self._policy, self._adapter)
        self._frozen = without_weights(self._reference)
        self.itemsize = _DTYPES[model.dtype].itemsize
        wants_packed = config.train.layout != "padded" and model.attention == "auto"
        self._packed = wants_packed and why_not_packable(self._model) is None
        lengths = train.lengths
        cost = StepCost(*products(self._model), passes=8 if config.reference.mode in ("engine", "adapter") else 6)
        self._costs = cost.flops(tokens=lengths.tokens, scored=lengths.scored, attended=lengths.attended)
        self._rows: Rows = PackedRows(lengths.tokens, self._costs) if self._packed else PaddedRows(lengths.longer)
        budget, groups = config.train.tokens_per_micro_batch, ranks // config.train.sequence_parallel_size
        self._steps = [
            plan_training(pairs, rows=self._rows, ranks=groups, tokens_per_micro_batch=budget)
            for pairs in self._sampled_pairs()
        ]
        self._peaks = lru_cache(self._peaks_of)

    def parameters(self, ds_config: Mapping[str, Any]) -> Parameters:
        """Returns the policy's."""
        return parameters_of(self._model, threshold=_threshold(ds_config))

    def sizes(self, ds_config: Mapping[str, Any]) -> Sizes:
        """Returns the policy's."""
        found = self.parameters(ds_config)
        return Sizes(sharded=found.total - found.whole, whole=found.whole, trained=found.trained)

    @property
    def micro_batches(self) -> float:
        """A rank's, in a mean step."""
        return sum(len(plan[0]) for plan in self._steps) / len(self._steps)

    @property
    def flops(self) -> float:
        """Floating-point operations of a mean step, without what is computed again."""
        batches = [batch for plan in self._steps for rank in plan for batch in rank if batch.weight]
        return float(sum(self._costs[list(batch.pairs)].sum() for batch in batches)) / len(self._steps)

    def _sampled_pairs(self) -> Iterator[NDArray[np.int64]]:
        if isinstance(self._schedule, Schedule):
            for step in range(1, min(_SAMPLED_STEPS, self._schedule.steps) + 1):
                yield self._schedule.pairs_of_step(step)
        else:
            yield np.arange(min(len(self._train), self._config.train.pairs_per_step))

    def _peaks_of(self, checkpointing: Checkpointing, on_gpu: bool) -> tuple[Peaks, Peaks]:
        """Of the policy and of the reference, for the largest micro-batch of the sampled steps."""
        batches = [batch.pairs for plan in self._steps for rank in plan for batch in rank]
        largest = max(batches, key=lambda pairs: self._train.lengths.tokens[list(pairs)].sum())
        pairs = [self._train.pair(number) for number in largest]
        peaks = partial(
            peaks_of_micro_batch,
            pairs=pairs,
            dtype=_DTYPES[self._config.model.dtype],
            packed=self._packed,
            tile=self._config.train.tokens_per_mlp_tile,
            parts=self._config.train.sequence_parallel_size,
            on_gpu=on_gpu,
        )
        policy = peaks(self._policy, checkpointing=checkpointing, adapter=self._adapter)
        if self._config.model.reference is None:
            return policy, policy
        frozen = peaks(self._reference, checkpointing=None)
        return policy, frozen

    @property
    def recomputable(self) -> bool:
        """Whether the policy's layers can compute again what they did not keep."""
        return bool(self._model.supports_gradient_checkpointing)

    @property
    def state_bytes(self) -> int:
        """What the optimizer keeps of one weight."""
        return OptimizerSettings(self._config.train.optimizer).bytes_per_weight

    def shares(
        self,
        machines: Machines,
        config: RunConfig,
        policy_config: Mapping[str, Any],
        reference_config: Mapping[str, Any],
    ) -> list[Share]:
        """Returns what each rank needs, the program itself first.

        Args:
            machines: how many ranks there are, and where they compute.
            config: the run file, or a variant of it.
            policy_config: resolved.
            reference_config: resolved.
        """
        policy, reference = self._peaks(config.train.activation_checkpointing, machines.gpu_gib is not None)
        sizes = {"itemsize": self.itemsize, "ranks": machines.ranks}
        parameters = self.parameters(policy_config)
        shares = shares_of_policy(parameters, policy_config, activations=policy, state_bytes=self.state_bytes, **sizes)
        if config.reference.mode == "engine":
            frozen = parameters_of(self._frozen, threshold=_threshold(reference_config))
            shares += shares_of_reference(frozen, reference_config, activations=reference, **sizes)
        if machines.gpu_gib is not None:
            return [_PROGRAM_OF_GPU_RANK, *shares]
        shares = [share._replace(device=0, host=share.device + share.host) for share in shares]
        return [Share("program", host=_PROGRAM_OF_CPU_RANK), *shares]


def _threshold(ds_config: Mapping[str, Any]) -> int:
    return int(ds_config["zero_optimization"].get("stage3_param_persistence_threshold", 1e5))


def _table(machines: Machines, shares: list[Share]) -> str:
    """Returns rows of what a GPU, or a rank, and a whole machine need."""
    on_gpu = machines.gpu_gib is not None
    shown = [share for share in shares if share.device + share.host + share.files > _TOO_LITTLE_TO_SHOW]
    rows = [*shown, peak(shares)._replace(purpose="most in use at one time")]
    lines = [f"{'a GPU' if on_gpu else 'a rank':>8} {'a machine':>10}  GiB"]
    for share in rows:
        own, whole = share.device if on_gpu else share.host, share.host * machines.gpus
        when = {"all": "", "scoring": " (while scoring)", "training": " (while training)", "update": " (in the update)"}
        files = f", {share.files * machines.gpus / _GIB:.1f} in files" if share.files else ""
        lines.append(f"{own / _GIB:8.2f} {whole / _GIB:10.2f}  {share.purpose}{when[share.phase]}{files}")
    return ("\n" + 12 * " ").join(lines)


def _verdict(
    needs: Needs,
    machines: Machines,
    shares: list[Share],
    config: RunConfig,
    policy_config: Mapping[str, Any],
    reference_config: Mapping[str, Any],
) -> str:
    if machines.gpu_gib is None and machines.host_gib is None:
        return "not known without --gpu_gib, or --host_gib for ranks without a GPU"
    if _fits(shares, machines):
        return "yes" if machines.host_gib is not None else "yes, if the host has what is said above"
    for way in _ways_to_fit(config, needs) if machines.gpu_gib is not None else ():
        other = needs.shares(machines, *_changed(way, config, policy_config, reference_config))
        if _fits(other, machines):
            return "no; it does with " + " ".join(f"--{key} {value}" for key, value in way)
    nodes = machines.nodes
    while nodes < _MOST_NODES:
        nodes *= 2
        more = replace(machines, nodes=nodes)
        if more.ranks > config.train.pairs_per_step:
            break
        if _fits(needs.shares(more, config, policy_config, reference_config), more):
            return f"no; it does on {nodes} such nodes"
    return (
        "no; lower train.tokens_per_micro_batch or data.max_length, raise train.sequence_parallel_size, train an "
        "adapter, or take more memory"
    )


def _ways_to_fit(config: RunConfig, needs: Needs) -> list[list[tuple[str, str]]]:
    """Returns what may be changed, without what is so already or would change nothing."""
    idle = set()
    if config.train.activation_checkpointing != "none" or not needs.recomputable:
        idle.add(_CHECKPOINTING)
    if config.train.activation_checkpointing == "offload" or not needs.recomputable:
        idle.add(_INPUTS_AWAY)
    if config.reference.mode != "engine":
        idle.add(_REFERENCE_AWAY)
    return [changes for way in _WAYS_TO_FIT if (changes := [change for change in way if change not in idle])]


def _changed(
    way: Sequence[tuple[str, str]],
    config: RunConfig,
    policy_config: Mapping[str, Any],
    reference_config: Mapping[str, Any],
) -> tuple[RunConfig, Mapping[str, Any], Mapping[str, Any]]:
    for key, value in way:
        if key.startswith("train."):
            changed: dict[str, Any] = {key.removeprefix("train."): value}
            config = replace(config, train=replace(config.train, **changed))
            continue
        path, dtype = resolve_path(value, key=key, run_file=None), config.model.dtype
        if key == "deepspeed.reference":
            reference_config = reference_ds_config(path, dtype=dtype)
        else:
            policy_config = policy_ds_config(path, dtype=dtype, gradient_clipping=config.train.gradient_clipping)
    return config, policy_config, reference_config


def _fits(shares: list[Share], machines: Machines) -> bool:
    needed = peak(shares)
    return needed.device <= (machines.gpu_gib or 0) * _GIB and (
        machines.host_gib is None or needed.host * machines.gpus <= machines.host_gib * _GIB
    )
