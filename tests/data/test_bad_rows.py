"""No row is lost, whatever it holds: it is a pair, or dropped for a reason, or refused in one line."""

import json
from typing import get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_ds.data.preferences import DropReason, Preference, Source, read_preferences
from dpo_ds.data.prepare import prepare
from dpo_ds.data.tokenization import TokenizedPair, tokenize_pair
from dpo_ds.errors import UserError
from tests.data.small_tokenizer import small_tokenizer

TEMPLATE = (
    "{% for t in tools or [] %}<tool>{{ t | tojson }}{% endfor %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NUMBERS = ("tools", "probability", "margin", "weight")
TEXTS = st.sampled_from(
    ["", " ", "a", "b", "hot tea", "\ud800", "<eos>", "{", "[]", "1", "nan", "\n\nHuman: q\n\nAssistant: a"]
)
SCALARS = st.none() | st.booleans() | st.integers(-2, 3) | st.floats() | st.just(10**400) | TEXTS
KEYS = ["role", "content", "from", "value", "type", "text", "tool_calls", "function", "name", "rank", "score", "answer"]
CELLS = st.recursive(
    SCALARS,
    lambda cell: st.lists(cell, max_size=3) | st.dictionaries(st.sampled_from(KEYS), cell, max_size=3),
    max_leaves=6,
)
CALL = st.just([{"function": {"name": "add", "arguments": "{}"}}])
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "system"]), "content": TEXTS | st.none()},
    optional={"tool_calls": CALL | CELLS, "name": CELLS},
) | st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "function_call", "x"]), "value": TEXTS | CELLS})
TURNS = st.lists(TURN, min_size=1, max_size=4)
COLUMNS = ["prompt", "chosen", "rejected", "output_1", "output_2", "label", "answers", "conversations", "system"]
ROWS = st.dictionaries(
    st.sampled_from([*COLUMNS, *NUMBERS]), TEXTS | TURN | TURNS | CELLS, max_size=7
) | st.fixed_dictionaries(
    {"prompt": TEXTS | TURNS, "chosen": TEXTS | TURNS, "rejected": TEXTS | TURNS},
    optional=dict.fromkeys(NUMBERS, SCALARS | CELLS),
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"), template=TEMPLATE, eos="<|end|>")


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(row=ROWS, scored=st.sampled_from(["last_turn", "all_assistant_turns"]), named=st.sets(st.sampled_from(NUMBERS)))
def test_a_row_of_anything_is_a_pair_or_has_a_reason_or_is_refused(tokenizer, row, scored, named):
    columns = {name: name for name in named if name in row}
    try:
        found = read_preferences(row, columns=columns, where="row 1", scored=scored)
    except UserError:  # a column is missing, or unpaired data
        return
    assert found
    for read in found:
        if isinstance(read, Preference):
            read = tokenize_pair(read, tokenizer, max_length=100, truncation=None)
        assert isinstance(read, TokenizedPair) or read in get_args(DropReason)


def test_the_counts_of_every_reason_add_up_to_the_rows(tokenizer, tmp_path):
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    pair = {"prompt": "q", "chosen": "a", "rejected": "b", "p": 0.9, "w": 1, "t": ""}
    messages = {**pair, "prompt": [question]}
    expected = {
        "empty response": [{**pair, "chosen": ""}, {**pair, "rejected": "<|end|>"}],
        "identical responses": [{**pair, "chosen": "b"}],
        "prompts differ": [{**pair, "prompt": "other", "chosen": [question, answer], "rejected": [question, answer]}],
        "empty prompt": [{**pair, "prompt": ""}],
        "label not understood": [{**pair, "p": 2}, {**pair, "p": None}],
        "weight not above 0": [{**pair, "w": 0}],
        "tie": [{**pair, "p": 0.5}],
        "not text": [{**pair, "chosen": 3}, {**pair, "prompt": "\ud800"}],
        "too long": [{**pair, "prompt": "x" * 1_000_000}],
        "tools not understood": [{**messages, "t": "{"}],
        "tools ignored": [{**pair, "t": "[{}]"}],
        "refused by the chat template": [{**messages, "prompt": [{"role": "tool", "content": "2"}]}],
    }
    refusing = "{% if messages[0].role == 'tool' %}{{ raise_exception('no question') }}{% endif %}" + TEMPLATE
    tokenizer = small_tokenizer(tmp_path / "refusing", template=refusing, eos="<|end|>")
    rows = [pair, messages, *(row for some in expected.values() for row in some), pair]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(str(tmp_path / "rows.jsonl"), columns={"probability": "p", "weight": "w", "tools": "t"})
    prepared = prepare([source], tokenizer, max_length=50, truncation=None, max_dropped=1.0, folder=tmp_path / "data")
    assert prepared.dropped == {reason: len(some) for reason, some in expected.items()}
    assert prepared.manifest.rows_read == len(rows) == len(prepared) + sum(prepared.dropped.values())
    by_labels = {"label not understood", "tie", "fewer than two answers"}  # of rows of other shapes, too
    assert set(get_args(DropReason)) - by_labels == set(expected) - by_labels
