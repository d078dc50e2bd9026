from dataclasses import replace
from itertools import groupby

import pytest
import sentencepiece
from transformers import AutoTokenizer

from dpo_ds.data.messages import Message
from dpo_ds.data.preferences import Preference, Source, read_preferences
from dpo_ds.data.rows import load_rows
from dpo_ds.data.tokenization import TokenizedPair, merges_at_boundary, tokenize_pair
from dpo_ds.errors import UserError
from dpo_ds.models.tokenizer import load_tokenizer
from tests.data.small_tokenizer import small_tokenizer

PLAIN = Preference("pqrst", "xy", "xyz")

# Each template after a well-known one, cut down to what matters here: where BOS, EOS and the end marker stand.
LLAMA_2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>\n\n{{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n\n{% endif %}"
)
CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<system>\nBe kind.<|end|>\n{% endif %}"
    "<{{ m.role }}>\n{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FORGETFUL = "{% for m in messages[-1:] %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}"
FAULTY = "{% for m in messages %}{{ no_such_function(m) }}{% endfor %}"


def conversation(chosen="good", rejected="bad", first_role="user"):
    return Preference(
        (Message(first_role, "Why?"),), (Message("assistant", chosen),), (Message("assistant", rejected),)
    )


def tokenize(preference, tokenizer, max_length=1000, truncation=None):
    return tokenize_pair(preference, tokenizer, max_length=max_length, truncation=truncation)


def test_tokens_never_merge_across_the_boundary(tmp_path):
    tokenizer = small_tokenizer(tmp_path)
    newline, two_newlines = tokenizer.encode("\n"), tokenizer.encode("\n\n")
    assert len(newline) == len(two_newlines) == 1
    assert newline != two_newlines
    pair = tokenize(Preference("pq\n", "\nxy", " a"), tokenizer)
    assert pair.prompt_ids == (*tokenizer.encode("pq"), *newline)
    assert pair.chosen_ids == (*newline, *tokenizer.encode("xy"), tokenizer.eos_id)
    assert pair.rejected_ids == (*tokenizer.encode(" a"), tokenizer.eos_id)


def test_plain_text_gets_the_tokenizers_own_special_tokens_less_its_eos(tmp_path):
    tokenizer = small_tokenizer(tmp_path, bos="<bos>", adds="<bos> $A <eos>")
    pair = tokenize(Preference(" pq", "xy", "<bos>"), tokenizer)
    assert pair.prompt_ids == (tokenizer.bos_id, *tokenizer.encode(" pq"))
    assert pair.chosen_ids == (*tokenizer.encode("xy"), tokenizer.eos_id)


def test_a_tokenizer_that_adds_no_bos_gets_none(tmp_path):
    tokenizer = small_tokenizer(tmp_path, bos="<bos>")
    assert tokenize(PLAIN, tokenizer).prompt_ids == tuple(tokenizer.encode("pqrst"))


def test_a_bos_written_in_the_text_is_not_doubled(tmp_path):
    tokenizer = small_tokenizer(tmp_path, bos="<bos>", adds="<bos> $A")
    assert tokenize(Preference("<bos>pq", "x", "y"), tokenizer).prompt_ids == (1, *tokenizer.encode("pq"))


def test_an_eos_written_in_a_response_is_not_doubled(tmp_path):
    tokenizer = small_tokenizer(tmp_path)
    pair = tokenize(Preference("pq<eos>", "xy<eos>", "xy<eos>z"), tokenizer)
    assert pair.prompt_ids == (*tokenizer.encode("pq"), tokenizer.eos_id)
    assert pair.chosen_ids == (*tokenizer.encode("xy"), tokenizer.eos_id)
    assert pair.rejected_ids == (*tokenizer.encode("xy<eos>z"), tokenizer.eos_id)


@pytest.mark.parametrize(
    ("template", "eos", "prompt", "response"),
    [
        (LLAMA_2, "<eos>", "<bos>[INST] Why? [/INST]", " good "),
        (LLAMA_3, "<|end|>", "<bos><user>\n\nWhy?<|end|><assistant>\n\n", "good"),
        (CHATML, "<|end|>", "<system>\nBe kind.<|end|>\n<user>\nWhy?<|end|>\n<assistant>\n", "good"),
        (GEMMA, "<eos>", "<bos><user>Why?<end_of_turn>\n<assistant>", "good<end_of_turn>\n"),
    ],
    ids=["llama 2", "llama 3", "chatml with a default system turn", "gemma"],
)
def test_a_conversation_is_what_the_template_writes_with_one_bos_and_one_eos(tmp_path, template, eos, prompt, response):
    # The tokenizer would add a BOS and an EOS of its own to a plain text.
    tokenizer = small_tokenizer(tmp_path, template=template, bos="<bos>", eos=eos, adds=f"<bos> $A {eos}")
    pair = tokenize(conversation(), tokenizer)
    assert pair.prompt_ids == tuple(tokenizer.encode(prompt))
    assert pair.chosen_ids == (*tokenizer.encode(response), tokenizer.eos_id)
    assert pair.prompt_ids.count(tokenizer.bos_id) == prompt.count("<bos>")
    assert pair.rejected_ids.count(tokenizer.eos_id) == 1


def test_a_plain_prompt_never_meets_the_chat_template(tmp_path):
    tokenizer = small_tokenizer(tmp_path, template=CHATML)
    assert tokenize(PLAIN, tokenizer).prompt_ids == tuple(tokenizer.encode("pqrst"))


def test_a_template_that_rewrites_earlier_turns_is_refused_with_what_it_does(tmp_path):
    tokenizer = small_tokenizer(tmp_path, template=FORGETFUL)
    with pytest.raises(UserError, match=r"after 1 characters 'user>Why\?<\|end\|>' becomes 'assistant>good"):
        tokenize(conversation(), tokenizer)


# As of reasoning models: one opens the thought for the model, which then answers without; the other thinks nothing.
OPENS_A_THOUGHT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)
THINKS_NOTHING = (
    "{% for m in messages %}<{{ m.role }}>{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}"
    "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_template_that_opens_a_thought_which_the_answer_lacks_is_refused_with_what_it_does(tmp_path):
    tokenizer = small_tokenizer(tmp_path, template=OPENS_A_THOUGHT)
    with pytest.raises(UserError, match=r"rewrites a prompt once .* '<think>\\n' becomes 'good<\|end\|>'"):
        tokenize(conversation(), tokenizer)
    thought = conversation("<think>\nhm</think>good", "<think>\nbad")
    pair = tokenize(thought, tokenizer)
    assert pair.prompt_ids == tuple(tokenizer.encode("<user>Why?<|end|><assistant><think>\n"))
    assert pair.chosen_ids == (*tokenizer.encode("hm</think>good<|end|>"), tokenizer.eos_id)


def test_a_thought_that_the_template_writes_into_the_answer_is_scored(tmp_path):
    tokenizer = small_tokenizer(tmp_path, template=THINKS_NOTHING, eos="<|end|>")
    pair = tokenize(conversation(), tokenizer)
    assert pair.prompt_ids == tuple(tokenizer.encode("<user>Why?<|end|><assistant>"))
    assert pair.chosen_ids == tuple(tokenizer.encode("<think></think>good<|end|>"))


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "merges"),
    [
        ("pq\n", "xy", "z", False),
        ("pq\n", "\nxy", "z", True),
        ("pq\n", "xy", "\nz", True),
        ("pq ", "xy", "ax", True),
        ("p\n\n", "xy", "z", False),
    ],
)
def test_a_pair_whose_tokens_would_merge_is_told_from_one_whose_would_not(tmp_path, prompt, chosen, rejected, merges):
    tokenizer = small_tokenizer(tmp_path, template="{% for m in messages %}{{ m.content }}{% endfor %}")
    assert merges_at_boundary(Preference(prompt, chosen, rejected), tokenizer) is merges
    texts = zip(("user", "assistant", "assistant"), (prompt, chosen, rejected), strict=True)
    messages = [(Message(role, text),) for role, text in texts]
    assert merges_at_boundary(Preference(*messages), tokenizer) is merges


