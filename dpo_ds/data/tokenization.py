"""From a preference to token ids. Truncation, BOS and EOS are decided here and never again; no column name, no file and
no tensor may enter."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np

from dpo_ds.data.messages import Message
from dpo_ds.data.preferences import DropReason, Preference
from dpo_ds.errors import UserError

Truncation = Literal["prompt_start", "response_end"]
TokenIds = tuple[int, ...]
Mask = tuple[bool, ...]


class Tokenizer(Protocol):
    """What Hugging Face and SentencePiece tokenizers both offer."""

    @property
    def name(self) -> str:
        """Its folder, file or hub id, for messages."""

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text, if there is one."""

    @property
    def eos_id(self) -> int:
        """The token that ends a response."""

    @property
    def vocab_size(self) -> int:
        """The largest id that it can produce, plus 1."""

    @property
    def has_chat_template(self) -> bool:
        """Whether it can render conversations."""

    @property
    def identity(self) -> str:
        """A hash of its content: equal for tokenizers that give the same ids, wherever they lie."""

    def encode_prompt(self, text: str) -> list[int]:
        """Returns the ids of a plain prompt with the tokenizer's own special tokens, less an EOS that it appends."""

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, special tokens neither prepended nor appended."""

    def render_chat(self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: str = "") -> str | None:
        """Returns a conversation as the chat template writes it, None where the template refuses such a conversation.

        Args:
            messages: the turns.
            add_generation_prompt: whether to write the beginning of the assistant's next turn, too.
            tools: what the assistant may call, as a JSON list; empty for nothing.

        Raises:
            UserError: there is no template, or it is faulty.
        """

    def encode_rendered(self, text: str, *, begins: bool) -> list[int]:
        """Returns the ids of a part of what ``render_chat`` wrote.

        Args:
            text: the part.
            begins: whether it is the beginning, where a BOS belongs that the template has not written.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, without special tokens, for people to read."""

    def save(self, folder: Path) -> None:
        """Writes the files from which the tokenizer can be loaded again."""


@dataclass(frozen=True)
class TokenizedPair:
    """A pair as the models see it.

    Attributes:
        id: hash of the tokens, hexadecimal.
        prompt_ids: at least one token.
        chosen_ids: ends with an EOS, unless its end was cut off; the only one, unless several turns are scored.
        rejected_ids: likewise.
        chosen_scored: for each token of the chosen response whether it is scored, the first is; None: all are.
        rejected_scored: likewise.
        probability: as in ``Preference``; of these three the name does not tell.
        margin: likewise.
        weight: likewise.
    """

    id: str
    prompt_ids: TokenIds
    chosen_ids: TokenIds
    rejected_ids: TokenIds
    chosen_scored: Mask | None = None
    rejected_scored: Mask | None = None
    probability: float | None = None
    margin: float | None = None
    weight: float | None = None

    @classmethod
    def of(
        cls,
        prompt_ids: Sequence[int],
        chosen_ids: Sequence[int],
        rejected_ids: Sequence[int],
        chosen_scored: Mask | None = None,
        rejected_scored: Mask | None = None,
    ) -> "TokenizedPair":
        """Returns the pair of these tokens, named by their hash and that of what is not scored."""
        parts = (tuple(prompt_ids), tuple(chosen_ids), tuple(rejected_ids))
        masks = [None if mask is None or all(mask) else mask for mask in (chosen_scored, rejected_scored)]
        numbers = [*map(len, parts), *chain.from_iterable(parts)]
        if any(masks):
            for mask, part in zip(masks, parts[1:], strict=True):
                numbers += mask or (True,) * len(part)
        packed = np.array(numbers, dtype="<i8").tobytes()
        return cls(hashlib.blake2b(packed, digest_size=16).hexdigest(), *parts, masks[0], masks[1])

    def shortened(self, responses: int) -> "TokenizedPair":
        """Returns the pair with no more than so many tokens of each response; its name stays."""
        return replace(
            self,
            chosen_ids=self.chosen_ids[:responses],
            rejected_ids=self.rejected_ids[:responses],
            chosen_scored=self.chosen_scored and self.chosen_scored[:responses],
            rejected_scored=self.rejected_scored and self.rejected_scored[:responses],
        )


def tokenize_pair(
    preference: Preference, tokenizer: Tokenizer, *, max_length: int, truncation: Truncation | None
) -> TokenizedPair | DropReason:
    """Returns a preference's tokens, or why it cannot be used.

    Prompt and responses are encoded separately and concatenated, which is what inference produces: a model that writes
    the response starts from the prompt's own tokens. A plain prompt never meets the chat template.

    Args:
        preference: strings or messages.
        tokenizer: the policy's.
        max_length: bound on the tokens of prompt + longer response.
        truncation: None drops what does not fit, ``prompt_start`` shortens the prompt at its start (a BOS stays),
            ``response_end`` both responses at their end.

    Raises:
        UserError: the preference needs a chat template, and there is none or it rewrites earlier turns.
    """
    pair = _tokenized(preference, tokenizer, max_length=max_length, truncation=truncation)
    labels = (preference.probability, preference.margin, preference.weight)
    if isinstance(pair, str) or labels == (None, None, None):
        return pair
    return replace(pair, probability=labels[0], margin=labels[1], weight=labels[2])


def merges_at_boundary(preference: Preference, tokenizer: Tokenizer) -> bool:
    """Returns whether a response's first token would differ if prompt and response were encoded in one go.

    Such a pair is encoded as inference does, like every other; it matters to programs that do otherwise.

    Args:
        preference: one that ``tokenize_pair`` takes.
        tokenizer: the policy's.

    Raises:
        UserError: as ``tokenize_pair`` does.
    """
    match preference:
        case Preference(tuple(messages), tuple(chosen), tuple(rejected)):
            rendered = _render(messages, (chosen, rejected), tokenizer, tools=preference.tools)
            texts = [rendered[0], *(parts[0].text for parts in rendered[1])] if rendered else []

            def encode(text: str, *, begins: bool) -> list[int]:
                return tokenizer.encode_rendered(text, begins=begins)

        case Preference(str(prompt), str(chosen), str(rejected)):
            texts = [prompt, chosen, rejected]

            def encode(text: str, *, begins: bool) -> list[int]:
                return tokenizer.encode(text)

        case _:
            raise TypeError("prompt, chosen and rejected must be of one kind")
    return any(
        encode(texts[0] + after, begins=True) != [*encode(texts[0], begins=True), *encode(after, begins=False)]
        for after in texts[1:]
    )


def _tokenized(
    preference: Preference, tokenizer: Tokenizer, *, max_length: int, truncation: Truncation | None
) -> TokenizedPair | DropReason:
    match preference:
        case Preference(str(prompt), str(chosen), str(rejected)):
            if preference.tools:
                return "tools ignored"
            prompt_ids = tokenizer.encode_prompt(prompt)
            encoded = [_Response(tokenizer.encode(response), None) for response in (chosen, rejected)]
        case Preference(tuple(messages), tuple(chosen), tuple(rejected)):
            rendered = _render(messages, (chosen, rejected), tokenizer, tools=preference.tools)
            if rendered is None:
                return "refused by the chat template"
            start, responses = rendered
            if _ignores_tools(messages, (chosen, rejected), tokenizer, tools=preference.tools):
                return "tools ignored"
            prompt_ids = tokenizer.encode_rendered(start, begins=True)
            encoded = [_encode(response, tokenizer) for response in responses]
        case _:
            raise TypeError("prompt, chosen and rejected must be of one kind")
    while len(prompt_ids) > 1 and prompt_ids[0] == prompt_ids[1] == tokenizer.bos_id:
        prompt_ids = prompt_ids[1:]
    if not prompt_ids:
        return "empty prompt"
    first, second = (_ended_once(response, tokenizer.eos_id) for response in encoded)
    if len(first.ids) == 1 or len(second.ids) == 1:
        return "empty response"
    if first.ids == second.ids:
        return "identical responses"
    pair = TokenizedPair.of(prompt_ids, first.ids, second.ids, first.scored, second.scored)
    if not _differs_where_scored(pair):
        return "prompts differ"
    if len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) <= max_length:
        return pair
    if truncation == "prompt_start":
        return _cut_prompt(pair, max_length, tokenizer.bos_id)
    return _cut_responses(pair, max_length) if truncation == "response_end" else "too long"


def _ignores_tools(
    prompt: tuple[Message, ...], responses: Sequence[tuple[Message, ...]], tokenizer: Tokenizer, *, tools: str
) -> bool:
    """Whether the chat template writes the same without the tools, without a turn's calls, or without a tool's turn."""

    def write(messages: Sequence[Message], *, tools: str, begins: bool = False) -> str | None:
        return tokenizer.render_chat(messages, add_generation_prompt=begins, tools=tools)

    if tools and write(prompt, tools=tools, begins=True) == write(prompt, tools="", begins=True):
        return True
    for response in responses:
        whole = (*prompt, *response)
        for place, message in enumerate(whole):
            if message.role == "tool":
                less: tuple[Message, ...] = ()
            elif "tool_calls" in message.details:
                less = (replace(message, details=""),)
            else:
                continue
            if write(whole, tools=tools) == write((*whole[:place], *less, *whole[place + 1 :]), tools=tools):
                return True
    return False


class _Part(NamedTuple):
    text: str
    is_scored: bool


class _Response(NamedTuple):
    ids: list[int]
    scored: Mask | None


def _render(
    prompt: Sequence[Message], responses: Sequence[tuple[Message, ...]], tokenizer: Tokenizer, *, tools: str
) -> tuple[str, list[list[_Part]]] | None:
    """Returns the prompt's text and what each response adds to it, None where the template refuses the conversation."""
    if not tokenizer.has_chat_template:
        raise UserError(
            f"the data holds messages and the tokenizer {tokenizer.name} has no chat template; set model.tokenizer "
            "to one that has, or write prompt, chosen and rejected as plain strings"
        )
    start = tokenizer.render_chat(prompt, add_generation_prompt=True, tools=tools)
    if start is None:
        return None
    continuations = []
    for response in responses:
        written, parts = start, list[_Part]()
        for place, message in enumerate(response):
            if message.role != "assistant":
                continue
            # What leads to the turn, which the start does for the first one, and then the turn.
            for end, is_scored in ((place, False), (place + 1, True)) if place else ((1, True),):
                whole = tokenizer.render_chat(
                    [*prompt, *response[:end]], add_generation_prompt=not is_scored, tools=tools
                )
                if whole is None:
                    return None
                if not whole.startswith(written):
                    raise UserError(_how_it_rewrites(written, whole, tokenizer))
                parts.append(_Part(whole[len(written) :], is_scored))
                written = whole
        continuations.append(parts)
    return start, continuations


