"""The demo's preference data says what its rule says; no model is needed to check that."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

DEMO = Path(__file__).parents[2] / "launch" / "demo"


def load_script(name: str) -> ModuleType:
    """Imports a script of launch/demo, which is no package, by its path."""
    spec = importlib.util.spec_from_file_location(f"demo_{name}", DEMO / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DEMO / name).read_text(encoding="utf-8").splitlines()]


def question(row: dict[str, Any]) -> str:
    return row["prompt"][0]["content"]


rule = load_script("rule")
FILES = ("train.jsonl", "heldout.jsonl")


@pytest.mark.parametrize(
    "answer",
    [
        "A hammer drives nails into wood.",
        "Bread rises because yeast makes gas. The gas is caught in the dough!",
        "  White space around it does not matter.\n",
        "About 3.5 litres of water are enough.",
        "Fruit, e.g. apples, keeps well. Dr. Smith says so.",
        'The word means "slow to agree."',
        "Is that not what anyone would do?",
        "one " * 39 + "forty.",
    ],
)
def test_one_or_two_finished_sentences_in_one_paragraph_are_brief(answer: str) -> None:
    assert rule.is_brief(answer)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("", "empty"),
        ("  \n ", "only white space"),
        ("Yes, it is.", "three words"),
        ("A hammer drives nails into wood", "not finished"),
        ("You will need the following:", "ends in a colon"),
        ("It is hot. It is dry. It is far away.", "three sentences"),
        ("First part of it.\nSecond part of it.", "a line break"),
        ("First part of it.\n\nSecond part of it.", "two paragraphs"),
        ("- a list of one item.", "a list mark"),
        ("1. Take a pan of cold water.", "a numbered list"),
        ("one " * 40 + "more.", "41 words"),
    ],
)
def test_other_answers_are_not_brief(answer: str, why: str) -> None:
    assert not rule.is_brief(answer), why


def test_sentences_are_counted_at_their_ends_only() -> None:
    assert rule.count_sentences("It costs 2.50 a piece.") == 1
    assert rule.count_sentences("Really?! Yes... It does.") == 3
    assert rule.count_sentences('He said "stop." Then he left.') == 2
    assert rule.count_sentences("J. R. R. Tolkien wrote it.") == 1
    assert rule.count_sentences("no end at all") == 0


def test_there_are_enough_pairs() -> None:
    assert len(read_rows("train.jsonl")) >= 300
    assert len(read_rows("heldout.jsonl")) >= 60


@pytest.mark.parametrize("name", FILES)
def test_every_row_is_one_question_with_two_answers(name: str) -> None:
    for row in read_rows(name):
        assert {key: [message["role"] for message in turns] for key, turns in row.items()} == {
            "prompt": ["user"],
            "chosen": ["assistant"],
            "rejected": ["assistant"],
        }
        for turns in row.values():
            assert turns[0]["content"] == turns[0]["content"].strip() != ""


@pytest.mark.parametrize("name", FILES)
def test_the_chosen_answer_satisfies_the_rule_and_the_rejected_one_does_not(name: str) -> None:
    for row in read_rows(name):
        assert rule.is_brief(row["chosen"][0]["content"]), question(row)
        assert not rule.is_brief(row["rejected"][0]["content"]), question(row)


def test_no_question_occurs_twice_or_in_both_files() -> None:
    questions = [question(row).casefold() for name in FILES for row in read_rows(name)]
    assert len(set(questions)) == len(questions)


def test_no_pair_of_answers_occurs_twice() -> None:
    answers = [
        (row["chosen"][0]["content"], row["rejected"][0]["content"]) for name in FILES for row in read_rows(name)
    ]
    assert len(set(answers)) == len(answers)


def test_the_files_follow_the_written_split() -> None:
    prompts = load_script("prompts")
    train, held_out = prompts.split_prompts()
    assert len(train) + len(held_out) == len(set(train) | set(held_out)) >= 470
    assert {question(row) for row in read_rows("train.jsonl")} <= set(train)
    assert {question(row) for row in read_rows("heldout.jsonl")} <= set(held_out)
