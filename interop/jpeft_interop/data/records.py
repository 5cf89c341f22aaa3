"""What a file of examples holds: documents, conversations, labelled texts, each with the place it came from.

Records are frozen, and so is all that they hold: they are compared, hashed and pickled. What may be any JSON is kept as
its text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

Label = str | int
Json = str  # the text of a JSON value


@dataclass(frozen=True)
class Document:
    """A text to go on writing.

    Attributes:
      text: what it says.
      where: the place it came from, as `file:line`.
      unused: the row's other fields, which nothing uses.
    """

    text: str
    where: str
    unused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
      role: whose turn.
      content: what is said; None in a turn that only calls tools, several texts where the file has a list of parts.
      fields: the turn's other fields, such as `tool_calls`, as the text of a JSON object; `role` and `content` stand in
        it as null where they are not the first two, since a template may write a turn as it comes.
      unused: what its parts hold beside their texts, which nothing uses.
    """

    role: str
    content: str | tuple[str, ...] | None
    fields: Json = "{}"
    unused: tuple[str, ...] = ()

    @property
    def turn(self) -> dict[str, Any]:
        """The turn as templates read it."""
        parts = isinstance(self.content, tuple)
        content = [{"type": "text", "text": text} for text in self.content or ()] if parts else self.content
        said = {"role": self.role, "content": content}
        fields = json.loads(self.fields)
        return (fields if "role" in fields else said | fields) | said


@dataclass(frozen=True)
class Conversation:
    """Messages in order; the assistant's turns are what is learnt.

    Attributes:
      messages: the turns.
      where: the place it came from, as `file:line`.
      tools: JSON schemas of the functions that the assistant may call, as the text of a JSON list, or `null`.
      documents: texts that it may look into, as `tools`.
      unused: the row's other fields, which nothing uses.
    """

    messages: tuple[Message, ...]
    where: str
    tools: Json = "null"
    documents: Json = "null"
    unused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Labelled:
    """A text and the class it belongs to.

    Attributes:
      text: what it says.
      label: its class.
      where: the place it came from, as `file:line`.
      unused: the row's other fields, which nothing uses.
    """

    text: str
    label: Label
    where: str
    unused: tuple[str, ...] = ()


Record = Document | Conversation
