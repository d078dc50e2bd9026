import json
from collections import Counter
from dataclasses import replace

import pytest

from dpo_ds.data.messages import Message
from dpo_ds.data.preferences import Preference, Source, read_preferences
from dpo_ds.data.rows import load_rows
from dpo_ds.errors import UserError

SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION = {"role": "user", "content": "Why?"}
GOOD = {"role": "assistant", "content": "Because."}
BAD = {"role": "assistant", "content": "No idea."}
PAIR_OF_MESSAGES = Preference(
    (Message("user", "Why?"),), (Message("assistant", "Because."),), (Message("assistant", "No idea."),)
)


def read_all(row, **columns):
    return read_preferences(row, columns=columns, where="pairs.jsonl row 7")


def read(row, **columns):
    (only,) = read_all(row, **columns)
    return only


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
        ({"prompt": [QUESTION], "chosen": [QUESTION], "rejected": [BAD]}, "not text"),
        ({"prompt": [QUESTION, GOOD], "chosen": [GOOD], "rejected": [BAD]}, "not text"),
        ({"prompt": [{"role": "user", "content": 5}], "chosen": [GOOD], "rejected": [BAD]}, "not text"),
        ({"prompt": [{"from": "narrator", "value": "Q"}], "chosen": [GOOD], "rejected": [BAD]}, "not text"),
        ({"prompt": [{"from": "function_call", "value": "{}"}], "chosen": "a", "rejected": "b"}, "not text"),
        ({"prompt": "Q", "chosen": "a\ud800", "rejected": "b"}, "not text"),
        ({"prompt": [{"role": "user", "content": "\udfff"}], "chosen": "a", "rejected": "b"}, "not text"),
        ({"chosen": "\n\nHuman: Q\n\nAssistant: a", "rejected": [BAD]}, "not text"),
        ({"conversations": "Q", "chosen": [GOOD], "rejected": [BAD]}, "not text"),
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
    with pytest.raises(UserError, match=r"columns.chosen of x.jsonl must be one column, got \['a', 'b'\]"):
        Source("x.jsonl", columns={"chosen": ["a", "b"]})


HUMAN = {"from": "human", "value": "Why?"}
GPT = {"from": "gpt", "value": "Because."}
OTHER_GPT = {"from": "gpt", "value": "No idea."}


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [(GPT, OTHER_GPT), ([GPT], [OTHER_GPT]), ("Because.", "No idea."), (GOOD, BAD)],
    ids=["objects", "lists", "strings", "messages"],
)
def test_sharegpt_turns_are_the_prompt_of_answers_of_any_kind(chosen, rejected):
    assert read({"conversations": [HUMAN], "chosen": chosen, "rejected": rejected}) == PAIR_OF_MESSAGES
    assert read({"prompt": [QUESTION], "chosen": chosen, "rejected": rejected}) == PAIR_OF_MESSAGES


def test_sharegpt_speakers_become_roles_and_a_system_column_the_first_turn():
    turns = [HUMAN, GPT, {"from": "observation", "value": "4"}, HUMAN]
    found = read({"conversations": turns, "chosen": GPT, "rejected": OTHER_GPT, "system": "Be brief.", "tools": ""})
    assert found.prompt == (
        Message("system", "Be brief."),
        Message("user", "Why?"),
        Message("assistant", "Because."),
        Message("tool", "4"),
        Message("user", "Why?"),
    )
    assert read({"conversations": [HUMAN], "chosen": GPT, "rejected": OTHER_GPT, "system": ""}) == PAIR_OF_MESSAGES


MORE, ANSWER, OTHER_ANSWER = (
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "So."},
    {"role": "assistant", "content": "Hm."},
)


