"""What real ranks do in the tests of checkpoints: ``python checkpoint_scenarios.py AGENDA``."""

import json
import pickle
import random
import resource
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch

from dpo_ds.engine import Engines, World, checkpoint
from dpo_ds.engine.checkpoint import Checkpoints, Progress, complete_checkpoints, read_saved
from dpo_ds.engine.extensions import build_extensions
from dpo_ds.errors import RunError, UserError
from dpo_ds.files import measured
from tests.engine.scenarios import DTYPES, engines_of, main, my_batch, take_step

PROGRESS = Progress(step=2, tokens=7, train_seconds=1.5, metrics_bytes=3, wandb_run_id="abc", evaluation={"loss": 0.5})


def checkpoints_of(engines: Engines, world: World, folder: str | Path, **options: Any) -> Checkpoints:
    return Checkpoints(Path(folder), policy=engines.policy, world=world, origin={"a": 1}, versions={}, **options)


def build(options: dict[str, Any]) -> None:
    """Compiles what engines with these options need, which the tests' launcher has not."""
    build_extensions(
        options.get("policy_config", {"zero_optimization": {}}), optimizer=options.get("optimizer", "adamw")
    )


BOUNDS = {"float32": 1e-4, "bfloat16": 5e-2}


def drawn() -> list[float]:
    """One number from each generator."""
    return [float(torch.rand(())), float(np.random.rand()), random.random()]


def goes_on(world: World, model: str, folder: str, dtype: str, options: dict[str, Any]) -> None:
    build(options)
    batch = my_batch(world)
    engines = engines_of(model, world, DTYPES[dtype], **options)
    checkpoints = checkpoints_of(engines, world, folder)
    checkpoints.check_place()
    for _ in range(2):
        take_step(engines, batch, pairs=4)
    with torch.no_grad():
        engines.policy.score(batch)  # as an evaluation just before
    torch.manual_seed(world.rank)
    drawn()
    checkpoints.save(PROGRESS)
    saved = engines.policy.fingerprint()
    expected = [drawn(), *(take_step(engines, batch, pairs=4) for _ in range(3)), engines.policy.fingerprint()]

    engines = engines_of(model, world, DTYPES[dtype], **options)
    assert engines.policy.fingerprint() != saved
    with torch.no_grad():
        engines.policy.score(batch)  # as the choice of a layout just before
    found, _ = complete_checkpoints(Path(folder))
    restored = checkpoints_of(engines, world, folder).restore(found, allowed=())
    assert restored == PROGRESS
    assert engines.policy.fingerprint() == saved
    again = [drawn(), *(take_step(engines, batch, pairs=4) for _ in range(3)), engines.policy.fingerprint()]
    assert again == expected, (again, expected)
    if world.rank == 0:
        Path(folder, "norms.json").write_text(json.dumps(expected[1:-1]))


def spreads(world: World, model: str, folder: str, dtype: str, options: dict[str, Any]) -> None:
    """What ``goes_on`` has saved on two ranks goes on on another number of ranks."""
    build(options)
    engines = engines_of(model, world, DTYPES[dtype], **options)
    found, _ = complete_checkpoints(Path(folder))
    checkpoints_of(engines, world, folder).restore(found, allowed=())
    norms = [take_step(engines, my_batch(world), pairs=4) for _ in range(3)]
    # Sums are taken in another order; in bfloat16 also the rows' shapes matter.
    assert norms == pytest.approx(json.loads(Path(folder, "norms.json").read_text()), rel=BOUNDS[dtype])
    steps = [int(state.get("step", 0)) for state in engines.policy.engine.basic_optimizer.state.values()]
    before = steps_before(found[0])
    assert set(steps) == {before + 3 if before else 0}, steps


def steps_before(checkpoint: Path) -> int:
    """What an optimizer that counts its steps has counted."""
    file = next(checkpoint.glob("*zero_pp_rank_0_mp_rank_00_optim_states.pt"))
    state = torch.load(file, weights_only=False)["optimizer_state_dict"]["optimizer_state_dict"]["state"]
    return int(state[0].get("step", 0))


def older_ones_go(world: World, model: str, folder: str) -> None:
    checkpoints = checkpoints_of(engines_of(model, world), world, folder, keep=1, keep_every=4, keep_best="loss")
    for step, loss in ((2, 0.3), (4, 0.6), (6, 0.5), (8, 0.4), (10, 0.4)):
        checkpoints.save(replace(PROGRESS, step=step, evaluation={"loss": loss}))
    world.barrier()
    kept = sorted(path.name for path in Path(folder).iterdir())
    assert kept == [f"step-{step:08d}" for step in (2, 4, 8, 10)]


def disks_of_nodes_are_told_apart(world: World, model: str, folder: str) -> None:
    checkpoints = checkpoints_of(engines_of(model, world), world, Path(folder, str(world.rank)))
    checkpoint._SEEN_WITHIN_S = 0.5
    for attempt in (checkpoints.check_place, lambda: checkpoints.save(PROGRESS), checkpoints.check_place):
        with pytest.raises(UserError, match="must be on a file system that all ranks share"):
            attempt()
    world.barrier()
    assert not list(Path(folder, "0").iterdir())


def unwritable_folder_is_named(world: World, model: str, folder: str) -> None:
    if world.rank == 0:
        Path(folder).write_text("a file in the way")
    checkpoints = checkpoints_of(engines_of(model, world), world, Path(folder, "checkpoints"))
    for attempt in (checkpoints.check_place, lambda: checkpoints.save(PROGRESS)):
        with pytest.raises(UserError, match=r"checkpoints cannot be saved in .*; make it writable, or name another"):
            attempt()


