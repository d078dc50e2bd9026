"""From a row of a data set to a preference.

The last place that sees a column's name: whatever shape a row has, a prompt and two responses leave here. No token, no
length and no order may enter.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Literal

from dpo_ds.data.messages import Message, Text, is_blank, is_text, text_of, tools_of
from dpo_ds.errors import UserError

DropReason = Literal[
    "empty prompt",
    "empty response",
    "fewer than two answers",
    "identical responses",
    "label not understood",
    "not text",
    "prompts differ",
    "tie",
    "tools not understood",
    "weight not above 0",
    "tools ignored",
    "refused by the chat template",
    "too long",
]
"""Why a row cannot be used. The last three are found when it is tokenized, the first where it has no token.

Tools are ignored by a chat template that writes the same without them, and by a plain prompt, which meets no template.
"""

Scored = Literal["last_turn", "all_assistant_turns"]
"""Which turns of a conversation are a response; ``read_preferences`` has the rule."""

Columns = Mapping[str, str | list[str]]
"""Our names of a row's columns, and the row's own."""

_NUMBERS: Mapping[str, tuple[Callable[[float], bool], DropReason]] = {
    "probability": (lambda value: 0 <= value <= 1, "label not understood"),
    "margin": (lambda value: True, "label not understood"),
    "weight": (lambda value: value > 0, "weight not above 0"),
}
"""Columns with a number for a pair: which ones make sense, and why a row with another is dropped."""
_ONLY_IF_NAMED = ("tools", *_NUMBERS)
"""Columns that change what a pair says although rows without them are whole: the run file has to ask for them."""
_COLUMNS = ("prompt", "chosen", "rejected", "output_1", "output_2", "label", "answers", *_ONLY_IF_NAMED)
_PAIR = ("chosen", "rejected")
_LABELLED = ("prompt", "output_1", "output_2", "label")
_RANKED = ("prompt", "answers")
_OF_SEVERAL_COLUMNS = ("prompt", "label")
_LAST_ASSISTANT_TURN = "\n\nAssistant:"
_VOTES = {"1": 1, "a": 1, "model_a": 1, "output_1": 1, "2": 2, "b": 2, "model_b": 2, "output_2": 2, "0": 0, "tie": 0}
_ANSWER_KEYS = ("answer", "response", "completion", "text")
_GOODNESS = {"rank": -1, "score": 1, "overall_score": 1}
"""Keys that order answers, with the sign that makes more of it better."""


@dataclass(frozen=True)
class Preference:
    """A prompt and two responses, of which the first was preferred; all three strings, or all three messages.

    Attributes:
        prompt: plain text, or the turns before the response.
        chosen: plain text, or messages, of which the first and the last are the assistant's and are scored with any
            other of the assistant's; those between were written by others.
        rejected: the same kind as ``chosen``.
        tools: what the assistant may call, as a JSON list; empty for nothing.
        probability: that the chosen response is the better one; None: no soft label.
        margin: by how much its reward has to be the larger; None: by nothing.
        weight: factor of the pair's loss; None: 1.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    tools: str = ""
    probability: float | None = None
    margin: float | None = None
    weight: float | None = None


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Attributes:
        path: a ``.json``, ``.jsonl``, ``.parquet``, ``.csv`` or ``.arrow`` file, the first two and CSV also with
            ``.gz`` or ``.zst`` behind, a glob or a folder of them, or a hub id.
        split: the part of a folder or hub data set; a single file has only ``train``.
        columns: what this source calls ``prompt``, ``chosen``, ``rejected``, ``output_1``, ``output_2``, ``label`` and
            ``answers``, where it names them otherwise; ``prompt`` and ``label`` may be several columns. ``tools``,
            ``probability``, ``margin`` and ``weight`` are read only where they are named here.

    Raises:
        UserError: ``columns`` has another key, or several columns for one of the others.
    """

    path: str
    split: str = "train"
    columns: Columns = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name, named in self.columns.items():
            if name not in _COLUMNS:
                raise UserError(f"columns of {self.path} names {name!r}, expected one of {', '.join(_COLUMNS)}")
            if not isinstance(named, str) and name not in _OF_SEVERAL_COLUMNS:
                raise UserError(f"columns.{name} of {self.path} must be one column, got {named}")


def read_preferences(
    row: Mapping[str, object], *, columns: Columns, where: str, scored: Scored = "last_turn"
) -> list[Preference | DropReason]:
    """Returns the preferences that a row holds, and why others cannot be used; at least one of either.

    A row is one of:

    * ``prompt``, ``chosen`` and ``rejected``. Without ``prompt`` it is the turns in ``conversations`` (with those of
      ``system`` before them), or what both conversations (or both ``Human:``/``Assistant:`` transcripts) say before
      their last turn. A response that is a whole conversation is reduced to its last message.
    * ``prompt``, ``output_1``, ``output_2`` and ``label``: 1 or ``a`` where the first is better, 2 or ``b`` where the
      second is, 0 or ``tie``. Several labels are votes: more than half of those cast decide, else it is a tie.
    * ``prompt`` and ``answers``: a list, best first unless each has a ``rank`` (1 is best) or a ``score``. Every answer
      is paired with every worse one (Ouyang et al. 2022, section 3.5, arXiv:2203.02155); equal ones are ties.

    Any of them may have ``tools``, a list or its JSON, for the chat template. Tool calls belong to their message, as
    ``tool_calls`` or as a turn from ``function_call``; arguments that are the JSON of an object become that object,
    which is what templates expect.

    What changes a pair's loss has to be named in ``columns``, and then stands in every row, as a number or its text:
    ``probability`` in [0, 1] that ``chosen`` or ``output_1`` is the better one, in place of ``label`` and with 0.5 for
    a tie; ``margin``, any number; ``weight`` above 0. Ranked answers take a weight, for each of their pairs.

    The two sides of a row are one prompt and two responses. With ``last_turn`` a response is the last turn, and all
    before it must be the same on both sides. With ``all_assistant_turns`` the prompt is the turns that both sides begin
    with, and the response all behind them, of which the assistant's turns are scored and the others are given, as in
    M-DPO, Xiong et al. 2024, arXiv:2409.02392. The assistant's turns within the prompt need no score: the same
    tokens behind the same tokens add as much to both sides, and their difference is what a loss sees. Both sides must
    first differ in a turn of the assistant's, else their prompts differ. Plain text has no turns, transcripts included:
    there a response is the last one.

    Args:
        row: cells by column.
        columns: the row's own names of our columns, where they differ. Texts of several prompt columns are joined by
            an empty line, blank ones left out.
        where: file and row, for messages.
        scored: which turns of a conversation are the response.

    Raises:
        UserError: a column is missing, the row is unpaired data, or ranks answers and has a probability or margin.
    """
    cells = _cells(row, columns, where)
    tools = tools_of(cells.get("tools"))
    if tools is None:
        return ["tools not understood"]
    numbers: dict[str, float] = {}
    for name, (makes_sense, otherwise) in _NUMBERS.items():
        if name in cells:
            value = _number(cells[name])
            if value is None or not makes_sense(value):
                return [otherwise]
            cells[name] = numbers[name] = value
    if numbers.get("probability") == 0.5:
        return ["tie"]
    found = _pairs_of(row, cells, columns, where, scored)
    if not tools and not numbers:
        return found
    if _needed(cells, columns) == _LABELLED and "probability" in numbers:  # of the first output
        numbers["probability"] = max(numbers["probability"], 1 - numbers["probability"])
    probability, margin, weight = map(numbers.get, _NUMBERS)
    return [
        replace(pair, tools=tools, probability=probability, margin=margin, weight=weight)
        if isinstance(pair, Preference)
        else pair
        for pair in found
    ]


def _pairs_of(
    row: Mapping[str, object], cells: Mapping[str, object], columns: Columns, where: str, scored: Scored
) -> list[Preference | DropReason]:
    needed = _needed(cells, columns)
    if needed == _PAIR and "chosen" not in cells and "rejected" not in cells and _is_unpaired(row):
        raise UserError(
            f"{where} is unpaired data ({', '.join(row)}): one answer and a true/false label, as for KTO; DPO needs "
            "two answers to the same prompt in each row, chosen and rejected"
        )
    for name in needed:
        if name not in cells and not (name == "label" and "probability" in cells):
            raise _missing(name, row, columns, where)
    if needed == _RANKED:
        if named := [name for name in ("probability", "margin") if name in cells]:
            raise UserError(
                f"{where} ranks answers, whose pairs cannot share one {named[0]}; take columns.{named[0]} out, or "
                "write each pair as a row"
            )
        return _ranked(text_of(cells["prompt"]), cells["answers"], scored)
    if needed == _LABELLED:
        soft = cells.get("probability")
        winner = _winner(cells["label"]) if not isinstance(soft, float) else 1 if soft > 0.5 else 2
        if winner not in (1, 2):
            return ["label not understood" if winner is None else "tie"]
        outputs = [text_of(cells[name]) for name in ("output_1", "output_2")]
        return [_paired(text_of(cells["prompt"]), outputs[winner - 1], outputs[2 - winner], scored)]
    chosen, rejected = text_of(cells["chosen"]), text_of(cells["rejected"])
    if "prompt" in cells:
        return [_paired(text_of(cells["prompt"]), chosen, rejected, scored)]
    if chosen is None or rejected is None:
        return ["not text"]
    if _is_answer(chosen) and _is_answer(rejected):
        if "conversations" not in row:
            raise _missing("prompt", row, columns, where)
        return [_paired(text_of(_with_system(row)), chosen, rejected, scored)]
    return [_checked(_split(chosen, rejected, scored))]


def _needed(cells: Mapping[str, object], columns: Columns) -> tuple[str, ...]:
    """Returns the cells that a row of this shape must have: the shape that the run file names, else the row's own."""
    for given in (columns, cells):
        for shape in (_PAIR, _LABELLED, _RANKED):
            # A prompt belongs to every shape, and a label may stand beside any.
            if not given.keys().isdisjoint(set(shape) - {"prompt", "label"}):
                return shape
    return _PAIR


