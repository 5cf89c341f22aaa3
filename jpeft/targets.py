"""Which weights a spec means: names, regexes and layer numbers against the paths of the params, as PEFT resolves them.

Targets are resolved on the base params alone. An adapter is another tree, so there is nothing of it to match.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from jpeft.errors import KernelError, SpecError
from jpeft.kernel import Kernel, Kernels
from jpeft.tree import dotted, module_of, nearest

V = TypeVar("V")
Patterns = Mapping[str, V] | tuple[tuple[str, V], ...]
ALL_LINEAR = "all-linear"


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


def pattern_value(patterns: Patterns[V], module: str, default: V) -> V:
    """The value of the first pattern that matches the dotted path, whole or from a dot to the end."""
    for pattern, value in frozen_mapping(patterns):
        if re.match(rf"(.*\.)?({dotted(pattern)})$", dotted(module)):
            return value
    return default


def names_module(names: str | tuple[str, ...], module: str) -> bool:
    """Whether a regex matches the whole dotted path, or a name equals it or its end from a separator on."""
    name = dotted(module)
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(name == dotted(n) or name.endswith("." + dotted(n)) for n in names)


def saves_module(saved: Sequence[str], module: str) -> bool:
    """Whether a module lies in one of those saved whole (a name of its path, or anything below it)."""
    parts = dotted(module)
    return any(re.match(rf"(^|.*\.){re.escape(dotted(name))}($|\..*)", parts) for name in saved)


def layer_number(module: str, patterns: tuple[str, ...] = ()) -> int | None:
    """The first layer number of a path, from `layers/0` and `layers_0` alike."""
    name = re.sub(r"_(\d+)(?=\.|$)", r".\1", dotted(module))
    for pattern in patterns or (r"[^.]*",):
        found = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name)
        if found:
            return int(found.group(1))
    return None


def resolve(where: Targets, kernels: Kernels) -> list[str]:
    """The paths of the targeted weights, in the order of `kernels`.

    Raises:
      SpecError: a target, or the whole of them, matches nothing; shows the nearest names.
      KernelError: a target is a leaf whose geometry is not known; shows how to find it.
    """
    if where.targets == ALL_LINEAR:
        matched = [path for path, kernel in kernels.items() if kernel.kind == "product" and not kernel.head]
    else:
        _check_names(where, kernels)
        matched = [path for path in kernels if names_module(where.targets, module_of(path))]
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
    if names_module(where.exclude, module) or saves_module(where.saved, module):
        return False
    # A module named by its whole path is meant, whatever its layer: so PEFT has it.
    named_whole = not isinstance(where.targets, str) and dotted(module) in map(dotted, where.targets)
    return where.layers is None or named_whole or _in_layers(where.layers, where.layers_pattern, module, kernel)


def _in_layers(layers: tuple[int, ...], patterns: tuple[str, ...], module: str, kernel: Kernel) -> bool:
    number = layer_number(module, patterns)
    stacked = number is None and bool(kernel.batch)  # `selected_layers` chooses its slices
    return stacked or number in layers


def selected_layers(where: Targets, module: str, kernel: Kernel) -> tuple[int, ...] | None:
    """Of a stacked weight, the slices that are adapted; None for all, or where layers are not stacked."""
    if where.layers is None or not kernel.batch or layer_number(module, where.layers_pattern) is not None:
        return None
    return tuple(sorted(where.layers))


def _check_names(where: Targets, kernels: Kernels) -> None:
    """Each name has to match a weight; one that matches only a leaf of unknown geometry is told apart."""
    unknown = dict(kernels.unknown)
    for name in (where.targets,) if isinstance(where.targets, str) else where.targets:
        names = name if isinstance(where.targets, str) else (name,)
        if any(names_module(names, module_of(path)) for path in kernels):
            continue
        hidden = [path for path in unknown if names_module(names, module_of(path))]
        if hidden:
            raise KernelError(f"target {name!r}: {hidden[0]!r} {unknown[hidden[0]]}")
        modules = [dotted(module_of(path)) for path in kernels]
        raise SpecError(f"target {name!r} matches nothing; the nearest are {nearest(dotted(name), modules)}")
