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
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock
from tqdm import tqdm

from dpo_ds.data.preferences import DropReason, load_rows, read_preference
from dpo_ds.data.preferences import Source as Source
from dpo_ds.data.schedule import Lengths
from dpo_ds.data.tokenization import TokenizedPair, Tokenizer, Truncation, tokenize_pair
from dpo_ds.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

_FORMAT = 1
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
    }
)


@dataclass(frozen=True)
class Manifest:
    """What a folder of prepared pairs says of itself; ``rows_read == pairs + sum(dropped.values())``.

    Attributes:
        format: version of the files' layout.
        key: hash of all that the pairs depend on.
        sources: paths, in the order that the column ``source`` counts from 0.
        tokenizer: its identity.
        max_length: bound on the tokens of prompt + longer response.
        truncation: what was done with longer ones.
        rows_read: rows of all sources.
        pairs: rows that became pairs.
        dropped: the other rows, by reason.
        first_dropped: for each reason the file and row (counted from 1) where it was met first.
    """

    format: int
    key: str
    sources: list[str]
    tokenizer: str
    max_length: int
    truncation: Truncation | None
    rows_read: int
    pairs: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    first_dropped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class PreparedPairs:
    """Tokenized pairs, mapped into memory.

    Attributes:
        path: their folder.
        manifest: what it holds and how that came about.
        table: one row a pair: ``id``, ``row`` (in its source, from 1), ``source``, ``prompt_ids``, ``chosen_ids``,
            ``rejected_ids``.
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
        return TokenizedPair(self.table["id"][index].as_py(), prompt, chosen, rejected)

    def where(self, index: int) -> str:
        """Returns which row of which source a pair was, for messages."""
        source = self.manifest.sources[self.table["source"][index].as_py()]
        return f"{source} row {self.table['row'][index].as_py()}"

    @cached_property
    def lengths(self) -> Lengths:
        """Tokens of prompts, chosen and rejected responses."""
        return Lengths(
            *(
                pc.list_value_length(self.table[name]).to_numpy().astype(np.int64)
                for name in ("prompt_ids", "chosen_ids", "rejected_ids")
            )
        )


def prepare(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    truncation: Truncation | None,
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
    rows = [load_rows(source) for source in sources]
    key = _content_key(sources, rows, tokenizer, max_length, truncation)
    created = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / f".{key}.lock"
    try:
        with FileLock(lock):
            if not (folder / key).exists():
                blank = Manifest(
                    format=_FORMAT,
                    key=key,
                    sources=[source.path for source in sources],
                    tokenizer=tokenizer.identity,
                    max_length=max_length,
                    truncation=truncation,
                    rows_read=sum(map(len, rows)),
                )
                _write(sources, rows, tokenizer, blank=blank, max_dropped=max_dropped, folder=folder)
            prepared = open_prepared(folder / key)
            # Another run, with another bound, may have written it.
            _check_dropped(prepared.manifest, max_dropped)
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


def _write(
    sources: Sequence[Source],
    rows: Sequence["Dataset"],
    tokenizer: Tokenizer,
    *,
    blank: Manifest,
    max_dropped: float,
    folder: Path,
) -> None:
    for left_by_a_killed_process in folder.glob(f".{blank.key}-*"):
        shutil.rmtree(left_by_a_killed_process, ignore_errors=True)
    aside, target = folder / f".{blank.key}-{uuid.uuid4().hex}", folder / blank.key
    aside.mkdir(parents=True)
    try:
        outcomes = _outcomes(sources, rows, tokenizer, blank)
        dropped: Counter[str] = Counter()
        first_dropped: dict[str, str] = {}
        pairs = 0
        with pa.OSFile(str(aside / "pairs.arrow"), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
            while chunk := list(islice(outcomes, _ROWS_PER_CHUNK)):
                kept = [record for record, _ in chunk if not isinstance(record, str)]
                writer.write_batch(pa.RecordBatch.from_pylist(kept, schema=_SCHEMA))
                pairs += len(kept)
                for reason, where in chunk:
                    if isinstance(reason, str):
                        dropped[reason] += 1
                        first_dropped.setdefault(reason, where)
        manifest = replace(blank, pairs=pairs, dropped=dict(dropped), first_dropped=first_dropped)
        _check_dropped(manifest, max_dropped)
        (aside / "manifest.json").write_text(json.dumps(asdict(manifest), indent=1) + "\n")
        try:
            aside.rename(target)
        except OSError:
            # Where the file system has no locks, another process may have been quicker.
            if not target.exists():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _outcomes(
    sources: Sequence[Source], rows: Sequence["Dataset"], tokenizer: Tokenizer, blank: Manifest
) -> Iterator[tuple[dict[str, object] | DropReason, str]]:
    """Yields each row's record, or why it has none, and the row's name."""
    bar = tqdm(
        total=blank.rows_read, desc="tokenizing", unit="row", disable=blank.rows_read <= _ROWS_WITHOUT_PROGRESS_BAR
    )
    with bar:
        for source_number, source in enumerate(sources):
            for row_number, row in enumerate(rows[source_number], start=1):
                where = f"{source.path} row {row_number}"
                preference = read_preference(row, columns=source.columns, where=where)
                pair = (
                    preference
                    if isinstance(preference, str)
                    else tokenize_pair(preference, tokenizer, max_length=blank.max_length, truncation=blank.truncation)
                )
                place = {"row": row_number, "source": source_number}
                yield pair if isinstance(pair, str) else {**place, **vars(pair)}, where
                bar.update()


def _content_key(
    sources: Sequence[Source],
    rows: Sequence["Dataset"],
    tokenizer: Tokenizer,
    max_length: int,
    truncation: Truncation | None,
) -> str:
    settings = [[sorted(source.columns.items()) for source in sources], tokenizer.identity, max_length, truncation]
    digest = hashlib.blake2b(json.dumps([_FORMAT, settings]).encode(), digest_size=16)
    for source_rows in rows:
        # The rows, not the file: equal content has one key wherever it lies, on the hub too.
        digest.update(f"{len(source_rows)} {source_rows.features}".encode())
        for table in source_rows.with_format("arrow").iter(batch_size=_ROWS_PER_CHUNK):
            for batch in table.combine_chunks().to_batches():
                digest.update(batch.serialize())
    return digest.hexdigest()


def _check_dropped(manifest: Manifest, max_dropped: float) -> None:
    dropped = sum(manifest.dropped.values())
    if manifest.pairs and dropped <= max_dropped * manifest.rows_read:
        return
    reasons = ", ".join(
        f"{reason} {count} (first: {manifest.first_dropped[reason]})"
        for reason, count in sorted(manifest.dropped.items(), key=lambda item: -item[1])
    )
    remedies = ["mend them"]
    if "not text" in manifest.dropped:
        remedies[0] += " (text is a string, or a list of {role, content} whose last turn is the assistant's)"
    if "too long" in manifest.dropped:
        remedies += [f"raise data.max_length ({manifest.max_length})", "set data.truncation"]
    if manifest.pairs:
        remedies.append("or raise data.max_dropped")
    raise UserError(
        f"{dropped} of {manifest.rows_read} rows of {', '.join(manifest.sources)} cannot be used: {reasons}; "
        f"data.max_dropped allows a share of {max_dropped:g}: {', '.join(remedies)}"
    )
