"""What holds for any text and any kind of tokenizer: the prompt's tokens do not depend on what follows, and the scored
tokens, decoded by the tokenizer's own library, are the response."""

import string
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import sentencepiece
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dpo_ds.data.messages import Message
from dpo_ds.data.preferences import Preference
from dpo_ds.data.tokenization import TokenizedPair, tokenize_pair
from dpo_ds.data.tokenization import Tokenizer as AnyTokenizer
from dpo_ds.models.tokenizer import load_tokenizer
from tests.data.small_tokenizer import small_tokenizer

LETTERS = string.ascii_letters + string.digits + string.punctuation
# Every character but halves of surrogate pairs, which have no UTF-8; and what merges, gets lost or is many bytes.
CHARACTERS = st.characters(exclude_categories=("Cs",))
AWKWARD = st.sampled_from(
    [" ", "  ", "\n", "\n\n", "\r\n", "\t", " a", "ab", "the", "é", "e\u0301", "日本", "\U0001f642", "\ufeff"]
)
ANY_TEXT = st.lists(AWKWARD | CHARACTERS, max_size=12).map("".join)
CORPUS = ["the tea is hot and the soup is hot", "why is the sky blue, and the sea?\n\n", LETTERS] * 20
ROLES = ("user", "assistant", "user", "assistant", "user", "assistant")
TEMPLATE = (
    "<bos>{% for m in messages %}<{{ m.role }}>\n{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
KINDS = ("byte-level BPE", "BPE of characters", "WordPiece", "SentencePiece", "minimind's", "Mistral's")


class Case(NamedTuple):
    """A tokenizer, its library's decoding, and the texts that it can write down."""

    tokenizer: AnyTokenizer
    decode: Callable[[list[int]], str]
    texts: st.SearchStrategy[str]


def hugging_face(path: Path | str, texts: st.SearchStrategy[str]) -> Case:
    decode = AutoTokenizer.from_pretrained(path).decode
    return Case(load_tokenizer(str(path)), lambda ids: decode(ids, clean_up_tokenization_spaces=False), texts)


def sentence_piece(file: Path, texts: st.SearchStrategy[str]) -> Case:
    return Case(load_tokenizer(str(file)), sentencepiece.SentencePieceProcessor(model_file=str(file)).decode, texts)


def saved(backend: Tokenizer, folder: Path) -> Path:
    specials = [(token, backend.token_to_id(token)) for token in ("<bos>", "<eos>")]
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=specials)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )
    wrapped.save_pretrained(folder)
    return folder


def characters_case(folder: Path) -> Case:
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    alphabet = [*LETTERS, "\n", "▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<bos>", "<eos>", "<unk>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return hugging_face(saved(backend, folder), st.text(st.sampled_from([*LETTERS, *" \n" * 9]), max_size=20))


def word_piece_case(folder: Path) -> Case:
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=["<bos>", "<eos>", "<unk>"], initial_alphabet=list(LETTERS), show_progress=False
    )
    # Each letter within a word, so that no word is unknown.
    backend.train_from_iterator([*CORPUS, *(f"a{letter}" for letter in LETTERS)], trainer)
    # It forgets how many blanks there were, so its texts are words and single ones.
    words = st.lists(st.text(st.sampled_from(LETTERS), min_size=1, max_size=6), max_size=6)
    return hugging_face(saved(backend, folder), words.map(" ".join))


