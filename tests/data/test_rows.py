"""From files to rows: every kind, every fault."""

import gzip
import json
import os
import subprocess
import sys

import datasets
import pandas as pd
import pyarrow as pa
import pytest

from dpo_ds.data.preferences import Source
from dpo_ds.data.rows import load_rows
from dpo_ds.errors import UserError

ROWS = [{"prompt": "Q", "chosen": "NA", "rejected": "b"}, {"prompt": "R", "chosen": "c", "rejected": ""}]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_of(source):
    """All rows of a source, one file after the other."""
    files = load_rows(source if isinstance(source, Source) else Source(str(source)))
    return [row for rows in files for _, row in rows]


def arrow_file(path, rows):
    data = datasets.Dataset.from_list(rows)
    with datasets.arrow_writer.ArrowWriter(path=str(path), features=data.features) as writer:
        writer.write_table(data.with_format("arrow")[:])
        writer.finalize()


def compressed(path, content):
    with pa.output_stream(str(path), compression="detect") as stream:
        stream.write(content)


def test_every_kind_of_file_gives_the_same_rows(tmp_path, capfd):
    write(tmp_path / "rows.jsonl", *ROWS)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "marked.json").write_bytes(b"\xef\xbb\xbf\n" + json.dumps(ROWS).encode())
    frame = pd.DataFrame(ROWS)
    frame.to_csv(tmp_path / "rows.csv", index=False)
    frame.to_parquet(tmp_path / "rows.parquet")
    arrow_file(tmp_path / "rows.arrow", ROWS)
    for name in ("rows.jsonl", "rows.json", "rows.csv"):
        for ending in (".gz", ".zst"):
            compressed(tmp_path / f"{name}{ending}", (tmp_path / name).read_bytes())
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "train.jsonl", *ROWS)
    write(folder / "test.jsonl", ROWS[0])
    capfd.readouterr()
    names = [path.name for path in tmp_path.iterdir() if not path.name.startswith(("tokenizer", "."))]
    assert len(names) == 13
    for name in names:
        assert rows_of(tmp_path / name) == ROWS, name
    assert rows_of(Source(str(folder), split="test")) == ROWS[:1]
    assert capfd.readouterr() == ("", "")


def row(name):
    return {"prompt": name, "chosen": "a", "rejected": "b"}


def test_every_file_of_a_folder_is_read_whatever_its_kind_and_depth(tmp_path):
    (tmp_path / "deeper").mkdir()
    write(tmp_path / "deeper" / "a.jsonl", row("a"))
    pd.DataFrame([row("b")]).to_parquet(tmp_path / "b.parquet")
    compressed(tmp_path / "c.jsonl.gz", json.dumps(row("c")).encode())
    pd.DataFrame([row("d")]).to_csv(tmp_path / "d.csv", index=False)
    for name in ("README.md", "notes.txt", ".hidden.jsonl"):
        (tmp_path / name).write_text("no row")
    assert sorted(found["prompt"] for found in rows_of(tmp_path)) == ["a", "b", "c", "d"]


