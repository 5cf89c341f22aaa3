"""Names for the axes that are found: short, and the usual ones where it can be told."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from jpeft_interop.infer.names import NUMBER
from jpeft_interop.layout.link import Kind

SINGLE = {"linear": "oi", "conv1d": "io", "embedding": "vd", "experts": "eoi", "experts_io": "eio", "conv": "oihwt"}
COUNTED = {"layers": "l", "layer": "l", "h": "l", "block": "l", "blocks": "l", "experts": "e"}


class Naming:
    """The names of the atoms of one leaf, each its own."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.names: dict[Hashable, str] = {}

    def of(self, atom: Hashable) -> str:
        """The name of an atom."""
        return self.names[atom]

    def number(self, atom: Hashable, key: str, position: int) -> None:
        """Of an axis that is a number in a key."""
        before = key[: list(NUMBER.finditer(key))[position].start()].rstrip(".")
        self._give(atom, COUNTED.get(before.rpartition(".")[2], "k"))

    def along(self, atoms: Sequence[Any], key: str, kind: Kind, axis: int, fused: Callable[[Any], bool]) -> None:
        """Of the atoms along one of torch's axes, the slowest first."""
        sizes = [atom.size for atom in atoms]
        for place, atom in enumerate(atoms):
            word = part_word(key) if fused(atom) else ""
            name = word if word and len(atoms) == 1 else self._usual(sizes, place, kind, axis)
            self._give(atom, f"{word}_{name}" if word and name != word else name)

    def _usual(self, sizes: list[int], place: int, kind: Kind, axis: int) -> str:
        size = sizes[place]
        if len(sizes) == 1:
            letters = SINGLE.get(kind, "d" if axis == 0 else "a")
            wide = size == self.width and kind in ("linear", "conv1d", "plain") and "d" not in self.names.values()
            return "d" if wide else letters[min(axis, len(letters) - 1)]
        if len(sizes) == 2:
            return "nh"[place]
        if len(sizes) == 3 and place:
            if 2 not in sizes[1:]:
                return "gh"[place - 1]
            return "two" if size == 2 and (place == 1 or sizes[1] != 2) else "half"
        return "nabcdefg"[min(place, 7)]

    def _give(self, atom: Hashable, name: str) -> None:
        if atom in self.names:
            return
        taken, count = set(self.names.values()), 2
        chosen = name
        while chosen in taken:
            chosen, count = f"{name}{count}", count + 1
        self.names[atom] = chosen


def part_word(key: str) -> str:
    """What to call the part of a fused leaf that a tensor is.

    Example:
      >>> part_word("layers.0.self_attn.q_proj.weight")
      'q'
    """
    parts = [part for part in key.split(".") if not part.isdigit()]
    word = parts[-2] if len(parts) > 1 and parts[-1] in ("weight", "bias") else parts[-1]
    word = re.sub(r"\W|_proj$|_layer$", "", word)
    return word if re.match(r"[A-Za-z_]\w*$", word) else "part"
