"""Preferences that do not fit a disk: blocks of rows, each tokenized into a folder of its own when its turn is near.

A block follows from its rows and the settings alone, so one that is gone can be prepared again at any time. The folder
of blocks holds a few; who may write there and when is `supply`'s concern.
"""

import hashlib
import json
import shutil
import uuid
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dpo_ds.data.preferences import Scored, Source
from dpo_ds.data.prepare import prepare_rows
from dpo_ds.data.prepared import PreparedPairs
from dpo_ds.data.random_access import random_access
from dpo_ds.data.rows import Rows, load_rows, rows_between
from dpo_ds.data.tokenization import Tokenizer, Truncation
from dpo_ds.errors import UserError

_FORMAT = 1
_SAMPLED_ROWS = 500
_SAMPLE = "sample"


@dataclass(frozen=True)
class Stream:
    """Sources that are tokenized block by block; it can be sent to another process.

    Attributes:
        sources: their rows follow each other.
        max_length: bound on the tokens of prompt + longer response.
        truncation: as in ``tokenize_pair``.
        scored: as in ``read_preferences``.
        max_dropped: share of a block's rows above which unusable ones are an error.
        rows_per_block: the last block has what is left.
        keep: how many blocks may be on disk.
        processes: how many tokenize, as in ``map_in_order``.
        folder: of the blocks and what is known of the sources.
        key: hash of the files' names, sizes and order, and of the settings.
        rows: of all sources.
    """

    sources: tuple[Source, ...]
    max_length: int
    truncation: Truncation | None
    scored: Scored
    max_dropped: float
    rows_per_block: int
    keep: int
    processes: int | None
    folder: Path
    key: str
    rows: int

    @property
    def sample(self) -> Path:
        """Folder of the prepared pairs of the first rows, which stays."""
        return self.folder / _SAMPLE

    @property
    def blocks(self) -> Path:
        """Folder of the blocks; all that has a folder in there takes one block's place on disk."""
        return self.folder / "blocks"

    def path(self, block: int) -> Path:
        """Returns the folder of a block's prepared pairs, complete or absent."""
        return self.blocks / _name(block)

    def problem(self, block: int) -> str | None:
        """Returns why a block cannot be prepared, None where nobody has met that."""
        with suppress(FileNotFoundError):
            return self._problem(block).read_text()
        return None

    def tell(self, block: int, problem: str) -> None:
        """Says to all who wait for a block why it cannot be prepared."""
        written = self.blocks / f".{uuid.uuid4().hex}"
        written.write_text(problem)
        written.rename(self._problem(block))

    def _problem(self, block: int) -> Path:
        return self.blocks / f"{_name(block)}.problem"

    def open_sources(self) -> tuple[list[Rows], list[int]]:
        """Returns the files' rows and which of the sources names each file.

        Raises:
            UserError: a source is missing, broken, or of a kind whose rows cannot be read from any one on.
        """
        files_of = [load_rows(source, opener=random_access(self.folder.parent)) for source in self.sources]
        return [rows for part in files_of for rows in part], [n for n, part in enumerate(files_of) for _ in part]

    def prepare(
        self, block: int, rows: range, files: Sequence[Rows], parts: Sequence[int], tokenizer: Tokenizer
    ) -> None:
        """Tokenizes a block; what a killed process had whole of it is gone on from.

        Args:
            block: its number.
            rows: its rows, all sources' counted from 0.
            files: as ``open_sources`` gives them.
            parts: as ``open_sources`` gives them.
            tokenizer: the policy's.

        Raises:
            RunError: a process that tokenizes was killed.
            UserError: the block cannot be read or written, or too many of its rows cannot be used.
        """
        try:
            self._prepare(_name(block), rows, files, parts, tokenizer, into=self.blocks, max_dropped=self.max_dropped)
        except UserError as error:
            place = f"block {block} of data.streaming (rows {rows.start + 1} to {rows.stop} of data.train)"
            raise UserError(f"{place}: {error}") from error

    def prepare_sample(self, files: Sequence[Rows], parts: Sequence[int], tokenizer: Tokenizer) -> PreparedPairs:
        """Tokenizes the first rows; arguments and errors as for ``prepare``."""
        rows = range(min(_SAMPLED_ROWS, self.rows_per_block, self.rows))
        return self._prepare(_SAMPLE, rows, files, parts, tokenizer, into=self.folder, max_dropped=1.0)

    def _prepare(
        self,
        name: str,
        rows: range,
        files: Sequence[Rows],
        parts: Sequence[int],
        tokenizer: Tokenizer,
        *,
        into: Path,
        max_dropped: float,
    ) -> PreparedPairs:
        found = rows_between(files, rows.start, rows.stop)
        if sum(map(len, found.values())) < len(rows):
            raise UserError(
                f"the sources have lost rows since the run began, when they had {self.rows}; bring them back, or name "
                "another output_dir and begin again"
            )
        return prepare_rows(
            [*found.values()],
            tokenizer,
            key=name,
            parts=[parts[place] for place in found],
            max_length=self.max_length,
            truncation=self.truncation,
            scored=self.scored,
            max_dropped=max_dropped,
            folder=into,
            processes=self.processes,
            shows_bar=False,
        )

    def is_full(self, *, but_for: int) -> bool:
        """Returns whether as many blocks are on disk as may be, one that is begun or half removed being one, too.

        Args:
            but_for: a block that is to be prepared, perhaps has been begun, and does not count.
        """
        names = {path.name.lstrip(".") for path in self.blocks.iterdir() if path.is_dir()}
        return len(names - {_name(but_for)}) >= self.keep

    def forget(self, *, but_for: Collection[int]) -> None:
        """Removes all blocks but some; what is begun stays."""
        self._remove({_name(block) for block in but_for}, begun=False)

    def forget_begun(self, *, but_for: int) -> None:
        """Removes what killed processes have begun, but one block; only for whoever alone may write."""
        self._remove({f".{_name(but_for)}"}, begun=True)

    def _remove(self, kept: Collection[str], *, begun: bool) -> None:
        for path in self.blocks.iterdir():
            # Another node's process may be quicker.
            with suppress(FileNotFoundError):
                if path.is_dir() and path.name.startswith(".") == begun and path.name not in kept:
                    # Renamed first: one that is half removed is no block.
                    going = path.with_name(f".{uuid.uuid4().hex}")
                    path.rename(going)
                    shutil.rmtree(going, ignore_errors=True)


