"""From rows to tokenized pairs, or to the reason why there is none."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import pyarrow as pa
from tqdm import tqdm

from dpo_ds.data.preferences import Columns, DropReason, Preference, Scored, read_preferences
from dpo_ds.data.prepared import SCHEMA
from dpo_ds.data.rows import Row, Rows
from dpo_ds.data.tokenization import TokenizedPair, Tokenizer, Truncation, tokenize_pair


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

    @classmethod
    def of(
        cls,
        files: Sequence[Rows],
        tokenizer: Tokenizer,
        *,
        max_length: int,
        truncation: Truncation | None,
        scored: Scored,
    ) -> "RowTokenizer":
        """Returns that of opened files."""
        paths = tuple((rows.path, dict(rows.columns)) for rows in files)
        return cls(paths, tokenizer, max_length, truncation, scored)

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
        return Chunk(len(rows), pa.RecordBatch.from_pylist(kept, schema=SCHEMA), dropped)


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
    work = RowTokenizer.of(files, tokenizer, max_length=max_length, truncation=truncation, scored=scored)
    with progress_bar(files) as bar:
        for row in numbered(dict(enumerate(files))):
            yield from work.outcomes(row)
            bar.update()


def numbered(files: Mapping[int, Rows]) -> Iterator[NumberedRow]:
    """Yields the rows of files that are given by their places among all."""
    return (NumberedRow(source, number, row) for source, rows in files.items() for number, row in rows)


def progress_bar(files: Sequence[Rows], *, begun: int = 0, is_shown: bool = True) -> "tqdm[NoReturn]":
    """Returns a bar over the files' rows, of which some were done before."""
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