def said(*turns):
    return tuple(Message(turn["role"], turn["content"]) for turn in turns)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # They differ from the first answer on.
        (
            {"chosen": [QUESTION, GOOD, MORE, ANSWER], "rejected": [QUESTION, BAD, MORE, OTHER_ANSWER]},
            Preference(said(QUESTION), said(GOOD, MORE, ANSWER), said(BAD, MORE, OTHER_ANSWER)),
        ),
        # One is shorter, and the column with the prompt repeats its beginning.
        (
            {"prompt": [QUESTION], "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD, MORE, ANSWER]},
            Preference(said(QUESTION), said(GOOD), said(BAD, MORE, ANSWER)),
        ),
        # What both share is the prompt, however long.
        (
            {"chosen": [QUESTION, GOOD, MORE, ANSWER], "rejected": [QUESTION, GOOD, MORE, OTHER_ANSWER]},
            Preference(said(QUESTION, GOOD, MORE), said(ANSWER), said(OTHER_ANSWER)),
        ),
        # They go on where the prompt ends.
        (
            {"prompt": [QUESTION], "chosen": [GOOD, MORE, ANSWER], "rejected": [BAD]},
            Preference(said(QUESTION), said(GOOD, MORE, ANSWER), said(BAD)),
        ),
        ({"prompt": [QUESTION], "chosen": [GOOD], "rejected": [BAD]}, PAIR_OF_MESSAGES),
        ({"prompt": "Why?", "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]}, PAIR_OF_MESSAGES),
        ({"prompt": "Q", "chosen": "a", "rejected": "b"}, Preference("Q", "a", "b")),
        ({"prompt": "Who?", "chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD]}, "prompts differ"),
        ({"chosen": [QUESTION, GOOD], "rejected": [MORE, BAD]}, "prompts differ"),
        # The user said another thing first, or only one side goes on.
        (
            {"chosen": [QUESTION, GOOD, MORE, ANSWER], "rejected": [QUESTION, GOOD, QUESTION, OTHER_ANSWER]},
            "prompts differ",
        ),
        ({"chosen": [QUESTION, GOOD], "rejected": [QUESTION, GOOD, MORE, ANSWER]}, None),
        ({"chosen": [QUESTION, GOOD, MORE], "rejected": [QUESTION, BAD]}, "not text"),
        ({"chosen": [QUESTION, GOOD], "rejected": [QUESTION, GOOD]}, "identical responses"),
        (
            {"chosen": [QUESTION, {**GOOD, "content": ""}, MORE, ANSWER], "rejected": [QUESTION, BAD]},
            "empty response",
        ),
    ],
)
def test_all_turns_of_the_assistant_behind_what_both_sides_share_are_the_response(row, expected):
    (found,) = read_preferences(row, columns={}, where="", scored="all_assistant_turns")
    if expected is None:  # told apart by their tokens alone
        assert (found.chosen, found.rejected) == (said(GOOD), said(GOOD, MORE, ANSWER))
    else:
        assert found == expected


def test_by_default_conversations_may_differ_in_their_last_turn_only():
    assert (
        read({"chosen": [QUESTION, GOOD, MORE, ANSWER], "rejected": [QUESTION, BAD, MORE, ANSWER]}) == "prompts differ"
    )
    assert read({"chosen": [QUESTION, GOOD], "rejected": [QUESTION, BAD, MORE, ANSWER]}) == "prompts differ"
    assert read({"prompt": [QUESTION], "chosen": [GOOD, MORE, ANSWER], "rejected": [BAD]}) == "prompts differ"


ADD = {"name": "add", "arguments": {"a": 1}}
CALL = '{"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]}'


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": ADD}]},
        {"role": "assistant", "tool_calls": [ADD]},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {**ADD, "arguments": '{"a": 1}'}}]},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
    ],
    ids=["wrapped", "bare", "arguments as JSON", "ShareGPT"],
)
def test_a_call_of_a_tool_stays_with_its_turn(turn):
    found = read(
        {"prompt": [QUESTION, turn, {"role": "tool", "name": "add", "content": "1"}], "chosen": "a", "rejected": "b"}
    )
    assert found.prompt == (
        Message("user", "Why?"),
        Message("assistant", "", CALL),
        Message("tool", "1", '{"name": "add"}'),
    )
    assert read({"prompt": [QUESTION], "chosen": turn, "rejected": BAD}).chosen == (Message("assistant", "", CALL),)


@pytest.mark.parametrize("calls", [[{}], ["add"], "add", [{"function": "add"}], [{**ADD, "name": "\ud800"}]])
def test_what_is_no_call_of_a_tool_is_not_text(calls):
    assert read({"prompt": [QUESTION], "chosen": {**GOOD, "tool_calls": calls}, "rejected": BAD}) == "not text"


TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ([TOOL], json.dumps([TOOL])),
        (json.dumps([TOOL]), json.dumps([TOOL])),
        ("", ""),
        (" ", ""),
        (None, ""),
        ([], ""),
        ("[]", ""),
        ("{", None),
        ("add", None),
        (["add"], None),
        ({"name": "add"}, None),
        (3, None),
        ([{"name": "\ud800"}], None),
    ],
)
def test_tools_are_a_list_or_its_json_and_read_only_where_they_are_named(cell, expected):
    row = {"prompt": [QUESTION], "chosen": GOOD, "rejected": BAD, "tools": cell}
    assert read(row) == PAIR_OF_MESSAGES
    named = read(row, tools="tools")
    assert named == ("tools not understood" if expected is None else replace(PAIR_OF_MESSAGES, tools=expected))
    with pytest.raises(UserError, match="has no column 'functions'"):
        read(row, tools="functions")


def test_whole_conversations_are_read_in_sharegpts_words_too():
    assert read({"chosen": [HUMAN, GPT], "rejected": [HUMAN, OTHER_GPT]}) == PAIR_OF_MESSAGES


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        (1, Preference("Q", "a", "b")),
        ("1", Preference("Q", "a", "b")),
        (1.0, Preference("Q", "a", "b")),
        ("model_a", Preference("Q", "a", "b")),
        (2, Preference("Q", "b", "a")),
        (" B ", Preference("Q", "b", "a")),
        ("output_2", Preference("Q", "b", "a")),
        (0, "tie"),
        ("tie", "tie"),
        ([1, 1, 2], Preference("Q", "a", "b")),
        ([2, 2, None], Preference("Q", "b", "a")),
        ([1, 2, 0], "tie"),
        ([1, 0, 0], "tie"),
        ([1, 2], "tie"),
        (3, "label not understood"),
        (True, "label not understood"),
        (None, "label not understood"),
        ("", "label not understood"),
        ([], "label not understood"),
        ([1, "perhaps"], "label not understood"),
        (0.7, "label not understood"),
    ],
)
def test_a_label_says_which_output_is_better(label, expected):
    assert read({"prompt": "Q", "output_1": "a", "output_2": "b", "label": label}) == expected


NAMED = {"probability": "p", "margin": "m", "weight": "w"}


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ({"p": 0.75, "m": 1, "w": 2}, (0.75, 1.0, 2.0)),
        ({"p": "0.2", "m": " -1.5", "w": "1e-3"}, (0.2, -1.5, 1e-3)),
        ({"p": 1, "m": 0, "w": 1}, (1.0, 0.0, 1.0)),
        ({"p": 0.5}, "tie"),
        *(({"p": wrong}, "label not understood") for wrong in (-0.1, 1.1, "", None, True, "high", [0.7], float("nan"))),
        *(({"m": wrong}, "label not understood") for wrong in ("", None, float("inf"), "1e999", 10**400)),
        *(({"w": wrong}, "weight not above 0") for wrong in (0, -1, None, "x", float("nan"))),
    ],
)
def test_numbers_that_change_a_pairs_loss_are_read_where_they_are_named(cells, expected):
    row = {"prompt": "Q", "chosen": "a", "rejected": "b", "p": 1, "m": 0, "w": 1, **cells}
    plain = Preference("Q", "a", "b")
    assert read(row) == plain
    assert read({**row, "probability": 0.1, "margin": 3, "weight": 2}) == plain  # not named
    if isinstance(expected, tuple):
        probability, margin, weight = expected
        expected = replace(plain, probability=probability, margin=margin, weight=weight)
    assert read(row, **NAMED) == expected
    del row["w"]
    with pytest.raises(UserError, match="has no column 'w'"):
        read(row, **NAMED)


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        (0.75, Preference("Q", "a", "b", probability=0.75)),
        (0.25, Preference("Q", "b", "a", probability=0.75)),
        (0.0, Preference("Q", "b", "a", probability=1.0)),
        (0.5, "tie"),
    ],
)
def test_a_probability_takes_the_place_of_a_label(cell, expected):
    row = {"prompt": "Q", "output_1": "a", "output_2": "b", "p": cell}
    assert read(row, probability="p") == expected
    assert read({**row, "label": "not looked at"}, probability="p") == expected
    if expected != "tie":
        both = {**row, "chosen": "c", "rejected": "d"}
        assert read(both, probability="p") == Preference("Q", "c", "d", probability=cell)
    with pytest.raises(UserError, match="has no column 'label'"):
        read(row)