def _how_it_rewrites(start: str, whole: str, tokenizer: Tokenizer) -> str:
    same = next((i for i, (a, b) in enumerate(zip(start, whole, strict=False)) if a != b), min(len(start), len(whole)))
    return (
        f"the chat template of {tokenizer.name} rewrites a prompt once its response follows: after {same} characters "
        f"{start[same : same + 40]!r} becomes {whole[same : same + 40]!r}; use a template that only appends to earlier "
        "turns, or write prompt, chosen and rejected as plain strings"
    )


def _encode(response: Sequence[_Part], tokenizer: Tokenizer) -> _Response:
    ids, scored, behind = list[int](), list[bool](), ""
    for part in response:
        text, behind = behind + part.text, ""
        some = tokenizer.encode_rendered(text.rstrip() if part.is_scored else text, begins=False)
        if part.is_scored and some[-1:] == [tokenizer.eos_id]:
            # ChatML writes a newline behind its end marker, which a model that stops at EOS never says.
            behind = text[len(text.rstrip()) :]
        elif part.is_scored:
            some = tokenizer.encode_rendered(text, begins=False)
        ids += some
        scored += [part.is_scored] * len(some)
    return _Response(ids, tuple(scored) if len(response) > 1 else None)


def _ended_once(response: _Response, eos_id: int) -> _Response:
    end = len(response.ids)
    while end and response.ids[end - 1] == eos_id:
        end -= 1
    return _Response([*response.ids[:end], eos_id], response.scored and (*response.scored[:end], True))


