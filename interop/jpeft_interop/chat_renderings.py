"""A conversation written anew with words of our own in it, which show where in its text a turn's content lies."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from jpeft_interop.chat_template import Span, Turn
from jpeft_interop.tokenizer import Tokenizer, TokenizerError

Replace = Callable[[Turn, str], Turn | None]
Around = tuple[str, str]


@dataclass(frozen=True)
class Proof:
    """What a proof is made of.

    Attributes:
      tokenizer: whose template is used.
      say: renders turns.
      messages: the conversation.
      text: what the template makes of it.
      word: stands nowhere in it, nor does `other`.
      other: a second such word, with another beginning and another end.
    """

    tokenizer: Tokenizer
    say: Callable[..., str]
    messages: Sequence[Turn]
    text: str
    word: str
    other: str

    @property
    def eos(self) -> str:
        """The token that ends a text; empty if there is none."""
        return self.tokenizer.special.get("eos_token", "")

    def tried(self, messages: Sequence[Turn], *, prompt: bool = False) -> str | None:
        """Render other turns; None where the template refuses them."""
        try:
            return self.say(messages, prompt=prompt)
        except TokenizerError:
            return None

    def around(self, messages: Sequence[Turn], number: int, replace: Replace, *, prompt: bool = False) -> Around | None:
        """Render turns with the word in one of them, and give what stands before it and after; None if not once."""
        turn = replace(messages[number], self.word)
        if turn is None:
            return None
        text = self.tried([*messages[:number], turn, *messages[number + 1 :]], prompt=prompt)
        parts = (text or "").split(self.word)
        return (parts[0], parts[1]) if len(parts) == 2 else None

    def units(self, text: str) -> list[str]:
        """Part a text into special tokens and characters."""
        added = {token.content for token in self.tokenizer.backend.get_added_tokens_decoder().values()}
        tokens = sorted(added | set(self.tokenizer.special.values()), key=len, reverse=True)
        return re.findall("|".join([*map(re.escape, filter(None, tokens)), "."]), text, re.DOTALL)

    def shared(self, one: str, two: str) -> str:
        """Give what two texts begin with, whole special tokens."""
        return _same(self.units(one), self.units(two))

    def shared_end(self, one: str, two: str) -> str:
        """Give what two texts end with, whole special tokens."""
        same = len(_same(self.units(one)[::-1], self.units(two)[::-1]))
        return one[len(one) - same :]


def _same(one: Iterable[str], two: Iterable[str]) -> str:
    return "".join(
        first for first, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False))
    )


def proof_of(tokenizer: Tokenizer, say: Callable[..., str], messages: Sequence[Turn], more: Any) -> Proof:
    """Render a conversation, and choose words that are nowhere in it, in its template or in `more`."""
    text = say(messages)
    templates = f"{tokenizer.chat_template}{tokenizer.tool_chat_template}"
    known = text + templates + json.dumps([list(messages), more], ensure_ascii=False)
    number = next(number for number in itertools.count() if f"q{number}" not in known)
    return Proof(tokenizer, say, messages, text, f"Xq{number}w", f"Zq{number}v")


def in_content(turn: Turn, word: str) -> Turn:
    """Put the word in place of what the turn says."""
    content = [{"type": "text", "text": word}] if isinstance(turn.get("content"), list) else word
    return {**turn, "content": content}


def in_call(turn: Turn, word: str) -> Turn | None:
    """Put the word in place of the name of the function that the turn calls first."""
    match turn.get("tool_calls"):
        case [{"function": {"name": _}} as call, *others]:
            return {**turn, "tool_calls": [{**call, "function": {**call["function"], "name": word}}, *others]}
        case [{"name": _} as call, *others]:
            return {**turn, "tool_calls": [{**call, "name": word}, *others]}
    return None


def places_of_content(proof: Proof, number: int) -> list[Span]:
    """Find a turn's content wherever it stands in the text; nowhere if that can't be told."""
    turn = in_content(proof.messages[number], proof.word)
    text = proof.tried([*proof.messages[:number], turn, *proof.messages[number + 1 :]])
    pieces = (text or "").split(proof.word)
    times, room = len(pieces) - 1, len(proof.text) - sum(map(len, pieces))
    if not times or room < 0 or room % times:
        return []
    size = room // times
    starts = [sum(map(len, pieces[: time + 1])) + time * size for time in range(times)]
    said = proof.text[starts[0] : starts[0] + size]
    return [(start, start + size) for start in starts] if said.join(pieces) == proof.text else []
