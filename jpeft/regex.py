"""Whether a regex matches a name, in bounded time: for regexes that may come from a stranger's file.

A set of positions in the text is an integer, bit by bit; a part of a regex takes the positions where it may begin to
those where it may end. Nothing backtracks: `(a+)+$` costs what `a+$` does. What is accepted means what it means to
`re.fullmatch`; what only backtracking can do (backreferences, atomic groups) and flags are refused, by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, reduce
from operator import or_

from jpeft.errors import SpecError

LONGEST, PARTS, STEPS, DEPTH, SETS, COUNT = 100_000, 1_000, 1_000, 50, 100, 1_000
WORDS = 4  # that are looked for in one step
LONGEST_NAME = 10_000  # characters: what is done with a text grows with their square
LEAST = 20  # steps, however many regexes there are; one as people write it takes 2 to 16
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "a": "\a"}
CLASSES, BORDERS = frozenset("dDwWsS"), frozenset("AZbB")
WORD = re.compile(r"\w")
COUNTED = re.compile(r"\{\d+,?\d*\}|\{,\d*\}")
QUANTIFIER = re.compile(r"[*+?]|\{(\d*)(,?)(\d*)\}")


class RegexError(SpecError):
    """A text that is no regex, or one that is not taken here; says what, and where in it."""


@dataclass
class _Text:
    """A text, the positions of each of its characters, and how much has been done with it."""

    text: str
    most: int = STEPS

    def __post_init__(self) -> None:
        if len(self.text) > LONGEST_NAME:
            raise RegexError(f"a name of {len(self.text)} characters, more than {LONGEST_NAME}")
        self.all = (1 << len(self.text) + 1) - 1
        self.steps = 0
        self.of: dict[str, int] = {}
        self.classes: dict[str, int] = {}
        for i, char in enumerate(self.text):
            self.of[char] = self.of.get(char, 0) | 1 << i

    def step(self, count: int = 1) -> None:
        self.steps += count
        if self.steps > self.most:
            raise RegexError(f"it takes more than {self.most} steps on a name of {len(self.text)} characters")

    def where(self, source: str) -> int:
        """Where a character of a class stands."""
        if source not in self.classes:
            self.classes[source] = _any(where for char, where in self.of.items() if _is_in(source, char))
        return self.classes[source]


class Part:
    """A part of a regex, which turns positions to begin at into positions to end at (`ends`), and back (`starts`)."""

    def ends(self, text: _Text, at: int) -> int:
        """Where it may end."""
        raise NotImplementedError

    def starts(self, text: _Text, at: int) -> int:
        """Where it may begin, to end there."""
        raise NotImplementedError


@dataclass(frozen=True)
class _Words(Part):
    """One of some literal texts."""

    words: tuple[str, ...]

    def ends(self, text: _Text, at: int) -> int:
        text.step(1 + len(self.words) // WORDS)
        return _any((_found(text, word) & at) << len(word) for word in self.words)

    def starts(self, text: _Text, at: int) -> int:
        text.step(1 + len(self.words) // WORDS)
        return _any(_found(text, word) & (at >> len(word)) for word in self.words)


@dataclass(frozen=True)
class _Class(Part):
    """One character of a class, in `re`'s own words."""

    source: str

    def ends(self, text: _Text, at: int) -> int:
        text.step()
        return (at & text.where(self.source)) << 1

    def starts(self, text: _Text, at: int) -> int:
        text.step()
        return (at >> 1) & text.where(self.source)


@dataclass(frozen=True)
class _Chain(Part):
    """One after the other."""

    parts: tuple[Part, ...]

    def ends(self, text: _Text, at: int) -> int:
        for part in self.parts:
            at = at and part.ends(text, at)
        return at

    def starts(self, text: _Text, at: int) -> int:
        for part in reversed(self.parts):
            at = at and part.starts(text, at)
        return at


@dataclass(frozen=True)
class _Either(Part):
    """One of several."""

    parts: tuple[Part, ...]

    def ends(self, text: _Text, at: int) -> int:
        return _any(part.ends(text, at) for part in self.parts)

    def starts(self, text: _Text, at: int) -> int:
        return _any(part.starts(text, at) for part in self.parts)


