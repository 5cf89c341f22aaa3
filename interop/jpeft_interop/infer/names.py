"""What names say: the numbers in them, the words, and how near one is to another."""

from __future__ import annotations

import re
from functools import lru_cache

NUMBER = re.compile(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])")
NAMES = 1 << 14  # asked for again and again, where many tensors are equal
PARTS = re.compile(r"[./]")
# Words that most names have, and that tell none apart.
COMMON = frozenset(
    ("params", "param", "model", "transformer", "base", "layers", "layer", "h", "blocks", "block", "weight", "kernel")
    + ("scale", "w", "embedding", "embeddings", "gamma", "norm", "layernorm", "ln", "proj", "dense", "self")
)


@lru_cache(NAMES)
def numbers(name: str) -> tuple[int, ...]:
    """The numbers in a name that stand alone between signs.

    Example:
      >>> numbers("model.layers.3.mlp"), numbers("layers_3/experts/7/fc1")
      ((3,), (3, 7))
    """
    return tuple(int(found[0]) for found in NUMBER.finditer(name.replace("_", "/")))


@lru_cache(NAMES)
def pattern(name: str) -> str:
    """The name with its numbers left open.

    Example:
      >>> pattern("layers.3.mlp.fc1.weight")
      'layers.{}.mlp.fc1.weight'
    """
    return re.sub(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])", "{}", name.replace("_", "\0")).replace("\0", "_")


def module(name: str) -> str:
    """The name without its last part."""
    parts = PARTS.split(name)
    return "/".join(parts[:-1])


def last(name: str) -> str:
    """The last part."""
    return PARTS.split(name)[-1]


@lru_cache(NAMES)
def words(name: str) -> frozenset[str]:
    """The words that tell a name apart from others."""
    found = re.findall(
        r"[a-z]+\d*", re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower().replace("layernorm", "layer_norm")
    )
    return frozenset(found) - COMMON


def likeness(path: str, key: str) -> int:
    """2 where both have the same words, 1 where one has all of the other's, 0 otherwise."""
    mine, theirs = words(path), words(key)
    if mine == theirs:
        return 2
    return int(bool(mine & theirs) and (mine <= theirs or theirs <= mine))


def shared(one: str, other: str) -> int:
    """How many parts two names begin with alike."""
    count = 0
    for mine, theirs in zip(PARTS.split(one), PARTS.split(other), strict=False):
        if mine != theirs:
            break
        count += 1
    return count
