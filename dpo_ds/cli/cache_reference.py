"""``launch/cache_reference.py``: from argv to the reference's log-probs on disk."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_ds.cli.train import start
from dpo_ds.launcher.identity import Identity
from dpo_ds.launcher.signals import StopRequest

if TYPE_CHECKING:
    from dpo_ds.cli.preflight import Inputs
    from dpo_ds.engine.meeting import Meeting


def main(argv: Sequence[str] | None = None) -> None:
    """Fills a run's cache on this rank, as if its ``reference.mode`` were ``cache``, and checks what was there already.

    Exits as ``launch/train.py`` does.

    Args:
        argv: the arguments behind the script's name; None takes the process's.
    """
    start(argv, _fill, more=["--reference.mode", "cache"])


def _fill(found: "Inputs | None", identity: Identity, meeting: "Meeting", request: StopRequest) -> None:
    # Only now, so that --help and a mistyped key are answered at once.
    from dpo_ds.cli.reference import cached_reference
    from dpo_ds.engine import DataParallel, World
    from dpo_ds.engine.stopping import stoppable

    world = World.join(identity, meeting)
    inputs = world.broadcast(found)
    world.allow(asdict(inputs.config.timeouts))
    with stoppable(request, world=world, folder=Path(inputs.config.output_dir)) as agreement:
        data_parallel = DataParallel(world, sequence_parallel_size=inputs.config.train.sequence_parallel_size)
        cached_reference(inputs, world=world, data_parallel=data_parallel, agreement=agreement, checks=True)
    world.leave()