def _cells(row: Mapping[str, object], columns: Columns, where: str) -> dict[str, object]:
    """Returns a row's cells under our names."""
    cells: dict[str, object] = {}
    for name in _COLUMNS:
        named = columns.get(name, name)
        if not isinstance(named, str):
            if absent := [column for column in named if column not in row]:
                raise _missing(name, row, {name: absent[0]}, where)
            values = [row[column] for column in named]
            cells[name] = _joined_by_an_empty_line(values) if name == "prompt" else values
        elif named in row and (name in columns or name not in _ONLY_IF_NAMED):
            cells[name] = row[named]
        elif name in columns:
            raise _missing(name, row, columns, where)
    return cells


def _joined_by_an_empty_line(cells: Sequence[object]) -> str | None:
    given = [cell for cell in cells if cell is not None]
    texts = [cell for cell in given if is_text(cell)]
    return "\n\n".join(text for text in texts if text.strip()) if len(texts) == len(given) else None


def _is_unpaired(row: Mapping[str, object]) -> bool:
    labels = [row[name] for name in ("label", "kto_tag") if name in row]
    return any(isinstance(label, bool) or str(label).lower() in ("true", "false") for label in labels)


def _is_answer(text: Text) -> bool:
    """Whether it has no prompt within."""
    return _LAST_ASSISTANT_TURN not in text if isinstance(text, str) else len(text) == 1


