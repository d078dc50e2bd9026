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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from tqdm import tqdm

from dpo_ds.data.preferences import Columns, DropReason, Preference, Scored, read_preferences
from dpo_ds.data.preferences import Source as Source
from dpo_ds.data.processes import map_in_order
from dpo_ds.data.rows import Row, Rows, load_rows, rows_between
from dpo_ds.data.schedule import Lengths
from dpo_ds.data.tokenization import TokenizedPair, Tokenizer, Truncation, tokenize_pair
from dpo_ds.errors import UserError

_FORMAT = 3
_ROWS_PER_CHUNK = 500
_ROWS_PER_SHARD = 32_000
_MANIFEST = "manifest.json"
_ASIDE = re.compile(r"\.[0-9a-f]{32}")
_SILENT_S = 1
_ASIDE_IS_KEPT_S = 7 * 24 * 3600
_IDS = pa.list_(pa.int32())
_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "row": pa.int64(),
        "source": pa.int32(),
        "prompt_ids": _IDS,
        "chosen_ids": _IDS,
        "rejected_ids": _IDS,
        "chosen_scored": pa.list_(pa.bool_()),
        "rejected_scored": pa.list_(pa.bool_()),
        "probability": pa.float64(),
        "margin": pa.float64(),
        "weight": pa.float64(),
    }
)
_OPTIONAL = ("chosen_scored", "rejected_scored", "probability", "margin", "weight")


@dataclass(frozen=True)
class Manifest:
    """What a folder of prepared pairs says of itself; ``rows_read + expanded == pairs + sum(dropped.values())``.

    Attributes:
        format: version of the files' layout.
        key: hash of all that the pairs depend on.
        sources: files, folders and hub ids, in the order that the column ``source`` counts from 0.
        parts: for each of them which of the given sources, counted from 0, names it.
        tokenizer: its identity.
        max_length: bound on the tokens of prompt + longer response.
        truncation: what was done with longer ones.
        scored: which turns of a conversation are scored.
        rows_read: rows of all sources.
        pairs: what could be used.
        dropped: what could not, by reason.
        first_dropped: for each reason the file and row (counted from 1) where it was met first.
        expanded: how many more pairs than one a row the rows with ranked answers name.
        shards: the files with the pairs, in order, and the blake2b of each.
    """

    format: int
    key: str
    sources: list[str]
    parts: list[int]
    tokenizer: str
    max_length: int
    truncation: Truncation | None
    scored: Scored
    rows_read: int
    pairs: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    first_dropped: dict[str, str] = field(default_factory=dict)
    expanded: int = 0
    shards: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class PreparedPairs:
    """Tokenized pairs, mapped into memory.

    Attributes:
        path: their folder.
        manifest: what it holds and how that came about.
        table: one row a pair: ``id``, ``row`` (in its source, from 1), ``source``, ``prompt_ids``, ``chosen_ids``,
            ``rejected_ids``, and, null where a pair has no such thing, ``chosen_scored``, ``rejected_scored``,
            ``probability``, ``margin`` and ``weight``.
    """

    path: Path
    manifest: Manifest
    table: pa.Table

    def __len__(self) -> int:
        return self.manifest.pairs

    @property
    def dropped(self) -> Mapping[str, int]:
        """Rows that could not be used, by reason."""
        return self.manifest.dropped

    def pair(self, index: int) -> TokenizedPair:
        """Returns one pair."""
        columns = ("prompt_ids", "chosen_ids", "rejected_ids")
        prompt, chosen, rejected = (tuple(self.table[name][index].values.to_pylist()) for name in columns)
        given = {name: self.table[name][index].as_py() for name in self._given}
        more: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in given.items()}
        return TokenizedPair(self.table["id"][index].as_py(), prompt, chosen, rejected, **more)

    def where(self, index: int) -> str:
        """Returns which row of which source a pair was, for messages."""
        source = self.manifest.sources[self.table["source"][index].as_py()]
        return f"{source} row {self.table['row'][index].as_py()}"

    @cached_property
    def _given(self) -> list[str]:
        return [name for name in _OPTIONAL if self.table[name].null_count < len(self.table)]

    @cached_property
    def part(self) -> NDArray[np.int64]:
        """Which of the given sources, counted from 0, each pair is from, ``(pairs,)``, in ascending order."""
        parts: NDArray[np.int64] = np.array(self.manifest.parts)[self.table["source"].to_numpy()]
        return parts

    @property
    def pairs_of_parts(self) -> list[int]:
        """How many pairs each of the given sources has."""
        counts: list[int] = np.bincount(self.part, minlength=self.manifest.parts[-1] + 1).tolist()
        return counts

    @cached_property
    def lengths(self) -> Lengths:
        """Tokens of prompts, chosen and rejected responses."""
        return Lengths(
            *(
                pc.list_value_length(self.table[name]).to_numpy().astype(np.int64)
                for name in ("prompt_ids", "chosen_ids", "rejected_ids")
            )
        )


