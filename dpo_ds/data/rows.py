"""From a source to its rows, each with its number in its file.

JSON and CSV are read here and not by `datasets`, which turns cells into other cells on the way (3 into "3", a date into
a timestamp, a second column of one name into another name). No cell may be interpreted here.
"""

import glob
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import csv

from dpo_ds.data.preferences import Columns, Source
from dpo_ds.errors import UserError

Row = Mapping[str, object]

_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
_COMPRESSED = (".gz", ".zst")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SPLITS = {
    name: re.compile(rf"(?:^|[-._ /0-9])(?:{words})(?:[-._ /0-9]|$)")
    for name, words in {
        "train": "train|training",
        "validation": "validation|valid|val|dev",
        "test": "test|testing|eval|evaluation",
    }.items()
}
"""What a file or folder is called that belongs to a split."""
_ROWS_PER_CHUNK = 1000
_LINES_PER_MARK = 1000
_CSV_BLOCK_BYTES = 1 << 26  # a row must fit into one


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one file, folder or hub data set; iterating gives ``(number, row)``, the first number is 1.

    Attributes:
        path: the file, folder or hub id.
        columns: its own names of our columns.
        numbers: those of the rows that are read.
        read: begins to read at the row of this number.
        feed: updates a hash with the content of the rows of these numbers.
    """

    path: str
    columns: Columns
    numbers: range
    read: Callable[[int], Iterator[Row]]
    feed: Callable[[hashlib.blake2b, range], None]

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        # In this order: behind the last number nothing more is read.
        return zip(self.numbers, self.read(self.numbers.start) if self.numbers else (), strict=False)

    def update(self, digest: hashlib.blake2b) -> None:
        """Adds the rows' content to a hash."""
        self.feed(digest, self.numbers)


class Opener(NamedTuple):
    """How rows are opened.

    Attributes:
        file: those of one file.
        library: those of a hub id, or of a folder that the datasets library wrote or describes.
    """

    file: Callable[[Path, Columns], Rows]
    library: Callable[[Source], Rows]


def load_rows(source: Source, *, opener: Opener | None = None) -> list[Rows]:
    """Opens a source's rows file by file, without printing anything; only what is compressed or JSON in one piece is
    held in memory.

    Files may have different columns. Iterating may raise the errors below, too, where a file is broken in the middle.

    Args:
        source: what the run file names.
        opener: None for this room's own, which lets the datasets library keep copies of Parquet and Arrow files.

    Raises:
        UserError: the source is missing, empty or broken, names a column twice, or has no such split.
    """
    opener = opener or Opener(_file_rows, _rows_of_library)
    path = Path(source.path)
    if not path.exists() and (matches := sorted(glob.glob(source.path, recursive=True))):
        return [rows for match in matches for rows in load_rows(replace(source, path=match), opener=opener)]
    builder = builder_of(path)
    if not path.exists() and (builder or not _HUB_ID.fullmatch(source.path)):
        raise UserError(f"the data file {path} does not exist; name a file, a glob, a folder or a hub id in data")
    if path.is_file() and builder is None:
        raise UserError(
            f"the data file {path} must be one of {', '.join(_BUILDERS)}, JSON and CSV also with .gz or .zst behind; "
            "convert it, or rename it if it is"
        )
    split, _, _ = source.split.partition("[")
    try:
        if files := [path] if path.is_file() else _data_files(path, split):
            # A file by itself, or one of those that are the split, is all of it.
            whole = "train" if path.is_file() else split
            return _taken([opener.file(file, source.columns) for file in files], source.split, whole=whole)
        return [opener.library(source)]
    except (OSError, ValueError, KeyError, StopIteration) as error:
        raise UserError(_why_unreadable(source, error)) from error


def builder_of(path: Path) -> str | None:
    """Returns how a file is read, by its name: ``json``, ``parquet``, ``csv`` or ``arrow``; None for no such file."""
    if path.suffix in _COMPRESSED:
        inner = _BUILDERS.get(path.with_suffix("").suffix)
        return inner if inner in _READERS else None
    return _BUILDERS.get(path.suffix)


