"""A row of a table of ready layouts: where the leaves of one path lie in torch, whatever their number and sizes.

    layers/{i}/attn/q_proj/w    "d n h"    model.layers.{i}.self_attn.q_proj.weight    "(n h) d"

`{i}` in a path is the layer's number, and in keys (`{i*2+1}`: of every second, `{i+6*l}`: behind six for each of `l`).
Every other name in braces is an axis of the leaf, as in `Place`: `{l*6+2}` is every sixth layer. The names of axes have
one size in all rows of a table (`d`, `f`, `h`, …), but for those in `OWN`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from jpeft_interop.layout.link import Kind

OWN = frozenset({"i", "o", "r"})  # of each row: any input, any output, a norm's size

Torch = Mapping[str, str | tuple[str, Kind]]


@dataclass(frozen=True)
class Rule:
    """One row.

    Attributes:
      path: the leaves', with `{i}` for a layer's number.
      axes: the leaf's, in the notation of `jpeft_interop.layout.axes`.
      torch: torch's axes by torch's names, as `Place.of` takes them; `{f}` in axes is the size of `f`.
      scale: a size and the power of it by which the leaf is larger than what torch has.
      offset: how much more it is.
      sizes: of the row's own names.
    """

    path: str
    axes: str
    torch: Torch
    scale: tuple[str, float] | None = None
    offset: float = 0.0
    sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def pattern(self) -> re.Pattern[str]:
        """What matches its paths; the group is the layer's number."""
        return re.compile(re.escape(self.path).replace(re.escape("{i}"), r"(0|[1-9]\d*)"))


Rules = tuple[Rule, ...]


@dataclass(frozen=True)
class Tie:
    """A tied head: torch's other name for an embedding.

    Attributes:
      key: the embedding's name.
      other: the head's; left out where a leaf has it.
      needs: a path without which the model has no head.
    """

    key: str
    other: str
    needs: str | None = None


@dataclass(frozen=True)
class Table:
    """The rows of a family, or of one form of it.

    Attributes:
      rules: each of which has a leaf, those with `{i}` one for each layer.
      options: groups of rows whose leaves are all there or none (a head).
      ties: heads without a leaf.
    """

    rules: Rules
    options: tuple[Rules, ...] = ()
    ties: tuple[Tie, ...] = ()


def dense(path: str, key: str | None = None, *, axes: str = "i o", bias: bool = False) -> Rules:
    """A kernel (in, out) of a torch Linear, which is called as its path if nothing is said."""
    key = key or path.replace("/", ".")
    inputs, outputs = axes.split()
    biases = (Rule(f"{path}/bias", outputs, {f"{key}.bias": outputs}),) if bias else ()
    return (Rule(f"{path}/kernel", axes, {f"{key}.weight": f"{outputs} {inputs}"}), *biases)


def norm(path: str, key: str | None = None, *, leaf: str = "scale", bias: bool = False) -> Rules:
    """A norm's scale, and its bias."""
    key = key or path.replace("/", ".")
    biases = (Rule(f"{path}/bias", "r", {f"{key}.bias": "r"}),) if bias else ()
    return (Rule(f"{path}/{leaf}", "r", {f"{key}.weight": "r"}), *biases)


def embedding(path: str, key: str, axes: str = "v d") -> Rules:
    """A table of rows."""
    return (Rule(path, axes, {key: (axes, "embedding")}),)


def joined(*groups: Rules) -> Rules:
    """All their rows."""
    return tuple(rule for group in groups for rule in group)


def with_base(table: Table, base: str) -> tuple[Table, Table]:
    """The table, and that of the model without a head, whose paths and keys lack `base` in front."""
    rules, options = _of_base(table.rules, base), (_of_base(option, base) for option in table.options)
    return table, Table(rules, tuple(option for option in options if option))


def _of_base(rules: Rules, base: str) -> Rules:
    return tuple(
        replace(
            rule,
            path=rule.path.removeprefix(f"{base}/"),
            torch={key.removeprefix(f"{base}."): told for key, told in rule.torch.items()},
        )
        for rule in rules
        if rule.path.startswith(f"{base}/")
    )
