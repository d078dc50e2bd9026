"""Files whose rows are read from any one on, and of which nothing is copied: what data that fit no disk need.

Cells come out as `datasets` would give them, by its own words on the files' types.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from dpo_ds.data.preferences import Columns, Source
from dpo_ds.data.rows import (
    LineIndex,
    Opener,
    Row,
    Rows,
    builder_of,
    first_repeated,
    index_lines,
    is_one_list,
    line_rows,
    one_line,
)
from dpo_ds.errors import UserError
from dpo_ds.files import write_whole

_ROWS_PER_READ = 1000


def random_access(folder: Path) -> Opener:
    """Returns what opens rows so.

    JSON lines, Parquet, Arrow, and what ``save_to_disk`` wrote, are read from any row on; compressed JSON lines too,
    decompressed from their beginning each time. The others are refused.

    Args:
        folder: where it is kept which byte the lines of a file begin at, so that a file is read for that only once.
    """
    return Opener(partial(_of_file, folder=folder), _of_library)


def _of_file(path: Path, columns: Columns, *, folder: Path) -> Rows:
    if builder_of(path) == "json" and not is_one_list(path):
        rows = line_rows(path, columns, _index(path, folder))
    elif builder_of(path) == "parquet":
        rows = _of_parquet(path, columns)
    elif builder_of(path) == "arrow":
        table = _arrow_table(path)
        rows = _of_tables(str(path), columns, table.slice, len(table))
    else:
        raise UserError(
            f"data.streaming reads a file from any row on, which CSV and JSON in one list do not allow: {path}; "
            "convert it to Parquet or to JSON lines, or leave data.streaming out"
        )
    if not len(rows):
        raise UserError(f"the data file {path} has no rows")
    return rows


def _of_library(source: Source) -> Rows:
    from datasets import load_from_disk

    folder = Path(source.path)
    if (folder / "dataset_dict.json").exists():
        table = load_from_disk(source.path)[source.split]
    elif (folder / "state.json").exists():
        table = load_from_disk(source.path)
    else:
        raise UserError(
            f"data.streaming reads files where they lie, and of {source.path} the datasets library would keep a copy; "
            "download its Parquet files (hf download --repo-type dataset) and name them by a glob, or leave "
            "data.streaming out"
        )
    arrow = table.with_format("arrow")

    def piece(start: int, length: int) -> pa.Table:
        return arrow[start : start + length]

    return _of_tables(source.path, source.columns, piece, len(table))


def _of_tables(name: str, columns: Columns, piece: Callable[[int, int], pa.Table], count: int) -> Rows:
    def read(first: int) -> Iterator[Row]:
        for start in range(first - 1, count, _ROWS_PER_READ):
            with _named(name):
                rows = _cells(piece(start, min(_ROWS_PER_READ, count - start)))
            yield from rows

    return Rows(name, columns, range(1, count + 1), read, _no_content)


def _of_parquet(path: Path, columns: Columns) -> Rows:
    with parquet.ParquetFile(path) as file:
        about, names = file.metadata, file.schema_arrow.names
        ends = [*accumulate(about.row_group(group).num_rows for group in range(about.num_row_groups))]
    if twice := first_repeated(names):
        raise UserError(f"the data file {path} names the column {twice!r} twice; rename or remove one of them")

    def read(first: int) -> Iterator[Row]:
        group = bisect_right(ends, first - 1)
        skipped = first - 1 - (ends[group - 1] if group else 0)
        with _named(str(path)), parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_ROWS_PER_READ, row_groups=range(group, len(ends))):
                yield from _cells(pa.Table.from_batches([batch.slice(skipped)]))
                skipped = max(0, skipped - len(batch))

    return Rows(str(path), columns, range(1, about.num_rows + 1), read, _no_content)


def _arrow_table(path: Path) -> pa.Table:
    mapped = pa.memory_map(str(path))
    try:
        return pa.ipc.open_stream(mapped).read_all()
    except pa.ArrowInvalid:
        return pa.ipc.open_file(mapped).read_all()


def _cells(table: pa.Table) -> list[Row]:
    from datasets import Dataset
    from datasets.table import InMemoryTable

    # Text that is not UTF-8 would otherwise be noticed where no file is known any more.
    table.validate(full=True)
    return list(Dataset(InMemoryTable(table)))


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"the data file {name} is broken in the middle: {one_line(error)}; mend or remove it"
        ) from error


def _index(path: Path, folder: Path) -> LineIndex:
    about = path.stat()
    known = f"{path.absolute()} {about.st_size} {about.st_mtime_ns}".encode()
    file = folder / f"lines-{hashlib.blake2b(known, digest_size=16).hexdigest()}.npy"
    if file.exists():
        (rows, _), *marks = np.load(file)
        return LineIndex(int(rows), np.array(marks))
    index = index_lines(path)
    folder.mkdir(parents=True, exist_ok=True)
    written = BytesIO()
    np.save(written, np.concatenate([np.array([[index.rows, 0]], dtype=np.int64), index.marks]))
    write_whole(file, written.getvalue())
    return index


def _no_content(digest: "hashlib.blake2b", numbers: range) -> None:
    raise AssertionError("rows that are not to be read as a whole are known by their files' names and sizes")
