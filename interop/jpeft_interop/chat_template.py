"""Conversations as text, by a tokenizer's own Jinja template, and where in it the template says the assistant speaks.

Templates are the programs that Hugging Face tokenizers carry; they run in Jinja's sandbox, and are given what
transformers' `apply_chat_template` gives them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jpeft_interop.tokenizer import Tokenizer, TokenizerError

Turn = Mapping[str, Any]
Objects = Sequence[Mapping[str, Any]]
Span = tuple[int, int]
REASONING = ("reasoning_content", "thinking", "reasoning")  # names under which a turn may hold its thought
MARKS = "jpeft_generation_marks"
PRIVATE = range(0xE000, 0xF8FF)  # characters without a meaning of their own


class Generation(Extension):
    """`{% generation %}…{% endgeneration %}`, with which some templates mark the assistant's words."""

    tags = {"generation"}
    stands_in_template = False

    def parse(self, parser: Parser) -> nodes.Node:
        """Make a call of what stands between the tags, with variables of its own, as in transformers."""
        self.stands_in_template = True
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_enclosed", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _enclosed(self, context: Context, caller: Callable[[], str]) -> str:
        first, last = context.get(MARKS, ("", ""))
        return first + caller() + last


@dataclass(frozen=True)
class Program:
    """A compiled template.

    Attributes:
      template: what is rendered.
      has_generation: whether `{% generation %}` stands in it.
    """

    template: Template
    has_generation: bool


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Turn],
    *,
    prompt: bool = False,
    tools: Objects | None = None,
    documents: Objects | None = None,
) -> str:
    """Write a conversation as the model was trained to read it.

    Args:
      tokenizer: whose template is used.
      messages: turns, each with `role` and, mostly, `content`; a field that is None counts as missing.
      prompt: end with the words that open the assistant's next turn.
      tools: functions that the assistant may call, as JSON schemas.
      documents: texts that the assistant may look into, for templates that know them.

    Raises:
      TokenizerError: the tokenizer has no chat template, or the template refuses these messages.
    """
    return _rendered(tokenizer, messages, {"tools": tools, "documents": documents, "add_generation_prompt": prompt})


def generated(
    tokenizer: Tokenizer, messages: Sequence[Turn], *, tools: Objects | None = None, documents: Objects | None = None
) -> list[Span] | None:
    """Find the characters that the template itself marks as the assistant's; None if it has no `{% generation %}`.

    Raises:
      TokenizerError: as for `render`, or the template changes what it has marked.
    """
    if not _program(tokenizer, tools).has_generation:
        return None
    plain = render(tokenizer, messages, tools=tools, documents=documents)
    first, last = islice((chr(code) for code in PRIVATE if chr(code) not in plain), 2)
    marked = _rendered(tokenizer, messages, {"tools": tools, "documents": documents, MARKS: (first, last)})
    text, spans = _unmarked(marked, first, last)
    if text != plain:
        raise TokenizerError(
            f"{tokenizer.folder}: the chat template changes what stands in its {{% generation %}} blocks, so where it "
            "lies can't be told"
        )
    return spans


def _rendered(tokenizer: Tokenizer, messages: Sequence[Turn], given: Mapping[str, Any]) -> str:
    turns = [_as_transformers_gives_it(message) for message in messages]
    program = _program(tokenizer, given["tools"])
    values = {**tokenizer.special, "messages": turns, "add_generation_prompt": False, **given}
    try:
        text = program.template.render(values)
    except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
        dated = "; write a date into it, so that the same data makes the same rows tomorrow"
        hint = dated if "'strftime_now' is undefined" in str(error) else ""
        raise TokenizerError(f"{tokenizer.folder}: the chat template fails: {error}{hint}") from None
    for number, turn in enumerate(turns, 1):
        content = turn.get("content")
        if content and isinstance(content, list) and str(content) in text:
            raise TokenizerError(
                f"{tokenizer.folder}: the chat template does not read the content of message {number}, a list of "
                "parts, and writes it as it stands; give the content as a string"
            )
    return text


def _as_transformers_gives_it(message: Turn) -> dict[str, Any]:
    """Leave out what is None, and give a thought under each name that templates read."""
    turn = {name: value for name, value in message.items() if value is not None}
    thought = next((turn[name] for name in REASONING if name in turn), None)
    return turn if thought is None else {"thinking": thought, **turn, "reasoning_content": thought}


def _unmarked(marked: str, first: str, last: str) -> tuple[str, list[Span]]:
    """Take the marks out; of marks within marks the outer ones count."""
    text, spans, starts = "", list[Span](), list[int]()
    for piece in re.split(f"([{first}{last}])", marked):
        if piece == first:
            starts.append(len(text))
        elif piece == last:
            start = starts.pop()
            if not starts:
                spans.append((start, len(text)))
        else:
            text += piece
    return text, spans


def _program(tokenizer: Tokenizer, tools: Objects | None) -> Program:
    source = tokenizer.chat_template
    if tools is not None and tokenizer.tool_chat_template is not None:
        source = tokenizer.tool_chat_template
    if source is None:
        raise TokenizerError(
            f"{tokenizer.folder}: the tokenizer has no chat template, so messages have no form; give plain text, or "
            "put a chat_template.jinja into the folder"
        )
    try:
        return _compiled(source)
    except TemplateError as error:
        raise TokenizerError(f"{tokenizer.folder}: the chat template fails: {error}") from None


@lru_cache(maxsize=16)
def _compiled(source: str) -> Program:
    extensions = ["jinja2.ext.loopcontrols", Generation]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _as_json
    environment.globals["raise_exception"] = _refuse
    # transformers also gives `strftime_now`. Without it templates fall back on a date of their own, so that the same
    # data makes the same training rows tomorrow.
    template = environment.from_string(source)
    generation = environment.extensions[Generation.identifier]
    return Program(template, isinstance(generation, Generation) and generation.stands_in_template)


def _as_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(reason: str) -> NoReturn:
    raise TemplateError(reason)