def test_a_conversation_that_the_template_refuses_is_dropped(tmp_path):
    tokenizer = small_tokenizer(tmp_path, template=GEMMA, bos="<bos>")
    assert tokenize(conversation(first_role="system"), tokenizer) == "refused by the chat template"


def scored_of(tokenizer, ids, scored):
    """The runs of scored tokens, and those of the others."""
    runs = [
        (is_scored, [ids[place] for place, _ in run]) for is_scored, run in groupby(enumerate(scored), lambda t: t[1])
    ]
    return [run for is_scored, run in runs if is_scored], [run for is_scored, run in runs if not is_scored]


@pytest.mark.parametrize(
    ("template", "end", "newline"), [(CHATML, "<|end|>", "\n"), (LLAMA_2, "<eos>", "")], ids=["ChatML", "Llama 2"]
)
def test_of_several_turns_the_assistants_are_scored_up_to_their_eos_and_the_others_are_given(
    tmp_path, template, end, newline
):
    tokenizer = small_tokenizer(tmp_path, template=template, bos="<bos>", eos=end)
    question, more = Message("user", "Why?"), Message("user", "And?")
    first, last, other = (Message("assistant", text) for text in ("good", "so", "bad"))
    pair = tokenize(Preference((question,), (first, more, last), (other,)), tokenizer)
    blank = " " if template is LLAMA_2 else ""
    between = {CHATML: "\n<user>\nAnd?<|end|>\n<assistant>\n", LLAMA_2: "[INST] And? [/INST]"}
    turns, others = scored_of(tokenizer, pair.chosen_ids, pair.chosen_scored)
    assert turns == [[*tokenizer.encode(f"{blank}{text}{blank}"), tokenizer.eos_id] for text in ("good", "so")]
    assert others == [tokenizer.encode(between[template])]
    assert pair.rejected_scored is None
    assert pair.rejected_ids == (*tokenizer.encode(f"{blank}bad{blank}"), tokenizer.eos_id)
    alone = tokenize(Preference((question,), (first,), (other,)), tokenizer)
    assert (alone.prompt_ids, alone.rejected_ids) == (pair.prompt_ids, pair.rejected_ids)
    assert (alone.chosen_ids, alone.chosen_scored) == (pair.chosen_ids[: len(turns[0])], None)


