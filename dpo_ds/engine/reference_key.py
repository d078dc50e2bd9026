"""What a frozen reference's log-probs depend on, found out without building its engine."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from dpo_ds.engine.weight_files import find_file, tensor_files
from dpo_ds.engine.world import World

BLOCK_PAIRS = 2048
"""Pairs of one file: what a killed pass loses at most, and enough micro-batches for many ranks."""

SCORING_VERSION = 2
"""Counts the changes of this package after which the same weights score otherwise."""

_PIECE_BYTES = 2**26


@dataclass(frozen=True)
class Scoring:
    """All that log-probs depend on, to their last bits; each value has a folder of its own.

    Attributes:
        checkpoint: digest of the reference's files.
        pairs: key of the prepared pairs.
        dtype: of the weights.
        layout: ``train.layout``; what ``auto`` came to follows from the rest.
        tokens_per_micro_batch: decides the micro-batches' shapes, and these the rounding.
        attention: ``model.attention``.
        sequence_parallel_size: ranks that share rows, and so decide how these are cut.
        tokens_per_mlp_tile: decides how MLPs cut rows.
        device: kind of device.
        libraries: versions of those whose code computes.
        block_pairs: pairs of a block; micro-batches never reach over its end.
        version: of this package's own scoring.
    """

    checkpoint: str
    pairs: str
    dtype: str
    layout: str
    tokens_per_micro_batch: int
    attention: str
    sequence_parallel_size: int
    tokens_per_mlp_tile: int | None
    device: str
    libraries: str
    block_pairs: int = BLOCK_PAIRS
    version: int = SCORING_VERSION

    @property
    def key(self) -> str:
        """The folder's name."""
        return hashlib.blake2b(json.dumps(asdict(self), sort_keys=True).encode(), digest_size=16).hexdigest()


def checkpoint_digest(path: str, *, world: World) -> str:
    """Returns a digest of a checkpoint's weights, config and code, of their bytes and not of their times; collective.

    Every rank reads a share. Loading the model would read all of it, on every rank.

    Args:
        path: folder or hub id.
        world: the ranks.

    Raises:
        UserError: it has no safetensors files, or a file cannot be read.
    """
    named = world.broadcast(_files_of(path) if world.rank == 0 else None)
    world.agree(None if named else f"{path} has no safetensors weights to know it by; convert it with save_pretrained")
    pieces = [(name, start) for name, size in named for start in range(0, size, _PIECE_BYTES)]
    mine, problem = [], None
    try:
        mine = [_digest_of_piece(path, *piece) for piece in pieces[world.rank :: world.size]]
    except OSError as error:
        problem = f"{path} cannot be read: {error}"
    world.agree(problem)
    by_rank = world.gather(mine)
    digests = [by_rank[place % world.size][place // world.size] for place in range(len(pieces))]
    return hashlib.sha256(json.dumps([pieces, digests]).encode()).hexdigest()


def _files_of(path: str) -> list[tuple[str, int]]:
    files, config = tensor_files(path), find_file(path, "config.json")
    if files is None or config is None:
        return []
    beside = Path(config).parent.glob("*.py")
    places = {Path(file) for file in files.values()} | {Path(config), *beside}
    return sorted((place.name, place.stat().st_size) for place in places)


def _digest_of_piece(path: str, name: str, start: int) -> str:
    place = find_file(path, name)
    if place is None:
        raise FileNotFoundError(f"there is no {name}")
    with open(place, "rb") as file:
        file.seek(start)
        return hashlib.sha256(file.read(_PIECE_BYTES)).hexdigest()
