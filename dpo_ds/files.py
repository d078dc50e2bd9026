"""Files that are on the disk whole and for good, and what they hold."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

_PIECE_BYTES = 2**24


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file so that it is there complete or not at all, whatever ends this process or the machine.

    Args:
        path: the file; an earlier one is replaced.
        content: what it will hold.

    Raises:
        OSError: it cannot be written; an earlier one stays.
    """
    aside = path.with_name(f"{path.name}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError:
        with suppress(OSError):
            aside.unlink()
        raise
    sync_folder(path.parent)


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
