"""From a row of a data set to a preference.

The last place that sees a column's name: whatever shape a row has, a prompt and two responses leave here. No token, no
length and no order may enter.
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dpo_ds.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

DropReason = Literal[
    "empty prompt",
    "empty response",
    "identical responses",
    "prompts differ",
    "not text",
    "refused by the chat template",
    "too long",
]
"""Why a row cannot be used. The last two are found when it is tokenized, the first where it has no token."""

_COLUMNS = ("prompt", "chosen", "rejected")
_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_LAST_ASSISTANT_TURN = "\n\nAssistant:"


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: ``user``, ``assistant``, ``system`` or whatever else the chat template knows.
        content: its text.
    """

    role: str
    content: str


Text = str | tuple[Message, ...]


@dataclass(frozen=True)
class Preference:
    """A prompt and two responses, of which the first was preferred; all three strings, or all three messages.

    Attributes:
        prompt: plain text, or the turns before the response.
        chosen: plain text, or the assistant's one message.
        rejected: the same kind as ``chosen``.
    """

    prompt: Text
    chosen: Text
    rejected: Text


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Attributes:
        path: a ``.json``, ``.jsonl``, ``.parquet``, ``.csv`` or ``.arrow`` file, a folder of them, or a hub id.
        split: the part of a folder or hub data set; a single file has only ``train``.
        columns: what this source calls ``prompt``, ``chosen`` and ``rejected``, where it names them otherwise.
        weight: the source's share among several; None or 1.

    Raises:
        UserError: ``columns`` has another key.
    """

    path: str
    split: str = "train"
    columns: Mapping[str, str] = field(default_factory=dict, hash=False)
    weight: float | None = None

    def __post_init__(self) -> None:
        for name in self.columns:
            if name not in _COLUMNS:
                raise UserError(f"columns of {self.path} names {name!r}, expected one of {', '.join(_COLUMNS)}")


def read_preference(row: Mapping[str, object], *, columns: Mapping[str, str], where: str) -> Preference | DropReason:
    """Returns the preference that a row holds, or why it cannot be used.

    The prompt has its own column, or is what both conversations (or both ``Human:``/``Assistant:`` transcripts) say
    before their last turn. A response that is a whole conversation is reduced to its last message.

    Args:
        row: cells by column.
        columns: the row's own names of ``prompt``, ``chosen`` and ``rejected``, where they differ.
        where: file and row, for messages.

    Raises:
        UserError: a column is missing.
    """
    cells = {name: row[column] for name in _COLUMNS if (column := columns.get(name, name)) in row}
    for name in ("chosen", "rejected", *(["prompt"] if "prompt" in columns else [])):
        if name not in cells:
            raise _missing(name, row, columns, where)
    texts = {name: _text(cell) for name, cell in cells.items()}
    if None in texts.values():
        return "not text"
    match texts.get("prompt"), texts["chosen"], texts["rejected"]:
        case None, str(chosen), str(rejected):
            if _LAST_ASSISTANT_TURN not in chosen and _LAST_ASSISTANT_TURN not in rejected:
                raise _missing("prompt", row, columns, where)
            found = _split_transcripts(chosen, rejected)
        case str(prompt), str(chosen), str(rejected):
            found = Preference(prompt, chosen, rejected)
        case None, (Message(),), (Message(),):
            raise _missing("prompt", row, columns, where)
        case prompt, tuple(chosen), tuple(rejected):
            found = _split_conversations(prompt, chosen, rejected)
        case _:
            return "not text"
    if not isinstance(found, Preference):
        return found
    if _is_blank(found.chosen) or _is_blank(found.rejected):
        return "empty response"
    return "identical responses" if found.chosen == found.rejected else found


def load_rows(source: Source) -> "Dataset":
    """Opens a source's rows, memory-mapped, without printing anything.

    Raises:
        UserError: the source is missing, empty or broken, or has no such split.
    """
    from datasets import load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError

    path = Path(source.path)
    builder = _BUILDERS.get(path.suffix)
    if not path.exists() and (builder or not _HUB_ID.fullmatch(source.path)):
        raise UserError(f"the data file {path} does not exist; name a file, a folder or a hub id in data")
    if path.is_file() and builder is None:
        raise UserError(
            f"the data file {path} must be one of {', '.join(_BUILDERS)}; convert it, or rename it if it is"
        )
    try:
        with _quiet():
            if path.is_file():
                # A CSV's cells are text: the answers "NA" and "None" are no missing values.
                options = {"keep_default_na": False} if builder == "csv" else {}
                rows = load_dataset(builder, data_files=source.path, split=source.split, **options)
            elif (path / "dataset_dict.json").exists():
                rows = load_from_disk(source.path)[source.split]
            elif (path / "state.json").exists():
                rows = load_from_disk(source.path)
            else:
                rows = load_dataset(source.path, split=source.split)
        # Bytes that are not UTF-8 would otherwise be noticed in the middle of the rows.
        rows.data.validate(full=True)
    except (DatasetsError, OSError, ValueError, KeyError, StopIteration) as error:
        raise UserError(_why_unreadable(source, error)) from error
    if len(rows) == 0:
        raise UserError(f"the data set {source.path} has no rows")
    return rows


@contextmanager
def _quiet() -> Iterator[None]:
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    verbosity, had_bars = logging.get_verbosity(), not are_progress_bars_disabled()
    # Its loggers tell of an error before raising it, which would make two lines of one.
    logging.set_verbosity(logging.CRITICAL)
    disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            enable_progress_bars()


def _why_unreadable(source: Source, error: Exception) -> str:
    path = Path(source.path)
    if isinstance(error, StopIteration) or "corresponds to no data" in str(error):
        return f"the data set {source.path} has no rows"
    if path.is_file() and _BUILDERS[path.suffix] == "json" and (fault := _json_fault(path)):
        return f"the data file {source.path} is not valid JSON: {fault}; mend or remove it"
    cause = error.__cause__ or error
    why = " ".join(str(cause).split())[:300] or type(cause).__name__
    return f"the data set {source.path} (split {source.split!r}) cannot be read: {why}"


def _json_fault(path: Path) -> str | None:
    """Returns where and why a .json or .jsonl file does not parse, None if it does."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        return f"byte {error.start} is not UTF-8"
    is_one_value = text.lstrip().startswith("[")
    for number, part in enumerate([text] if is_one_value else text.split("\n"), start=1):
        try:
            if part.strip():
                json.loads(part)
        except json.JSONDecodeError as error:
            return f"line {error.lineno if is_one_value else number}, column {error.colno}: {error.msg}"
    return None