def test_turns_that_only_another_than_the_assistant_makes_different_are_other_prompts(tmp_path):
    tokenizer = small_tokenizer(tmp_path, template=CHATML, eos="<|end|>")
    good, more, bad = Message("assistant", "good"), Message("user", "And?"), Message("assistant", "bad")
    assert tokenize(Preference((Message("user", "Why?"),), (good,), (good, more, bad)), tokenizer) == "prompts differ"


def test_a_pair_is_cut_at_the_end_with_what_is_scored_of_it(tmp_path):
    tokenizer = small_tokenizer(tmp_path, template="{% for m in messages %}{{ m.content }}{% endfor %}", eos=".")
    turns = [Message("user", "Q"), Message("assistant", "xy"), Message("user", "r"), Message("assistant", "z")]
    preference = Preference((turns[0],), tuple(turns[1:]), (Message("assistant", "xw"),))
    whole = tokenize(preference, tokenizer)
    assert whole.chosen_scored == (True, True, False, True, True)
    cut = tokenize(preference, tokenizer, 4, "response_end")
    assert cut == TokenizedPair.of(
        whole.prompt_ids, whole.chosen_ids[:3], whole.rejected_ids, whole.chosen_scored[:3], None
    )
    assert tokenize(preference, tokenizer, 2, "response_end") == "too long"
    shorter = tokenize(replace(preference, prompt=(Message("user", "PQ"),)), tokenizer, 6, "prompt_start")
    assert shorter == whole


