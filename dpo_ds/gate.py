"""What must hold before the first update: heads, the layout of rows, and equal scores of equal weights."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from dpo_ds.data.batch import PairBatch, packed_batch, padded_batch
from dpo_ds.data.tokenization import TokenizedPair
from dpo_ds.engine import Engines, PolicyEngine, World
from dpo_ds.engine.reference_cache import CachedReference
from dpo_ds.errors import RunError, UserError
from dpo_ds.models.attention import share_prompts, why_not_packable
from dpo_ds.models.row_parts import RowParts
from dpo_ds.models.scorer import Scorer

PER_TOKEN_BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Largest difference of two log-probs, per token, that may come from rounding in another kernel of that dtype."""

PACKED_BOUND = {torch.float32: 1e-4, torch.bfloat16: 8e-2}
"""The same between packed and padded rows, whose sums run in another order in every layer.

SmolLM2-135M in bfloat16 differs by up to 0.04; wrong positions make 0.15 and more, pairs that see each other over 1.
"""

LOSS_BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Largest distance of the first loss from its analytic value."""

BATCHES = 4
"""Micro-batches that each rank scores at the gate."""

SAMPLED_PAIRS = 8
"""Pairs of each cached set that are scored again."""


def check_heads(engines: Engines, pair: TokenizedPair, *, world: World) -> None:
    """Compares each scorer with its model's own logits, on a small piece of a pair; collective.

    Raises:
        UserError: a model does something between its last hidden state and its logits that the scorer does not know.
    """
    for key, scorer in engines.scorers.items():
        check_head(scorer, pair, key=key, dtype=engines.policy.dtype, world=world)


def check_head(scorer: Scorer, pair: TokenizedPair, *, key: str, dtype: torch.dtype, world: World) -> None:
    """Compares one scorer with its model's own logits; ``key`` names it. As ``check_heads``."""
    # Small, since a model's own logits come all at once.
    difference = scorer.differs_from_its_model(padded_batch([_piece(pair, 32)]).to(world.device))
    bound = PER_TOKEN_BOUND[dtype]
    wrong = not difference <= bound
    world.agree(
        f"{key}: {type(scorer.model).__name__} computes its logits in a way that the scorer does not "
        f"know (log-probs differ by {difference:.2g} a token, bound {bound:g}); this architecture is not supported"
        if wrong
        else None
    )


def choose_layout(
    scorers: Mapping[str, Scorer],
    pair: TokenizedPair,
    *,
    layout: Literal["auto", "packed", "padded"],
    dtype: torch.dtype,
    world: World,
) -> bool:
    """Returns whether pairs share rows, for which all models are then made ready; collective.

    Args:
        scorers: by their keys in the run file.
        pair: any pair of the data; pieces of it prove that packed pairs score as single ones do.
        layout: ``train.layout``.
        dtype: of the weights.
        world: the ranks.

    Raises:
        UserError: ``packed`` is wanted, and a model cannot do it.
    """
    if layout == "padded":
        return False
    pieces, bound = _pieces(pair), PACKED_BOUND[dtype]
    reasons = [scorer.why_not_packed(pieces, bound=bound, device=world.device) for scorer in scorers.values()]
    reason = next((named for found in world.gather(reasons) for named in found if named), None)
    if reason is None:
        for scorer in scorers.values():
            share_prompts(scorer.model)
        return True
    if layout == "packed":
        raise UserError(f"train.layout: packed is not possible: {reason}; use auto or padded")
    if world.rank == 0:
        print(f"rows are padded, since {reason}", flush=True)
    return False


def split_rows(
    scorers: Mapping[str, Scorer],
    pair: TokenizedPair,
    *,
    row_parts: RowParts | None,
    packed: bool,
    dtype: torch.dtype,
    world: World,
) -> None:
    """Lets the ranks of a sequence-parallel group share rows, once all models have proven that they can; collective.

    Args:
        scorers: by their keys in the run file.
        pair: as in ``choose_layout``, which has been called.
        row_parts: the ranks of this rank's group; None: it is alone, and nothing changes.
        packed: what ``choose_layout`` returned.
        dtype: of the weights.
        world: the ranks.

    Raises:
        UserError: a model cannot do it.
    """
    if row_parts is None:
        return
    batch = (packed_batch if packed else padded_batch)(_pieces(pair)).to(world.device)
    for key, scorer in scorers.items():
        reason = why_not_packable(scorer.model)  # padded rows need that attention here, too
        if reason is None:
            share_prompts(scorer.model)
            reason = scorer.why_not_split(batch, row_parts, bound=PACKED_BOUND[dtype])
        world.agree(reason and f"train.sequence_parallel_size must be 1 for {key}: {reason}")
        scorer.row_parts = row_parts


def tile_mlps(
    scorers: Mapping[str, Scorer], pair: TokenizedPair, *, tokens: int | None, dtype: torch.dtype, world: World
) -> None:
    """Lets MLPs take few tokens at a time, once all models have proven that they can; collective.

    Args:
        scorers: by their keys in the run file.
        pair: any pair of the data.
        tokens: ``train.tokens_per_mlp_tile``; None: nothing changes.
        dtype: of the weights.
        world: the ranks.

    Raises:
        UserError: a model cannot do it.
    """
    if tokens is None:
        return
    batch = padded_batch(_pieces(pair)).to(world.device)
    for key, scorer in scorers.items():
        reason = scorer.why_not_tiled(batch, tokens=tokens, bound=PACKED_BOUND[dtype])
        world.agree(reason and f"train.tokens_per_mlp_tile must be null for {key}: {reason}")