def _data_files(folder: Path, split: str) -> list[Path]:
    """Returns a folder's files of a split; none where the datasets library knows better what lies there."""
    card = folder / "README.md"
    if any((folder / name).exists() for name in ("dataset_dict.json", "state.json")) or (
        card.exists() and "\nconfigs:" in card.read_text(encoding="utf-8", errors="replace")
    ):
        return []
    files = {
        file: next((name for name, pattern in _SPLITS.items() if pattern.search(str(place).lower())), None)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and builder_of(file)
        for place in [file.relative_to(folder)]
        if not any(part.startswith((".", "__")) for part in place.parts)
    }
    if not any(files.values()):
        files = dict.fromkeys(files, "train")
    for file, its_split in files.items():
        if its_split is None:
            raise UserError(
                f"the folder {folder} holds files of splits, and {file.name}, which is of none; name the files that "
                "you mean by a glob, or move that one away"
            )
    if files and split not in files.values():
        there = sorted({str(name) for name in files.values()})
        raise UserError(f"the data set {folder} (split {split!r}) cannot be read: it has only {', '.join(there)}")
    return [file for file, its_split in files.items() if its_split == split]


def _file_rows(path: Path, columns: Columns) -> Rows:
    builder = str(builder_of(path))
    if builder not in _READERS:
        from datasets import load_dataset

        return _table_rows(str(path), columns, lambda: load_dataset(builder, data_files=str(path), split="train"))
    rows = _READERS[builder](path, columns)
    if not len(rows):
        raise UserError(f"the data file {path} has no rows")
    return rows


def _taken(files: list[Rows], split: str, *, whole: str) -> list[Rows]:
    """Returns what a split as ``train[:100]`` takes of files that are all of ``whole`` together."""
    if split == whole:
        return files
    from datasets import ReadInstruction

    total = sum(map(len, files))
    (asked,) = ReadInstruction.from_spec(split).to_absolute({whole: total})
    taken = rows_between(files, asked.from_ or 0, total if asked.to is None else asked.to)
    if not taken:
        raise ValueError(f"it takes none of the {total} rows")
    return list(taken.values())


def rows_between(files: Sequence[Rows], start: int, stop: int) -> dict[int, Rows]:
    """Returns some of the rows of files that follow each other, by the place of their file among all.

    Args:
        files: as ``load_rows`` gives them.
        start: the first row, all files' rows counted from 0.
        stop: the row behind the last.
    """
    found = {}
    for place, rows in enumerate(files):
        numbers = rows.numbers[max(0, start) : max(0, stop)]
        if numbers:
            found[place] = replace(rows, numbers=numbers)
        start, stop = start - len(rows), stop - len(rows)
    return found


def _json_rows(path: Path, columns: Columns) -> Rows:
    if not is_one_list(path):
        return line_rows(path, columns, index_lines(path))
    with _opened(path) as file:
        content = file.read()
    values, fingerprint = _parsed(content, path, line=None), hashlib.blake2b(content).digest()

    def read(first: int) -> Iterator[Row]:
        return islice(_as_objects(iter(values), path), first - 1, None)

    def feed(digest: hashlib.blake2b, numbers: range) -> None:
        digest.update(f"json {numbers}".encode() + fingerprint)

    return Rows(str(path), columns, range(1, len(values) + 1), read, feed)


def is_one_list(path: Path) -> bool:
    """Returns whether a JSON file holds one list of rows, not one row a line."""
    with _opened(path) as file:
        return file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


class LineIndex(NamedTuple):
    """Where the rows of a file of JSON lines begin.

    Attributes:
        rows: how many there are.
        marks: ``(marks, 2)``, for the first row and then every thousandth: the byte at which its line begins, and how
            many lines are before.
    """

    rows: int
    marks: NDArray[np.int64]