def test_ranked_answers_share_a_weight_and_nothing_else():
    row = {"prompt": "Q", "answers": ["a", "b", "c"], "w": 2}
    assert [pair.weight for pair in read_all(row, weight="w")] == [2.0] * 3
    with pytest.raises(UserError, match=r"row 7 ranks answers, .* share one margin; take columns.margin out, or write"):
        read(row, margin="w")


def test_several_columns_are_the_votes_of_several_raters_and_the_parts_of_a_prompt():
    row = {"instruction": "Add.", "input": "1 2\n", "r1": "3", "r2": "4", "x": 2, "y": 1, "z": 1}
    columns = {"output_1": "r1", "output_2": "r2", "label": ["x", "y", "z"], "prompt": ["instruction", "input"]}
    assert read(row, **columns) == Preference("Add.\n\n1 2\n", "3", "4")
    assert read({**row, "input": " "}, **columns) == Preference("Add.", "3", "4")
    assert read({**row, "input": None}, **columns) == Preference("Add.", "3", "4")
    assert read({**row, "input": 3}, **columns) == "not text"
    assert read({**row, "x": 1, "y": 0, "z": 2}, **columns) == "tie"
    del row["y"]
    with pytest.raises(UserError, match=r"has no column 'y', only instruction, input, r1, r2, x, z;"):
        read(row, **columns)


def test_a_labelled_pair_may_hold_messages():
    row = {"prompt": [QUESTION], "output_1": BAD, "output_2": [GOOD], "label": 2}
    assert read(row) == PAIR_OF_MESSAGES


def test_every_ranked_answer_is_paired_with_every_worse_one():
    expected = [Preference("Q", better, worse) for better, worse in ("ab", "ac", "bc")]
    answers = [
        ["a", "b", "c"],
        [{"answer": "b", "rank": 2}, {"answer": "c", "rank": 3}, {"answer": "a", "rank": 1}],
        [
            {"response": "b", "overall_score": 5.5},
            {"response": "a", "overall_score": 9},
            {"response": "c", "overall_score": 1},
        ],
    ]
    for some in answers:
        assert read_all({"prompt": "Q", "answers": some}) == expected
    assert read_all({"context": "Q", "completions": answers[1]}, prompt="context", answers="completions") == expected


def test_ranked_answers_may_be_messages():
    answers = [{"completion": [BAD], "rank": 1}, {"completion": [GOOD], "rank": 0}]
    assert read({"prompt": [QUESTION], "answers": answers}) == PAIR_OF_MESSAGES
    assert read({"prompt": [QUESTION], "answers": [GOOD, BAD]}) == PAIR_OF_MESSAGES


def test_each_pair_of_ranked_answers_counts_for_itself():
    scored = [{"text": "a", "score": 2}, {"text": "b", "score": 1}, {"text": "", "score": 1}, {"text": 3, "score": 0}]
    assert read_all({"prompt": "Q", "answers": scored}) == [
        Preference("Q", "a", "b"),
        "empty response",
        "not text",
        "tie",
        "not text",
        "not text",
    ]


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([], "fewer than two answers"),
        (["a"], "fewer than two answers"),
        (None, "not text"),
        ("a", "not text"),
        ([{"text": "a", "score": 1}, {"text": "b"}], "label not understood"),
        ([{"text": "a", "rank": True}, {"text": "b", "rank": 2}], "label not understood"),
        ([{"text": "a", "rank": 1}, "b"], "label not understood"),
    ],
)
def test_a_ranked_list_without_an_order_is_dropped_once(answers, reason):
    assert read({"prompt": "Q", "answers": answers}) == reason


