"""A table's rows matched with the leaves of params: all of both, or an error that names what is left over."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jpeft.errors import WeightsError
from jpeft.tree import nearest
from jpeft_interop.layout import Place, Tensor
from jpeft_interop.layout.axes import names, parse, solve
from jpeft_interop.layout.link import Kind
from jpeft_interop.ready.rule import OWN, Rule, Rules, Table

NUMBER = re.compile(r"\{i(?:\*(\d+))?(?:\+(\d+)(?:\*(\w+))?)?\}")  # {i}, {i*2+1}, {i+6*l}


@dataclass(frozen=True)
class Match:
    """A leaf and its row.

    Attributes:
      path: the leaf's.
      shape: the leaf's.
      rule: the row.
      layer: the number in the path; None where there is none.
    """

    path: str
    shape: tuple[int, ...]
    rule: Rule
    layer: int | None


@dataclass(frozen=True)
class Matched:
    """A table's places, and what stands before all its paths (`params/`)."""

    places: Mapping[str, Place]
    prefix: str


def match(table: Table, flat: Mapping[str, Any], sizes: Mapping[str, int]) -> Matched:
    """The place of every leaf.

    Args:
      table: the rows.
      flat: leaves by path.
      sizes: those that a config tells.

    Raises:
      WeightsError: a leaf without a row, a row without its leaf, or shapes that contradict each other or `sizes`.
    """
    prefix = _prefix(table, flat)
    found = {match.path: match for match in _matches(table, flat, prefix)}
    if unknown := [path for path in flat if path not in found]:
        known = [prefix + rule.path for rule in _rules(table)]
        raise WeightsError(f"it has no leaf {unknown[0]!r}; the nearest that it has are {nearest(unknown[0], known)}")
    for path in _expected(table, found, prefix):
        if path not in flat:
            raise WeightsError(f"the params have no leaf {path!r}; the nearest are {nearest(path, flat)}")
    axes = {path: _padded(one, sizes) for path, one in found.items()}
    shared = _shared_sizes(list(found.values()), axes, sizes)
    places = {path: _place(one, axes[path], shared) for path, one in found.items()}
    return Matched(_tied(table, places, prefix), prefix)


def matching(table: Table, flat: Mapping[str, Any]) -> int:
    """How many leaves have a row."""
    return len(list(_matches(table, flat, _prefix(table, flat))))


def _rules(table: Table) -> Rules:
    return table.rules + tuple(rule for option in table.options for rule in option)


def _prefix(table: Table, flat: Mapping[str, Any]) -> str:
    """What stands before the path of the table's first row; nothing, where that has no leaf."""
    first = table.rules[0].path
    found = [path.removesuffix(first) for path in flat if path == first or path.endswith(f"/{first}")]
    return min(found, key=len, default="")


def _matches(table: Table, flat: Mapping[str, Any], prefix: str) -> Iterator[Match]:
    for rule in _rules(table):
        pattern = rule.pattern
        for path, leaf in flat.items():
            if path.startswith(prefix) and (found := pattern.fullmatch(path, len(prefix))):
                yield Match(path, tuple(leaf.shape), rule, int(found[1]) if found.groups() else None)


def _expected(table: Table, found: Mapping[str, Match], prefix: str) -> Iterator[str]:
    """Every path that a table has whose leaves are these: all rows, and all layers of each."""
    layers: dict[str, int] = defaultdict(int)
    for one in found.values():
        if one.layer is not None:
            stem = _stem(one.rule)
            layers[stem] = max(layers[stem], one.layer + 1)
    present = {id(one.rule) for one in found.values()}
    options = (rule for option in table.options if any(id(rule) in present for rule in option) for rule in option)
    for rule in (*table.rules, *options):
        count = max(layers[_stem(rule)], 1) if "{i}" in rule.path else 1
        yield from (prefix + rule.path.replace("{i}", str(layer)) for layer in range(count))


def _stem(rule: Rule) -> str:
    return rule.path.partition("{i}")[0]


def _padded(one: Match, sizes: Mapping[str, int]) -> str:
    """The leaf's axes; with the rows that a vocabulary has in the leaf beyond the config's."""
    axes = one.rule.axes.split()
    if "v" not in axes or "v" not in sizes or len(axes) != len(one.shape):
        return one.rule.axes
    at = axes.index("v")
    more = one.shape[at] - sizes["v"]
    return " ".join([*axes[:at], f"(v + {more})", *axes[at + 1 :]]) if more > 0 else one.rule.axes


def _shared_sizes(found: list[Match], axes: Mapping[str, str], sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes that all rows agree on."""
    shared = dict(sizes)
    for one in found:
        notation = parse(axes[one.path])
        known = {name: size for name, size in shared.items() if name in names(notation)}
        solved = solve(notation, one.shape, known | dict(one.rule.sizes), repr(one.path))
        shared |= {name: size for name, size in solved.items() if name not in OWN and name not in one.rule.sizes}
    return shared


def _place(one: Match, axes: str, shared: Mapping[str, int]) -> Place:
    rule, used = one.rule, names(parse(axes))
    sizes = {name: size for name, size in {**shared, **rule.sizes}.items() if name in used}
    torch: dict[str, str | tuple[str, Kind]] = {}
    for key, told in rule.torch.items():
        told = told.format_map(shared) if isinstance(told, str) else (told[0].format_map(shared), told[1])
        torch[_key(key, one.layer, shared)] = told
    return Place.of(axes, torch, scale=_scale(one, shared), offset=rule.offset, **sizes)


def _key(key: str, layer: int | None, sizes: Mapping[str, int]) -> str:
    """Torch's name with the layer's number in it."""
    number = lambda found: (layer or 0) * int(found[1] or 1) + int(found[2] or 0) * sizes.get(found[3] or "", 1)
    return NUMBER.sub(lambda found: str(number(found)), key)


def _scale(one: Match, sizes: Mapping[str, int]) -> float:
    if one.rule.scale is None:
        return 1.0
    name, power = one.rule.scale
    if name not in sizes:
        raise WeightsError(
            f"{one.path!r} is torch's times a number that no shape tells: pass config=, for its {name!r}"
        )
    return sizes[name] ** power


def _tied(table: Table, places: Mapping[str, Place], prefix: str) -> dict[str, Place]:
    """With torch's other name for an embedding, where that is the head too."""
    made = dict(places)
    keys = {tensor.key for place in places.values() for tensor in place.torch}
    for tie in table.ties:
        if tie.other in keys or (tie.needs is not None and prefix + tie.needs not in places):
            continue
        for path, place in made.items():
            if tensors := [tensor for tensor in place.torch if tensor.key == tie.key]:
                head = Tensor(tie.other, tensors[0].axes, "linear")
                made[path] = replace(place, torch=(*place.torch, head))
    return made