@dataclass(frozen=True)
class _Repeat(Part):
    """From `least` to `most` times; without end where that is None. Greedy or lazy is the same to a whole match."""

    part: Part
    least: int
    most: int | None

    def ends(self, text: _Text, at: int) -> int:
        if isinstance(self.part, _Class) and self.least == 0 and self.most is None:
            text.step()
            where = text.where(self.part.source)  # a carry runs through each run of such characters
            return at | (((at & where) + where) ^ where) & text.all
        return self._go(text, at, lambda at: self.part.ends(text, at))

    def starts(self, text: _Text, at: int) -> int:
        return self._go(text, at, lambda at: self.part.starts(text, at))

    def _go(self, text: _Text, at: int, once: Callable[[int], int]) -> int:
        for _ in range(self.least):
            text.step()
            before, at = at, once(at)
            if not at or at == before:
                break
        found = fresh = at
        left = self.most - self.least if self.most is not None else -1
        while fresh and left:
            text.step()
            fresh = once(fresh) & ~found
            found, left = found | fresh, left - 1
        return found


@dataclass(frozen=True)
class _Ahead(Part):
    """What has to follow, or must not."""

    part: Part
    wanted: bool

    def ends(self, text: _Text, at: int) -> int:
        found = self.part.starts(text, text.all)
        return at & (found if self.wanted else ~found)

    starts = ends


@dataclass(frozen=True)
class _Border(Part):
    r"""A place, not a character: `^` `$` `\A` `\Z` `\b` `\B`."""

    kind: str

    def ends(self, text: _Text, at: int) -> int:
        text.step()
        end = 1 << len(text.text)
        if self.kind in "^A":
            return at & 1
        if self.kind == "Z":
            return at & end
        if self.kind == "$":
            return at & (end | (end >> 1 if text.text.endswith("\n") else 0))
        words = _any(where for char, where in text.of.items() if WORD.match(char))
        edges = words ^ (words << 1)
        if self.kind == "B":
            return at & ~edges if text.text else 0  # as Python's before 3.14
        return at & edges

    starts = ends


def matches(regex: str, text: str) -> bool:
    r"""`re.fullmatch(regex, text) is not None`, in bounded time.

    Raises:
      RegexError: no regex, one that needs backtracking, or too costly a one.

    Example:
      >>> matches(r".*\.(q|v)_proj", "layers.0.q_proj"), matches(r"(a+)+", "a" * 60 + "b")
      (True, False)
    """
    return bool(ends(regex, text) >> len(text))


