import gzip
import json

import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict
from pyarrow import parquet

from dpo_ds.data.preferences import Source
from dpo_ds.data.random_access import random_access
from dpo_ds.data.rows import load_rows, rows_between
from dpo_ds.errors import UserError

ROWS = [
    {"prompt": [{"role": "user", "content": f"q{n}"}], "chosen": f"yes {n}", "rejected": "no" if n % 3 else None}
    for n in range(2500)
]
LINES = "\n\n".join(json.dumps(row) for row in ROWS)


def jsonl(folder):
    (folder / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + LINES.encode())


def compressed(folder):
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))


def row_groups(folder):
    parquet.write_table(pa.Table.from_pylist(ROWS), folder / "rows.parquet", row_group_size=700)


def of_library(folder):
    Dataset.from_list(ROWS).to_parquet(folder / "rows.parquet")


def arrow_stream(folder):
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(str(folder / "rows.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=300)


def arrow_file(folder):
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(str(folder / "rows.arrow"), table.schema) as writer:
        writer.write_table(table)


def saved(folder):
    Dataset.from_list(ROWS).save_to_disk(str(folder))


def saved_splits(folder):
    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(str(folder))


@pytest.mark.parametrize(
    "write", [jsonl, compressed, row_groups, of_library, arrow_stream, arrow_file, saved, saved_splits]
)
def test_rows_from_any_one_on_are_those_that_reading_all_of_them_gives(tmp_path, write):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data")
    source, opener = Source(str(tmp_path / "data")), random_access(tmp_path / "known")
    (rows,) = load_rows(source, opener=opener)
    (plain,) = load_rows(source)
    assert [*plain] == [*rows] == [*enumerate(ROWS, start=1)]
    for start, stop in ((0, 1), (699, 701), (999, 1002), (1400, 2400), (2499, 2500)):
        for files in ([rows], [plain]):
            part = rows_between(files, start, stop)[0]
            assert [*part] == [(n + 1, ROWS[n]) for n in range(start, stop)]
    if write not in (saved, saved_splits):
        (part,) = load_rows(Source(source.path, split="train[1000:1100]"), opener=opener)
        assert [*rows_between([part], 50, 51)[0]] == [(1051, ROWS[1050])]


def test_rows_of_several_files_follow_each_other(tmp_path):
    for name, some in (("a", ROWS[:3]), ("b", ROWS[3:4]), ("c", ROWS[4:9])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    files = load_rows(Source(str(tmp_path / "*.jsonl")), opener=random_access(tmp_path / "known"))
    found = rows_between(files, 2, 6)
    assert {place: [*rows] for place, rows in found.items()} == {
        0: [(3, ROWS[2])],
        1: [(1, ROWS[3])],
        2: [(1, ROWS[4]), (2, ROWS[5])],
    }


def test_a_file_of_lines_is_read_as_a_whole_only_once(tmp_path, monkeypatch):
    jsonl(tmp_path)
    source, opener = Source(str(tmp_path / "rows.jsonl")), random_access(tmp_path / "known")
    (first,) = load_rows(source, opener=opener)
    (kept,) = (tmp_path / "known").iterdir()
    written = kept.stat().st_mtime_ns
    (second,) = load_rows(source, opener=opener)
    assert kept.stat().st_mtime_ns == written
    assert len(first) == len(second) == 2500
    assert [*rows_between([second], 2000, 2001)[0]] == [*rows_between([first], 2000, 2001)[0]]
    # Another file in its place is noticed.
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    (changed,) = load_rows(source, opener=opener)
    assert len(changed) == 1


def test_a_broken_line_is_named_by_its_place_in_the_file(tmp_path):
    (tmp_path / "rows.jsonl").write_text(LINES + "\n{broken")
    (rows,) = load_rows(Source(str(tmp_path / "rows.jsonl")), opener=random_access(tmp_path / "known"))
    # The rows' lines and the blank ones between them: 2500 + 2499, and one more.
    with pytest.raises(UserError, match=r"rows.jsonl is not valid JSON: line 5000, column 2"):
        [*rows_between([rows], 2400, 2501)[0]]
    assert len([*rows_between([rows], 2400, 2500)[0]]) == 100


@pytest.mark.parametrize(
    ("name", "content"), [("rows.csv", "prompt,chosen,rejected\na,b,c\n"), ("rows.json", json.dumps(ROWS[:2]))]
)
def test_files_without_random_access_are_refused_with_the_remedy(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"data.streaming reads a file from any row on.*{name}; convert it to Parquet"):
        load_rows(Source(str(tmp_path / name)), opener=random_access(tmp_path / "known"))


def test_what_the_library_would_copy_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"of nobody/nothing the datasets library would keep a copy; download its"):
        load_rows(Source("nobody/nothing"), opener=random_access(tmp_path))


def test_broken_tables_are_one_line(tmp_path):
    of_library(tmp_path)
    whole = (tmp_path / "rows.parquet").read_bytes()
    (tmp_path / "rows.parquet").write_bytes(whole[:4] + b"\0" * 2000 + whole[2004:])
    (rows,) = load_rows(Source(str(tmp_path / "rows.parquet")), opener=random_access(tmp_path))
    with pytest.raises(UserError, match=r"rows.parquet is broken in the middle: .*; mend or remove it"):
        list(rows)
    (tmp_path / "rows.parquet").write_bytes(whole[:1000])
    with pytest.raises(UserError, match=r"rows.parquet \(split 'train'\) cannot be read"):
        load_rows(Source(str(tmp_path / "rows.parquet")), opener=random_access(tmp_path))
    twice = pa.table([pa.array(["a"]), pa.array(["b"])], names=["chosen", "chosen"])
    parquet.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(UserError, match=r"names the column 'chosen' twice"):
        load_rows(Source(str(tmp_path / "twice.parquet")), opener=random_access(tmp_path))
    parquet.write_table(pa.table({"chosen": pa.array([], pa.string())}), tmp_path / "none.parquet")
    with pytest.raises(UserError, match=r"none.parquet has no rows"):
        load_rows(Source(str(tmp_path / "none.parquet")), opener=random_access(tmp_path))