def full_disk_is_named(world: World, model: str, folder: str) -> None:
    engines = engines_of(model, world)
    take_step(engines, my_batch(world), pairs=4)
    checkpoints = checkpoints_of(engines, world, folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    with pytest.raises(UserError, match="checkpoints cannot be saved in"):
        checkpoints.save(PROGRESS)
    world.barrier()
    assert not list(Path(folder).iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    checkpoints.save(PROGRESS)
    assert len(complete_checkpoints(Path(folder))[0]) == 1


def written_meanwhile(world: World, model: str, folder: str) -> None:
    """Two checkpoints of the same weights, one of them written while steps are taken, and by a slow disk."""
    batch = my_batch(world)
    engines = engines_of(model, world)
    take_step(engines, batch, pairs=4)
    at_once, meanwhile = (
        checkpoints_of(engines, world, Path(folder, name), background=name == "meanwhile")
        for name in ("at_once", "meanwhile")
    )
    at_once.save(PROGRESS)
    go_on, write = Event(), torch.save
    torch.save = lambda *arguments, **options: (go_on.wait(), write(*arguments, **options))
    meanwhile.save(PROGRESS)
    take_step(engines, batch, pairs=4)
    meanwhile.finish_if_written()
    assert not complete_checkpoints(Path(folder, "meanwhile"))[0]
    if world.rank == 0:
        go_on.set()
    meanwhile.finish_if_written()  # the other rank still writes
    world.barrier()
    assert not complete_checkpoints(Path(folder, "meanwhile"))[0]
    go_on.set()
    meanwhile.finish()
    torch.save = write
    found, _ = complete_checkpoints(Path(folder, "meanwhile"))
    assert checkpoints_of(engines, world, Path(folder, "meanwhile")).restore(found, allowed=()) == PROGRESS
    other, _ = complete_checkpoints(Path(folder, "at_once"))
    assert read_saved(found[0]) == read_saved(other[0])
    checkpoints_of(engines, world, Path(folder, "at_once")).restore(other, allowed=())
    # What cannot be written is told where the run next looks.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    meanwhile.save(replace(PROGRESS, step=4))
    with pytest.raises(UserError, match="checkpoints cannot be saved in"):
        meanwhile.finish()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    world.barrier()
    assert [path.name for path in Path(folder, "meanwhile").iterdir()] == [found[0].name]


def lack_of_space_is_named(world: World, model: str, folder: str) -> None:
    engines = engines_of(model, world)
    engines.policy.bytes_per_weight = 10**15
    checkpoints = checkpoints_of(engines, world, folder)
    with pytest.raises(UserError, match=r"a checkpoint needs about \d+.\d GiB in .*, where .* GiB are free"):
        checkpoints.check_place()
    checkpoints.check_place(will_save=False)
    world.barrier()
    assert not Path(folder).exists()


class Payload:
    """What an attacker puts into a shard: unpickling it makes a file."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (Path(self._path),)


def changed(world: World, path: Path, change: Callable[[Path], object]) -> None:
    """Changes a file of a checkpoint, and its manifest with it."""
    if world.rank == 0:
        change(path)
        manifest = json.loads((path.parent / "COMPLETE").read_text())
        manifest["files"][path.name] = measured(path)
        (path.parent / "COMPLETE").write_text(json.dumps(manifest))
    world.barrier()


def saved_once(world: World, model: str, folder: str) -> Path:
    checkpoints_of(engines_of(model, world), world, folder).save(PROGRESS)
    ((path,), _) = complete_checkpoints(Path(folder))
    world.barrier()
    return path


def code_in_a_shard_is_not_executed(world: World, model: str, folder: str, mark: str) -> None:
    path = saved_once(world, model, folder)
    shard = path / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    changed(world, shard, lambda file: torch.save({"optimizer_state_dict": Payload(mark)}, file, pickle_module=pickle))
    with pytest.raises(RunError, match="cannot be loaded"):
        checkpoints_of(engines_of(model, world), world, folder).restore([path], allowed=())
    assert not Path(mark).exists()


def other_weights_than_saved_are_found(world: World, model: str, folder: str) -> None:
    path = saved_once(world, model, folder)
    weights = read_saved(path).weights
    world.barrier()  # one rank is about to rewrite it
    changed(world, path / "state.json", lambda file: file.write_text(file.read_text().replace(weights, "0" * 64)))
    with pytest.raises(RunError, match="weights are not those that were saved"):
        checkpoints_of(engines_of(model, world), world, folder).restore([path], allowed=())


def optimizer_that_was_left_out_is_found(world: World, model: str, folder: str) -> None:
    engines = engines_of(model, world)
    take_step(engines, my_batch(world), pairs=4)
    checkpoints_of(engines, world, folder).save(PROGRESS)
    ((path,), _) = complete_checkpoints(Path(folder))
    world.barrier()

    def forget_moments(file: Path) -> None:
        held = torch.load(file, weights_only=False)
        for state in held["optimizer_state_dict"]["optimizer_state_dict"]["state"].values():
            state["exp_avg"].zero_()
        torch.save(held, file)

    changed(world, path / "zero_pp_rank_1_mp_rank_00_optim_states.pt", forget_moments)
    with pytest.raises(RunError, match="masters, moments or steps are not those that were saved"):
        checkpoints_of(engines_of(model, world), world, folder).restore([path], allowed=())


if __name__ == "__main__":
    main(sys.argv[1], globals())
