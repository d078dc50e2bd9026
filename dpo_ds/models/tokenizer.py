"""Loading the policy's tokenizer, Hugging Face or raw SentencePiece, as the one kind that the data rooms know.

What is done with the ids (truncation, EOS, dropping) is decided in the data rooms, not here.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_ds.data.messages import Message
from dpo_ds.data.tokenization import Tokenizer
from dpo_ds.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES = ("tokenizer.json", "tokenizer_config.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
_EXPECTED = "a folder with tokenizer.json or tokenizer.model, a SentencePiece .model file, or a hub id"


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> Tokenizer:
    """Opens a tokenizer.

    A folder without ``tokenizer.json`` and ``tokenizer_config.json`` but with one SentencePiece ``.model`` file is read
    by SentencePiece itself: transformers' conversion of such a bare file gives other ids and forgets the BOS.

    Args:
        path: a Hugging Face folder or hub id, or a SentencePiece ``.model`` file.
        trust_remote_code: whether code that comes with the tokenizer may run.

    Raises:
        UserError: it cannot be opened, or has no EOS token.
    """
    place = Path(path)
    if place.is_file():
        return SentencePieceTokenizer(place)
    if place.is_dir():
        if not any(file for pattern in _FILES for file in place.glob(pattern)):
            raise UserError(f"the folder {path} has no tokenizer files; set model.tokenizer to {_EXPECTED}")
        bare = sorted(place.glob("*.model"))
        if len(bare) == 1 and not any((place / name).exists() for name in _FILES[:2]):
            return SentencePieceTokenizer(bare[0])
    return HuggingFaceTokenizer(_open(path, trust_remote_code), name=path)


class HuggingFaceTokenizer:
    """A transformers tokenizer; attributes and methods as ``Tokenizer`` says.

    Args:
        tokenizer: an open one.
        name: its folder or hub id.

    Raises:
        UserError: it has no EOS token.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", *, name: str) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer {name} has no EOS token, so no response could end; set eos_token in its "
                "tokenizer_config.json"
            )
        self._tokenizer = tokenizer
        # Tokenizers' own encoding, without offsets, takes two thirds of the time of transformers' way there. A class
        # that encodes in another way keeps it.
        self._backend = tokenizer.backend_tokenizer if _encodes_as_its_backend(tokenizer) else None
        self.name = name
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int = tokenizer.eos_token_id
        self.vocab_size: int = max(tokenizer.get_vocab().values()) + 1
        self.has_chat_template = bool(tokenizer.chat_template)
        specimen = list(tokenizer.encode("a", add_special_tokens=True, verbose=False))
        self._appends_eos = specimen[-1:] == [self.eos_id]
        # Only now: transformers' own encoding resets the truncation and padding that a tokenizer.json may hold.
        self.identity = _identity(tokenizer, specimen)

    def encode_prompt(self, text: str) -> list[int]:
        """Returns the ids of a plain prompt with the tokenizer's own special tokens, less an EOS that it appends."""
        ids = self._encode(text, special=True)
        return ids[:-1] if self._appends_eos else ids

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, special tokens neither prepended nor appended."""
        return self._encode(text, special=False)

    def encode_rendered(self, text: str, *, begins: bool) -> list[int]:
        """Returns the ids of a part of what ``render_chat`` wrote; templates write special tokens themselves."""
        return self.encode(text)

    def render_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: str = "") -> str | None:
        """Returns a conversation as the chat template writes it, None where it refuses such a conversation."""
        from jinja2 import TemplateError

        turns = [{"role": m.role, "content": m.content, **json.loads(m.details or "{}")} for m in messages]
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    turns,
                    tools=json.loads(tools) if tools else None,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            # Exactly this class is what a template's own raise_exception gives; a subclass is a fault in the template,
            # or in tools and calls, whose shape is the data's.
            if type(error) is TemplateError or tools or any(message.details for message in messages):
                return None
            raise UserError(f"the chat template of {self.name} is faulty: {first_line(error)}; mend it") from error

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, without special tokens, for people to read."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def save(self, folder: Path) -> None:
        """Writes tokenizer, config and chat template."""
        self._tokenizer.save_pretrained(folder)

    def _encode(self, text: str, *, special: bool) -> list[int]:
        if self._backend is not None:
            (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=special)
            return list(encoding.ids)
        return list(self._tokenizer.encode(text, add_special_tokens=special, verbose=False))


class SentencePieceTokenizer:
    """A raw SentencePiece model; attributes and methods as ``Tokenizer`` says.

    A prompt begins with the model's BOS if it defines one, as Llama's and Mistral's tokenizers have it.

    The file has no chat template, so messages become the transcript in which Bai et al. 2022 (arXiv:2204.05862) wrote
    their preferences, and DPO's first data were: the text of a system turn, then for each turn an empty line and
    ``Human: TEXT`` or ``Assistant: TEXT``. The generation prompt is an empty line and ``Assistant:``. EOS ends the
    response and no other turn. Other roles, tools and tool calls are refused.

    Args:
        file: the ``.model`` file.

    Raises:
        UserError: it cannot be opened, or has no EOS piece.
    """

    has_chat_template = True

    def __init__(self, file: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._processor = SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError) as error:
            raise UserError(f"{file} is no SentencePiece model; set model.tokenizer to {_EXPECTED}") from error
        if self._processor.eos_id() < 0:
            raise UserError(f"the tokenizer {file} has no EOS piece, so no response could end; train it with an eos_id")
        self._file = file
        self.name = str(file)
        self.bos_id: int | None = self._processor.bos_id() if self._processor.bos_id() >= 0 else None
        self.eos_id: int = self._processor.eos_id()
        self.vocab_size: int = self._processor.vocab_size()
        self.identity = hashlib.sha256(file.read_bytes()).hexdigest()
        self._begins_with_a_blank = self._processor.encode("a", out_type=str)[0].startswith("▁")

    def encode_prompt(self, text: str) -> list[int]:
        """Returns the ids of a plain prompt, behind the BOS if the model defines one."""
        return [*([] if self.bos_id is None else [self.bos_id]), *self.encode(text)]

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, special tokens neither prepended nor appended."""
        return list(self._processor.encode(text))

    def encode_rendered(self, text: str, *, begins: bool) -> list[int]:
        """Returns the ids of a part of what ``render_chat`` wrote, behind the BOS where it begins."""
        # Most models put a blank of their own before a text: behind "Assistant:" that is the template's blank.
        return (
            self.encode_prompt(text) if begins else self.encode(text[self._begins_with_a_blank and text[:1] == " " :])
        )

    def render_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: str = "") -> str | None:
        """Returns a conversation as a transcript, None where it has tools or turns that a transcript does not know."""
        speakers = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
        is_known = all(
            not message.details and (message.role in speakers or (place == 0 and message.role == "system"))
            for place, message in enumerate(messages)
        )
        if tools or not is_known:
            return None
        turns = [speakers.get(message.role, "") + message.content for message in messages]
        return "".join([*turns, "\n\nAssistant:" if add_generation_prompt else ""])

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, without special tokens, for people to read."""
        return str(self._processor.decode(list(ids)))

    def save(self, folder: Path) -> None:
        """Copies the file as ``tokenizer.model``."""
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self._file, folder / "tokenizer.model")


def _open(path: str, trust_remote_code: bool) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # a broken tokenizer.json raises Rust's errors, whose class is plain Exception
        raise UserError(
            f"the tokenizer {path} cannot be opened ({first_line(error)}); set model.tokenizer to {_EXPECTED}"
        ) from error


def _encodes_as_its_backend(tokenizer: Any) -> bool:
    from transformers import PreTrainedTokenizerFast

    return bool(tokenizer.is_fast) and type(tokenizer)._encode_plus is PreTrainedTokenizerFast._encode_plus


def _identity(tokenizer: Any, specimen: list[int]) -> str:
    if tokenizer.is_fast:
        rules = tokenizer.backend_tokenizer.to_str()
    else:
        rules = [type(tokenizer).__qualname__, sorted(tokenizer.get_vocab().items())]
    parts = [rules, specimen, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
