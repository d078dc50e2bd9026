"""Composes a cached reference: what is on disk, what its engine adds to it, and that engine's end."""

import torch
import transformers

from dpo_ds.cli.preflight import Inputs
from dpo_ds.data.prepared import open_prepared
from dpo_ds.engine import DataParallel, World, initialize_reference
from dpo_ds.engine.reference_cache import CachedReference, LogpCache, Source
from dpo_ds.engine.reference_key import Scoring, checkpoint_digest
from dpo_ds.engine.stopping import Agreement
from dpo_ds.gate import check_cached_scores, check_head, choose_layout, split_rows, tile_mlps


def cached_reference(
    inputs: Inputs, *, world: World, data_parallel: DataParallel, agreement: Agreement, checks: bool = False
) -> CachedReference:
    """Returns the reference's log-probs of all pairs, from disk or scored now; collective.

    The reference's engine is built where a pair is missing, and gone when this returns. What it finds on disk it scores
    again in part.

    Args:
        inputs: of a run whose ``reference.mode`` is ``cache``.
        world: the ranks.
        data_parallel: which of them score which pairs.
        agreement: whether the ranks were asked to stop.
        checks: whether to build the engine even if nothing is missing, to check what is there.

    Raises:
        UserError: the checkpoint cannot be used, or the folder not be written.
        RunError: the log-probs on disk are not those of the reference, or new ones are not finite.
        Stopped: the ranks were asked to stop.
    """
    config, folder = inputs.config, inputs.cache
    assert inputs.reference is not None
    assert folder is not None
    sets = [open_prepared(path) for path in (inputs.train, inputs.evaluation) if path]
    checkpoint = checkpoint_digest(inputs.reference, world=world)

    def scoring(key: str) -> Scoring:
        return Scoring(
            checkpoint=checkpoint,
            pairs=key,
            dtype=config.model.dtype,
            layout=inputs.layout,
            tokens_per_micro_batch=config.reference.tokens_per_micro_batch or config.train.tokens_per_micro_batch,
            attention=config.model.attention,
            sequence_parallel_size=config.train.sequence_parallel_size,
            tokens_per_mlp_tile=config.train.tokens_per_mlp_tile,
            device=world.device.type,
            libraries=f"torch {torch.__version__}, transformers {transformers.__version__}",
        )

    cached = CachedReference(
        tuple(
            LogpCache(folder, scoring(key), pairs, world=world, data_parallel=data_parallel)
            for key, pairs in {pairs.manifest.key: pairs for pairs in sets}.items()
        )
    )
    if not cached.is_complete or checks:
        _complete(cached, inputs, world, data_parallel, agreement)
    elif world.rank == 0:
        print(f"the reference's log-probs are in {folder}; its engine is not built", flush=True)
    return cached


def _complete(
    cached: CachedReference, inputs: Inputs, world: World, data_parallel: DataParallel, agreement: Agreement
) -> None:
    config = inputs.config
    assert inputs.reference is not None
    reference = initialize_reference(
        inputs.reference,
        world=world,
        config=inputs.reference_config,
        dtype=inputs.dtype,
        attention=config.model.attention,
        trust_remote_code=config.model.trust_remote_code,
    )
    pair = cached.caches[0].pairs.pair(0)
    check_head(reference.model, pair, key="model.reference", dtype=inputs.dtype, world=world)
    scorers, dtype = {"model.reference": reference.model}, inputs.dtype
    tile_mlps(scorers, pair, tokens=config.train.tokens_per_mlp_tile, dtype=dtype, world=world)
    packed = choose_layout(scorers, pair, layout=inputs.layout, dtype=dtype, world=world)
    split_rows(scorers, pair, row_parts=data_parallel.row_parts, packed=packed, dtype=dtype, world=world)
    for cache in cached.caches:
        cache.expect(Source(reference.fingerprint, packed))
    check_cached_scores(reference.score, cached, seed=config.train.seed, dtype=inputs.dtype, world=world)
    world.enter("cache")
    for cache in cached.caches:
        cache.fill(reference, agreement)
    world.enter("load")
    reference.free()
