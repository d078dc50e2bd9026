import json
import os
import subprocess
import sys

import datasets
import pandas as pd
import pytest

from dpo_ds.data.preferences import Message, Preference, Source, load_rows, read_preference
from dpo_ds.errors import UserError

SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": "Why?"}
GOOD = {"role": "assistant", "content": "Because."}
BAD = {"role": "assistant", "content": "No idea."}
PAIR_OF_MESSAGES = Preference(
    (Message("user", "Why?"),), (Message("assistant", "Because."),), (Message("assistant", "No idea."),)
)


def read(row, **columns):
    return read_preference(row, columns=columns, where="pairs.jsonl row 7")


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_strings_are_taken_as_they_are_nothing_stripped():
    row = {"prompt": " Q\n", "chosen": "a ", "rejected": "\nb", "score": 3}
    assert read(row) == Preference(" Q\n", "a ", "\nb")


def test_columns_of_other_names_are_found_through_the_mapping():
    row = {"question": "Q", "best": "a", "worst": "b", "prompt": "not this one"}
    assert read(row, prompt="question", chosen="best", rejected="worst") == Preference("Q", "a", "b")


@pytest.mark.parametrize("wrap", [lambda message: [message], lambda message: message], ids=["list", "single message"])
def test_messages_with_an_explicit_prompt(wrap):
    assert read({"prompt": [QUESTION], "chosen": wrap(GOOD), "rejected": wrap(BAD)}) == PAIR_OF_MESSAGES


def test_the_prompt_of_whole_conversations_is_what_they_share():
    row = {"chosen": [SYSTEM, QUESTION, GOOD], "rejected": [SYSTEM, QUESTION, BAD]}
    found = read(row)
    assert found.prompt == (Message("system", "Be brief."), Message("user", "Why?"))
    assert (found.chosen, found.rejected) == (PAIR_OF_MESSAGES.chosen, PAIR_OF_MESSAGES.rejected)


@pytest.mark.parametrize("prompt", ["Why?", [QUESTION]])
def test_a_prompt_column_beside_whole_conversations_must_repeat_them(prompt):
    row = {"chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]}
    assert read({**row, "prompt": prompt}) == PAIR_OF_MESSAGES
    assert read({**row, "prompt": "Another question"}) == "prompts differ"


def test_a_transcript_is_cut_behind_its_last_assistant_marker():
    start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
    row = {"chosen": start + " Because.", "rejected": start + " No idea."}
    assert read(row) == Preference(start, " Because.", " No idea.")


def test_typed_text_content_is_joined():
    typed = [{"type": "text", "text": "Wh"}, {"type": "text", "text": None, "value": "y?"}]
    row = {"prompt": [{"role": "user", "content": typed}], "chosen": GOOD, "rejected": BAD}
    assert read(row) == PAIR_OF_MESSAGES


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Q", "chosen": "", "rejected": "b"}, "empty response"),
        ({"prompt": "Q", "chosen": "a", "rejected": " \n"}, "empty response"),
        ({"prompt": [QUESTION], "chosen": [{"role": "assistant", "content": ""}], "rejected": [BAD]}, "empty response"),
        ({"chosen": "\n\nHuman: Q\n\nAssistant:", "rejected": "\n\nHuman: Q\n\nAssistant: b"}, "empty response"),
        ({"prompt": "Q", "chosen": "a", "rejected": "a"}, "identical responses"),
        ({"prompt": [QUESTION], "chosen": [GOOD], "rejected": [GOOD]}, "identical responses"),
        ({"chosen": [QUESTION, GOOD], "rejected": [SYSTEM, QUESTION, BAD]}, "prompts differ"),
        ({"chosen": "\n\nHuman: Q\n\nAssistant: a", "rejected": "\n\nHuman: R\n\nAssistant: b"}, "prompts differ"),
        ({"chosen": "\n\nHuman: Q\n\nAssistant: a", "rejected": "b"}, "prompts differ"),
        ({"prompt": "Q", "chosen": 3, "rejected": "b"}, "not text"),
        ({"prompt": "Q", "chosen": True, "rejected": "b"}, "not text"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "not text"),
        ({"prompt": [], "chosen": [GOOD], "rejected": [BAD]}, "not text"),
        ({"prompt": "Q", "chosen": [GOOD], "rejected": [BAD]}, "not text"),
        ({"prompt": [QUESTION], "chosen": "a", "rejected": "b"}, "not text"),
        ({"prompt": [QUESTION], "chosen": [QUESTION], "rejected": [BAD]}, "not text"),
        ({"prompt": [QUESTION, GOOD], "chosen": [GOOD], "rejected": [BAD]}, "not text"),
        ({"prompt": [{"role": "user", "content": 5}], "chosen": [GOOD], "rejected": [BAD]}, "not text"),
        ({"prompt": [{"from": "human", "value": "Q"}], "chosen": [GOOD], "rejected": [BAD]}, "not text"),
        ({"prompt": [QUESTION], "chosen": [{**GOOD, "tool_calls": [{}]}], "rejected": [BAD]}, "not text"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}], "chosen": GOOD, "rejected": BAD}, "not text"),
    ],
)
def test_an_unusable_row_is_named_by_its_reason(row, reason):
    assert read(row) == reason