def index_lines(path: Path) -> LineIndex:
    """Reads a file once to learn where its rows begin."""
    rows, marks = 0, list[tuple[int, int]]()
    with _opened(path) as file:
        for byte, line, _ in _lines(file):
            if rows % _LINES_PER_MARK == 0:
                marks.append((byte, line - 1))
            rows += 1
    return LineIndex(rows, np.array(marks, dtype=np.int64).reshape(-1, 2))


def line_rows(path: Path, columns: Columns, index: LineIndex) -> Rows:
    """Returns the rows of a file of JSON lines; where it is not compressed, any one is found at once."""

    def parsed(lines: Iterator[tuple[int, int, bytes]]) -> Iterator[Any]:
        return (_parsed(content, path, line=line) for _, line, content in lines)

    def read(first: int) -> Iterator[Row]:
        mark, rest = divmod(first - 1, _LINES_PER_MARK)
        byte, before = map(int, index.marks[mark])
        with _opened(path) as begun, _opened(path) as file:
            _skip(file, byte)
            values = parsed(islice(_lines(file, byte=byte, before=before), rest, None))
            # Which columns there are, the first row of all says.
            yield from islice(_as_objects(chain(islice(parsed(_lines(begun)), 1), values), path), 1, None)

    def feed(digest: hashlib.blake2b, numbers: range) -> None:
        digest.update(f"json lines {numbers}".encode())
        with _opened(path) as file:
            for _, _, line in _lines(file):
                digest.update(line + b"\n")

    return Rows(str(path), columns, range(1, index.rows + 1), read, feed)


def _skip(file: io.BufferedReader, left: int) -> None:
    if file.seekable():
        file.seek(left)
        return
    while skipped := file.read(min(left, 1 << 20)):
        left -= len(skipped)


def _csv_rows(path: Path, columns: Columns) -> Rows:
    def batches() -> Iterator[pa.RecordBatch]:
        reading = csv.ReadOptions(block_size=_CSV_BLOCK_BYTES)
        parsing = csv.ParseOptions(newlines_in_values=True)
        with _opened(path) as file, _csv_named(path):
            # Only the names of the columns matter: the cells are text, and the answers "NA" and "12" are answers.
            names = csv.open_csv(file, read_options=reading, parse_options=parsing).schema.names
        if twice := first_repeated(names):
            raise UserError(f"the data file {path} names the column {twice!r} twice; rename or remove one of them")
        text = csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False)
        with _opened(path) as file, _csv_named(path):
            yield from csv.open_csv(file, read_options=reading, parse_options=parsing, convert_options=text)

    def read(first: int) -> Iterator[Row]:
        return islice((row for batch in batches() for row in batch.to_pylist()), first - 1, None)

    def feed(digest: hashlib.blake2b, numbers: range) -> None:
        digest.update(f"csv {numbers}".encode())
        with _opened(path) as file:
            while block := file.read(1 << 20):
                digest.update(block)

    count = sum(batch.num_rows for batch in batches())
    return Rows(str(path), columns, range(1, count + 1), read, feed)


_READERS: Mapping[str, Callable[[Path, Columns], Rows]] = {"json": _json_rows, "csv": _csv_rows}


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    """Opens a file, decompressed where its name says so."""
    try:
        with pa.input_stream(str(path), compression="detect") as stream, io.BufferedReader(stream) as file:
            yield file
    except OSError as error:
        if path.suffix not in _COMPRESSED:
            raise
        raise UserError(
            f"the data file {path} cannot be decompressed: {one_line(error)}; it is damaged or not what its name "
            "says: rename it, or compress it again"
        ) from error


def _lines(file: io.BufferedReader, *, byte: int = 0, before: int = 0) -> Iterator[tuple[int, int, bytes]]:
    """Yields each line that is not blank with the byte where it begins and its number, from 1.

    Args:
        file: where lines are read from now on.
        byte: where it stands.
        before: how many lines are before that.
    """
    for number, line in enumerate(file, start=before + 1):
        stripped = line.strip(b"\xef\xbb\xbf \t\r\n" if number == 1 else b" \t\r\n")
        if stripped:
            yield byte, number, stripped
        byte += len(line)


