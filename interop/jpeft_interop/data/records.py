"""What a file of examples holds: documents, conversations, labelled texts, each with the place it came from."""

from __future__ import annotations

from dataclasses import dataclass

Label = str | int


@dataclass(frozen=True)
class Document:
    """A text to go on writing.

    Attributes:
      text: what it says.
      where: the place it came from, as `file:line`.
    """

    text: str
    where: str


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """Messages in order; the assistant's turns are what is learnt."""

    messages: tuple[Message, ...]
    where: str


@dataclass(frozen=True)
class Labelled:
    """A text and the class it belongs to."""

    text: str
    label: Label
    where: str


Record = Document | Conversation