def sentence_piece_case(folder: Path) -> Case:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(folder / "small"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    # It writes blanks as this sign, and its own control pieces are none when they are text.
    return sentence_piece(folder / "small.model", ANY_TEXT.filter(lambda text: "▁" not in text and "\0" not in text))


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("tokenizer")
    match request.param:
        case "byte-level BPE":
            small_tokenizer(folder, bos="<bos>", adds="<bos> $A <eos>")
            return hugging_face(folder, ANY_TEXT)
        case "BPE of characters":
            return characters_case(folder)
        case "WordPiece":
            return word_piece_case(folder)
        case "SentencePiece":
            return sentence_piece_case(folder)
    material: Path = request.getfixturevalue("material")
    if request.param == "minimind's":
        return hugging_face(material / "tokenizers" / "minimind-6400", ANY_TEXT)
    texts = ANY_TEXT.filter(lambda text: "▁" not in text and "\0" not in text)
    return sentence_piece(material / "tokenizers" / "mistral-v1-32000" / "tokenizer.model", texts)


def tokenized(tokenizer: AnyTokenizer, *texts: str, **settings) -> TokenizedPair | str:
    return tokenize_pair(Preference(*texts), tokenizer, **{"max_length": 10_000, "truncation": None, **settings})


every_kind = pytest.mark.parametrize("case", KINDS, indirect=True)
many = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.filter_too_much])


@every_kind
@many
@given(data=st.data())
def test_the_scored_tokens_are_the_response_and_the_prompts_do_not_depend_on_it(case, data):
    prompt, chosen, rejected = (data.draw(case.texts) for _ in range(3))
    assume(chosen.strip() and rejected.strip() and chosen != rejected)
    pair = tokenized(case.tokenizer, prompt, chosen, rejected)
    if pair == "empty prompt":
        assert case.tokenizer.encode_prompt(prompt) == []
        return
    for ids, text in ((pair.chosen_ids, chosen), (pair.rejected_ids, rejected)):
        assert ids[-1] == case.tokenizer.eos_id
        assert case.tokenizer.eos_id not in ids[:-1]
        assert case.decode(list(ids[:-1])) == text
    turned = tokenized(case.tokenizer, prompt, rejected, chosen)
    assert pair.prompt_ids == turned.prompt_ids == tuple(case.tokenizer.encode_prompt(prompt))
    assert (pair.chosen_ids, pair.rejected_ids) == (turned.rejected_ids, turned.chosen_ids)
    has_bos = pair.prompt_ids[0] == case.tokenizer.bos_id
    assert pair.prompt_ids.count(case.tokenizer.bos_id) == has_bos
    assert case.decode(list(pair.prompt_ids[has_bos:])) == prompt


@every_kind
@many
@given(data=st.data(), room=st.integers(2, 60), truncation=st.sampled_from([None, "prompt_start", "response_end"]))
def test_what_is_kept_fits_and_differs_and_what_is_cut_is_cut_at_the_named_end(case, data, room, truncation):
    prompt, chosen, rejected = (data.draw(case.texts) for _ in range(3))
    assume(chosen.strip() and rejected.strip() and chosen != rejected)
    whole = tokenized(case.tokenizer, prompt, chosen, rejected)
    cut = tokenized(case.tokenizer, prompt, chosen, rejected, max_length=room, truncation=truncation)
    assume(isinstance(whole, TokenizedPair))
    length = len(whole.prompt_ids) + max(len(whole.chosen_ids), len(whole.rejected_ids))
    if length <= room:
        assert cut == whole
    elif truncation is None:
        assert cut == "too long"
    elif isinstance(cut, TokenizedPair):
        longer = max(len(cut.chosen_ids), len(cut.rejected_ids))
        assert len(cut.prompt_ids) + longer == room
        assert cut.chosen_ids != cut.rejected_ids
        if truncation == "prompt_start":
            assert (cut.chosen_ids, cut.rejected_ids) == (whole.chosen_ids, whole.rejected_ids)
            has_bos = whole.prompt_ids[0] == case.tokenizer.bos_id
            assert cut.prompt_ids[:has_bos] == whole.prompt_ids[:has_bos]
            assert whole.prompt_ids[len(whole.prompt_ids) - len(cut.prompt_ids) + has_bos :] == cut.prompt_ids[has_bos:]
        else:
            assert cut.prompt_ids == whole.prompt_ids
            assert whole.chosen_ids[: len(cut.chosen_ids)] == cut.chosen_ids
            assert whole.rejected_ids[: len(cut.rejected_ids)] == cut.rejected_ids
            assert len(cut.chosen_ids) == min(len(whole.chosen_ids), longer)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("chat")
    small_tokenizer(folder, template=TEMPLATE, bos="<bos>", adds="<bos> $A <eos>")
    return hugging_face(folder, ANY_TEXT)


