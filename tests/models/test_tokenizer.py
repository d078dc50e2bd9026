import json
import pickle
import shutil

import pytest
import sentencepiece
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dpo_ds.data.messages import Message
from dpo_ds.errors import UserError
from dpo_ds.models.tokenizer import HuggingFaceTokenizer, load_tokenizer
from tests.data.small_tokenizer import small_tokenizer

TEXTS = ["Hello  world\n\n\nx", " Once", "é🙂 a", "", "a</s>b"]


def test_a_hugging_face_folder_gives_the_ids_of_transformers(material):
    path = str(material / "tokenizers" / "minimind-6400")
    tokenizer, expected = load_tokenizer(path), AutoTokenizer.from_pretrained(path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 6400)
    assert tokenizer.has_chat_template
    for text in TEXTS:
        assert tokenizer.encode(text) == expected(text, add_special_tokens=False).input_ids
        assert tokenizer.encode_prompt(text) == expected(text).input_ids


def test_a_class_that_encodes_in_its_own_way_is_asked_itself(tmp_path):
    small_tokenizer(tmp_path)

    class Reversing(PreTrainedTokenizerFast):
        def _encode_plus(self, text, *args, **kwargs):
            return super()._encode_plus(text[::-1], *args, **kwargs)

    plain, reversing = load_tokenizer(str(tmp_path)), Reversing.from_pretrained(tmp_path)
    assert HuggingFaceTokenizer(reversing, name="reversing").encode("xyz") == plain.encode("zyx")


@pytest.mark.parametrize("folder", ["models/stories260K-hf", "tokenizers/mistral-v1-32000"])
def test_a_sentencepiece_file_gives_its_own_ids_behind_a_bos(material, folder):
    file = material / folder / "tokenizer.model"
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
    for path in (file, file.parent):
        tokenizer = load_tokenizer(str(path))
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, pieces.vocab_size())
        for text in TEXTS:
            assert tokenizer.encode(text) == pieces.encode(text)
            assert tokenizer.encode_prompt(text) == [1, *pieces.encode(text)]


def test_a_sentencepiece_file_writes_conversations_as_transcripts(material):
    tokenizer = load_tokenizer(str(material / "tokenizers" / "mistral-v1-32000"))
    pieces = sentencepiece.SentencePieceProcessor(
        model_file=str(material / "tokenizers" / "mistral-v1-32000" / "tokenizer.model")
    )
    turns = [Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "?")]
    start = "Be brief.\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: ?\n\nAssistant:"
    answer = [*turns, Message("assistant", "So. ")]
    assert tokenizer.has_chat_template
    assert tokenizer.render_chat(turns, add_generation_prompt=True) == start
    assert tokenizer.render_chat(answer, add_generation_prompt=False) == f"{start} So. "
    # The ids are those of the transcript in one piece, behind the BOS.
    prompt, response = tokenizer.encode_rendered(start, begins=True), tokenizer.encode_rendered(" So. ", begins=False)
    assert [*prompt, *response] == [1, *pieces.encode(f"{start} So. ")]
    for refused in (
        [Message("tool", "4")],
        [turns[1], turns[0]],
        [Message("assistant", "", '{"tool_calls": []}')],
    ):
        assert tokenizer.render_chat(refused, add_generation_prompt=False) is None
    assert tokenizer.render_chat(turns, add_generation_prompt=True, tools="[{}]") is None


@pytest.mark.parametrize("name", ["tokenizers/minimind-6400", "models/stories260K-hf"])
def test_a_saved_tokenizer_opens_as_the_same(material, tmp_path, name):
    tokenizer = load_tokenizer(str(material / name))
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(str(tmp_path / "saved"))
    assert again.identity == tokenizer.identity
    assert [again.encode_prompt(text) for text in TEXTS] == [tokenizer.encode_prompt(text) for text in TEXTS]
    assert again.has_chat_template == tokenizer.has_chat_template


