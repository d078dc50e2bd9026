"""The real preference files, whole: what their README says of them is what is read."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from dpo_ds.data.messages import Message
from dpo_ds.data.preferences import Source, read_preferences
from dpo_ds.data.prepare import prepare
from dpo_ds.data.rows import load_rows
from dpo_ds.errors import UserError
from dpo_ds.models.tokenizer import load_tokenizer

VOTES = {
    "prompt": ["instruction", "input"],
    "output_1": "response1",
    "output_2": "response2",
    "label": ["annotator1", "annotator2", "annotator3"],
}
COLUMNS: Mapping[str, Mapping[str, str | list[str]]] = {
    "pandalm_testset_v1.json": VOTES,
    "llamafactory_v1_dpo_demo.jsonl": {"chosen": "chosen_messages", "rejected": "rejected_messages"},
    "llmbar_Natural.json": {"prompt": "input"},
}
UNPAIRED = "llamafactory_kto_en_demo.json"
DROPPED = {"pandalm_testset_v1.json": {"tie": 105, "empty response": 52, "not text": 6}}


def rows_in_readme(material: Path) -> dict[str, int]:
    table = (material / "README.md").read_text().partition("## Preference data")[2].partition("\n## ")[0]
    return {name: int(rows) for name, rows in re.findall(r"^\| `([^`]+)` \| (\d+) \|", table, re.MULTILINE)}


@pytest.mark.parametrize("tokenizer", ["minimind-6400", "mistral-v1-32000"])
def test_all_real_preference_files_load_with_the_counts_of_their_readme(material, tmp_path, tokenizer):
    expected = rows_in_readme(material)
    assert expected.keys() == {path.name for path in (material / "prefs").iterdir()}
    loaded = load_tokenizer(str(material / "tokenizers" / tokenizer))
    for name, rows in expected.items():
        source = Source(str(material / "prefs" / name), columns=COLUMNS.get(name, {}))
        settings = {"max_length": 100_000, "truncation": None, "max_dropped": 1.0, "folder": tmp_path}
        if name == UNPAIRED:
            with pytest.raises(UserError, match=r"row 1 is unpaired data .*as for KTO; DPO needs two answers"):
                prepare([source], loaded, **settings)
            (unread,) = load_rows(source)
            assert len(unread) == rows
            continue
        prepared = prepare([source], loaded, **settings)
        assert (prepared.manifest.rows_read, prepared.manifest.expanded) == (rows, 0), name
        assert prepared.dropped == DROPPED.get(name, {}), name
        assert len(prepared) == rows - sum(prepared.dropped.values())


def read_all(material: Path, name: str) -> list[tuple[int, object]]:
    (rows,) = load_rows(Source(str(material / "prefs" / name), columns=COLUMNS.get(name, {})))
    return [
        (number, read)
        for number, row in rows
        for read in read_preferences(row, columns=rows.columns, where=f"row {number}")
    ]


def test_the_six_rows_that_hold_a_boolean_as_a_response_are_named(material):
    found = [number for number, read in read_all(material, "pandalm_testset_v1.json") if read == "not text"]
    rows = json.loads((material / "prefs" / "pandalm_testset_v1.json").read_text())
    broken = [row["idx"] for row in rows if isinstance(row["response1"], bool) or isinstance(row["response2"], bool)]
    # Its own count begins at 0.
    assert [number - 1 for number in found] == broken == [157, 158, 159, 161, 162, 164]


def test_votes_give_the_pairs_of_the_file_that_was_derived_from_them(material):
    voted = [read for _, read in read_all(material, "pandalm_testset_v1.json") if not isinstance(read, str)]
    derived = [read for _, read in read_all(material, "pandalm_dpo.jsonl")]
    assert [(pair.chosen, pair.rejected) for pair in voted] == [(pair.chosen, pair.rejected) for pair in derived]


def test_eighty_sharegpt_conversations_start_with_a_system_turn(material):
    prompts = [read.prompt for _, read in read_all(material, "llamafactory_dpo_en_demo.json")]
    assert sum(prompt[0].role == "system" for prompt in prompts) == 80
    assert (min(map(len, prompts)), max(map(len, prompts))) == (1, 13)
    assert all(isinstance(message, Message) for prompt in prompts for message in prompt)
