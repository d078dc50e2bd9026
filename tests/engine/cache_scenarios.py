"""What real ranks do in the tests of the cached reference: ``python cache_scenarios.py AGENDA``."""

import json
import os
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from dpo_ds.data.batch import padded_batch
from dpo_ds.data.prepared import Manifest, PreparedPairs
from dpo_ds.engine import DataParallel, PolicyEngine, ReferenceEngine, World, initialize, initialize_reference
from dpo_ds.engine.reference_cache import CachedReference, LogpCache, Source
from dpo_ds.engine.reference_key import Scoring, checkpoint_digest
from dpo_ds.engine.stopping import Agreement
from dpo_ds.errors import RunError, UserError
from dpo_ds.gate import check_cached_scores, choose_layout
from dpo_ds.launcher.signals import StopRequest
from tests.engine.scenarios import POLICY_CONFIG, REFERENCE_CONFIG, main, some_pairs

PAIRS = 11  # in blocks of 4, 4 and 3


def prepared(count: int = PAIRS) -> PreparedPairs:
    rows = [{**vars(pair), "row": n + 1, "source": 0} for n, pair in enumerate(some_pairs(count))]
    manifest = Manifest(
        format=2,
        key="k",
        sources=["some"],
        parts=[0],
        tokenizer="t",
        max_length=64,
        truncation=None,
        scored="last_turn",
        rows_read=count,
        pairs=count,
    )
    return PreparedPairs(Path("nowhere"), manifest, pa.Table.from_pylist(rows))


def scoring(layout: str = "padded") -> Scoring:
    return Scoring(
        checkpoint="c",
        pairs="k",
        dtype="float32",
        layout=layout,
        tokens_per_micro_batch=100,
        attention="auto",
        sequence_parallel_size=1,
        tokens_per_mlp_tile=None,
        device="cpu",
        libraries="l",
        block_pairs=4,
    )


def reference_of(model: str, world: World) -> ReferenceEngine:
    return initialize_reference(model, world=world, config=REFERENCE_CONFIG, dtype=torch.float32)


def opened(folder: str, world: World, layout: str = "padded") -> LogpCache:
    return LogpCache(Path(folder), scoring(layout), prepared(), world=world, data_parallel=DataParallel(world))


def filled(folder: str, reference: ReferenceEngine, world: World, layout: str = "padded") -> LogpCache:
    pair = prepared().pair(0)
    scorers = {"model.reference": reference.model}
    packed = choose_layout(scorers, pair, layout=layout, dtype=torch.float32, world=world)
    cache = opened(folder, world, layout)
    cache.expect(Source(reference.fingerprint, packed))
    cache.fill(reference, Agreement(StopRequest()))
    return cache


def check(engine: ReferenceEngine | PolicyEngine, cache: LogpCache, world: World) -> None:
    check_cached_scores(engine.score, CachedReference((cache,)), seed=0, dtype=torch.float32, world=world)


def files(cache: LogpCache) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in sorted(cache.folder.glob("*.safetensors"))}


def fills(world: World, model: str, folder: str, layout: str) -> None:
    reference = reference_of(model, world)
    before = filled(folder, reference, world, layout)
    cache = opened(folder, world, layout)
    assert cache.is_complete
    assert cache.source == Source(reference.fingerprint, layout == "packed")
    assert torch.equal(cache.logps(range(PAIRS)), before.logps(range(PAIRS)))
    for batch, logps in cache.sample(PAIRS, seed=0):
        assert torch.equal(reference.score(batch), logps)
    for index in range(PAIRS):
        alone = padded_batch([prepared().pair(index)])
        difference = (reference.score(alone) - cache.logps([index])).flatten() / alone.response_tokens
        assert difference.abs().max() <= 1e-5
    if world.rank == 0:
        Path(folder, "logps.json").write_text(json.dumps(cache.logps(range(PAIRS)).tolist()))


def goes_on(world: World, model: str, folder: str) -> None:
    """A block is gone, one has a flipped bit, one is left, and so is the file of a writer that was killed."""
    reference = reference_of(model, world)
    cache = filled(folder, reference, world)
    expected, before = cache.logps(range(PAIRS)).clone(), files(cache)
    gone, damaged, kept = (cache.folder / name for name in before)
    world.barrier()
    if world.rank == 0:
        gone.unlink()
        damaged.write_bytes(damaged.read_bytes()[:-20] + b"\x01" + damaged.read_bytes()[-19:])
        (cache.folder / f".{gone.name}.killed").write_bytes(b"half")
    world.barrier()
    assert not opened(folder, world).is_complete
    again = filled(folder, reference, world)
    assert again.is_complete
    assert torch.equal(again.logps(range(PAIRS)), expected)
    after = files(again)
    assert list(after) == list(before)
    assert not list(cache.folder.glob(".*"))
    assert after[kept.name] == before[kept.name]
    assert after[damaged.name] > before[damaged.name]