@pytest.mark.parametrize("name", ["tokenizers/minimind-6400", "models/stories260K-hf"])
def test_a_tokenizer_that_is_sent_to_another_process_is_the_same(material, name):
    tokenizer = load_tokenizer(str(material / name))
    sent = pickle.loads(pickle.dumps(tokenizer))
    assert (sent.identity, sent.eos_id, sent.bos_id) == (tokenizer.identity, tokenizer.eos_id, tokenizer.bos_id)
    for text in TEXTS:
        assert sent.encode(text) == tokenizer.encode(text)
        assert sent.encode_prompt(text) == tokenizer.encode_prompt(text)


def test_the_identity_follows_content_and_not_the_place(tmp_path):
    plain = small_tokenizer(tmp_path / "a")
    plain.encode("This does not change it.")
    assert plain.identity == small_tokenizer(tmp_path / "b").identity
    others = [
        small_tokenizer(tmp_path / "c", template="{{ messages }}"),
        small_tokenizer(tmp_path / "d", bos="<bos>"),
        small_tokenizer(tmp_path / "e", bos="<bos>", adds="<bos> $A"),
        small_tokenizer(tmp_path / "f", eos="<|end|>"),
    ]
    assert len({tokenizer.identity for tokenizer in [plain, *others]}) == 5


def test_truncation_and_padding_that_a_tokenizer_file_holds_do_not_matter(tmp_path):
    plain = small_tokenizer(tmp_path / "a")
    file = tmp_path / "a" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    file.write_text(json.dumps(content))
    limited = load_tokenizer(str(tmp_path / "a"))
    assert limited.encode("pqrst") == plain.encode("pqrst")
    assert len(limited.encode("pqrst")) == 5
    assert limited.identity == plain.identity


def test_an_eos_that_the_tokenizer_appends_is_taken_off_a_prompt_and_one_in_the_text_is_not(tmp_path):
    tokenizer = small_tokenizer(tmp_path, adds="$A <eos>")
    assert tokenizer.encode_prompt("pq") == tokenizer.encode("pq")
    assert tokenizer.encode_prompt("pq<eos>") == [*tokenizer.encode("pq"), tokenizer.eos_id]


def test_the_vocabulary_size_counts_the_largest_id(tmp_path):
    tokenizer = small_tokenizer(tmp_path)
    assert tokenizer.vocab_size == max(AutoTokenizer.from_pretrained(tmp_path).get_vocab().values()) + 1


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no EOS token.*set eos_token in its tokenizer_config.json"):
        small_tokenizer(tmp_path, eos=None)


def test_a_sentencepiece_model_without_eos_is_refused(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words to learn pieces from"] * 20),
        model_prefix=str(tmp_path / "no_eos"),
        vocab_size=30,
        eos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(UserError, match=r"no_eos\.model has no EOS piece"):
        load_tokenizer(str(tmp_path / "no_eos.model"))


def test_what_is_no_tokenizer_is_refused_in_one_line(tmp_path):
    empty, broken, text = tmp_path / "empty", tmp_path / "broken", tmp_path / "notes.model"
    empty.mkdir()
    (empty / "config.json").write_text('{"model_type": "gpt2"}')
    broken.mkdir()
    (broken / "tokenizer.json").write_text('{"version": ')
    text.write_text("hello")
    for path, message in [
        (empty, "has no tokenizer files; set model.tokenizer"),
        (broken, "broken cannot be opened"),
        (text, "is no SentencePiece model; set model.tokenizer"),
        (tmp_path / "nowhere", "nowhere cannot be opened"),
    ]:
        with pytest.raises(UserError, match=message) as raised:
            load_tokenizer(str(path))
        assert "\n" not in str(raised.value)


def test_a_folder_with_a_tokenizer_config_is_left_to_transformers(material, tmp_path):
    shutil.copy(material / "tokenizers" / "mistral-v1-32000" / "tokenizer.model", tmp_path)
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    expected = AutoTokenizer.from_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).encode_prompt("Hello") == expected("Hello").input_ids
