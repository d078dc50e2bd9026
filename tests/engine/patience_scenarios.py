"""What two real ranks do in the tests of standing still: ``python patience_scenarios.py SCENARIO [MODEL]`` on both."""

import sys
import time

import pytest
import torch
import torch.distributed as dist

from dpo_ds.engine import World
from dpo_ds.engine.meeting import Meeting
from dpo_ds.launcher.identity import Identity
from tests.engine.scenarios import engines_of, my_batch, take_step

LIMITS = {"load_s": 2.0, "cache_s": 30.0, "train_s": 3.0, "save_s": 60.0, "silence_s": 60.0}


def every_group_is_patient_for_longer_than_the_clock(world: World, model: str) -> None:
    own = dist.new_group()
    world.allow(LIMITS)
    for phase in ("cache", "train", "save"):
        world.enter(phase)
        for group in (dist.group.WORLD, own):
            timeout = group._get_backend(torch.device("cpu")).options._timeout
            assert timeout.total_seconds() == LIMITS[f"{phase}_s"] + 60


def a_rank_that_progresses_lives_on_and_one_that_waits_ends(world: World, model: str) -> None:
    world.allow(LIMITS)
    world.enter("train")
    for _ in range(5):
        time.sleep(1)
        world.progressed()
    print("alive", flush=True)
    if world.rank == 0:
        world.barrier()
    time.sleep(60)


def another_order_of_collectives_is_named(world: World, model: str) -> None:
    engines = engines_of(model, world)
    batch = my_batch(world)
    started = time.monotonic()
    comes_next = (lambda: engines.policy.score(batch)) if world.rank == 0 else world.barrier
    with pytest.raises(RuntimeError, match="Detected mismatch between collectives on ranks"):
        comes_next()
    assert time.monotonic() - started < 5


def a_gradient_that_is_not_finite_leaves_the_weights_alone(world: World, model: str) -> None:
    engines = engines_of(model, world)
    batch = my_batch(world)
    before = engines.policy.fingerprint()
    for wrong in (float("inf"), float("nan")):
        # On one rank alone.
        weight = wrong if world.rank == 1 else 1.0
        engines.policy.backward(engines.policy.score(batch).sum() * weight)
        assert not torch.tensor(engines.policy.step(learning_rate=1e-3)).isfinite()
        assert engines.policy.fingerprint() == before
    assert 0 < take_step(engines, batch, pairs=4) < 1e3
    assert engines.policy.fingerprint() != before


if __name__ == "__main__":
    identity = Identity.from_environment()
    with Meeting(identity) as meeting:
        if identity.speaks_for_node:
            meeting.vouch({})
        meeting.wait()
    ranks = World.join(identity, meeting)
    *scenarios, path = sys.argv[1:]
    for scenario in scenarios:
        globals()[scenario](ranks, path)
    sys.exit()