def _missing(name: str, row: Mapping[str, object], columns: Mapping[str, str], where: str) -> UserError:
    return UserError(
        f"{where} has no column {columns.get(name, name)!r}, only {', '.join(row)}; a row needs prompt, chosen and "
        "rejected, or chosen and rejected as whole conversations; columns of other names are given in data.train as "
        f"[{{path: FILE, columns: {{{name}: ITS_NAME}}}}]"
    )


def _text(cell: object) -> Text | None:
    """Returns a cell as text or messages, None if it is neither."""
    if isinstance(cell, str):
        return cell
    turns = [cell] if isinstance(cell, Mapping) else cell
    if not isinstance(turns, list) or not turns:
        return None
    messages = [_message(turn) for turn in turns]
    return None if None in messages else tuple(message for message in messages if message)


def _message(turn: object) -> Message | None:
    # A turn that calls tools says more than its text, and would be falsified by keeping only that.
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str) or turn.get("tool_calls"):
        return None
    content = turn.get("content")
    if isinstance(content, list):
        content = _joined(content)
    return Message(turn["role"], content) if isinstance(content, str) else None


def _joined(parts: list[object]) -> str | None:
    """Returns typed content, ``[{"type": "text", "text": ...}, ...]``, as one string, None if any part is no text."""
    texts = []
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            return None
        text = part["value"] if isinstance(part.get("value"), str) else part.get("text")
        if not isinstance(text, str):
            return None
        texts.append(text)
    return "".join(texts)


def _split_transcripts(chosen: str, rejected: str) -> Preference | DropReason:
    prompt, marker, chosen_response = chosen.rpartition(_LAST_ASSISTANT_TURN)
    rejected_prompt, _, rejected_response = rejected.rpartition(_LAST_ASSISTANT_TURN)
    if prompt != rejected_prompt:
        return "prompts differ"
    return Preference(prompt + marker, chosen_response, rejected_response)


def _split_conversations(
    prompt: Text | None, chosen: tuple[Message, ...], rejected: tuple[Message, ...]
) -> Preference | DropReason:
    if len(chosen) > 1 or len(rejected) > 1:
        before = chosen[:-1]
        # Beside whole conversations a prompt column repeats their beginning, or one of its messages.
        agrees = prompt is None or prompt == before or any(message.content == prompt for message in before)
        if before != rejected[:-1] or not agrees:
            return "prompts differ"
        prompt = before
    if not isinstance(prompt, tuple) or prompt[-1].role == "assistant":
        return "not text"
    if chosen[-1].role != "assistant" or rejected[-1].role != "assistant":
        return "not text"
    return Preference(prompt, chosen[-1:], rejected[-1:])


def _is_blank(text: Text) -> bool:
    return not (text if isinstance(text, str) else text[-1].content).strip()