def open_stream(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    *,
    max_length: int,
    truncation: Truncation | None,
    scored: Scored,
    max_dropped: float,
    rows_per_block: int,
    keep: int,
    processes: int | None,
    folder: Path,
) -> Stream:
    """Looks at the sources, tokenizes their first rows, and forgets what was said of blocks that could not be prepared.

    A file of JSON lines is read once as a whole, to know where its rows begin; of others only what they say of
    themselves. The content of the rest is not looked at.

    Args:
        sources: their rows follow each other.
        tokenizer: the policy's.
        max_length: as ``Stream`` says, and so on.
        folder: of all prepared data; created if need be.

    Raises:
        UserError: a source cannot be read, or its first rows not be used.
    """

    def stream(key: str, rows: int) -> Stream:
        return Stream(
            sources=tuple(sources),
            max_length=max_length,
            truncation=truncation,
            scored=scored,
            max_dropped=max_dropped,
            rows_per_block=rows_per_block,
            keep=keep,
            processes=processes,
            folder=folder / f"stream-{key}",
            key=key,
            rows=rows,
        )

    files, parts = stream("", 0).open_sources()
    named = [
        (Path(rows.path).name, _size(Path(rows.path)), str(rows.numbers), sorted(rows.columns.items()))
        for rows in files
    ]
    settings = [_FORMAT, parts, tokenizer.identity, max_length, truncation, scored, max_dropped, rows_per_block]
    key = hashlib.blake2b(json.dumps([named, settings]).encode(), digest_size=16).hexdigest()
    opened = stream(key, sum(map(len, files)))
    opened.prepare_sample(files, parts, tokenizer)
    opened.blocks.mkdir(exist_ok=True)
    for problem in opened.blocks.glob("*.problem"):
        problem.unlink(missing_ok=True)
    return opened


def _size(path: Path) -> int:
    return (
        sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size
    )


def _name(block: int) -> str:
    return f"block-{block:06d}"