class Outcome(NamedTuple):
    """What became of a row, or of one of the pairs that a row names.

    Attributes:
        source: place of its file, folder or hub id among all.
        row: number in there, from 1.
        preference: the texts, None where the row has none.
        pair: the tokens, or why there are none.
    """

    source: int
    row: int
    preference: Preference | None
    pair: TokenizedPair | DropReason


class NumberedRow(NamedTuple):
    """A row and where it was read.

    Attributes:
        source: place of its file, folder or hub id among all.
        number: in there, from 1.
        cells: by column.
    """

    source: int
    number: int
    cells: Row


@dataclass(frozen=True)
class RowTokenizer:
    """All that decides what becomes of a row; it can be sent to another process.

    Attributes:
        files: path and column names of each file, folder or hub id.
        tokenizer: the policy's.
        max_length: bound on the tokens of prompt + longer response.
        truncation: as in ``tokenize_pair``.
        scored: as in ``read_preferences``.
    """

    files: tuple[tuple[str, Columns], ...]
    tokenizer: Tokenizer
    max_length: int
    truncation: Truncation | None
    scored: Scored

    def outcomes(self, row: NumberedRow) -> Iterator[Outcome]:
        """Yields what becomes of each preference that a row holds.

        Raises:
            UserError: the row lacks a column, or needs a chat template that there is not.
        """
        path, columns = self.files[row.source]
        where = f"{path} row {row.number}"
        for read in read_preferences(row.cells, columns=columns, where=where, scored=self.scored):
            if isinstance(read, str):
                yield Outcome(row.source, row.number, None, read)
                continue
            pair = tokenize_pair(read, self.tokenizer, max_length=self.max_length, truncation=self.truncation)
            yield Outcome(row.source, row.number, read, pair)

    def __call__(self, rows: Sequence[NumberedRow]) -> "Chunk":
        """Returns what becomes of some rows, as it is stored."""
        outcomes = [outcome for row in rows for outcome in self.outcomes(row)]
        kept = [
            {"row": outcome.row, "source": outcome.source, **vars(outcome.pair)}
            for outcome in outcomes
            if not isinstance(outcome.pair, str)
        ]
        dropped = [(outcome.pair, outcome.source, outcome.row) for outcome in outcomes if isinstance(outcome.pair, str)]
        return Chunk(len(rows), pa.RecordBatch.from_pylist(kept, schema=_SCHEMA), dropped)


class Chunk(NamedTuple):
    """What became of some rows.

    Attributes:
        rows: how many they were.
        pairs: what could be used.
        dropped: what could not: reason, place of the file among all, and row.
    """

    rows: int
    pairs: pa.RecordBatch
    dropped: list[tuple[DropReason, int, int]]


def tokenize(
    files: Sequence[Rows],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    truncation: Truncation | None,
    scored: Scored = "last_turn",
) -> Iterator[Outcome]:
    """Yields what becomes of each row, in order, behind a progress bar if it takes long.

    Args:
        files: as ``load_rows`` gives them.
        tokenizer: the policy's.
        max_length: bound on the tokens of prompt + longer response.
        truncation: as in ``tokenize_pair``.
        scored: as in ``read_preferences``.

    Raises:
        UserError: a file is broken in the middle, lacks a column, or needs a chat template that there is not.
    """
    work = _row_tokenizer(files, tokenizer, max_length, truncation, scored)
    with _progress_bar(files) as bar:
        for row in _numbered(dict(enumerate(files))):
            yield from work.outcomes(row)
            bar.update()


def _row_tokenizer(
    files: Sequence[Rows], tokenizer: Tokenizer, max_length: int, truncation: Truncation | None, scored: Scored
) -> RowTokenizer:
    paths = tuple((rows.path, dict(rows.columns)) for rows in files)
    return RowTokenizer(paths, tokenizer, max_length, truncation, scored)


def _numbered(files: Mapping[int, Rows]) -> Iterator[NumberedRow]:
    return (NumberedRow(source, number, row) for source, rows in files.items() for number, row in rows)


