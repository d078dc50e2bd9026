"""From a row's cell to plain text or to the messages of a conversation, in each of the shapes that data sets use."""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeGuard

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}
"""What ShareGPT calls a turn's speaker, and what chat templates call it."""
_DETAILS = ("tool_calls", "tool_call_id", "name")
"""What chat templates are told of a turn beside its role and content."""
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: ``user``, ``assistant``, ``system``, ``tool`` or whatever else the chat template knows.
        content: its text.
        details: ``tool_calls``, ``tool_call_id`` and ``name``, those that it has, as a JSON object; empty for none.
    """

    role: str
    content: str
    details: str = ""


Text = str | tuple[Message, ...]
"""Plain text, or the turns of a conversation."""


def text_of(cell: object) -> Text | None:
    """Returns a cell as text or messages, None if it is neither."""
    if isinstance(cell, str):
        return cell if is_text(cell) else None
    turns = [cell] if isinstance(cell, Mapping) else cell
    if not isinstance(turns, list) or not turns:
        return None
    messages = [_message(turn) for turn in turns]
    return None if None in messages else tuple(message for message in messages if message)


def _message(turn: object) -> Message | None:
    if not isinstance(turn, Mapping):
        return None
    role, content = turn.get("role"), turn.get("content")
    details = {name: turn[name] for name in _DETAILS if turn.get(name)}
    if role is None:  # ShareGPT
        role, content = _ROLES.get(str(turn.get("from"))), turn.get("value")
        if turn.get("from") == "function_call":
            role, content, details = "assistant", None, {"tool_calls": content}
    if "tool_calls" in details:
        details["tool_calls"] = _calls(details["tool_calls"])
        if details["tool_calls"] is None:
            return None
        content = "" if content is None else content
    if isinstance(content, list):
        content = _joined(content)
    written = json.dumps(details, ensure_ascii=False, default=str) if details else ""
    return Message(role, content, written) if isinstance(role, str) and is_text(content) and is_text(written) else None


def _calls(calls: object) -> list[object] | None:
    """Returns tool calls as chat templates expect them, ``{"function": {"name": ..., "arguments": {...}}}``."""
    if isinstance(calls, str):
        calls = _of_json(calls)
    found: list[object] = []
    for call in [calls] if isinstance(calls, Mapping) else calls if isinstance(calls, list) else []:
        function = (call.get("function") or call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            return None
        arguments = function.get("arguments")
        decoded = _of_json(arguments) if isinstance(arguments, str) else arguments
        function = {**function, "arguments": decoded if isinstance(decoded, Mapping) else arguments}
        found.append({"type": "function", **(call if "function" in call else {}), "function": function})
    return found or None


def tools_of(cell: object) -> str | None:
    """Returns tools as a JSON list, empty for none; None if they are something else."""
    if cell is None or cell == [] or (isinstance(cell, str) and cell.strip() in ("", "[]")):
        return ""
    tools = _of_json(cell) if isinstance(cell, str) else cell
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        return None
    written = json.dumps(tools, ensure_ascii=False, default=str)
    return written if is_text(written) else None


def _of_json(text: str) -> object:
    with suppress(ValueError, RecursionError):
        return json.loads(text)
    return None


def is_text(cell: object) -> TypeGuard[str]:
    """Whether it is a string that a tokenizer can take."""
    # Half of a surrogate pair is no character: it has no UTF-8 and no tokens.
    return isinstance(cell, str) and not _SURROGATE.search(cell)


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


def is_blank(text: Text) -> bool:
    """Whether there is nothing in it, or in one of the assistant's turns, that could be scored."""
    if isinstance(text, str):
        return not text.strip()
    return any(
        not message.content.strip() and "tool_calls" not in message.details
        for message in text
        if message.role == "assistant"
    )
