"""``launch/export.py``: from argv to a checkpoint's policy as a Hugging Face folder."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_ds.cli.train import start
from dpo_ds.config import Run
from dpo_ds.launcher.identity import Identity
from dpo_ds.launcher.signals import StopRequest

if TYPE_CHECKING:
    from dpo_ds.cli.preflight import Checkpointed
    from dpo_ds.engine.meeting import Meeting


def main(argv: Sequence[str] | None = None) -> None:
    """Exports a checkpoint on this rank: the newest complete one, or the one that ``--checkpoint.resume`` names.

    Ranks and memory are those of training, whose engine restores it; any number of ranks will do. Exits as
    ``launch/train.py`` does.

    Args:
        argv: the arguments behind the script's name; None takes the process's.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out", type=Path)
    options, arguments = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    start(arguments, _export, check=partial(_check, out=options.out))


def _check(run: Run, *, ranks: int, out: Path | None) -> "Checkpointed":
    from dpo_ds.cli.preflight import find_checkpoint

    return find_checkpoint(run, out=out)


def _export(found: "Checkpointed | None", identity: Identity, meeting: "Meeting", request: StopRequest) -> None:
    # Only now, so that --help and a mistyped key are answered at once.
    from dpo_ds.cli.export import export_model
    from dpo_ds.engine import World, initialize
    from dpo_ds.engine.checkpoint import Checkpoints

    world = World.join(identity, meeting)
    inputs: Checkpointed = world.broadcast(found)
    config = inputs.config
    world.allow(asdict(config.timeouts))
    policy, _ = initialize(
        config.model.policy,
        world=world,
        policy_config=inputs.policy_config,
        reference=None,
        reference_config=None,
        dtype=inputs.dtype,
        attention=config.model.attention,
        trust_remote_code=config.model.trust_remote_code,
    )
    checkpoints = Checkpoints(inputs.checkpoint.parent, policy=policy, world=world, origin={}, versions={})
    progress = checkpoints.restore([inputs.checkpoint], allowed=())
    world.enter("save")
    export_model(
        policy,
        inputs.out,
        config=config,
        tokenizer=inputs.tokenizer,
        reference_config=inputs.reference_config,
        step=progress.step,
        evaluation=progress.evaluation,
        world=world,
    )
    if world.rank == 0:
        print(f"exported {inputs.checkpoint} to {inputs.out}", flush=True)
    world.leave()