def _with_system(row: Mapping[str, object]) -> object:
    turns, system = row["conversations"], row.get("system")
    if isinstance(turns, list) and isinstance(system, str) and system.strip():
        return [{"role": "system", "content": system}, *turns]
    return turns


def _winner(label: object) -> int | None:
    """Returns 1 or 2 for the better output, 0 for a tie, None where that cannot be said."""
    votes = [vote for vote in (label if isinstance(label, list) else [label]) if vote is not None and vote != ""]
    counted = [None if isinstance(vote, bool) else _VOTES.get(_as_text(vote)) for vote in votes]
    if not counted or None in counted:
        return None
    return next((output for output in (1, 2) if 2 * counted.count(output) > len(counted)), 0)


def _number(cell: object) -> float | None:
    if isinstance(cell, bool) or not isinstance(cell, int | float | str):
        return None
    with suppress(ValueError, OverflowError):
        return value if math.isfinite(value := float(cell)) else None
    return None


def _as_text(vote: object) -> str:
    return f"{vote:g}" if isinstance(vote, float) else str(vote).strip().lower()


def _ranked(prompt: Text | None, answers: object, scored: Scored) -> list[Preference | DropReason]:
    if not isinstance(answers, list) or len(answers) < 2:
        return ["fewer than two answers" if isinstance(answers, list) else "not text"]
    order = next(
        (key for key in _GOODNESS if isinstance(answers[0], Mapping) and answers[0].get(key) is not None), None
    )
    goodness: list[float] = []
    for place, answer in enumerate(answers):
        value = -place if order is None else _number(answer.get(order) if isinstance(answer, Mapping) else None)
        if value is None:
            return ["label not understood"]
        goodness.append(value if order is None else value * _GOODNESS[order])
    best_first = sorted(range(len(answers)), key=lambda place: -goodness[place])
    return [
        "tie"
        if goodness[better] == goodness[worse]
        else _paired(prompt, _answer(answers[better]), _answer(answers[worse]), scored)
        for better, worse in combinations(best_first, 2)
    ]