@lru_cache(1 << 14)
def ends(regex: str, text: str, at: int = 1, share: int = 1) -> int:
    """The positions where a match may end, bit by bit, of those where it may begin.

    Args:
      regex: what is to match.
      text: the name.
      at: where it may begin, bit by bit.
      share: how many regexes there are: together they may take as many steps as one alone.

    Raises:
      RegexError: as `matches`.
    """
    try:
        return parsed(regex).ends(_Text(text, max(STEPS // share, LEAST)), at)
    except RegexError as error:
        raise RegexError(f"the regex {regex!r:.200} is refused: {error}") from None


@lru_cache(1024)
def parsed(regex: str) -> Part:
    """The parts of a regex.

    Raises:
      RegexError: it is none that is taken here.
    """
    if len(regex) > LONGEST:
        raise RegexError(f"it has {len(regex)} characters, more than {LONGEST}")
    return _Parser(regex).whole()


class _Parser:
    def __init__(self, regex: str) -> None:
        self.regex, self.at, self.parts, self.sets, self.depth = regex, 0, 0, 0, 0
        self.names: set[str] = set()

    def whole(self) -> Part:
        part = self.either()
        if self.at < len(self.regex):
            raise self.error("an unbalanced ')'")
        return part

    def error(self, what: str) -> RegexError:
        return RegexError(f"{what} at position {self.at}")

    def peek(self, n: int = 1) -> str:
        return self.regex[self.at : self.at + n]

    def take(self, n: int = 1) -> str:
        found = self.peek(n)
        self.at += n
        return found

    def made(self, part: Part) -> Part:
        self.parts += 1
        if self.parts > PARTS:
            raise RegexError(f"it has more than {PARTS} parts")
        return part

    def either(self) -> Part:
        """The alternatives; those of letters alone are one part."""
        words: list[str] = []
        others: list[Part] = []
        while True:
            found = self.chain()
            if isinstance(found, str):
                words.append(found)
            else:
                others.append(found)
            if self.peek() != "|":
                break
            self.at += 1
        if words:
            others.append(self.made(_Words(tuple(words))))
        return others[0] if len(others) == 1 else self.made(_Either(tuple(others)))

    def chain(self) -> Part | str:
        """What follows one another, up to `|` or `)`; a text where it is only letters."""
        found: list[Part] = []
        letters = ""
        while self.at < len(self.regex) and self.peek() not in "|)":
            one = self.atom()
            times = self.times()
            if isinstance(one, str) and times is None:
                letters += one
                continue
            if letters:
                found.append(self.made(_Words((letters,))))
                letters = ""
            part = self.made(_Words((one,)) if isinstance(one, str) else one)
            if times is not None:
                if isinstance(part, (_Border, _Ahead)):
                    raise self.error("a repeated place")
                if isinstance(one, str):
                    part = _Class(re.escape(one))
                part = self.made(_Repeat(part, *times))
            found.append(part)
        if not found:
            return letters
        if letters:
            found.append(self.made(_Words((letters,))))
        return found[0] if len(found) == 1 else _Chain(tuple(found))

    def atom(self) -> Part | str:
        char = self.take()
        match char:
            case "(":
                return self.group()
            case "[":
                return self.set()
            case ".":
                return _Class(".")
            case "^" | "$":
                return _Border(char)
            case "\\":
                return self.escape()
            case "*" | "+" | "?":
                raise self.error(f"nothing for {char!r} to repeat")
            case "{" if COUNTED.match(self.regex, self.at - 1):
                raise self.error("nothing for a count to repeat")
        return char

    def escape(self) -> Part | str:
        char = self.take()
        if char in CLASSES:
            return _Class(f"\\{char}")
        if char in BORDERS:
            return _Border(char)
        if char in ESCAPES:
            return ESCAPES[char]
        if not char or (char.isascii() and char.isalnum()):
            what = "a backreference" if char.isdigit() else "an escape that is not taken here"
            raise self.error(f"{what}, '\\{char}',")
        return char

    def set(self) -> Part:
        begin = self.at - 1
        self.take(self.peek() == "^")
        self.take(self.peek() == "]")
        while (char := self.take()) != "]":
            if not char:
                raise self.error("a '[' that is not closed")
            if char == "[" or (char in "-&~|" and self.peek() == char):
                raise self.error("a set in a set")
            if char == "\\":
                self.at += 1
        self.sets += 1
        source = self.regex[begin : self.at]
        try:
            if self.sets > SETS or len(source) > 1_000:
                raise self.error(f"more than {SETS} sets, or one of more than 1,000 characters,")
            re.compile(source)
        except re.error as reason:
            raise self.error(f"a set that is none, {source:.50} ({reason}),") from None
        return _Class(source)

    def group(self) -> Part:
        kind = ""
        if self.peek() == "?":
            for kind in ("?:", "?=", "?!", "?P<"):
                if self.peek(len(kind)) == kind:
                    break
            else:
                raise self.error("a flag, a look behind, or another group that is not taken here,")
            self.take(len(kind))
        if kind == "?P<":
            name, closed, _ = self.regex[self.at :].partition(">")
            if not closed or not name.isidentifier():
                raise self.error("a group without a name")
            if name in self.names:
                raise self.error(f"a second group {name!r:.50}")
            self.names.add(name)
            self.take(len(name) + 1)
        self.depth += 1
        if self.depth > DEPTH:
            raise RegexError(f"its groups are more than {DEPTH} deep")
        part = self.either()
        self.depth -= 1
        if self.take() != ")":
            raise self.error("a '(' that is not closed")
        return _Ahead(part, kind == "?=") if kind in ("?=", "?!") else part

    def times(self) -> tuple[int, int | None] | None:
        """How often: of the quantifier that stands here, if one does."""
        found = QUANTIFIER.match(self.regex, self.at)
        if found is None or found.group() in ("{}", "{,}"):
            return None if found is None or found.group() == "{}" else self.counted(found, (0, None))
        least, comma, most = found.groups(default="")
        if max(len(least), len(most)) > 4:
            raise self.error(f"a count of more than {COUNT}")
        if found.group() in "*+?":
            return self.counted(found, {"*": (0, None), "+": (1, None), "?": (0, 1)}[found.group()])
        low = int(least or 0)
        return self.counted(found, (low, int(most) if most else None if comma else low))

    def counted(self, found: re.Match[str], times: tuple[int, int | None]) -> tuple[int, int | None]:
        least, most = times
        if max(least, most or 0) > COUNT:
            raise self.error(f"a count of more than {COUNT}")
        if most is not None and most < least:
            raise self.error("counts in the wrong order")
        self.at = found.end()
        if self.peek() == "?":
            self.at += 1  # lazy
        if self.peek() and self.peek() in "*+?" or COUNTED.match(self.regex, self.at):
            raise self.error("a repeated repetition")
        return times


def _any(found: Iterable[int]) -> int:
    return reduce(or_, found, 0)


def _found(text: _Text, word: str) -> int:
    """Where a literal text begins."""
    if len(word) < 2:
        return text.of.get(word, 0) if word else text.all
    total, at = 0, text.text.find(word)
    while at >= 0:
        total, at = total | 1 << at, text.text.find(word, at + 1)
    return total


@lru_cache(65536)
def _is_in(source: str, char: str) -> bool:
    return re.match(source, char) is not None