def _pieces(pair: TokenizedPair) -> list[TokenizedPair]:
    return [_piece(pair, 32), _piece(pair, 12), _piece(pair, 20)]


def _piece(pair: TokenizedPair, tokens: int) -> TokenizedPair:
    return replace(pair.shortened(tokens), prompt_ids=pair.prompt_ids[-tokens:])


def starts_equal(engines: Engines, *, world: World, same_source: bool, cached: CachedReference | None = None) -> bool:
    """Returns whether policy and reference hold equal weights, so that the gate applies; collective.

    Args:
        engines: policy and reference.
        world: the ranks.
        same_source: both were read from one checkpoint, so that their weights have to be equal.
        cached: what the reference has left where it has no engine.

    Raises:
        RunError: the weights should be equal and are not.
    """
    policy, reference = engines.policy, cached or engines.reference
    if reference is None:
        return False
    if policy.fingerprint() == reference.fingerprint:
        return True
    if same_source:
        raise RunError("policy and reference were read from one checkpoint, but their weights differ")
    return False


@torch.no_grad()
def check_equal_scores(engines: Engines, batches: Sequence[PairBatch], *, world: World) -> None:
    """Scores micro-batches with both engines, which hold equal weights: every log-ratio must be 0; collective.

    Args:
        engines: policy and reference.
        batches: this rank's; as many on every rank.
        world: the ranks.

    Raises:
        RunError: equal weights score differently.
    """
    policy, reference = engines
    assert reference is not None
    policy.model.train()  # as in the steps, so that noise of training mode shows
    differences = [
        (policy.score(batch) - reference.score(batch)).flatten() / batch.response_tokens for batch in batches
    ]
    worst = max(world.gather(float(torch.cat(differences).abs().max())))
    bound = PER_TOKEN_BOUND[policy.dtype]
    if not worst <= bound:
        raise RunError(
            f"step-0 gate: equal weights, but policy and reference differ by {worst:.3g} a token (bound {bound:g} in "
            f"{policy.dtype}), so the first rewards would not be 0; compare the two ds_configs and the attention"
        )


@torch.no_grad()
def check_cached_scores(
    score: Callable[[PairBatch], Tensor], cached: CachedReference, *, seed: int, dtype: torch.dtype, world: World
) -> list[tuple[PairBatch, Tensor]]:
    """Scores some cached pairs again, in the micro-batches in which they were scored; collective.

    Args:
        score: of a live engine with the weights that scored them.
        cached: what is known so far.
        seed: draws the pairs.
        dtype: of the weights.
        world: the ranks.

    Returns:
        This rank's micro-batches, as many on every rank, and the log-probs that are cached of them.

    Raises:
        RunError: they score differently now.
    """
    samples = []
    for cache in cached.caches:
        sample = cache.sample(SAMPLED_PAIRS, seed=seed)
        differences = [(score(batch) - logps).flatten() / batch.response_tokens for batch, logps in sample]
        mine = float(torch.cat(differences).abs().max()) if differences else 0.0
        worst = float(torch.tensor(world.gather(mine)).max())  # unlike Python's, this maximum keeps NaN
        bound = PER_TOKEN_BOUND[dtype]
        if not worst <= bound:
            raise RunError(
                f"the log-probs cached in {cache.folder} differ by {worst:.3g} a token from what the same weights give "
                f"now (bound {bound:g} in {dtype}); remove the folder, and they are scored again"
            )
        samples += sample
    return samples


@torch.no_grad()
def check_probe(policy: PolicyEngine, batch: PairBatch, *, saved: Sequence[float]) -> None:
    """Holds what a restored policy scores against what it scored when it was saved; collective.

    Args:
        policy: its weights are those that were saved.
        batch: the pair that was scored, on every rank.
        saved: its log-probs then, perhaps in rows of another layout.

    Raises:
        RunError: equal weights score differently.
    """
    difference = policy.score(batch).flatten() - torch.tensor(saved, device=batch.response_tokens.device)
    worst = float((difference / batch.response_tokens).abs().max())
    bound = PACKED_BOUND[policy.dtype]
    if not worst <= bound:
        raise RunError(
            f"the policy was restored to the bit, but scores a pair by {worst:.3g} a token differently (bound "
            f"{bound:g}); are model.attention, the ds_config or the libraries others than those that saved?"
        )


def check_first_loss(loss: float, *, expected: float, dtype: torch.dtype) -> None:
    """Holds the mean loss of equal weights against its analytic value, ln 2 for DPO.

    Raises:
        RunError: it is another one.
    """
    bound = LOSS_BOUND[dtype]
    if not abs(loss - expected) <= bound * max(1.0, expected):
        raise RunError(
            f"step-0 gate: with equal weights the loss must be {expected:.6f}, got {loss:.6f} (bound {bound:g}, "
            "relative above 1); policy and reference do not score alike"
        )