def _differs_where_scored(pair: TokenizedPair) -> bool:
    """Whether the first token that tells the responses apart is scored on one side at least."""
    if pair.chosen_scored is pair.rejected_scored is None:
        return pair.chosen_ids != pair.rejected_ids
    both = list(zip(pair.chosen_ids, pair.rejected_ids, strict=False))
    place = next((place for place, (one, other) in enumerate(both) if one != other), len(both))
    sides = ((pair.chosen_ids, pair.chosen_scored), (pair.rejected_ids, pair.rejected_scored))
    return any(place < len(ids) and (scored is None or scored[place]) for ids, scored in sides)


def _cut_prompt(pair: TokenizedPair, max_length: int, bos_id: int | None) -> TokenizedPair | DropReason:
    # Models are trained with their BOS first, so without it every log-prob of the pair would be off.
    kept = pair.prompt_ids[:1] if pair.prompt_ids[0] == bos_id else ()
    room = max_length - max(len(pair.chosen_ids), len(pair.rejected_ids)) - len(kept)
    if room <= 0:
        return "too long"
    return _renamed(replace(pair, prompt_ids=kept + pair.prompt_ids[-room:]))


def _cut_responses(pair: TokenizedPair, max_length: int) -> TokenizedPair | DropReason:
    room = max(0, max_length - len(pair.prompt_ids))
    cut = _renamed(pair.shortened(room))
    # What is left must differ somewhere: the same tokens on both sides have a loss and no gradient.
    return cut if _differs_where_scored(cut) else "too long"


def _renamed(pair: TokenizedPair) -> TokenizedPair:
    return TokenizedPair.of(
        pair.prompt_ids, pair.chosen_ids, pair.rejected_ids, pair.chosen_scored, pair.rejected_scored
    )