def ends_early(world: World, model: str, folder: str) -> None:
    reference = reference_of(model, world)
    forwards = iter(range(1000))

    def die(*_: object) -> None:
        cache = opened_alone(folder)
        if next(forwards) and cache and len(cache) == 2:
            os._exit(9)

    reference.model.register_forward_pre_hook(die)
    filled(folder, reference, world)


def opened_alone(folder: str) -> list[Path]:
    return list(Path(folder).glob("*/*.safetensors"))


def other_weights_are_scored_anew(world: World, model: str, other: str, folder: str) -> None:
    theirs = filled(folder, reference_of(other, world), world).logps(range(PAIRS)).clone()
    cache = filled(folder, reference_of(model, world), world)
    assert not torch.isclose(cache.logps(range(PAIRS)), theirs).any()


def poisoned_rows_are_found(world: World, model: str, folder: str) -> None:
    reference = reference_of(model, world)
    layer = reference.model.model.base_model.layers[0]
    hook = layer.register_forward_hook(lambda module, inputs, output: output * 1.01)
    cache = filled(folder, reference, world)
    check(reference, cache, world)
    hook.remove()
    with pytest.raises(RunError, match=r"differ by .* remove the folder"):
        check(reference, cache, world)


def infinite_rows_are_refused(world: World, model: str, folder: str) -> None:
    reference = reference_of(model, world)
    reference.model.register_forward_hook(lambda module, inputs, output: output / 0)
    with pytest.raises(RunError, match=r"4 pairs are not finite \(some row 1, .*some row 4\)"):
        filled(folder, reference, world)
    assert not opened_alone(folder)


def what_cannot_be_written_is_named(world: World, model: str, folder: str) -> None:
    root = Path(folder)
    if world.rank == 0:
        root.write_text("a file")
    world.barrier()
    with pytest.raises(UserError, match=r"reference\.cache_dir .* cannot be written"):
        filled(folder, reference_of(model, world), world)


def memory_comes_back(world: World, model: str) -> None:
    shards = sum(file.numel() * 4 for file in load_file(Path(model, "model.safetensors")).values()) / world.size

    def anonymous_bytes() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        (line,) = (line for line in lines if line.startswith("Anonymous:"))
        return int(line.split()[1]) * 1024

    def held_by(reference: ReferenceEngine) -> int:
        tensors = [held for p in reference.model.parameters() for held in (p.data, p.ds_tensor.data)]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    def scoring_reference() -> ReferenceEngine:
        reference = reference_of(model, world)
        reference.score(padded_batch(some_pairs(2)))
        world.trim_memory()
        return reference

    for _ in range(2):  # what libraries keep for themselves is there from now on
        scoring_reference().free()
    # What lingers now and then, a gathered weight or a page that malloc keeps, is here a few MB; shards are 41 MB.
    start, some = anonymous_bytes(), 0.4 * shards
    reference = scoring_reference()
    assert held_by(reference) >= shards
    assert anonymous_bytes() - start >= shards - some
    reference.free()
    assert held_by(reference) == 0
    assert anonymous_bytes() - start <= some


def policy_agrees(world: World, model: str, folder: str) -> None:
    """The engine is gone; a policy with its weights scores the cached micro-batches to the bit, and trains."""
    reference = reference_of(model, world)
    cache = filled(folder, reference, world)
    fingerprint = reference.fingerprint
    reference.free()
    policy, _ = initialize(
        model,
        world=world,
        policy_config=POLICY_CONFIG,
        reference=None,
        reference_config=None,
        dtype=torch.float32,
    )
    assert policy.fingerprint() == fingerprint == CachedReference((cache,)).fingerprint
    check(policy, cache, world)
    for batch, logps in cache.sample(PAIRS, seed=0):
        assert torch.equal(policy.score(batch), logps)
    policy.backward(policy.score(padded_batch(some_pairs(2))).sum())
    assert policy.step(learning_rate=1e-3) > 0
    with pytest.raises(RunError, match="remove the folder"):
        check(policy, cache, world)


def digests(world: World, out: str, models: list[str]) -> None:
    found = [checkpoint_digest(model, world=world) for model in models]
    if world.rank == 0:
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], globals())
