"""The policy as a Hugging Face folder, proven: at a run's end, and out of any checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_ds.config import RunConfig
from dpo_ds.engine import PolicyEngine, World, initialize_reference
from dpo_ds.engine.export import export
from dpo_ds.gate import check_export
from dpo_ds.model_card import model_card
from dpo_ds.models.causal_lm import load_model_config
from dpo_ds.models.tokenizer import load_tokenizer
from dpo_ds.tracking import versions


def export_model(
    policy: PolicyEngine,
    folder: Path,
    *,
    config: RunConfig,
    tokenizer: str,
    reference_config: Mapping[str, Any],
    step: int,
    evaluation: Mapping[str, float] | None,
    world: World,
) -> None:
    """Exports a policy, opens the files again as a frozen engine, and lets both score a pair; collective.

    Args:
        policy: the engine.
        folder: where the model goes.
        config: the run's, with its paths where they were found.
        tokenizer: folder, file or hub id.
        reference_config: resolved DeepSpeed config of a frozen engine.
        step: optimizer steps behind the weights.
        evaluation: means over the held-out pairs after that step, or None.
        world: the ranks.

    Raises:
        UserError: the files cannot be written.
        RunError: they are not the policy.
    """
    trust = config.model.trust_remote_code

    def prove(written: Path) -> None:
        reopened = initialize_reference(
            str(written),
            world=world,
            config=reference_config,
            dtype=policy.dtype,
            attention=config.model.attention,
            trust_remote_code=trust,
        )
        check_export(policy, reopened, world=world)
        reopened.free()

    export(
        policy,
        load_tokenizer(tokenizer, trust_remote_code=trust),
        folder,
        config=load_model_config(config.model.policy, trust_remote_code=trust),
        world=world,
        card=model_card(config, step=step, evaluation=evaluation, versions=versions()),
        prove=prove,
    )