def _progress_bar(files: Sequence[Rows], *, begun: int = 0, is_shown: bool = True) -> "tqdm[NoReturn]":
    # A terminal sees at once that something goes on; a job's log gets a line where that takes long, and few of them.
    waits_s, every_s = (0.1, 0.1) if sys.stderr.isatty() else (10, 30)
    return tqdm(
        total=sum(map(len, files)),
        initial=begun,
        desc="tokenizing",
        unit="row",
        delay=waits_s,
        mininterval=every_s,
        disable=not is_shown,
    )


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
                    format=_FORMAT,
                    key=key,
                    sources=[rows.path for rows in files],
                    parts=[*parts],
                    tokenizer=tokenizer.identity,
                    max_length=max_length,
                    truncation=truncation,
                    scored=scored,
                    rows_read=sum(map(len, files)),
                )
                work = _row_tokenizer(files, tokenizer, max_length, truncation, scored)
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


def open_prepared(path: Path) -> PreparedPairs:
    """Maps prepared pairs into memory; cheap, so every rank may call it.

    Args:
        path: the folder that ``prepare`` wrote.

    Raises:
        UserError: the folder is missing, damaged or of another version.
    """
    try:
        manifest = _read_manifest(path)
        shards = [pa.ipc.open_file(pa.memory_map(str(path / shard))).read_all() for shard in manifest.shards]
        table = pa.concat_tables(shards)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is no complete folder of prepared pairs; delete it, and it will be written again"
        ) from error
    if len(table) != manifest.pairs:
        raise UserError(f"{path} lacks some of its {manifest.pairs} pairs; delete it, and it will be written again")
    return PreparedPairs(path, manifest, table)


def _read_manifest(path: Path) -> Manifest:
    values = json.loads((path / _MANIFEST).read_text())
    if values["format"] != _FORMAT:
        raise UserError(f"the prepared pairs in {path} are of another version; delete the folder")
    return Manifest(**values)


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
        if not (aside / _MANIFEST).exists():
            shards = _write_shards(
                files, work, aside, processes=processes, rows_per_shard=rows_per_shard, shows_bar=shows_bar
            )
            manifest = _manifest(blank, shards)
            check_dropped(manifest, max_dropped)
            _put(aside / _MANIFEST, asdict(manifest))
        whole = {_MANIFEST, *_read_manifest(aside).shards}
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
    numbered = _numbered(rows_between(files, begun, rows_read))
    chunks = map_in_order(
        work,
        iter(lambda: list(islice(numbered, _ROWS_PER_CHUNK)), []),
        count=-(-(rows_read - begun) // _ROWS_PER_CHUNK),
        processes=processes,
    )
    with closing(chunks), _progress_bar(files, begun=begun, is_shown=shows_bar) as bar:
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
    with pa.OSFile(str(written), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
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
    named = [_FORMAT, *settings, [sorted(rows.columns.items()) for rows in files]]
    digest = hashlib.blake2b(json.dumps(named).encode(), digest_size=16)
    for rows in files:
        rows.update(digest)
    return digest.hexdigest()


class Counts(Protocol):
    """What became of some rows, counted; attributes as ``Manifest`` says."""

    @property
    def sources(self) -> Sequence[str]: ...
    @property
    def max_length(self) -> int: ...
    @property
    def rows_read(self) -> int: ...
    @property
    def expanded(self) -> int: ...
    @property
    def pairs(self) -> int: ...
    @property
    def dropped(self) -> Mapping[str, int]: ...
    @property
    def first_dropped(self) -> Mapping[str, str]: ...


def check_dropped(counts: Counts, max_dropped: float) -> None:
    """Checks how much could not be used.

    Raises:
        UserError: a larger share than ``max_dropped``, or everything.
    """
    dropped = sum(counts.dropped.values())
    candidates = counts.rows_read + counts.expanded
    if counts.pairs and dropped <= max_dropped * candidates:
        return
    reasons = ", ".join(
        f"{reason} {count} (first: {counts.first_dropped[reason]})"
        for reason, count in sorted(counts.dropped.items(), key=lambda item: -item[1])
    )
    remedies = ["mend them"]
    if "not text" in counts.dropped:
        remedies[0] += " (text is a string, or a list of {role, content} whose last turn is the assistant's)"
    if "too long" in counts.dropped:
        remedies += [f"raise data.max_length ({counts.max_length})", "set data.truncation"]
    if counts.pairs:
        remedies.append("or raise data.max_dropped")
    raise UserError(
        f"{dropped} of {candidates} {'pairs' if counts.expanded else 'rows'} of {_some(counts.sources)} cannot be "
        f"used: {reasons}; "
        f"data.max_dropped allows a share of {max_dropped:g}: {', '.join(remedies)}"
    )


def _some(paths: Sequence[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
