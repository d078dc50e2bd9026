"""The only room that knows that other ranks exist: DeepSpeed and torch.distributed are imported here alone."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from dpo_ds.engine.data_parallel import DataParallel
from dpo_ds.engine.extensions import keeps_optimizer_on_host
from dpo_ds.engine.loading import load_sharded
from dpo_ds.engine.optimizers import OptimizerSettings
from dpo_ds.engine.policy import PolicyEngine
from dpo_ds.engine.reference import AdapterReference, Reference, ReferenceEngine
from dpo_ds.engine.world import World
from dpo_ds.models.adapters import Adapter
from dpo_ds.models.causal_lm import Checkpointing, checkpoint_activations
from dpo_ds.models.lean import keep_little
from dpo_ds.models.scorer import Scorer

__all__ = [
    "DataParallel",
    "Engines",
    "OptimizerSettings",
    "PolicyEngine",
    "Reference",
    "ReferenceEngine",
    "World",
    "initialize",
    "initialize_reference",
]


class Engines(NamedTuple):
    """What ``initialize`` returns; ``reference`` is None for reference-free losses."""

    policy: PolicyEngine
    reference: Reference | None

    @property
    def scorers(self) -> dict[str, Scorer]:
        """Both models' scorers, by the run file's keys of the models."""
        engines = {"model.policy": self.policy, "model.reference": self.reference}
        return {key: engine.model for key, engine in engines.items() if engine is not None}


def initialize(
    policy: str,
    *,
    world: World,
    policy_config: Mapping[str, Any],
    reference: str | None,
    reference_config: Mapping[str, Any] | None,
    dtype: torch.dtype = torch.bfloat16,
    attention: str = "auto",
    trust_remote_code: bool = False,
    activation_checkpointing: Checkpointing = "none",
    optimizer: OptimizerSettings | None = None,
    balances_experts: bool = False,
    measures_entropy: bool = False,
    adapter: Adapter | None = None,
    adapter_start_is_reference: bool = False,
) -> Engines:
    """Builds the policy's and the reference's ZeRO-3 engines; the counterpart of ``deepspeed.initialize``; collective.

    Both models are read from files, one after the other, each straight into shards. The reference is never made from
    the policy.

    Args:
        policy: folder or hub id of the model that trains.
        world: the ranks.
        policy_config: resolved DeepSpeed config (``engine.ds_config.policy_ds_config``).
        reference: folder or hub id of the frozen model, or None for reference-free losses.
        reference_config: resolved DeepSpeed config without an optimizer; None without a reference.
        dtype: of both models' weights; the policy's masters are float32.
        attention: ``auto``, or the name of an attention that transformers knows.
        trust_remote_code: whether code that comes with the weights may run.
        activation_checkpointing: what the policy's layers keep for backward.
        optimizer: what updates the policy; None is AdamW.
        balances_experts: whether the policy, a mixture of experts, has a ``routing_loss`` behind each ``score``.
        measures_entropy: whether the policy has ``entropies`` behind each ``score``.
        adapter: trains in place of the policy's own weights; None trains those.
        adapter_start_is_reference: whether the reference is what the adapter begins with, scored by the policy's own
            engine; ``reference`` must then be None.

    Raises:
        UserError: a checkpoint cannot be opened, or does not fill its model exactly.
    """
    if keeps_optimizer_on_host(policy_config):
        world.spare_memory()
    policy_scorer = Scorer(
        load_sharded(
            policy,
            ds_config=policy_config,
            dtype=dtype,
            attention=attention,
            trust_remote_code=trust_remote_code,
            world=world,
            adapter=adapter,
            keeps_start=adapter_start_is_reference and adapter is not None and adapter.path is not None,
        ),
        balances_experts=balances_experts,
        measures_entropy=measures_entropy,
    )
    keep_little(policy_scorer.model)
    checkpoint_activations(policy_scorer.model, activation_checkpointing)
    world.trim_memory()  # whole tensors passed through while shards were cut from them
    policy_engine = PolicyEngine(
        policy_scorer,
        ds_config=policy_config,
        world=world,
        optimizer=optimizer or OptimizerSettings(),
    )
    world.trim_memory()  # the shards moved into one buffer
    reference_engine: Reference | None = None
    if adapter_start_is_reference:
        reference_engine = AdapterReference(policy_engine, world=world)
    if reference is not None and reference_config is not None:
        reference_engine = initialize_reference(
            reference,
            world=world,
            config=reference_config,
            dtype=dtype,
            attention=attention,
            trust_remote_code=trust_remote_code,
        )
    return Engines(policy_engine, reference_engine)


def initialize_reference(
    reference: str,
    *,
    world: World,
    config: Mapping[str, Any],
    dtype: torch.dtype = torch.bfloat16,
    attention: str = "auto",
    trust_remote_code: bool = False,
    adapter: Adapter | None = None,
) -> ReferenceEngine:
    """Builds the reference's engine alone; collective. Arguments and errors as those of ``initialize``."""
    model = load_sharded(
        reference,
        ds_config=config,
        dtype=dtype,
        attention=attention,
        trust_remote_code=trust_remote_code,
        world=world,
        adapter=adapter,
    )
    engine = ReferenceEngine(Scorer(model), ds_config=config, world=world)
    world.trim_memory()  # whole tensors passed through while shards were cut from them
    return engine
