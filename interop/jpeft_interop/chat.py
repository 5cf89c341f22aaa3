"""Conversations as text, by a tokenizer's own Jinja template, and where in it the assistant speaks.

Templates are the programs that Hugging Face tokenizers carry; they run in Jinja's sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jpeft_interop.tokenizer import Tokenizer, TokenizerError

Turn = Mapping[str, str]
Span = tuple[int, int]


class Generation(Extension):
    """`{% generation %}…{% endgeneration %}`, with which some templates mark the assistant's words: no effect here."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """What stands between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render(tokenizer: Tokenizer, messages: Sequence[Turn], *, prompt: bool = False) -> str:
    """A conversation as the model was trained to read it.

    Args:
      tokenizer: whose template is used.
      messages: turns, each with `role` and `content`.
      prompt: end with the words that open the assistant's next turn.

    Raises:
      TokenizerError: the tokenizer has no chat template, or the template refuses these messages.
    """
    if tokenizer.chat_template is None:
        raise TokenizerError(
            f"{tokenizer.folder}: the tokenizer has no chat template, so messages have no form; give plain text, or "
            "put a chat_template.jinja into the folder"
        )
    try:
        template = _environment().from_string(tokenizer.chat_template)
        return template.render(messages=list(messages), add_generation_prompt=prompt, **tokenizer.special)
    except (TemplateError, TypeError) as error:
        raise TokenizerError(f"{tokenizer.folder}: the chat template fails: {error}") from None


def _environment() -> ImmutableSandboxedEnvironment:
    extensions = ["jinja2.ext.loopcontrols", Generation]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = _refuse
    # transformers also gives `strftime_now`. Without it templates fall back on a date of their own, so that the same
    # data makes the same training rows tomorrow.
    return environment


def _refuse(reason: str) -> NoReturn:
    raise TemplateError(reason)


def with_spans(tokenizer: Tokenizer, messages: Sequence[Turn]) -> tuple[str, list[Span] | None]:
    """A conversation's text, and the characters that the assistant says, its end-of-turn mark included.

    A turn is found by rendering the conversation up to it, with the words that open it, and past it. A template
    whose text does not grow that way (one that drops earlier thoughts, say) does not let one tell: then there are none.

    Raises:
      TokenizerError: as for `render`.
    """
    text = render(tokenizer, messages)
    turns = [number for number, turn in enumerate(messages) if turn["role"] == "assistant"]
    spans = [_span(tokenizer, messages, number, text) for number in turns]
    found = [span for span in spans if span is not None]
    return text, found if len(found) == len(spans) else None


def _span(tokenizer: Tokenizer, messages: Sequence[Turn], number: int, text: str) -> Span | None:
    try:
        before = render(tokenizer, messages[:number], prompt=True)
        past = render(tokenizer, messages[: number + 1])
    except TokenizerError:  # of half a conversation, a template may refuse to make anything
        return None
    return (len(before), len(past)) if past.startswith(before) and text.startswith(past) else None