def _parsed(content: bytes, path: Path, *, line: int | None) -> Any:
    """Returns a JSON value; ``line`` is its line in the file, None where it is the whole file."""
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        fault = f"byte {error.start}{f' of line {line}' if line else ''} is not UTF-8"
    except json.JSONDecodeError as error:
        fault = f"line {line or error.lineno}, column {error.colno}: {error.msg}"
    except (ValueError, RecursionError) as error:
        fault = f"{f'line {line}: ' if line else ''}{one_line(error)}"
    raise UserError(f"the data file {path} is not valid JSON: {fault}; mend or remove it")


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{first_repeated([name for name, _ in pairs])!r} is named twice in one object")
    return found


def _as_objects(values: Iterator[object], path: Path) -> Iterator[Row]:
    """Yields rows that have all columns of the first one; what is no object has none but empty cells."""
    first = next(values)
    if not isinstance(first, dict):
        raise UserError(f"the data file {path} must hold objects, one a row, got {json.dumps(first)[:80]}")
    blank = dict.fromkeys(first)
    yield first
    for value in values:
        yield {**blank, **value} if isinstance(value, dict) else blank


def first_repeated(names: list[str]) -> str | None:
    """Returns the first name that is there twice."""
    return next((name for place, name in enumerate(names) if name in names[:place]), None)


@contextmanager
def _csv_named(path: Path) -> Iterator[None]:
    try:
        yield
    except pa.ArrowInvalid as error:
        if "Empty CSV" in str(error):
            raise UserError(f"the data file {path} has no rows") from error
        raise UserError(f"the data file {path} is not valid CSV: {one_line(error)}; mend or remove it") from error


def _rows_of_library(source: Source) -> Rows:
    """Returns the rows of a hub id, or of a folder that the datasets library wrote or describes."""
    from datasets import load_dataset, load_from_disk

    def load() -> Any:
        if (Path(source.path) / "dataset_dict.json").exists():
            return load_from_disk(source.path)[source.split]
        if (Path(source.path) / "state.json").exists():
            return load_from_disk(source.path)
        return load_dataset(source.path, split=source.split)

    return _table_rows(source.path, source.columns, load)


def _table_rows(name: str, columns: Columns, load: Callable[[], Any]) -> Rows:
    from datasets.exceptions import DatasetsError

    try:
        with _quiet():
            table = load()
        # Bytes that are not UTF-8 would otherwise be noticed in the middle of the rows.
        table.data.validate(full=True)
    except DatasetsError as error:
        raise ValueError(one_line(error.__cause__ or error)) from error
    if len(table) == 0:
        raise UserError(f"the data set {name} has no rows")

    def feed(digest: hashlib.blake2b, numbers: range) -> None:
        rows = table if len(numbers) == len(table) else table.select(range(numbers.start - 1, numbers.stop - 1))
        # The rows, not the file: equal content has one key wherever it lies, on the hub too.
        digest.update(f"{len(rows)} {rows.features}".encode())
        for chunk in rows.with_format("arrow").iter(batch_size=_ROWS_PER_CHUNK):
            for batch in chunk.combine_chunks().to_batches():
                digest.update(batch.serialize())

    def read(first: int) -> Iterator[Row]:
        return iter(table if first == 1 else table.skip(first - 1))

    return Rows(name, columns, range(1, len(table) + 1), read, feed)


@contextmanager
def _quiet() -> Iterator[None]:
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    verbosity, had_bars = logging.get_verbosity(), not are_progress_bars_disabled()
    # Its loggers tell of an error before raising it, which would make two lines of one.
    logging.set_verbosity(logging.CRITICAL)
    disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            enable_progress_bars()


def _why_unreadable(source: Source, error: Exception) -> str:
    if isinstance(error, StopIteration) or "corresponds to no data" in str(error):
        return f"the data set {source.path} has no rows"
    return f"the data set {source.path} (split {source.split!r}) cannot be read: {one_line(error)}"


def one_line(error: BaseException) -> str:
    """Returns a library's message, short and in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
