"""A row with `messages`: the turns, and what else transformers gives a chat template, `tools` and `documents`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jpeft.strict_json import parse_json_object
from jpeft_interop.data.errors import DataError
from jpeft_interop.data.records import Conversation, Json, Message

LISTS = ("tools", "documents")  # of objects, each also as the text of its JSON
EMPTY: tuple[Any, ...] = (None, "", [], {})


def conversation(row: Mapping[str, Any], where: str) -> Conversation:
    """Make a conversation of a row.

    Raises:
      DataError: `messages`, `tools` or `documents` is none, or a message is broken; names file, line and message.
    """
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: expected `messages`, a list of at least one; found {messages!r:.60}")
    turns = tuple(_message(message, f"{where}, message {number}") for number, message in enumerate(messages, 1))
    tools, documents = (_objects(name, row.get(name), where) for name in LISTS)
    return Conversation(turns, where, tools, documents, unused(row, "messages", *LISTS))


def unused(row: Mapping[str, Any], *used: str) -> tuple[str, ...]:
    """Name the fields of a row that hold something and are not among those that are used."""
    return tuple(name for name, value in row.items() if name not in used and value not in EMPTY)


def _objects(name: str, value: Any, where: str) -> Json:
    """Check a list of objects, or the text of one, and give its text; `null` if there is none."""
    found = _parsed(name, value, where) if isinstance(value, str) else value
    if found is not None and not (isinstance(found, list) and all(isinstance(one, dict) for one in found)):
        raise DataError(f"{where}: expected `{name}`, a list of objects or the JSON of one; found {value!r:.60}")
    return json.dumps(found, ensure_ascii=False)


def _parsed(name: str, text: str, where: str) -> Any:
    found = parse_json_object(f'{{"{name}": {text}}}'.encode(), f"{where}, the JSON in `{name}`", DataError)
    if len(found) != 1:
        raise DataError(f"{where}: expected `{name}`, a list of objects or the JSON of one; found {text!r:.60}")
    return found[name]


def _message(message: Any, where: str) -> Message:
    fields = message if isinstance(message, dict) else {}
    role, content = fields.get("role"), fields.get("content")
    if not isinstance(role, str):
        raise DataError(f"{where}: expected an object with a string `role` and `content`; found {message!r:.60}")
    calls = _objects("tool_calls", fields.get("tool_calls"), where)
    if content is None and calls in ("null", "[]"):
        raise DataError(f"{where}: expected `content`, or null beside `tool_calls`; found {message!r:.60}")
    rest = _rest(fields, calls)
    if not isinstance(content, list):
        return Message(role, _said(content, where), rest)
    odd = sorted({f"content[].{name}" for part in content for name in _others(part)})
    return Message(role, tuple(_part(part, where) for part in content), rest, tuple(odd))


def _rest(fields: Mapping[str, Any], calls: Json) -> Json:
    """Give what a turn holds beside role and content; those two as null where they are not the first."""
    rest = {name: None if name in ("role", "content") else value for name, value in fields.items()}
    if "tool_calls" in fields:
        rest["tool_calls"] = json.loads(calls)
    if list(fields)[:2] == ["role", "content"]:
        rest = {name: value for name, value in rest.items() if name not in ("role", "content")}
    return json.dumps(rest, ensure_ascii=False)


def _said(content: Any, where: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    raise DataError(f"{where}: expected `content`, a string or a list of text parts; found {content!r:.60}")


def _part(part: Any, where: str) -> str:
    """Give the text of a part; pictures and sounds are nothing that a language model learns here."""
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise DataError(
        f'{where}: expected `content` of text alone, parts like {{"type": "text", "text": "…"}}; found {part!r:.60}'
    )


def _others(part: Any) -> tuple[str, ...]:
    return unused(part, "type", "text") if isinstance(part, dict) else ()