TOOLS = '[{"type": "function", "function": {"name": "add"}}]'
CALL = '{"tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}'
CALLS = (
    "{% for t in tools or [] %}<tool>{{ t.function.name }}{% endfor %}{% for m in messages %}<{{ m.role }}>"
    "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}"
    "{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_tools_and_their_calls_are_what_the_template_writes_of_them(tmp_path):
    tokenizer = small_tokenizer(tmp_path, template=CALLS, eos="<|end|>")
    asked, called = Message("user", "1+1?"), Message("assistant", "", CALL)
    first = Preference((asked,), (called,), (Message("assistant", "no"),), TOOLS)
    pair = tokenize(first, tokenizer)
    assert pair.prompt_ids == tuple(tokenizer.encode("<tool>add<user>1+1?<|end|><assistant>"))
    assert pair.chosen_ids == tuple(tokenizer.encode('<call>add {"a": 1}<|end|>'))
    later = Preference(
        (asked, called, Message("tool", "2")), (Message("assistant", "2"),), (Message("assistant", "3"),), TOOLS
    )
    written = '<tool>add<user>1+1?<|end|><assistant><call>add {"a": 1}<|end|><tool>2<|end|><assistant>'
    assert tokenize(later, tokenizer).prompt_ids == tuple(tokenizer.encode(written))


@pytest.mark.parametrize(
    ("template", "prompt", "tools"),
    [
        (LLAMA_3, [Message("user", "?")], TOOLS),
        (LLAMA_3, [Message("user", "?"), Message("assistant", "", CALL), Message("user", "?")], ""),
        ("{% for m in messages if m.role != 'tool' %}{{ m.content }}{% endfor %}", [Message("tool", "2")], ""),
        (None, "plain text", TOOLS),
    ],
    ids=["tools", "a call", "a tool's turn", "a plain prompt"],
)
def test_tools_that_would_be_lost_without_a_word_are_counted(tmp_path, template, prompt, tools):
    tokenizer = small_tokenizer(tmp_path, template=template, bos="<bos>")
    responses = ("a", "b") if template is None else ((Message("assistant", "a"),), (Message("assistant", "b"),))
    prompt = prompt if template is None else tuple(prompt)
    assert tokenize(Preference(prompt, *responses, tools), tokenizer) == "tools ignored"


def test_a_fault_of_the_template_at_tools_is_laid_to_the_row(tmp_path):
    tokenizer = small_tokenizer(tmp_path, template=CALLS.replace("t.function.name", "t.function.name.first.second"))
    prompt = (Message("user", "?"),)
    responses = ((Message("assistant", "a"),), (Message("assistant", "b"),))
    assert tokenize(Preference(prompt, *responses, TOOLS), tokenizer) == "refused by the chat template"
    assert isinstance(tokenize(Preference(prompt, *responses), tokenizer), TokenizedPair)


def test_a_real_chat_template_writes_tools_and_calls(material):
    path = str(material / "tokenizers" / "minimind-6400")
    tokenizer, decode = load_tokenizer(path), AutoTokenizer.from_pretrained(path).decode
    prompt = (Message("user", "1+1?"), Message("assistant", "", CALL), Message("tool", "2"))
    pair = tokenize(Preference(prompt, (Message("assistant", "2"),), (Message("assistant", "3"),), TOOLS), tokenizer)
    written = decode(list(pair.prompt_ids))
    assert '<tools>\n{"type": "function", "function": {"name": "add"}}\n</tools>' in written
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>' in written
    assert "<tool_response>\n2\n</tool_response>" in written
    assert decode(list(pair.chosen_ids)) == "2<|im_end|>"


def test_messages_are_a_transcript_to_a_sentencepiece_file(material):
    path = material / "tokenizers" / "mistral-v1-32000" / "tokenizer.model"
    tokenizer, pieces = load_tokenizer(str(path)), sentencepiece.SentencePieceProcessor(model_file=str(path))
    pair = tokenize(conversation("good", "bad one "), tokenizer)
    start = "\n\nHuman: Why?\n\nAssistant:"
    assert list(pair.prompt_ids) == [tokenizer.bos_id, *pieces.encode(start)]
    for ids, text in ((pair.chosen_ids, "good"), (pair.rejected_ids, "bad one ")):
        assert [*pair.prompt_ids, *ids] == [1, *pieces.encode(f"{start} {text}"), 2]
        assert pieces.decode(list(ids[:-1])) == text
    assert not merges_at_boundary(conversation(), tokenizer)


def test_messages_need_a_sound_chat_template(tmp_path):
    with pytest.raises(UserError, match=r"has no chat template; set model.tokenizer"):
        tokenize(conversation(), small_tokenizer(tmp_path / "none"))
    with pytest.raises(UserError, match=r"faulty is faulty: 'no_such_function' is undefined"):
        tokenize(conversation(), small_tokenizer(tmp_path / "faulty", template=FAULTY))


def test_rows_that_differ_in_text_only_are_dropped_as_identical(tmp_path):
    tokenizer = small_tokenizer(tmp_path, template=LLAMA_3, eos="<|end|>")
    assert tokenize(conversation("good", "good "), tokenizer) == "identical responses"
    assert tokenize(Preference("pq", "xy", "xy<|end|>"), tokenizer) == "identical responses"


def test_a_response_of_nothing_but_eos_is_empty_and_a_prompt_needs_a_token(tmp_path):
    without_bos = small_tokenizer(tmp_path / "a")
    with_bos = small_tokenizer(tmp_path / "b", bos="<bos>", adds="<bos> $A")
    assert tokenize(Preference("pq", "<eos>", "x"), without_bos) == "empty response"
    assert tokenize(Preference("", "x", "y"), without_bos) == "empty prompt"
    assert tokenize(Preference("", "x", "y"), with_bos).prompt_ids == (with_bos.bos_id,)


# The prompt pqrst has 5 tokens, the responses xy and xyz have 3 and 4 with their EOS (.).
@pytest.mark.parametrize(
    ("max_length", "truncation", "expected"),
    [
        (9, None, ("pqrst", "xy.", "xyz.")),
        (9, "prompt_start", ("pqrst", "xy.", "xyz.")),
        (9, "response_end", ("pqrst", "xy.", "xyz.")),
        (8, None, "too long"),
        (8, "prompt_start", ("qrst", "xy.", "xyz.")),
        (5, "prompt_start", ("t", "xy.", "xyz.")),
        (4, "prompt_start", "too long"),
        (8, "response_end", ("pqrst", "xy.", "xyz")),
        (7, "response_end", "too long"),
        (5, "response_end", "too long"),
        (1, "response_end", "too long"),
    ],
)
def test_truncation(tmp_path, max_length, truncation, expected):
    tokenizer = small_tokenizer(tmp_path, eos=".")
    found = tokenize(PLAIN, tokenizer, max_length, truncation)
    if isinstance(expected, tuple):
        expected = TokenizedPair.of(*(tokenizer.encode(text) for text in expected))
    assert found == expected


def test_a_shortened_prompt_keeps_its_bos(tmp_path):
    tokenizer = small_tokenizer(tmp_path, bos="<bos>", adds="<bos> $A")
    assert tokenize(PLAIN, tokenizer, 8, "prompt_start").prompt_ids == (1, *tokenizer.encode("rst"))
    assert tokenize(PLAIN, tokenizer, 6, "prompt_start").prompt_ids == (1, *tokenizer.encode("t"))
    assert tokenize(PLAIN, tokenizer, 5, "prompt_start") == "too long"


def test_a_pair_is_named_by_its_tokens():
    name = TokenizedPair.of([1], [2, 3], [4]).id
    assert name == TokenizedPair.of((1,), (2, 3), (4,)).id
    assert len(name) == 32
    assert name not in {TokenizedPair.of([1, 2], [3], [4]).id, TokenizedPair.of([1], [4], [2, 3]).id}
    masked = [((True, True), (True,)), ((True, False), None), (None, (False,)), ((True, False), (False,))]
    names = [TokenizedPair.of([1], [2, 3], [4], *masks).id for masks in masked]
    assert names[0] == name
    assert len(set(names)) == 4


def test_scored_tokens_of_real_rows_decode_to_the_responses(material):
    hugging_face = str(material / "tokenizers" / "minimind-6400")
    sentence_piece = str(material / "models" / "stories260K-hf" / "tokenizer.model")
    decoders = {
        hugging_face: AutoTokenizer.from_pretrained(hugging_face).decode,
        sentence_piece: sentencepiece.SentencePieceProcessor(model_file=sentence_piece).decode,
    }
    (rows,) = load_rows(Source(str(material / "prefs" / "pandalm_dpo.jsonl"), split="train[:100]"))
    for path, decode in decoders.items():
        tokenizer = load_tokenizer(path)
        for _, row in rows:
            (preference,) = read_preferences(row, columns={}, where="")
            pair = tokenize(preference, tokenizer, 10_000)
            for ids, text in ((pair.chosen_ids, row["chosen"]), (pair.rejected_ids, row["rejected"])):
                assert ids[-1] == tokenizer.eos_id
                assert ids.count(tokenizer.eos_id) == 1
                assert decode(list(ids[:-1])) == text


def test_a_real_chat_template_writes_the_prompt_and_the_response(material):
    path = str(material / "tokenizers" / "minimind-6400")
    tokenizer, decode = load_tokenizer(path), AutoTokenizer.from_pretrained(path).decode
    pair = tokenize(conversation(), tokenizer)
    thinks_nothing = "<think>\n\n</think>\n\n"
    assert decode(list(pair.prompt_ids)) == (
        f"<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n{thinks_nothing}"
    )
    assert decode(list(pair.chosen_ids)) == "good<|im_end|>"
