"""Which weights a spec means: names, regexes and layer numbers against the paths of the params, as PEFT resolves them.

Targets are resolved on the base params alone. An adapter is another tree, so there is nothing of it to match.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

from jpeft.errors import KernelError, SpecError
from jpeft.kernel import Kernel, Kernels
from jpeft.regex import ends, matches, parsed
from jpeft.tree import dotted, module_of, nearest

V = TypeVar("V")
Patterns = Mapping[str, V] | tuple[tuple[str, V], ...]
ALL_LINEAR = "all-linear"
FIXED = re.compile(r"(?:[\w\-.]|\\[.\-])*")  # a pattern that is a name; its dots stand for any character
NUMBER = re.compile(r"\.(\d+)(?=\.)")
MOST_REGEXES, MOST_FORMS, MOST_LAYERS_PATTERNS = 50, 500, 10


@dataclass(frozen=True)
class Targets:
    """The targeting fields of a spec; `str` is a regex (or `all-linear`), a tuple is names."""

    targets: str | tuple[str, ...]
    exclude: str | tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    saved: tuple[str, ...] = ()


def frozen_names(names: str | Sequence[str], regex: bool = True) -> Any:
    """Names as a tuple; a string stays one where it may be a regex."""
    if isinstance(names, str):
        return names if regex else (names,)
    return tuple(names)


def frozen_mapping(mapping: Patterns[V]) -> tuple[tuple[str, V], ...]:
    """Pairs of a mapping, or of pairs: hashable."""
    return tuple(mapping.items()) if isinstance(mapping, Mapping) else tuple((name, value) for name, value in mapping)


def matches_pattern(pattern: str, *names: str) -> bool:
    """Whether a pattern is one of the dotted names, whole or from a dot to the end."""
    return any(_ends_in(dotted(pattern), dotted(name)) for name in names)


def _ends_in(pattern: str, name: str, share: int = 1) -> bool:
    begin = sum(1 << at for at in parts_begin(name))
    return bool(ends(pattern, name, begin, share) >> len(name))


def parts_begin(name: str) -> list[int]:
    """Tell where the parts of a dotted name begin."""
    return [0, *(at + 1 for at, char in enumerate(name) if char == ".")]


def pattern_value(patterns: Patterns[V], names: Sequence[str], default: V) -> V:
    """The value of the first pattern that matches one of the names.

    Raises:
      SpecError: one of the patterns is no regex that is taken here, or there are too many of them.
    """
    pairs = patterns if isinstance(patterns, tuple) else frozen_mapping(patterns)
    known = _sorted_patterns(_Same(pairs))
    found = min((known.first(dotted(name)) for name in names), default=len(pairs))
    return pairs[found][1] if found < len(pairs) else default


@dataclass(frozen=True)
class _Patterns:
    """Patterns, sorted: those of one length, by where they have a `.` that stands for any character, and real regexes.

    A file may name each module apart, or hold a hundred thousand names: those are looked up, and not tried in turn.
    """

    fixed: Mapping[int, Mapping[tuple[int, ...], Mapping[str, int]]]
    regexes: tuple[tuple[int, str], ...]
    count: int

    def first(self, name: str) -> int:
        """The place of the first that matches; `count` if none does."""
        found = [self.count]
        for begin in parts_begin(name):
            end = name[begin:]
            for anything, known in self.fixed.get(len(end), {}).items():
                found.append(known.get(_blanked(end, anything), self.count))
        best, share = min(found), len(self.regexes)
        return next((at for at, regex in self.regexes if at < best and _ends_in(regex, name, share)), best)


class _Same:
    """A tuple that stands in a cache as itself: to hash a hundred thousand names on each call would be the work."""

    def __init__(self, items: tuple[Any, ...]):
        self.items = items

    def __hash__(self) -> int:
        return id(self.items)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.items is other.items


@lru_cache(64)
def _sorted_patterns(pairs: _Same) -> _Patterns:
    fixed: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
    regexes: list[tuple[int, str]] = []
    for at, (pattern, _) in enumerate(pairs.items):
        pattern = dotted(pattern)
        if FIXED.fullmatch(pattern) is None:
            regexes.append((at, pattern))
            continue
        marks = re.findall(r"\\.|[^\\]", pattern)
        anything = tuple(i for i, mark in enumerate(marks) if mark == ".")
        fixed.setdefault(len(marks), {}).setdefault(anything, {}).setdefault("".join(m[-1] for m in marks), at)
    forms = sum(map(len, fixed.values()))
    if len(regexes) > MOST_REGEXES or forms > MOST_FORMS:
        raise SpecError(
            f"{len(regexes)} regexes, and names of {forms} forms: expected at most {MOST_REGEXES} and {MOST_FORMS}; "
            "name modules by the ends of their paths"
        )
    for _, regex in regexes:
        parsed(regex)
    return _Patterns(fixed, tuple(regexes), len(pairs.items))


def _blanked(name: str, where: tuple[int, ...]) -> str:
    letters = list(name)
    for at in where:
        letters[at] = "."
    return "".join(letters)


def names_module(names: str | tuple[str, ...], module: str) -> bool:
    """Whether a regex matches the whole dotted path, or a name equals it or its end from a separator on.

    Raises:
      SpecError: it is no regex that is taken here.
    """
    name = dotted(module)
    if isinstance(names, str):
        return matches(names, name)
    known = _dotted_names(_Same(names))
    return any(name[begin:] in known for begin in parts_begin(name))


@lru_cache(64)
def _dotted_names(names: _Same) -> frozenset[str]:
    return frozenset(map(dotted, names.items))


def names_weight(names: str | tuple[str, ...], path: str) -> bool:
    """Whether names or a regex mean the module of a weight, or names the weight itself, leaf and all.

    The second serves trees in which a module holds several weights under names of their own: `attn/q`, `attn/k`.
    """
    return names_module(names, module_of(path)) or (not isinstance(names, str) and names_module(names, path))


def saves_module(saved: Sequence[str], module: str) -> bool:
    """Whether a module (or leaf) lies in one of those saved whole (a name of its path, or anything below it)."""
    parts, known = dotted(module).split("."), _dotted_names(_Same(tuple(saved)))
    last = range(1, len(parts) + 1)
    return bool(known) and any(".".join(parts[begin:end]) in known for end in last for begin in range(end))


def layer_number(module: str, patterns: tuple[str, ...] = ()) -> int | None:
    """The first layer number of a path, from `layers/0` and `layers_0` alike."""
    name = re.sub(r"_(\d+)(?=\.|$)", r".\1", dotted(module))
    if not patterns:
        found = re.match(r"(?:^|.*?\.)[^.]*\.(\d+)\.", name)
        return int(found.group(1)) if found else None
    return next((number for pattern in patterns if (number := number_after(pattern, name)) is not None), None)


def number_after(pattern: str, name: str) -> int | None:
    """Find the number that stands behind the first of the name's parts that the pattern matches."""
    begins = parts_begin(name)
    for begin in begins:
        found = ends(pattern, name, 1 << begin, len(begins))
        for number in NUMBER.finditer(name) if found else ():
            if found >> number.start() & 1:
                return int(number.group(1))
    return None