def test_the_shape_that_the_run_file_names_is_taken():
    row = {"prompt": "Q", "chosen": "a", "rejected": "b", "left": "c", "right": "d", "label": 2}
    assert read(row) == Preference("Q", "a", "b")
    assert read(row, output_1="left", output_2="right") == Preference("Q", "d", "c")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [QUESTION, GOOD], "label": True},
        {"prompt": "Q", "completion": "a", "label": False},
        {"prompt": "Q", "completion": "a", "label": "True"},
        {"instruction": "Q", "output": "a", "kto_tag": True},
    ],
)
def test_unpaired_data_is_refused_by_its_name(row):
    with pytest.raises(
        UserError, match=r"row 7 is unpaired data .*as for KTO; DPO needs two answers to the same prompt"
    ):
        read(row)


PANDALM = {
    "prompt": ["instruction", "input"],
    "output_1": "response1",
    "output_2": "response2",
    "label": ["annotator1", "annotator2", "annotator3"],
}


@pytest.mark.parametrize(
    ("name", "columns", "pairs", "dropped", "first"),
    [
        ("pandalm_dpo.jsonl", {}, 836, {}, "### Instruction"),
        (
            "pandalm_testset_v1.json",
            PANDALM,
            836,
            {"tie": 105, "empty response": 52, "not text": 6},
            "The sentence you are given might be",
        ),
        ("llamafactory_dpo_en_demo.json", {}, 300, {}, "Hi! I'd like to create a new language game"),
        (
            "llamafactory_v1_dpo_demo.jsonl",
            {"chosen": "chosen_messages", "rejected": "rejected_messages"},
            10,
            {},
            "You are an AI assistant.",
        ),
        ("llmbar_Natural.json", {"prompt": "input"}, 100, {}, "Summarize the following"),
        ("llmbar_natural_conversational.jsonl", {}, 100, {}, "Summarize the following"),
    ],
)
def test_every_row_of_the_real_files_is_a_preference_or_counted(material, name, columns, pairs, dropped, first):
    (rows,) = load_rows(Source(str(material / "prefs" / name), columns=columns))
    found = [read_preferences(row, columns=columns, where="") for _, row in rows]
    assert {len(some) for some in found} == {1}
    reasons = Counter(only for (only,) in found if isinstance(only, str))
    preferences = [only for (only,) in found if isinstance(only, Preference)]
    assert (len(preferences), reasons, len(rows)) == (pairs, dropped, pairs + sum(dropped.values()))
    prompt = preferences[0].prompt
    assert (prompt if isinstance(prompt, str) else prompt[0].content).startswith(first)


def test_the_votes_on_pandalm_give_the_pairs_that_were_derived_from_them(material):
    (raw,) = load_rows(Source(str(material / "prefs" / "pandalm_testset_v1.json")))
    (derived,) = load_rows(Source(str(material / "prefs" / "pandalm_dpo.jsonl")))
    found = [read(row, **PANDALM) for _, row in raw]
    assert [number for number, only in enumerate(found) if only == "not text"] == [157, 158, 159, 161, 162, 164]
    pairs = [(only.chosen, only.rejected) for only in found if isinstance(only, Preference)]
    assert pairs == [(row["chosen"], row["rejected"]) for _, row in derived]


def test_the_labels_of_llmbar_give_the_pairs_that_were_derived_from_them(material):
    (raw,) = load_rows(Source(str(material / "prefs" / "llmbar_Natural.json")))
    (derived,) = load_rows(Source(str(material / "prefs" / "llmbar_natural_conversational.jsonl")))
    for (_, labelled), (_, messages) in zip(raw, derived, strict=True):
        plain, typed = read(labelled, prompt="input"), read(messages)
        assert (plain.prompt,) == tuple(message.content for message in typed.prompt)
        assert (plain.chosen, plain.rejected) == (typed.chosen[0].content, typed.rejected[0].content)


def test_system_turns_of_real_sharegpt_rows_are_kept(material):
    (rows,) = load_rows(Source(str(material / "prefs" / "llamafactory_dpo_en_demo.json")))
    prompts = [read(row).prompt for _, row in rows]
    assert sum(prompt[0].role == "system" for prompt in prompts) == 80
    assert (min(map(len, prompts)), max(map(len, prompts))) == (1, 13)


def test_real_unpaired_data_are_refused_by_name(material):
    (rows,) = load_rows(Source(str(material / "prefs" / "llamafactory_kto_en_demo.json")))
    _, row = next(iter(rows))
    with pytest.raises(UserError, match=r"is unpaired data \(messages, label\)"):
        read(row)
