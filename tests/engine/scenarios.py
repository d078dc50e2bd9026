"""What real ranks do in the engine's tests: ``python scenarios.py AGENDA`` runs a list of these on every rank.

A scenario asserts; a rank whose assertion fails notes that and ends, and with it the job.
"""

import gc
import json
import resource
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from dpo_ds.data.batch import PairBatch, padded_batch
from dpo_ds.data.tokenization import TokenizedPair
from dpo_ds.engine import Engines, OptimizerSettings, World, initialize
from dpo_ds.engine.export import Probe, export
from dpo_ds.engine.loading import load_sharded
from dpo_ds.engine.machines import MachineMetrics
from dpo_ds.engine.meeting import Meeting
from dpo_ds.engine.reference import ReferenceEngine
from dpo_ds.engine.shards import fingerprint, shard_of, stored_buffers
from dpo_ds.engine.weight_files import difference_from_files
from dpo_ds.errors import RunError, UserError
from dpo_ds.gate import check_equal_scores, check_heads, starts_equal
from dpo_ds.launcher.identity import Identity
from dpo_ds.losses import PairLogps, preference_loss
from dpo_ds.models.causal_lm import load_model_config

# Threshold 0, so that a tiny model's parameters really are partitioned.
REFERENCE_CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "overlap_comm": False},
}
POLICY_CONFIG = REFERENCE_CONFIG | {
    "managed_gradient_accumulation": False,
    "data_types": {"grad_accum_dtype": "fp32"},
    "gradient_clipping": 1.0,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def configs(dtype: torch.dtype) -> dict[str, dict]:
    section = {"bf16": {"enabled": dtype is torch.bfloat16}}
    return {"policy_config": POLICY_CONFIG | section, "reference_config": REFERENCE_CONFIG | section}


def engines_of(model: str, world: World, dtype: torch.dtype = torch.float32, **options: Any) -> Engines:
    if "optimizer" in options:
        options["optimizer"] = OptimizerSettings(options["optimizer"])
    return initialize(model, world=world, reference=model, dtype=dtype, **configs(dtype) | options)


def some_pairs(count: int, vocabulary: int = 64) -> list[TokenizedPair]:
    draw = torch.Generator().manual_seed(1)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, vocabulary, (length,), generator=draw).tolist())

    return [
        TokenizedPair(id=str(n), prompt_ids=ids(3 + n), chosen_ids=ids(5), rejected_ids=ids(2 + 2 * n))
        for n in range(count)
    ]


def my_batch(world: World, count: int = 4) -> PairBatch:
    return padded_batch(some_pairs(count)[world.rank :: world.size]).to(world.device)


def take_step(engines: Engines, batch: PairBatch, *, pairs: int, learning_rate: float = 1e-3) -> float:
    logps = PairLogps(*engines.policy.score(batch), *engines.reference.score(batch), *batch.response_tokens.view(2, -1))
    engines.policy.backward(preference_loss(logps, type="sigmoid", beta=0.1).losses.sum() / pairs)
    return engines.policy.step(learning_rate=learning_rate)


def reference_stays(world: World, model: str) -> None:
    engines = engines_of(model, world)
    reference, policy = engines.reference, engines.policy
    assert type(reference.engine.optimizer).__name__ == "DeepSpeedZeRoOffload", "the reference has an optimizer"
    shards = [shard_of(parameter).values for parameter in reference.model.parameters()]
    whole = sum(parameter.ds_numel for parameter in reference.model.parameters())
    assert abs(sum(map(len, shards)) - whole / world.size) <= world.size * len(shards)
    assert not any(parameter.requires_grad for parameter in reference.model.parameters())
    theirs = {shard_of(parameter).values.untyped_storage().data_ptr() for parameter in policy.model.parameters()}
    assert not theirs & {shard.untyped_storage().data_ptr() for shard in shards}
    before = policy.fingerprint()
    assert before == reference.fingerprint
    batch = my_batch(world)
    for _ in range(3):
        take_step(engines, batch, pairs=4)
    assert policy.fingerprint() != before
    reference.check()
    assert all(parameter.grad is None for parameter in reference.model.parameters())
    assert (policy.score(batch) - reference.score(batch)).abs().max() > 1e-3


def moved_reference_is_found(world: World, model: str) -> None:
    reference = engines_of(model, world).reference
    last = list(reference.model.parameters())[-1]
    if world.rank == world.size - 1:
        shard_of(last).values[-1] += 1e-6
    expect_complaint(reference, "has moved")


def moved_running_copy_is_found(world: World, model: str) -> None:
    # Above this threshold nothing is sharded between steps: the model runs on whole copies, not on the shards.
    zero = REFERENCE_CONFIG["zero_optimization"] | {"stage3_param_persistence_threshold": 100_000}
    reference = engines_of(model, world, reference_config=REFERENCE_CONFIG | {"zero_optimization": zero}).reference
    for _ in range(3):  # DeepSpeed gives the copies up after the first forward, which it traces
        reference.score(my_batch(world))
    reference.check()
    next(reference.model.parameters()).data.view(-1)[-1] += 1e-6
    expect_complaint(reference, "has moved")


