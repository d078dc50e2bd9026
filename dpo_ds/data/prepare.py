"""Tokenizes preferences once, into immutable Arrow files that every rank maps into memory.

Written aside and renamed, so a folder of prepared pairs is complete or absent. One process writes; no rank may enter.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock
from numpy.typing import NDArray
from tqdm import tqdm

from dpo_ds.data.preferences import Source as Source
from dpo_ds.data.preferences import load_rows, read_preference
from dpo_ds.data.tokenization import TokenizedPair, Tokenizer, Truncation, tokenize_pair
from dpo_ds.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

_FORMAT = 1
_PAIRS_PER_CHUNK = 1000
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


class Lengths(NamedTuple):
    """Tokens of each pair's parts, ``(pairs,)`` each."""

    prompt: NDArray[np.int64]
    chosen: NDArray[np.int64]
    rejected: NDArray[np.int64]


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
    truncation: str | None
    rows_read: int
    pairs: int
    dropped: dict[str, int]
    first_dropped: dict[str, str]


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
    def key(self) -> str:
        """Hash of the sources' content, the tokenizer and the settings."""
        return self.manifest.key

    @property
    def rows_read(self) -> int:
        """Rows of all sources, usable or not."""
        return self.manifest.rows_read

    @property
    def dropped(self) -> Mapping[str, int]:
        """Rows that could not be used, by reason."""
        return self.manifest.dropped

    def pair(self, index: int) -> TokenizedPair:
        """Returns one pair."""
        columns = ("prompt_ids", "chosen_ids", "rejected_ids")
        prompt, chosen, rejected = (tuple(self.table[name][index].values.to_pylist()) for name in columns)
        return TokenizedPair(self.table["id"][index].as_py(), prompt, chosen, rejected)

    @cached_property
    def lengths(self) -> Lengths:
        """Tokens of prompts, chosen and rejected responses."""
        return Lengths(
            *(
                pc.list_value_length(self.table[name]).to_numpy().astype(np.int64)
                for name in ("prompt_ids", "chosen_ids", "rejected_ids")
            )
        )

    @cached_property
    def row_lengths(self) -> NDArray[np.int64]:
        """Tokens of prompt + longer response, ``(pairs,)``."""
        return self.lengths.prompt + np.maximum(self.lengths.chosen, self.lengths.rejected)


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
            raise UserError(f"weight of {source.path} must be 1: weighted mixtures are not available, got {source.weight}")
    rows = [load_rows(source) for source in sources]
    key = _content_key(sources, rows, tokenizer, max_length, truncation)
    created = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / f".{key}.lock"
    try:
        with FileLock(lock):
            if not (folder / key).exists():
                blank = Manifest(
                    _FORMAT, key, [s.path for s in sources], tokenizer.identity, max_length, truncation, 0, 0, {}, {}
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
            if not any(parent.iterdir()):
                parent.rmdir()
        raise