def resolve(where: Targets, kernels: Kernels) -> list[str]:
    """The paths of the targeted weights, in the order of `kernels`.

    Raises:
      SpecError: a name, an exclusion or a layer number, or the whole of them, matches nothing; shows the nearest names.
      KernelError: a target is a leaf whose geometry is not known; shows how to find it.
    """
    if where.targets == ALL_LINEAR:
        matched = [path for path, kernel in kernels.items() if kernel.kind == "product" and not kernel.head]
    else:
        _check_targets(where.targets, kernels)
        matched = [path for path in kernels if names_weight(where.targets, path)]
    _check_exclusions(where.exclude, kernels)
    kept = [path for path in matched if is_kept(where, path, kernels[path])]
    if matched and not kept:
        raise SpecError(
            f"targets {where.targets!r} match {len(matched)} weights, but exclude={where.exclude!r}, "
            f"layers_to_transform={where.layers!r}, layers_pattern={where.layers_pattern!r} and "
            f"modules_to_save={where.saved!r} leave none"
        )
    if not kept and where.targets and not where.saved:
        raise SpecError(
            f"targets {where.targets!r} match nothing; the weights are {nearest(str(where.targets), kernels)}"
        )
    return kept


def is_kept(where: Targets, path: str, kernel: Kernel) -> bool:
    """Whether a matched weight survives `exclude`, the saved modules and the layer numbers."""
    module = module_of(path)
    if names_weight(where.exclude, path) or saves_module(where.saved, path):
        return False
    # A module named by its whole path is meant, whatever its layer: so PEFT has it.
    named_whole = not isinstance(where.targets, str) and dotted(module) in _dotted_names(_Same(where.targets))
    return where.layers is None or named_whole or _in_layers(where.layers, where.layers_pattern, module, kernel)


def _in_layers(layers: tuple[int, ...], patterns: tuple[str, ...], module: str, kernel: Kernel) -> bool:
    number = layer_number(module, patterns)
    stacked = number is None and kernel.stack is not None  # `selected_layers` chooses its slices
    return stacked or number in layers


def selected_layers(where: Targets, module: str, kernel: Kernel) -> tuple[int, ...] | None:
    """Of a stacked weight, the slices that are adapted; None for all, or where layers are not stacked.

    Raises:
      SpecError: there is no such layer.
    """
    if where.layers is None or kernel.stack is None or layer_number(module, where.layers_pattern) is not None:
        return None
    depth = kernel.depth
    for layer in where.layers:
        if not 0 <= layer < depth:
            raise SpecError(f"layers_to_transform: {layer} is none of the {depth} layers stacked in {module!r}")
    return tuple(sorted(set(where.layers)))


def _check_targets(targets: str | tuple[str, ...], kernels: Kernels) -> None:
    """Each name has to match a weight; one that matches only a leaf of unknown geometry is told apart."""
    unknown = dict(kernels.unknown)
    for name in (targets,) if isinstance(targets, str) else targets:
        names = name if isinstance(targets, str) else (name,)
        if any(names_weight(names, path) for path in kernels):
            continue
        for path in unknown:
            if names_weight(names, path):
                raise KernelError(f"target {name!r}: {path!r} {unknown[path]}")
        raise SpecError(f"target {name!r} matches nothing; the nearest are {nearest(dotted(name), _names(kernels))}")


def _check_exclusions(exclude: str | tuple[str, ...], kernels: Kernels) -> None:
    """Something excluded that is not there is a mistake in its name."""
    known = (*kernels, *dict(kernels.unknown))
    for name in () if isinstance(exclude, str) else exclude:
        if not any(names_weight((name,), path) for path in known):
            raise SpecError(
                f"exclude: {name!r} matches nothing; the nearest are {nearest(dotted(name), _names(kernels))}"
            )


def _names(kernels: Kernels) -> list[str]:
    """What each weight is called in a target: its module, or its whole path where the module holds several."""
    modules = [module_of(path) for path in kernels]
    alone = lambda module: module and modules.count(module) == 1
    return [dotted(module if alone(module) else path) for module, path in zip(modules, kernels, strict=True)]
