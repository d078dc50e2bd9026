"""``launch/export.py``: from argv to the model of a checkpoint, without training."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dpo_ds.cli.train import start
from dpo_ds.launcher.identity import Identity
from dpo_ds.launcher.signals import StopRequest

if TYPE_CHECKING:
    from dpo_ds.cli.preflight import Inputs
    from dpo_ds.engine.meeting import Meeting


def main(argv: Sequence[str] | None = None) -> None:
    """Exports a run's newest complete checkpoint, or that of ``--checkpoint.resume PATH``, on this rank.

    Exits as ``launch/train.py`` does.

    Args:
        argv: the arguments behind the script's name; None takes the process's.
    """
    start(argv, _export, trains=False)


def _export(inputs: "Inputs | None", identity: Identity, meeting: "Meeting", request: StopRequest) -> None:
    # Only now, so that --help and a mistyped key are answered at once. A signal ends this at once: there is nothing to
    # save, and the next start clears away what is left.
    from dpo_ds.cli.publish import export_checkpoint

    export_checkpoint(inputs, identity, meeting)