def _answer(answer: object) -> Text | None:
    if isinstance(answer, Mapping):
        key = next((key for key in _ANSWER_KEYS if answer.get(key) is not None), None)
        return text_of(answer if key is None else answer[key])
    return text_of(answer)


def _paired(prompt: Text | None, chosen: Text | None, rejected: Text | None, scored: Scored) -> Preference | DropReason:
    """Returns the preference of a prompt and two answers, either of which may be a whole conversation."""
    match prompt, chosen, rejected:
        case str(), str(), str():
            return _checked(Preference(prompt, chosen, rejected))
        case tuple(), str(), str():
            return _paired(prompt, (Message("assistant", chosen),), (Message("assistant", rejected),), scored)
        case ((str() | tuple()), tuple(), tuple()):
            return _checked(_split_conversations(prompt, chosen, rejected, scored))
    return "not text"


def _split(chosen: Text, rejected: Text, scored: Scored) -> Preference | DropReason:
    """Returns the preference of two transcripts or conversations, whose prompt is what they share."""
    match chosen, rejected:
        case str(), str():
            return _split_transcripts(chosen, rejected)
        case tuple(), tuple():
            return _split_conversations(None, chosen, rejected, scored)
    return "not text"


def _checked(found: Preference | DropReason) -> Preference | DropReason:
    if not isinstance(found, Preference):
        return found
    if is_blank(found.chosen) or is_blank(found.rejected):
        return "empty response"
    return "identical responses" if found.chosen == found.rejected else found


def _missing(name: str, row: Mapping[str, object], columns: Columns, where: str) -> UserError:
    return UserError(
        f"{where} has no column {columns.get(name, name)!r}, only {', '.join(row)}; a row needs prompt, chosen and "
        "rejected, or chosen and rejected as whole conversations, or prompt, output_1, output_2 and label, or prompt "
        "and answers; columns of other names are given in data.train as "
        f"[{{path: FILE, columns: {{{name}: ITS_NAME}}}}]"
    )


def _split_transcripts(chosen: str, rejected: str) -> Preference | DropReason:
    prompt, marker, chosen_response = chosen.rpartition(_LAST_ASSISTANT_TURN)
    rejected_prompt, _, rejected_response = rejected.rpartition(_LAST_ASSISTANT_TURN)
    if prompt != rejected_prompt:
        return "prompts differ"
    return Preference(prompt + marker, chosen_response, rejected_response)


def _split_conversations(
    prompt: Text | None, chosen: tuple[Message, ...], rejected: tuple[Message, ...], scored: Scored
) -> Preference | DropReason:
    if len(chosen) > 1 or len(rejected) > 1:
        if scored == "last_turn":
            shared = max(len(chosen), len(rejected)) - 1
        else:
            if isinstance(prompt, tuple) and chosen[: len(prompt)] != prompt:  # they go on where it ends
                chosen, rejected = prompt + chosen, prompt + rejected
            shared = _shared(chosen, rejected)
        before, chosen, after = chosen[:shared], chosen[shared:], rejected[shared:]
        # Beside whole conversations a prompt column repeats their beginning, or one of its messages.
        repeated = before if scored == "last_turn" else before[: len(prompt or ())]
        agrees = prompt in (None, repeated) or any(message.content == prompt for message in before)
        if not before or before != rejected[:shared] or not agrees:
            return "prompts differ"
        # What another than the assistant says is no matter of preference.
        if scored == "all_assistant_turns" and not chosen[0].role == after[0].role == "assistant":
            return "prompts differ"
        prompt, rejected = before, after
    if not isinstance(prompt, tuple) or prompt[-1].role == "assistant":
        return "not text"
    if chosen[-1].role != "assistant" or rejected[-1].role != "assistant":
        return "not text"
    return Preference(prompt, chosen, rejected)


def _shared(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> int:
    """Returns how many messages both begin with, where each keeps one at least."""
    shared = 0
    while shared + 1 < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    return shared
