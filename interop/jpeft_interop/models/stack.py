"""Parameters of a module that files hold in parts, matrix by matrix: the experts of a mixture."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Stack:
    """One parameter of three axes, (experts, rows, columns), and the names of its parts.

    Attributes:
      whole: the end of the parameter's own name.
      parts: the ends of the names that an expert's matrices have in files, `{}` for its number. Their rows, in this
        order, are those of the expert; each has as many.
    """

    whole: str
    parts: tuple[str, ...]

    def find(self, key: str) -> tuple[str, int, int] | None:
        """Of a file's key: the name of the parameter it is a part of, the expert's number, and which of the parts.

        Example:
          >>> Stack("experts.down_proj", ("experts.{}.w2.weight",)).find("layers.0.mlp.experts.3.w2.weight")
          ('layers.0.mlp.experts.down_proj', 3, 0)
        """
        for number, part in enumerate(self.parts):
            before, after = map(re.escape, part.split("{}"))
            if found := re.fullmatch(rf"(|.*\.){before}(0|[1-9]\d*){after}", key):
                return found[1] + self.whole, int(found[2]), number
        return None

    def names(self, name: str, experts: int) -> list[list[str]] | None:
        """Each expert's keys in a file, of a parameter's name; None for one that this is not about.

        Example:
          >>> Stack("experts.down_proj", ("experts.{}.w2.weight",)).names("mlp.experts.down_proj", 2)
          [['mlp.experts.0.w2.weight'], ['mlp.experts.1.w2.weight']]
        """
        if name != self.whole and not name.endswith(f".{self.whole}"):
            return None
        before = name.removesuffix(self.whole)
        return [[before + part.format(number) for part in self.parts] for number in range(experts)]
