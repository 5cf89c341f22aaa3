"""Inputs for fuzzing, made of valid ones: JSON changed as a tree, then as text, then as bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

LETTERS = "ab.0_/\\[({*+?|^$\x00é\u2028名😀 "
PIECES = ["", "q_proj", "base_model.model.", ".lora_A.weight", "(a+)+$", r"\d", ".*", "[", "(", "layers.0", "../"]
PIECES += ["true", "all-linear", "lora_only", "1e999", "None", "LORA", "IA3", "ADALORA", "F32", "BF16", "U8", "pt"]
PIECES += ["__class__", "\ud800"]
VALUES: list[Any] = [None, True, False, 0, 1, -1, 2, 8, 2**31, 2**53, 2**63, 2**64, 10**30, -(2**63), 0.0, 0.5, -0.0]
VALUES += [1.0, 1e-300, 1e300, float("inf"), float("nan"), "", [], {}, [[]], [None], {"": None}, [0, 0], [1, 2, 3]]
VALUES += ["x" * 300]
TEXTS = [b'"', b"{", b"}", b"[", b"]", b",", b":", b"null", b"1e999", b"NaN", b"-0", b"00", b"\xef\xbb\xbf", b"\xff"]
TEXTS += [b"\\u", b'"a":1,', b"\n", b"\r", b"\r\n\r\n", b"\0", b'""', b"text", b"label", b"messages"]
TEXTS += [b"\xe2\x80\xa8", b'{"text":"a"}\n']


def value(draw: Random, depth: int = 2) -> Any:
    """Any JSON value; the odd ones first."""
    kind = draw.random()
    if kind < 0.5 or depth == 0:
        return draw.choice(VALUES)
    if kind < 0.8:
        return text(draw)
    if kind < 0.9:
        return [value(draw, depth - 1) for _ in range(draw.randrange(4))]
    return {text(draw): value(draw, depth - 1) for _ in range(draw.randrange(4))}


def text(draw: Random) -> str:
    """A string of pieces that mean something somewhere."""
    pieces = [draw.choice(PIECES if draw.random() < 0.6 else LETTERS) for _ in range(draw.randrange(1, 5))]
    return "".join(pieces)


def tree(found: Any, draw: Random) -> Any:
    """JSON with one place of it changed."""
    places = list(_places(found, ()))
    if not places:
        return value(draw)
    path = draw.choice(places)
    return _changed(found, path, lambda old: _other(old, draw), draw)


def _places(found: Any, path: tuple[Any, ...]) -> Any:
    items = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from _places(inner, (*path, key))


def _changed(found: Any, path: tuple[Any, ...], other: Callable[[Any], Any], draw: Random) -> Any:
    key, *rest = path
    new: Any = dict(found) if isinstance(found, dict) else list(found)
    if rest:
        new[key] = _changed(found[key], tuple(rest), other, draw)
        return new
    kind = draw.random()
    if kind < 0.15:
        del new[key]
    elif kind < 0.3:
        inner = new[key]
        if isinstance(new, dict):
            del new[key]
            new[spliced(key, draw) if draw.random() < 0.8 else text(draw)] = inner
        else:
            new.insert(draw.randrange(len(new) + 1), inner)
    elif kind < 0.4 and isinstance(new, dict):
        new[text(draw)] = value(draw)
    elif kind < 0.5:
        twin = draw.choice(list(new))
        if isinstance(new, dict):
            new[key], new[twin] = new[twin], new[key]
        else:
            draw.shuffle(new)
    else:
        new[key] = other(new[key])
    return new


def _other(old: Any, draw: Random) -> Any:
    """Another value, often one near to it."""
    kind = draw.random()
    if isinstance(old, str) and kind < 0.6:
        return spliced(old, draw)
    if isinstance(old, int) and not isinstance(old, bool) and kind < 0.6:
        return draw.choice([old + 1, old - 1, old * 2, -old, float(old), str(old), old << 40])
    if isinstance(old, bool) and kind < 0.4:
        return not old
    return value(draw)


def spliced(old: str, draw: Random) -> str:
    """A string with something put in, taken out, or said again."""
    begin, end = sorted(draw.randrange(len(old) + 1) for _ in range(2))
    return old[:begin] + draw.choice([text(draw), "", old[begin:end] * 2, text(draw) + old[begin:end]]) + old[end:]


def dumped(found: Any, draw: Random) -> bytes:
    """As JSON, or nearly: lone surrogates and NaN as Python writes them."""
    made = json.dumps(found, ensure_ascii=draw.random() < 0.9)
    return made.encode("utf-8", "surrogatepass")


def broken(data: bytes, draw: Random) -> bytes:
    """Bytes with a few of them changed."""
    new = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        begin = draw.randrange(len(new) + 1)
        end = min(len(new), begin + draw.choice((0, 1, 1, 2, 8, 40)))
        kind = draw.randrange(6)
        if kind == 0 and begin < len(new):
            new[begin] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del new[begin:end]
        elif kind == 2:
            new[begin:begin] = draw.choice(TEXTS)
        elif kind == 3:
            new[begin:end] = draw.randbytes(end - begin)
        elif kind == 4:
            new[begin:begin] = new[begin:end] * draw.choice((1, 2, 20))
        else:
            new[begin:end] = draw.choice(TEXTS)
    return bytes(new)
