"""Prepared pairs: Arrow files in a folder with a manifest, which every rank maps into memory."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from dpo_ds.data.preferences import Scored
from dpo_ds.data.schedule import Lengths
from dpo_ds.data.tokenization import TokenizedPair, Truncation
from dpo_ds.errors import UserError

FORMAT = 3
MANIFEST = "manifest.json"
_IDS = pa.list_(pa.int32())
SCHEMA = pa.schema(
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


def open_prepared(path: Path) -> PreparedPairs:
    """Maps prepared pairs into memory; cheap, so every rank may call it.

    Args:
        path: the folder that ``prepare`` wrote.

    Raises:
        UserError: the folder is missing, damaged or of another version.
    """
    try:
        manifest = read_manifest(path)
        shards = [pa.ipc.open_file(pa.memory_map(str(path / shard))).read_all() for shard in manifest.shards]
        table = pa.concat_tables(shards)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is no complete folder of prepared pairs; delete it, and it will be written again"
        ) from error
    if len(table) != manifest.pairs:
        raise UserError(f"{path} lacks some of its {manifest.pairs} pairs; delete it, and it will be written again")
    return PreparedPairs(path, manifest, table)


def read_manifest(path: Path) -> Manifest:
    """Returns what a folder says of itself.

    Raises:
        OSError: there is no manifest.
        ValueError: it is no JSON.
        KeyError: it is none of ours.
        TypeError: it lacks something.
        UserError: it is of another version.
    """
    values = json.loads((path / MANIFEST).read_text())
    if values["format"] != FORMAT:
        raise UserError(f"the prepared pairs in {path} are of another version; delete the folder")
    return Manifest(**values)


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