def moved_buffer_is_found(world: World, model: str) -> None:
    reference = engines_of(model, world).reference
    (bias,) = stored_buffers(reference.model).values()
    bias[-1] += 1e-6
    expect_complaint(reference, "has moved")


def trainable_reference_is_found(world: World, model: str) -> None:
    reference = engines_of(model, world).reference
    next(reference.model.parameters()).requires_grad_(True)
    expect_complaint(reference, "not frozen")


def aliased_reference_is_found(world: World, model: str) -> None:
    engines = engines_of(model, world)
    for mine, theirs in zip(engines.reference.model.parameters(), engines.policy.model.parameters(), strict=True):
        mine.ds_tensor.data = theirs.ds_tensor.data
    engines.reference.check()
    take_step(engines, my_batch(world), pairs=4)
    expect_complaint(engines.reference, "has moved")


def expect_complaint(reference: ReferenceEngine, complaint: str) -> None:
    with pytest.raises(RunError, match=complaint):
        reference.check()


def unlike_products_take_a_bounded_memory(world: World, model: str) -> None:
    whole = torch.ones(1001, 64, dtype=torch.bfloat16)
    before = psutil.Process().memory_info().rss
    for length in range(1, 1001):
        whole[:length] @ whole[:64]
    assert psutil.Process().memory_info().rss - before < 2**20 * 400, (
        "640 MiB where oneDNN and ideep keep what they like"
    )


def machines_are_told_apart(world: World, model: str) -> None:
    """Each rank stands for a machine, once of its own name and once of the same."""
    apart = MachineMetrics(world, local_rank=0, name=f"m{world.rank}").measure()
    alike = MachineMetrics(world, local_rank=0, name="m").measure()
    together = MachineMetrics(world, local_rank=world.rank, name="m").measure()
    kinds = ("host_memory_gib", "load")
    assert list(apart) == [f"system/m{n}/{kind}" for n in range(world.size) for kind in kinds]
    assert list(alike) == [f"system/m-{n}/{kind}" for n in range(world.size) for kind in kinds]
    assert list(together) == [f"system/m/{kind}" for kind in kinds]
    for found in (apart, alike, together):
        for name, value in found.items():
            largest = psutil.virtual_memory().total / 2**30 if name.endswith("gib") else 1000
            assert 0 <= value < largest, (name, value)


def other_expert_is_found(world: World, model: str, other: str) -> None:
    """A mixture's experts are one weight of the model and a tensor each in files."""
    policy = engines_of(model, world).policy.model.model
    assert world.gather(difference_from_files(policy, model)) == [None] * world.size
    [problem] = [found for found in world.gather(difference_from_files(policy, other)) if found]
    assert "the weight model.layers.1.mlp.experts.2.up_proj.weight differs from the file" in problem


def unlike_reference_cannot_follow(world: World, model: str, other: str) -> None:
    float32 = torch.float32
    engines = initialize(model, world=world, reference=other, dtype=float32, **configs(float32))
    assert isinstance(engines.reference, ReferenceEngine)
    with pytest.raises(UserError, match=r"sync_every must be null: .* are not the policy's, by name and shape"):
        engines.reference.check_it_can_follow(engines.policy)


def first_scores(world: World, model: str, dtype: str) -> None:
    engines = engines_of(model, world, DTYPES[dtype])
    batch = my_batch(world)
    check_heads(engines, some_pairs(1)[0], world=world)
    assert starts_equal(engines, world=world, same_source=True)
    check_equal_scores(engines, [batch], world=world)
    assert torch.equal(engines.policy.score(batch), engines.reference.score(batch))


def gate_finds_a_difference(world: World, model: str) -> None:
    engines = engines_of(model, world)
    # Dropout that slipped through would do this.
    engines.reference.model.model.base_model.register_forward_hook(
        lambda module, inputs, output: setattr(output, "last_hidden_state", output.last_hidden_state * 1.01)
    )
    with pytest.raises(RunError, match="step-0 gate"):
        check_equal_scores(engines, [my_batch(world)], world=world)


def gate_finds_noise_of_training_mode(world: World, model: str) -> None:
    engines = engines_of(model, world)
    engines.policy.model.eval()
    layer = engines.policy.model.model.base_model.layers[0]
    layer.register_forward_hook(lambda module, inputs, output: output * (1.01 if module.training else 1.0))
    with pytest.raises(RunError, match="step-0 gate"):
        check_equal_scores(engines, [my_batch(world)], world=world)


def unknown_head_is_refused(world: World, model: str) -> None:
    engines = engines_of(model, world)
    engines.policy.model.model.lm_head.register_forward_hook(lambda module, inputs, output: output * 1.5)
    with pytest.raises(UserError, match=r"model\.policy"):
        check_heads(engines, some_pairs(1)[0], world=world)