def test_the_files_of_a_split_are_known_by_their_names_or_their_folders(tmp_path):
    for name in ("train-0.jsonl", "train-1.jsonl", "my_test.jsonl", "dev/x.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, row(name), row(name))

    def read(split):
        return [found["prompt"] for found in rows_of(Source(str(tmp_path), split=split))]

    assert read("train") == ["train-0.jsonl"] * 2 + ["train-1.jsonl"] * 2
    assert read("test") == ["my_test.jsonl"] * 2
    assert read("validation") == ["dev/x.jsonl"] * 2
    assert read("train[1:3]") == ["train-0.jsonl", "train-1.jsonl"]
    assert read("train[:1]") == ["train-0.jsonl"]
    assert read("train[-1:]") == ["train-1.jsonl"]
    (numbered,) = load_rows(Source(str(tmp_path), split="train[3:]"))
    assert [number for number, _ in numbered] == [2]
    with pytest.raises(UserError, match=r"cannot be read: it takes none of the 4 rows"):
        read("train[4:]")
    with pytest.raises(UserError, match=r"\(split 'best'\) cannot be read: it has only test, train, validation"):
        read("best")
    write(tmp_path / "extra.jsonl", row("extra"))
    with pytest.raises(UserError, match=r"holds files of splits, and extra.jsonl, which is of none"):
        read("train")


def test_a_folder_whose_card_says_what_its_splits_are_is_read_as_it_says(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: best\n    path: first.jsonl\n---\n"
    )
    write(tmp_path / "first.jsonl", *ROWS)
    write(tmp_path / "second.jsonl", ROWS[0])
    assert rows_of(Source(str(tmp_path), split="best")) == ROWS


def test_a_glob_is_read_file_by_file_in_the_order_of_their_names(tmp_path):
    write(tmp_path / "b.jsonl", ROWS[1])
    pd.DataFrame(ROWS[:1]).to_parquet(tmp_path / "a.parquet")
    files = load_rows(Source(str(tmp_path / "*"), columns={"chosen": "best"}))
    assert [(rows.path, rows.columns, len(rows)) for rows in files] == [
        (str(tmp_path / "a.parquet"), {"chosen": "best"}, 1),
        (str(tmp_path / "b.jsonl"), {"chosen": "best"}, 1),
    ]
    with pytest.raises(UserError, match=r"\*.csv does not exist"):
        load_rows(Source(str(tmp_path / "*.csv")))


def test_files_of_one_folder_may_have_other_columns(tmp_path):
    write(tmp_path / "a.jsonl", {"prompt": "Q", "chosen": "a", "rejected": "b"})
    write(tmp_path / "b.jsonl", {"chosen": [{"role": "user", "content": "x"}], "rejected": 3})
    assert [set(row) for row in rows_of(tmp_path)] == [{"prompt", "chosen", "rejected"}, {"chosen", "rejected"}]


def test_rows_keep_their_numbers_when_only_some_are_read(tmp_path):
    path = write(tmp_path / "rows.jsonl", *[{"prompt": str(number)} for number in range(1, 11)])
    (some,) = load_rows(Source(path, split="train[20%:50%]"))
    assert len(some) == 3
    assert list(some) == [(3, {"prompt": "3"}), (4, {"prompt": "4"}), (5, {"prompt": "5"})]
    assert list(some) == list(some)


def test_a_folder_written_by_save_to_disk_is_read(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    datasets.disable_progress_bars()
    try:
        data.save_to_disk(tmp_path / "one")
        datasets.DatasetDict({"test": data}).save_to_disk(tmp_path / "several")
    finally:
        datasets.enable_progress_bars()
    assert rows_of(tmp_path / "one") == ROWS
    assert rows_of(Source(str(tmp_path / "several"), split="test")) == ROWS
    with pytest.raises(UserError, match=r"several \(split 'train'\) cannot be read"):
        rows_of(tmp_path / "several")


def test_reading_leaves_the_progress_bars_of_others_as_they_were(tmp_path):
    pd.DataFrame(ROWS).to_parquet(tmp_path / "rows.parquet")
    assert not datasets.are_progress_bars_disabled()
    rows_of(tmp_path / "rows.parquet")
    assert not datasets.are_progress_bars_disabled()


def test_json_cells_stay_what_they_are(tmp_path):
    # The datasets library makes timestamps of the first column, and text of numbers beyond its first 10 MB.
    rows = [
        {"chosen": "2024-01-02", "rejected": "2024-01-03", "prompt": "x" * 11_000_000},
        {"chosen": True, "rejected": 3, "prompt": {"a": None}},
        {"chosen": "\ud800", "rejected": 2.5, "prompt": [1, "x"]},
    ]
    assert rows_of(write(tmp_path / "rows.jsonl", *rows)) == rows


def test_a_json_row_has_the_columns_of_the_first_and_what_is_no_object_has_nothing_else(tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS[0], {"prompt": "Q", "more": 1}, ["Q", "a", "b"])
    nothing = dict.fromkeys(ROWS[0])
    assert rows_of(path) == [ROWS[0], {**nothing, "prompt": "Q", "more": 1}, nothing]


def test_csv_cells_are_text_whatever_they_look_like(tmp_path):
    (tmp_path / "rows.csv").write_text('prompt,chosen,rejected\n12,true,"null\n\n"\n"a, ""b""",,2024-01-02\n')
    assert rows_of(tmp_path / "rows.csv") == [
        {"prompt": "12", "chosen": "true", "rejected": "null\n\n"},
        {"prompt": 'a, "b"', "chosen": "", "rejected": "2024-01-02"},
    ]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_a_cell_of_several_megabytes_is_read(tmp_path, name):
    row = {"prompt": "x y\n" * 1_000_000, "chosen": "a", "rejected": "b"}
    frame = pd.DataFrame([row])
    {
        "rows.jsonl": lambda path: write(path, row),
        "rows.json": lambda path: path.write_text(json.dumps([row])),
        "rows.csv": lambda path: frame.to_csv(path, index=False),
        "rows.parquet": frame.to_parquet,
    }[name](tmp_path / name)
    assert rows_of(tmp_path / name) == [row]


GOOD_LINE = b'{"prompt": "a"}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("broken.jsonl", b'{"prompt": "a"}\n{"prompt": \n', r"broken.jsonl is not valid JSON: line 2, column 11"),
        (
            "cut.jsonl",
            GOOD_LINE * 2 + b'{"prompt": "a',
            r"cut.jsonl is not valid JSON: line 3, column 12: Unterminated",
        ),
        ("broken.json", b'[{"prompt": "a"},\n {"prompt" "b"}]', r"broken.json is not valid JSON: line 2, column 12"),
        ("latin.jsonl", GOOD_LINE + b'{"prompt": "\xe9"}\n', "not valid JSON: byte 12 of line 2 is not UTF-8"),
        ("latin.json", b'[{"prompt": "\xe9"}]', "not valid JSON: byte 13 is not UTF-8"),
        ("latin.csv", b"prompt,chosen\n\xe9,b\n", "latin.csv is not valid CSV: .*UTF-?8"),
        ("twice.jsonl", b'{"chosen": "a", "chosen": "b"}\n', "line 1: 'chosen' is named twice in one object"),
        ("twice.json", b'[{"chosen": "a"}, {"chosen": "a", "chosen": "b"}]', "'chosen' is named twice in one object"),
        ("twice.csv", b"chosen,rejected,chosen\na,b,c\n", "twice.csv names the column 'chosen' twice"),
        ("ragged.csv", b"chosen,rejected\na,b\nc\n", "ragged.csv is not valid CSV: .*Expected 2 columns, got 1"),
        ("text.jsonl", b'"a"\n', 'text.jsonl must hold objects, one a row, got "a"'),
        ("deep.jsonl", b"[" * 100_000, "deep.jsonl is not valid JSON"),
        ("zero.jsonl", b"", "zero.jsonl has no rows"),
        ("zero.csv", b"", "zero.csv has no rows"),
        ("zero.json", b"", "zero.json has no rows"),
        ("zero.jsonl.gz", b"", "zero.jsonl.gz (has no rows|cannot be decompressed)"),
        ("zero.csv.gz", b"", "zero.csv.gz (has no rows|cannot be decompressed)"),
        ("zero.arrow", b"", "zero.arrow .*cannot be read"),
        ("zero.parquet", b"", "zero.parquet .*cannot be read"),
        ("blank.jsonl", b"\n \n", "blank.jsonl has no rows"),
        ("empty.json", b"[]", "empty.json has no rows"),
        ("empty.csv", b"prompt,chosen,rejected\n", "empty.csv has no rows"),
        ("broken.parquet", b"PAR1", "broken.parquet .*cannot be read"),
        ("no.jsonl.gz", GOOD_LINE, "no.jsonl.gz cannot be decompressed: .*not what its name says"),
        ("no.jsonl.zst", GOOD_LINE, "no.jsonl.zst cannot be decompressed: .*not what its name says"),
        ("cut.jsonl.gz", gzip.compress(GOOD_LINE * 500, mtime=0)[:-20], "cut.jsonl.gz cannot be decompressed"),
        ("notes.txt", b"hello", "notes.txt must be one of .json, .jsonl, .parquet, .csv, .arrow"),
        ("rows.parquet.gz", b"hello", "rows.parquet.gz must be one of .json"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_clear_line(tmp_path, capfd, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        rows_of(path)
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


def test_bytes_in_a_table_that_are_not_utf_8_are_refused_before_any_row_is_read(tmp_path):
    from pyarrow import parquet

    offsets = pa.py_buffer(b"\x00\x00\x00\x00\x02\x00\x00\x00")
    broken = pa.StringArray.from_buffers(1, offsets, pa.py_buffer(b"\xff\xfe"))
    parquet.write_table(pa.table({"chosen": broken, "rejected": ["b"]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x.parquet .*cannot be read: .*Invalid UTF8"):
        rows_of(tmp_path / "x.parquet")


def test_a_parquet_file_with_two_columns_of_one_name_is_refused(tmp_path):
    from pyarrow import parquet

    parquet.write_table(pa.table([["a"], ["b"], ["c"]], names=["chosen", "rejected", "chosen"]), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x.parquet .*cannot be read: .*chosen"):
        rows_of(tmp_path / "x.parquet")


@pytest.mark.parametrize("path", ["nowhere.jsonl", "/nowhere/at/all", "some/deep/folder", "nowhere.jsonl.zst"])
def test_a_missing_file_is_refused_without_asking_the_hub(path):
    with pytest.raises(UserError, match=f"{path} does not exist"):
        load_rows(Source(path))


def test_an_empty_folder_and_an_unknown_split_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_rows(Source(str(tmp_path)))
    path = write(tmp_path / "rows.jsonl", {"prompt": "Q"})
    with pytest.raises(UserError, match=r"split 'test'.*\['train'\]"):
        load_rows(Source(path, split="test"))
    with pytest.raises(UserError, match=r"split 'test'"):
        load_rows(Source(str(tmp_path), split="test"))


def test_a_hub_id_that_cannot_be_reached_is_refused():
    # In a process of its own: the library reads the variable when it is imported.
    script = (
        "from dpo_ds.data.rows import load_rows\n"
        "from dpo_ds.data.preferences import Source\n"
        "from dpo_ds.errors import UserError\n"
        "try: load_rows(Source('nobody/nothing'))\n"
        "except UserError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert done.stdout.startswith("the data set nobody/nothing (split 'train') cannot be read")
    assert done.stdout.count("\n") == 1
