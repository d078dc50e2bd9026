"""Files that are on the disk for good, and what they hold."""

import hashlib
import os
from pathlib import Path

_PIECE_BYTES = 2**24


def settled(path: Path) -> tuple[int, str]:
    """Returns what ``measured`` does, once the file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return measured(path)


def measured(path: Path) -> tuple[int, str]:
    """Returns a file's size and the SHA-256 of its contents."""
    size, digest = 0, hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            size += len(piece)
            digest.update(piece)
    return size, digest.hexdigest()


def sync_folder(path: Path) -> None:
    """Waits until a folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