def broken_checkpoint_is_refused(world: World, model: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        engines_of(model, world)


def gradient_norm(world: World, model: str, out: str, options: dict[str, Any]) -> None:
    engines = engines_of(model, world, **options)
    norms = [take_step(engines, my_batch(world), pairs=4) for _ in range(3)]
    if world.rank == 0:
        Path(out).write_text(json.dumps(norms))


def fingerprints(world: World, model: str, out: str) -> None:
    loaded = load_sharded(
        model, ds_config=REFERENCE_CONFIG, dtype=torch.float32, attention="auto", trust_remote_code=False, world=world
    )
    value = fingerprint(loaded, world)
    if world.rank == 0:
        Path(out).write_text(json.dumps(value))


def scores(world: World, model: str, out: str) -> None:
    engines = engines_of(model, world)
    check_heads(engines, some_pairs(1)[0], world=world)
    rows = world.gather(engines.policy.score(my_batch(world)).tolist())
    norms = take_step(engines, my_batch(world), pairs=4)
    if world.rank == 0:
        Path(out).write_text(json.dumps({"scores": rows, "grad_norm": norms}))


class NoTokenizer:
    def save(self, folder: Path) -> None:
        (folder / "tokenizer.txt").write_text("none")


def probe_of(world: World, dtype: torch.dtype, bound: float = 0.0) -> Probe:
    batch = padded_batch(some_pairs(2)).to(world.device)
    return Probe(batch, configs(dtype)["reference_config"], "auto", False, bound=bound)


def export_of(engines: Engines, world: World, model: str, out: str, **options: Any) -> None:
    options = {"config": load_model_config(model), "probe": probe_of(world, engines.policy.dtype), **options}
    export(engines.policy, NoTokenizer(), Path(out), card="# a card\n", world=world, **options)  # type: ignore[arg-type]


def exports(world: World, model: str, out: str, max_shard_size: str) -> None:
    engines = engines_of(model, world, torch.bfloat16)
    take_step(engines, my_batch(world), pairs=4, learning_rate=1e-2)
    engines.reference.free()
    export_of(engines, world, model, out, max_shard_size=max_shard_size)
    engines.policy.model.eval()
    with torch.no_grad():
        scored = world.gather(engines.policy.score(my_batch(world)).tolist())
    if world.rank == 0:
        Path(out).with_suffix(".json").write_text(json.dumps(scored))


def broken_exports_are_refused(world: World, model: str, out: str) -> None:
    folder = Path(out)
    engines = engines_of(model, world)
    export_of(engines, world, model, out)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    world.barrier()
    # Files of more bytes than this cannot be written: on one rank, which has the second file.
    own_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, own_limit[1]))
    with pytest.raises(UserError, match=rf"cannot be exported to {out}: .*too large.*export\.folder"):
        export_of(engines, world, model, out, max_shard_size="20KB")
    resource.setrlimit(resource.RLIMIT_FSIZE, own_limit)
    config = load_model_config(model)
    config.rms_norm_eps = 0.1
    with pytest.raises(RunError, match="scores otherwise than by the live policy"):
        export_of(engines, world, model, out, config=config)
    with pytest.raises(UserError, match="holds something that is no verified export"):
        export_of(engines, world, model, model)
    if world.rank == 1:
        shard_of(list(engines.policy.model.parameters())[-1]).values[-1] = torch.inf
    with pytest.raises(RunError, match="is not finite"):
        export_of(engines, world, model, out, probe=probe_of(world, torch.float32))
    world.barrier()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.glob(f"{folder.name}*")] == [folder.name]


def interrupted_replacement_loses_nothing(world: World, model: str, out: str) -> None:
    folder = Path(out)
    engines = engines_of(model, world)
    if world.rank == 0:  # as a rank would leave it that was killed between its two renames
        folder.with_name(folder.name + ".tmp").mkdir()
        older = folder.with_name(folder.name + ".old")
        older.mkdir()
        (older / "SHA256SUMS").write_text("")
    world.barrier()
    if world.rank == 1:
        shard_of(list(engines.policy.model.parameters())[-1]).values[-1] = torch.inf
    with pytest.raises(RunError, match="is not finite"):
        export_of(engines, world, model, out)
    world.barrier()
    assert [path.name for path in folder.iterdir()] == ["SHA256SUMS"]
    assert [path.name for path in folder.parent.glob(f"{folder.name}*")] == [folder.name]


def main(agenda: str, scenarios: Mapping[str, Any]) -> None:
    """Runs an agenda, a JSON list of [name, arguments], in one process group, and notes each outcome as it comes."""
    gc.freeze()  # as the launched script does
    identity = Identity.from_environment()
    world = World.join(identity, Meeting(identity))
    for name, arguments in json.loads(Path(agenda).read_text()):
        with Path(agenda).with_suffix(f".{world.rank}.outcomes").open("a") as file:
            try:
                scenarios[name](world, *arguments)
                world.barrier()
            except BaseException:
                file.write(json.dumps([name, arguments, traceback.format_exc()]) + "\n")
                raise
            file.write(json.dumps([name, arguments, "passed"]) + "\n")
    world.leave()


if __name__ == "__main__":
    main(sys.argv[1], globals())
