"""Conversations as text, and who says what in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from jpeft_interop.chat_renderings import places_of_content, proof_of
from jpeft_interop.chat_template import Objects, Span, Turn, generated
from jpeft_interop.chat_template import render as render
from jpeft_interop.tokenizer import Tokenizer
from jpeft_interop.turn_proofs import ASSISTANT, proven


@dataclass(frozen=True)
class Heard:
    """A conversation's text, and who says what in it.

    Attributes:
      text: all of it.
      assistant: the characters that the assistant says, the marks that end its turns included.
      contents: roles, and where in the text the content of a turn of theirs lies, as far as that can be told.
      marked: whether the template itself marks the assistant's words.
    """

    text: str
    assistant: list[Span]
    contents: list[tuple[str, Span]]
    marked: bool


def hear(
    tokenizer: Tokenizer,
    messages: Sequence[Turn],
    *,
    tools: Objects | None = None,
    documents: Objects | None = None,
) -> Heard:
    """Find out who says what in a conversation's text: by the template's `{% generation %}`, else by proofs.

    Raises:
      TokenizerError: as for `render`, or it can't be told which characters an assistant's turn is.
    """
    say = partial(render, tokenizer, tools=tools, documents=documents)
    proof = proof_of(tokenizer, say, messages, [tools, documents])
    numbers = range(len(messages))
    contents = [(messages[number]["role"], span) for number in numbers for span in places_of_content(proof, number)]
    marked = generated(tokenizer, messages, tools=tools, documents=documents)
    if marked is not None:
        return Heard(proof.text, marked, contents, True)
    others = [span for role, span in contents if role != ASSISTANT]
    spans = [proven(proof, number, others) for number in numbers if messages[number]["role"] == ASSISTANT]
    return Heard(proof.text, spans, contents, False)


def with_spans(
    tokenizer: Tokenizer,
    messages: Sequence[Turn],
    *,
    tools: Objects | None = None,
    documents: Objects | None = None,
) -> tuple[str, list[Span]]:
    """Write a conversation as text, and give the characters that the assistant says, its end-of-turn marks included.

    Raises:
      TokenizerError: as for `hear`.
    """
    heard = hear(tokenizer, messages, tools=tools, documents=documents)
    return heard.text, heard.assistant
