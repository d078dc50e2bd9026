"""Tokenizes preferences once, into immutable Arrow files that every rank maps into memory.

Written aside and renamed, so a folder of prepared pairs is complete or absent. One process writes; no rank may enter.
"""

import hashlib
import json
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock
from tqdm import tqdm

from dpo_ds.data.preferences import DropReason, Preference, Scored, read_preferences
from dpo_ds.data.preferences import Source as Source
from dpo_ds.data.rows import Rows, load_rows
from dpo_ds.data.schedule import Lengths
from dpo_ds.data.tokenization import TokenizedPair, Tokenizer, Truncation, tokenize_pair
from dpo_ds.errors import UserError

_FORMAT = 2
_ROWS_PER_CHUNK = 1000
_ROWS_WITHOUT_PROGRESS_BAR = 2000
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
        tokenizer: its identity.
        max_length: bound on the tokens of prompt + longer response.
        truncation: what was done with longer ones.
        scored: which turns of a conversation are scored.
        rows_read: rows of all sources.
        pairs: what could be used.
        dropped: what could not, by reason.
        first_dropped: for each reason the file and row (counted from 1) where it was met first.
        expanded: how many more pairs than one a row the rows with ranked answers name.
    """

    format: int
    key: str
    sources: list[str]
    tokenizer: str
    max_length: int
    truncation: Truncation | None
    scored: Scored
    rows_read: int
    pairs: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    first_dropped: dict[str, str] = field(default_factory=dict)
    expanded: int = 0


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


def tokenize(
    files: Sequence[Rows],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    truncation: Truncation | None,
    scored: Scored = "last_turn",
) -> Iterator[Outcome]:
    """Yields what becomes of each row, in order, behind a progress bar if there are many.

    Args:
        files: as ``load_rows`` gives them.
        tokenizer: the policy's.
        max_length: bound on the tokens of prompt + longer response.
        truncation: as in ``tokenize_pair``.
        scored: as in ``read_preferences``.

    Raises:
        UserError: a file is broken in the middle, lacks a column, or needs a chat template that there is not.
    """
    rows_read = sum(map(len, files))
    with tqdm(total=rows_read, desc="tokenizing", unit="row", disable=rows_read <= _ROWS_WITHOUT_PROGRESS_BAR) as bar:
        for source, rows in enumerate(files):
            for number, row in rows:
                where = f"{rows.path} row {number}"
                for read in read_preferences(row, columns=rows.columns, where=where, scored=scored):
                    if isinstance(read, str):
                        yield Outcome(source, number, None, read)
                        continue
                    pair = tokenize_pair(read, tokenizer, max_length=max_length, truncation=truncation)
                    yield Outcome(source, number, read, pair)
                bar.update()


def prepare(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    truncation: Truncation | None,
    scored: Scored = "last_turn",
    max_dropped: float,
    folder: Path,
) -> PreparedPairs:
    """Tokenizes the sources into ``folder/KEY``, or opens what is there if that was done before.

    Several processes may call it at once: one works, the others wait and open its result. On failure nothing of this
    call stays behind.

    Args:
        sources: read one after the other.
        tokenizer: the policy's.
        max_length: bound on the tokens of prompt + longer response.
        truncation: as in ``tokenize_pair``.
        scored: as in ``read_preferences``.
        max_dropped: share of the rows, in [0, 1], above which unusable rows are an error.
        folder: of all prepared data; created if need be.

    Raises:
        UserError: a source cannot be read, lacks a column or has a weight, or too many rows cannot be used.
    """
    for source in sources:
        if source.weight not in (None, 1):
            raise UserError(
                f"weight of {source.path} must be 1: weighted mixtures are not available, got {source.weight}"
            )
    files = [rows for source in sources for rows in load_rows(source)]
    key = _content_key(files, tokenizer, max_length, truncation, scored)
    created = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / f".{key}.lock"
    try:
        with FileLock(lock):
            if not (folder / key).exists():
                blank = Manifest(
                    format=_FORMAT,
                    key=key,
                    sources=[rows.path for rows in files],
                    tokenizer=tokenizer.identity,
                    max_length=max_length,
                    truncation=truncation,
                    scored=scored,
                    rows_read=sum(map(len, files)),
                )
                _write(files, tokenizer, blank=blank, max_dropped=max_dropped, folder=folder)
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
        manifest = Manifest(**json.loads((path / "manifest.json").read_text()))
        table = pa.ipc.open_file(pa.memory_map(str(path / "pairs.arrow"))).read_all()
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} is no complete folder of prepared pairs; delete it, and it will be written again"
        ) from error
    if manifest.format != _FORMAT or len(table) != manifest.pairs:
        raise UserError(f"the prepared pairs in {path} are of another version; delete the folder")
    return PreparedPairs(path, manifest, table)


def _write(files: Sequence[Rows], tokenizer: Tokenizer, *, blank: Manifest, max_dropped: float, folder: Path) -> None:
    for left_by_a_killed_process in folder.glob(f".{blank.key}-*"):
        shutil.rmtree(left_by_a_killed_process, ignore_errors=True)
    aside, target = folder / f".{blank.key}-{uuid.uuid4().hex}", folder / blank.key
    try:
        aside.mkdir(parents=True)
        outcomes = tokenize(
            files, tokenizer, max_length=blank.max_length, truncation=blank.truncation, scored=blank.scored
        )
        dropped: Counter[str] = Counter()
        first_dropped: dict[str, str] = {}
        pairs = 0
        with pa.OSFile(str(aside / "pairs.arrow"), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
            while chunk := list(islice(outcomes, _ROWS_PER_CHUNK)):
                kept = [
                    {"row": outcome.row, "source": outcome.source, **vars(outcome.pair)}
                    for outcome in chunk
                    if not isinstance(outcome.pair, str)
                ]
                writer.write_batch(pa.RecordBatch.from_pylist(kept, schema=_SCHEMA))
                pairs += len(kept)
                for source, row, _, pair in chunk:
                    if isinstance(pair, str):
                        dropped[pair] += 1
                        first_dropped.setdefault(pair, f"{files[source].path} row {row}")
        manifest = replace(
            blank,
            pairs=pairs,
            dropped=dict(dropped),
            first_dropped=first_dropped,
            expanded=pairs + dropped.total() - blank.rows_read,
        )
        check_dropped(manifest, max_dropped)
        (aside / "manifest.json").write_text(json.dumps(asdict(manifest), indent=1) + "\n")
        try:
            aside.rename(target)
        except OSError:
            # Where the file system has no locks, another process may have been quicker.
            if not target.exists():
                raise
    except OSError as error:
        raise UserError(
            f"the prepared pairs cannot be written to {folder}: {error.strerror or error}; free some space there, or "
            "name another output_dir"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _content_key(
    files: Sequence[Rows], tokenizer: Tokenizer, max_length: int, truncation: Truncation | None, scored: Scored
) -> str:
    settings = [[sorted(rows.columns.items()) for rows in files], tokenizer.identity, max_length, truncation]
    settings += [] if scored == "last_turn" else [scored]
    digest = hashlib.blake2b(json.dumps([_FORMAT, settings]).encode(), digest_size=16)
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