@many
@given(turns=st.lists(ANY_TEXT, min_size=1, max_size=5), chosen=ANY_TEXT, rejected=ANY_TEXT)
def test_a_rendered_conversation_is_its_prompt_and_its_scored_tokens(chat, turns, chosen, rejected):
    assume(len(turns) % 2 == 1)
    assume(chosen.strip() and rejected.strip() and chosen != rejected)
    roles = ["user", "assistant"] * 3
    prompt = tuple(Message(role, text) for role, text in zip(roles, turns, strict=False))
    answers = ((Message("assistant", text),) for text in (chosen, rejected))
    pair = tokenized(chat.tokenizer, prompt, *answers)
    start = "<bos>" + "".join(f"<{role}>\n{text}<eos>\n" for role, text in zip(roles, turns, strict=False))
    assert chat.decode(list(pair.prompt_ids)) == f"{start}<assistant>\n"
    assert pair.prompt_ids.count(chat.tokenizer.bos_id) == 1
    for ids, text in ((pair.chosen_ids, chosen), (pair.rejected_ids, rejected)):
        assert chat.decode(list(ids)) == f"{text}<eos>"
        assert ids.count(chat.tokenizer.eos_id) == 1


@many
@given(texts=st.lists(ANY_TEXT.filter(str.strip), min_size=6, max_size=6), turns=st.integers(1, 3), other=ANY_TEXT)
def test_the_scored_tokens_of_a_conversation_are_the_turns_of_the_assistant(chat, texts, turns, other):
    assume(other.strip() and other != texts[1])
    said = tuple(Message(role, text) for role, text in zip(ROLES, texts, strict=True))[: 2 * turns]
    pair = tokenized(chat.tokenizer, said[:1], said[1:], (Message("assistant", other),))
    scored = pair.chosen_scored or (True,) * len(pair.chosen_ids)
    kept = [token for token, is_scored in zip(pair.chosen_ids, scored, strict=True) if is_scored]
    given = [token for token, is_scored in zip(pair.chosen_ids, scored, strict=True) if not is_scored]
    assert chat.decode(kept) == "".join(f"{text}<eos>" for text in texts[1 : 2 * turns : 2])
    others = texts[2 : 2 * turns : 2]
    assert chat.decode(given) == "".join(f"\n<user>\n{text}<eos>\n<assistant>\n" for text in others)
    assert chat.decode(list(pair.rejected_ids)) == f"{other}<eos>"


@pytest.fixture(scope="module")
def transcripts(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return sentence_piece_case(tmp_path_factory.mktemp("sentencepiece"))


@many
@given(data=st.data(), turns=st.sampled_from([1, 3, 5]))
def test_a_conversation_is_a_transcript_to_sentencepiece_and_its_answer_is_scored(transcripts, data, turns):
    texts, chosen, rejected = ([data.draw(transcripts.texts) for _ in range(count)] for count in (turns, 1, 1))
    assume(chosen[0].strip() and rejected[0].strip() and chosen != rejected)
    prompt = tuple(Message(role, text) for role, text in zip(ROLES, texts, strict=False))
    pair = tokenized(transcripts.tokenizer, prompt, *((Message("assistant", text),) for text in (*chosen, *rejected)))
    names = {"user": "Human", "assistant": "Assistant"}
    written = "".join(f"\n\n{names[role]}: {text}" for role, text in zip(ROLES, texts, strict=False))
    assert pair.prompt_ids[0] == transcripts.tokenizer.bos_id
    assert transcripts.decode(list(pair.prompt_ids[1:])) == f"{written}\n\nAssistant:"
    for ids, text in ((pair.chosen_ids, chosen[0]), (pair.rejected_ids, rejected[0])):
        assert transcripts.decode(list(ids[:-1])) == text
        assert ids.count(transcripts.tokenizer.eos_id) == 1
        whole = f"{written}\n\nAssistant: {text}"
        assert transcripts.decode([*pair.prompt_ids[1:], *ids[:-1]]) == whole
