"""The step-0 gate: with equal weights, policy and reference must agree before the first update."""

from dataclasses import replace

import torch

from dpo_ds.data.batch import PairBatch, padded_batch
from dpo_ds.data.tokenization import TokenizedPair
from dpo_ds.engine import Engines, World
from dpo_ds.errors import RunError

PER_TOKEN_BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Largest difference of two log-probs, per token, that may come from rounding in another kernel of that dtype."""


def check_heads(engines: Engines, pair: TokenizedPair, *, world: World) -> None:
    """Compares each scorer with its model's own logits, on a small piece of a pair; collective.

    Raises:
        UserError: a model does something between its last hidden state and its logits that the scorer does not know.
    """
    # Small, since a model's own logits come all at once.
    piece = replace(
        pair, prompt_ids=pair.prompt_ids[-32:], chosen_ids=pair.chosen_ids[:32], rejected_ids=pair.rejected_ids[:32]
    )
    batch = padded_batch([piece]).to(world.device)
    for role, engine in (("policy", engines.policy), ("reference", engines.reference)):
        if engine is None:
            continue
        difference = engine.model.differs_from_its_model(batch)
        bound = PER_TOKEN_BOUND[engines.policy.dtype]
        wrong = not difference <= bound
        world.agree(
            f"model.{role}: {type(engine.model.model).__name__} computes its logits in a way that the scorer does not "
            f"know (log-probs differ by {difference:.2g} a token, bound {bound:g}); this architecture is not supported"
            if wrong
            else None
        )


def check_equal_start(engines: Engines, batch: PairBatch, *, world: World, same_source: bool) -> bool:
    """Scores a micro-batch with both engines before the first update; collective.

    Where both hold equal weights every log-ratio must be 0, hence every reward 0 and the loss its value at margin 0.

    Args:
        engines: policy and reference.
        batch: this rank's micro-batch.
        world: the ranks.
        same_source: both were read from one checkpoint, so that their weights have to be equal.

    Returns:
        Whether the weights are equal, so that the gate applied.

    Raises:
        RunError: the weights should be equal and are not, or equal weights score differently.
    """
    policy, reference = engines
    if reference is None:
        return False
    if policy.fingerprint() != reference.fingerprint:
        if same_source:
            raise RunError("policy and reference were read from one checkpoint, but their weights differ")
        return False
    with torch.no_grad():
        differences = (policy.score(batch) - reference.score(batch)).flatten() / batch.response_tokens
    worst = max(world.gather(float(differences.abs().max())))
    bound = PER_TOKEN_BOUND[policy.dtype]
    if not worst <= bound:
        raise RunError(
            f"step-0 gate: equal weights, but policy and reference differ by {worst:.3g} a token (bound {bound:g} in "
            f"{policy.dtype}), so the first rewards would not be 0; compare the two ds_configs and the attention"
        )
    return True
