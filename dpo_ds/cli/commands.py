"""``python -m dpo_ds COMMAND``, also ``dpo-ds COMMAND``: what one process does without ranks."""

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dpo_ds.config import parse_run
from dpo_ds.errors import UserError

if TYPE_CHECKING:
    from dpo_ds.cli.outlook import Machines

COMMANDS = {
    "inspect": "say what a run's data holds: rows, lengths, doubles, tokens; --json prints one object",
    "launch": "start a run on this machine or over ssh, or submit it to slurm or kubernetes; --help lists its options",
    "plan": "check a run, print what it would do, and leave nothing behind; with [--nodes N] --gpus N [--gpu_gib N]\n"
    "           [--host_gib N] say what memory it takes, whether that fits, and else what would",
    "prepare": "check a run and tokenize its data, so that no rank waits for it later",
    "resize": "--model M --tokenizer T --out FOLDER: a copy of a model with rows for all of a tokenizer's tokens",
}
USAGE = "usage: python -m dpo_ds COMMAND --config RUN.yaml [--section.key value ...]\n\n" + "\n".join(
    f"  {name:<9}{text}" for name, text in COMMANDS.items()
)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command.

    Exits with 0 when done, 2 when the user's config or data is wrong.

    Args:
        argv: the command and its arguments; None takes the process's.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return
    try:
        _run(argv[0], argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _run(command: str, argv: Sequence[str]) -> None:
    if command not in COMMANDS:
        nearest = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0)[0]
        raise UserError(f"unknown command {command}; did you mean {nearest}? python -m dpo_ds --help lists them")
    if command == "inspect":
        from dpo_ds.cli.inspect import inspect

        inspect([argument for argument in argv if argument != "--json"], as_json="--json" in argv)
        return
    if command == "launch":
        from dpo_ds.cli.launch import launch

        sys.exit(launch(argv))
    if command == "resize":
        from dpo_ds.cli.resize import resize

        print(resize(argv))
        return
    options, arguments = _options_of_plan().parse_known_args(argv) if command == "plan" else (None, argv)
    run = parse_run(arguments)._replace(dry_run=command == "plan")
    os.environ.update(run.config.env)
    # Only now, so that --help and a mistyped key are answered at once.
    from dpo_ds.cli.preflight import preflight

    machines = _machines(options) if options else None
    # As few as there may be, where nobody says how many.
    ranks = machines.ranks if machines else run.config.train.sequence_parallel_size
    inputs = preflight(run, ranks=ranks, machines=machines)
    print(inputs.plan)
    if command == "prepare":
        for folder in filter(None, (inputs.train, inputs.evaluation)):
            print(f"{'prepared':>10}  {folder}")


def _options_of_plan() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dpo_ds plan", allow_abbrev=False, add_help=False)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int)
    parser.add_argument("--gpu_gib", type=float)
    parser.add_argument("--host_gib", type=float)
    return parser


def _machines(options: argparse.Namespace) -> "Machines | None":
    """Returns the machines that a plan is for, None where it is for none in particular."""
    from dpo_ds.cli.outlook import Machines

    for name, value in vars(options).items():
        if value is not None and value <= 0:
            raise UserError(f"--{name} must be > 0, got {value:g}")
    if options.gpus is None:
        if options.nodes != 1 or options.gpu_gib or options.host_gib:
            raise UserError("--gpus must be given, too: how many ranks a machine has")
        return None
    return Machines(options.nodes, options.gpus, options.gpu_gib, options.host_gib)
