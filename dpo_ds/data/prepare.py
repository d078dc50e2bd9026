"""Tokenizes preferences once, into immutable Arrow files that every rank maps into memory.

Written aside and renamed, so a folder of prepared pairs is complete or absent; what a killed process had whole is gone
on from. One process writes; no rank may enter.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple, NoReturn

import pyarrow as pa
from filelock import FileLock, Timeout
from tqdm import tqdm

from dpo_ds.data.preferences import Scored, Source
from dpo_ds.data.prepared import (
    FORMAT,
    MANIFEST,
    SCHEMA,
    Manifest,
    PreparedPairs,
    check_dropped,
    open_prepared,
    read_manifest,
)
from dpo_ds.data.processes import map_in_order
from dpo_ds.data.row_tokenizer import Chunk, RowTokenizer, numbered, progress_bar
from dpo_ds.data.rows import Rows, load_rows, rows_between
from dpo_ds.data.tokenization import Tokenizer, Truncation
from dpo_ds.errors import UserError

_ROWS_PER_CHUNK = 500
_ROWS_PER_SHARD = 32_000
_ASIDE = re.compile(r"\.[0-9a-f]{32}")
_SILENT_S = 1
_ASIDE_IS_KEPT_S = 7 * 24 * 3600


def prepare(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    truncation: Truncation | None,
    scored: Scored = "last_turn",
    max_dropped: float,
    folder: Path,
    processes: int | None = 1,
    rows_per_shard: int = _ROWS_PER_SHARD,
) -> PreparedPairs:
    """Tokenizes the sources into ``folder/KEY``, or opens what is there if that was done before.

    Several processes may call it at once: one works, the others wait and open its result. After an error that the user
    can mend nothing stays behind; a process that is killed or interrupted leaves its whole shards aside, and the next
    call goes on from there.

    Args:
        sources: read one after the other.
        tokenizer: the policy's.
        max_length: bound on the tokens of prompt + longer response.
        truncation: as in ``tokenize_pair``.
        scored: as in ``read_preferences``.
        max_dropped: share of the rows, in [0, 1], above which unusable rows are an error.
        folder: of all prepared data; created if need be.
        processes: how many tokenize, as in ``map_in_order``; what is written does not depend on it.
        rows_per_shard: rows whose pairs share a file, a multiple of 500; what a kill costs at most.

    Raises:
        RunError: a process that tokenizes was killed.
        UserError: a source cannot be read or lacks a column, or too many rows cannot be used.
    """
    files_of = [load_rows(source) for source in sources]
    files = [rows for part in files_of for rows in part]
    parts = [number for number, part in enumerate(files_of) for _ in part]
    settings = [rows_per_shard, parts, tokenizer.identity, max_length, truncation, scored]
    return prepare_rows(
        files,
        tokenizer,
        key=_content_key(files, settings),
        parts=parts,
        max_length=max_length,
        truncation=truncation,
        scored=scored,
        max_dropped=max_dropped,
        folder=folder,
        processes=processes,
        rows_per_shard=rows_per_shard,
    )


def prepare_rows(
    files: Sequence[Rows],
    tokenizer: Tokenizer,
    *,
    key: str,
    parts: Sequence[int],
    max_length: int,
    truncation: Truncation | None,
    scored: Scored,
    max_dropped: float,
    folder: Path,
    processes: int | None,
    rows_per_shard: int = _ROWS_PER_SHARD,
    shows_bar: bool = True,
) -> PreparedPairs:
    """Does what ``prepare`` does for rows that were opened before, into a folder whose name is known.

    Args:
        files: read one after the other.
        tokenizer: the policy's.
        key: the folder's name; whoever calls sees to it that other pairs have another one.
        parts: for each file, which of the run's sources, counted from 0, names it.
        max_length: as for ``prepare``, and so on.
        shows_bar: whether a progress bar is shown where it takes long.

    Raises:
        RunError: a process that tokenizes was killed.
        UserError: a file is broken in the middle or lacks a column, or too many rows cannot be used.
    """
    created = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    _forget_old_asides(folder)
    lock = folder / f".{key}.lock"
    try:
        with _locked(lock):
            if not (folder / key).exists():
                blank = Manifest(
                    format=FORMAT,
                    key=key,
                    sources=[rows.path for rows in files],
                    parts=[*parts],
                    tokenizer=tokenizer.identity,
                    max_length=max_length,
                    truncation=truncation,
                    scored=scored,
                    rows_read=sum(map(len, files)),
                )
                work = RowTokenizer.of(files, tokenizer, max_length=max_length, truncation=truncation, scored=scored)
                _write(
                    files,
                    work,
                    blank=blank,
                    max_dropped=max_dropped,
                    folder=folder,
                    processes=processes,
                    rows_per_shard=rows_per_shard,
                    shows_bar=shows_bar,
                )
            prepared = open_prepared(folder / key)
            # Another run, with another bound, may have written it.
            check_dropped(prepared.manifest, max_dropped)
            lock.unlink(missing_ok=True)
            return prepared
    except BaseException:
        lock.unlink(missing_ok=True)
        for parent in created:
            # Not empty, or already gone: another process works in there.
            with suppress(OSError):
                parent.rmdir()
        raise


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    lock = FileLock(file)
    # Without locks several processes may write the same shards, each under a name of its own until it is whole.
    with suppress(NotImplementedError):
        try:
            lock.acquire(timeout=_SILENT_S)
        except Timeout:
            print(f"another process prepares this data in {file.parent}; waiting for its end", file=sys.stderr)
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _forget_old_asides(folder: Path) -> None:
    """Removes what killed processes left and nobody has gone on from, whatever its settings were."""
    for path in folder.iterdir():
        # Another process may be quicker.
        with suppress(FileNotFoundError):
            if _ASIDE.fullmatch(path.name) and time.time() - path.stat().st_mtime > _ASIDE_IS_KEPT_S:
                shutil.rmtree(path, ignore_errors=True)


class _Shard(NamedTuple):
    """What a file of pairs holds and what its rows lost.

    Attributes:
        rows: how many were read.
        pairs: how many of what they name could be used.
        blake2b: hash of the file.
        dropped: what could not, by reason.
        first_dropped: for each reason the file and row where it was met first.
    """

    rows: int
    pairs: int
    blake2b: str
    dropped: dict[str, int]
    first_dropped: dict[str, str]


def _write(
    files: Sequence[Rows],
    work: RowTokenizer,
    *,
    blank: Manifest,
    max_dropped: float,
    folder: Path,
    processes: int | None,
    rows_per_shard: int,
    shows_bar: bool,
) -> None:
    aside, target = folder / f".{blank.key}", folder / blank.key
    try:
        aside.mkdir(exist_ok=True)
        if not (aside / MANIFEST).exists():
            shards = _write_shards(
                files, work, aside, processes=processes, rows_per_shard=rows_per_shard, shows_bar=shows_bar
            )
            manifest = _manifest(blank, shards)
            check_dropped(manifest, max_dropped)
            _put(aside / MANIFEST, asdict(manifest))
        whole = {MANIFEST, *read_manifest(aside).shards}
        for path in aside.iterdir():
            if path.name not in whole:
                path.unlink()
        aside.rename(target)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        # Where the file system has no locks, another process may have been quicker.
        if not target.exists():
            raise UserError(
                f"the prepared pairs cannot be written to {folder}: {error.strerror or error}; free some space there, "
                "or name another output_dir"
            ) from error
    except UserError:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _write_shards(
    files: Sequence[Rows],
    work: RowTokenizer,
    aside: Path,
    *,
    processes: int | None,
    rows_per_shard: int,
    shows_bar: bool,
) -> list[_Shard]:
    """Writes the shards that are not there yet; returns what all of them hold."""
    rows_read = sum(map(len, files))
    shards = _whole_shards(aside)
    begun = sum(shard.rows for shard in shards)
    rest = numbered(rows_between(files, begun, rows_read))
    chunks = map_in_order(
        work,
        iter(lambda: list(islice(rest, _ROWS_PER_CHUNK)), []),
        count=-(-(rows_read - begun) // _ROWS_PER_CHUNK),
        processes=processes,
    )
    with closing(chunks), progress_bar(files, begun=begun, is_shown=shows_bar) as bar:
        for number in range(len(shards), -(-rows_read // rows_per_shard)):
            shards.append(_write_shard(aside, number, islice(chunks, rows_per_shard // _ROWS_PER_CHUNK), files, bar))
    return shards


def _write_shard(
    aside: Path, number: int, chunks: Iterable[Chunk], files: Sequence[Rows], bar: "tqdm[NoReturn]"
) -> _Shard:
    dropped: Counter[str] = Counter()
    first_dropped: dict[str, str] = {}
    rows = pairs = 0
    written = aside / f".{uuid.uuid4().hex}"
    with pa.OSFile(str(written), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
        for chunk in chunks:
            writer.write_batch(chunk.pairs)
            rows += chunk.rows
            pairs += len(chunk.pairs)
            for reason, source, row in chunk.dropped:
                dropped[reason] += 1
                first_dropped.setdefault(reason, f"{files[source].path} row {row}")
            bar.update(chunk.rows)
    shard = _Shard(rows, pairs, _hash(written), dict(dropped), first_dropped)
    _sync(written)
    written.rename(aside / _name(number))
    # Only now is it whole.
    _put(aside / f"{_name(number)}.json", shard._asdict())
    return shard


def _whole_shards(aside: Path) -> list[_Shard]:
    """Returns the first shards of a process that was killed, up to one that is missing or damaged."""
    shards: list[_Shard] = []
    with suppress(OSError, ValueError, TypeError):
        while True:
            name = _name(len(shards))
            shard = _Shard(**json.loads((aside / f"{name}.json").read_text()))
            if shard.blake2b != _hash(aside / name):
                break
            shards.append(shard)
    return shards


def _manifest(blank: Manifest, shards: Sequence[_Shard]) -> Manifest:
    dropped: Counter[str] = Counter()
    first_dropped: dict[str, str] = {}
    for shard in shards:
        dropped.update(shard.dropped)
        first_dropped = shard.first_dropped | first_dropped
    pairs = sum(shard.pairs for shard in shards)
    return replace(
        blank,
        pairs=pairs,
        dropped=dict(dropped),
        first_dropped=first_dropped,
        expanded=pairs + dropped.total() - blank.rows_read,
        shards={_name(number): shard.blake2b for number, shard in enumerate(shards)},
    )


def _name(shard: int) -> str:
    return f"pairs-{shard:05}.arrow"


def _hash(file: Path) -> str:
    with pa.memory_map(str(file)) as mapped:
        return hashlib.blake2b(mapped.read_buffer(), digest_size=16).hexdigest()


def _put(file: Path, content: object) -> None:
    """Writes JSON that is there as a whole or not at all."""
    written = file.with_name(f".{uuid.uuid4().hex}")
    written.write_text(json.dumps(content, indent=1) + "\n")
    _sync(written)
    written.rename(file)


def _sync(file: Path) -> None:
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def _content_key(files: Sequence[Rows], settings: Sequence[object]) -> str:
    named = [FORMAT, *settings, [sorted(rows.columns.items()) for rows in files]]
    digest = hashlib.blake2b(json.dumps(named).encode(), digest_size=16)
    for rows in files:
        rows.update(digest)
    return digest.hexdigest()