@pytest.mark.parametrize(
    ("row", "columns", "missing"),
    [
        ({"prompt": "Q", "best": "a", "rejected": "b"}, {}, "chosen"),
        ({"prompt": "Q", "chosen": "a", "label": True}, {}, "rejected"),
        ({"question": "Q", "chosen": "a", "rejected": "b"}, {}, "prompt"),
        ({"question": "Q", "chosen": [GOOD], "rejected": [BAD]}, {}, "prompt"),
        ({"chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]}, {"prompt": "question"}, "question"),
    ],
)
def test_a_missing_column_is_an_error_that_names_row_columns_and_remedy(row, columns, missing):
    found = ", ".join(row)
    with pytest.raises(UserError, match=rf"pairs.jsonl row 7 has no column '{missing}', only {found};.*data.train"):
        read(row, **columns)


def test_a_mapping_of_an_unknown_name_is_refused():
    with pytest.raises(UserError, match=r"columns of x\.jsonl names 'promt', expected one of prompt, chosen, rejected"):
        Source("x.jsonl", columns={"promt": "question"})


def test_every_kind_of_file_gives_the_same_rows(tmp_path, capfd):
    rows = [{"prompt": "Q", "chosen": "NA", "rejected": "b"}, {"prompt": "R", "chosen": "c", "rejected": ""}]
    data = datasets.Dataset.from_list(rows)
    write(tmp_path / "rows.jsonl", *rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    frame = pd.DataFrame(rows)
    frame.to_csv(tmp_path / "rows.csv", index=False)
    frame.to_parquet(tmp_path / "rows.parquet")
    with datasets.arrow_writer.ArrowWriter(path=str(tmp_path / "rows.arrow"), features=data.features) as writer:
        writer.write_table(data.with_format("arrow")[:])
        writer.finalize()
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder / "train.jsonl", *rows)
    write(folder / "test.jsonl", rows[0])
    capfd.readouterr()
    names = ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "rows.arrow", "folder"]
    for name in names:
        assert list(load_rows(Source(str(tmp_path / name)))) == rows, name
    assert list(load_rows(Source(str(folder), split="test"))) == rows[:1]
    assert capfd.readouterr() == ("", "")


def test_a_folder_written_by_save_to_disk_is_read(tmp_path):
    rows = [{"prompt": "Q", "chosen": "a", "rejected": "b"}]
    data = datasets.Dataset.from_list(rows)
    datasets.disable_progress_bars()
    try:
        data.save_to_disk(tmp_path / "one")
        datasets.DatasetDict({"test": data}).save_to_disk(tmp_path / "several")
    finally:
        datasets.enable_progress_bars()
    assert list(load_rows(Source(str(tmp_path / "one")))) == rows
    assert list(load_rows(Source(str(tmp_path / "several"), split="test"))) == rows
    with pytest.raises(UserError, match=r"several \(split 'train'\) cannot be read"):
        load_rows(Source(str(tmp_path / "several")))


def test_reading_leaves_the_progress_bars_of_others_as_they_were(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"prompt": "Q"})
    assert not datasets.are_progress_bars_disabled()
    load_rows(Source(path))
    assert not datasets.are_progress_bars_disabled()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("broken.jsonl", '{"prompt": "a"}\n{"prompt": \n', r"broken.jsonl is not valid JSON: line 2, column 12"),
        ("broken.json", '[{"prompt": "a"},\n {"prompt" "b"}]', r"broken.json is not valid JSON: line 2, column 12"),
        ("latin.jsonl", b'{"prompt": "\xe9"}\n', "latin.jsonl is not valid JSON: byte 12 is not UTF-8"),
        ("empty.jsonl", "", "empty.jsonl has no rows"),
        ("empty.json", "[]", "empty.json has no rows"),
        ("empty.csv", "prompt,chosen,rejected\n", "empty.csv has no rows"),
        ("broken.parquet", "PAR1", "broken.parquet .*cannot be read"),
        ("notes.txt", "hello", "notes.txt must be one of .json, .jsonl, .parquet, .csv, .arrow"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_clear_line(tmp_path, capfd, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as raised:
        load_rows(Source(str(path)))
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("path", ["nowhere.jsonl", "/nowhere/at/all", "some/deep/folder"])
def test_a_missing_file_is_refused_without_asking_the_hub(path):
    with pytest.raises(UserError, match=f"{path} does not exist"):
        load_rows(Source(path))


def test_an_empty_folder_and_an_unknown_split_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_rows(Source(str(tmp_path)))
    path = write(tmp_path / "rows.jsonl", {"prompt": "Q"})
    with pytest.raises(UserError, match=r"split 'test'.*\['train'\]"):
        load_rows(Source(path, split="test"))


def test_a_hub_id_that_cannot_be_reached_is_refused():
    # In a process of its own: the library reads the variable when it is imported.
    script = (
        "from dpo_ds.data.preferences import Source, load_rows\n"
        "from dpo_ds.errors import UserError\n"
        "try: load_rows(Source('nobody/nothing'))\n"
        "except UserError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert done.stdout.startswith("the data set nobody/nothing (split 'train') cannot be read")
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "columns", "rows", "first"),
    [
        ("pandalm_dpo.jsonl", {}, 836, "### Instruction"),
        ("llmbar_natural_conversational.jsonl", {}, 100, "Summarize the following"),
        (
            "llamafactory_v1_dpo_demo.jsonl",
            {"chosen": "chosen_messages", "rejected": "rejected_messages"},
            10,
            "You are an AI assistant.",
        ),
    ],
)
def test_every_row_of_the_real_files_is_a_preference(material, name, columns, rows, first):
    found = [
        read_preference(row, columns=columns, where="") for row in load_rows(Source(str(material / "prefs" / name)))
    ]
    assert [type(preference) for preference in found] == [Preference] * rows
    prompt = found[0].prompt
    assert (prompt if isinstance(prompt, str) else prompt[0].content).startswith(first)


def test_unpaired_data_is_refused_by_name(material):
    row = next(iter(load_rows(Source(str(material / "prefs" / "llamafactory_kto_en_demo.json")))))
    with pytest.raises(UserError, match="has no column 'chosen', only messages, label"):
        read(row)
