"""An adapter's spec in torch's names, written so that PEFT means the same modules, ranks and scalings by it.

The spec's own words are kept where PEFT takes them so; else the ends of names, else every module's whole name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from jpeft.adapter import Adapter
from jpeft.errors import AdapterError
from jpeft.targets import ALL_LINEAR, FIXED, Patterns, frozen_mapping, names_module, pattern_value
from jpeft.tree import dotted
from jpeft_interop.ia3_keys import is_feedforward
from jpeft_interop.layout import Layout
from jpeft_interop.peft_resolution import Modules, excluded_heads, means_just
from jpeft_interop.saved_modules import SavedModules
from jpeft_interop.split import Matrix

V = TypeVar("V", int, float)
HAVE_LAYERS = ("lora", "dora", "adalora")  # methods whose config has `layers_to_transform`
ADAPTER_NAME = "default"  # PEFT's, of an adapter that is loaded without one
CONDENSED = 20


def exported_spec(
    adapter: Adapter, matrices: Sequence[Matrix], layout: Layout, saved: SavedModules, task_type: str | None
) -> Any:
    """Write the spec in torch's names.

    Raises:
      AdapterError: nothing is adapted, or PEFT can't be told to adapt just these modules in this way.
    """
    if not matrices:
        raise AdapterError("no kernel is adapted (or every one with rank 0): PEFT has no adapter without a factor")
    excluded = (*saved.names, *excluded_heads(task_type))
    spec = _with_targets(adapter.spec, {matrix.spot.module for matrix in matrices}, layout, excluded)
    spec = replace(spec, modules_to_save=saved.names)
    if spec.method == "adalora":
        return _adalora(spec, matrices)
    if spec.method == "ia3":
        return _ia3(spec, matrices)
    if spec.method in ("lora", "dora"):
        return _lora(spec, matrices)
    raise AdapterError(f"{spec.method!r} has no form in a PEFT config; jpeft.save keeps it")


def _lora(spec: Any, matrices: Sequence[Matrix]) -> Any:
    ranks = {matrix.spot.module: matrix.rank for matrix in matrices}
    alphas = {matrix.spot.module: _alpha(spec, matrix) for matrix in matrices}
    if spec.rank == 0:
        spec = replace(spec, rank=max(ranks.values()), alpha=spec.alpha_of(""))
    default = float(spec.rank if spec.alpha is None else spec.alpha)
    return replace(
        spec,
        rank_pattern=_patterns(spec.rank_pattern, ranks, spec.rank),
        alpha_pattern=_patterns(spec.alpha_pattern, alphas, default),
    )


def _patterns(pairs: Patterns[V], values: Mapping[str, V], default: V) -> dict[str, V]:
    """Patterns by which each module has its value, in whatever order PEFT tries them.

    Raises:
      AdapterError: there are none.
    """
    other = {module: value for module, value in values.items() if value != default}
    whole = tuple((escaped(module), value) for module, value in other.items())
    anchored = tuple((f"^{name}", value) for name, value in whole)
    for candidate in (frozen_mapping(pairs), whole, anchored):
        if (used := _used(candidate, values, default)) is not None:
            return dict(used)
    raise AdapterError(f"PEFT can't be told apart {sorted(other)[:5]} by patterns: one's name is the end of another's")


def _used(pairs: tuple[tuple[str, V], ...], values: Mapping[str, V], default: V) -> list[tuple[str, V]] | None:
    """The patterns that match a module; None where one has another value by them, or matches two."""
    order = tuple((name, at) for at, (name, _) in enumerate(pairs))
    first = {module: pattern_value(order, (module,), -1) for module in values}
    last = {module: pattern_value(order[::-1], (module,), -1) for module in values}
    right = all(value == (default if first[m] < 0 else pairs[first[m]][1]) for m, value in values.items())
    return [pairs[at] for at in sorted({*first.values()} - {-1})] if right and first == last else None


def _alpha(spec: Any, matrix: Matrix) -> float:
    """Alpha as the spec has it, where that gives the scaling; else what does: the scaling is what acts."""
    stated = float(spec.alpha_of(matrix.spot.module))
    acts = float(np.float32(matrix.scaling))
    if abs(float(np.float32(spec.scaling(matrix.rank, stated))) - acts) <= 1e-6 * abs(acts):
        return stated
    return matrix.scaling * (matrix.rank**0.5 if spec.rank_stabilized else matrix.rank)


def _adalora(spec: Any, matrices: Sequence[Matrix]) -> Any:
    """Say one scaling and one rank at the start for all, and what is left of it where something was pruned."""
    rank = {matrix.spot.module: matrix.rank for matrix in matrices}
    if spec.total_steps is None:
        raise AdapterError("PEFT has no AdaLoRA without a number of steps: replace(spec, total_steps=...) in its meta")
    if (alpha := spec.rank if spec.alpha is None else spec.alpha) <= 0:
        raise AdapterError(f"alpha is {alpha:g}: PEFT takes the rank for an AdaLoRA's alpha where that is not positive")
    if (most := max(rank.values())) > spec.rank:
        raise AdapterError(f"there is a rank of {most}, and the spec's rank at the start is {spec.rank}")
    for matrix in matrices:
        found = matrix.scaling
        if abs(found - spec.scaling) > 1e-6 * spec.scaling:
            raise AdapterError(
                f"{matrix.spot.module!r} is scaled by {found:g}; in PEFT an AdaLoRA has one scaling, which is "
                f"{spec.scaling:g} here: fold what is more into E"
            )
    pruned = frozen_mapping(spec.ranks) or any(r != spec.rank for r in rank.values())
    if pruned and (taken := [module for module in rank if ADAPTER_NAME in module]):
        raise AdapterError(
            f"PEFT takes {ADAPTER_NAME!r} in {taken[0]!r} for its adapter's name when it reads a pruned AdaLoRA: make "
            "it a LoRA, jpeft.algebra.to_lora(adapter, rank, params=params)"
        )
    return replace(spec, ranks={escaped(name): r for name, r in rank.items()} if pruned else ())


def _ia3(spec: Any, matrices: Sequence[Matrix]) -> Any:
    """Take the first way of saying the targets, and which are scaled at the input, that PEFT takes so."""
    if spec.bias != "none":
        raise AdapterError(f"bias={spec.bias!r}: PEFT's IA³ trains no biases; name them in modules_to_save")
    modules = {matrix.spot.module for matrix in matrices}
    on_input = {matrix.spot.module for matrix in matrices if ("l_in" in matrix.leaves) != matrix.spot.as_head}
    whole = replace(spec, targets=tuple(sorted(modules)), exclude=())
    for base, names in ((spec, _dotted(spec.feedforward)), (whole, tuple(sorted(on_input)))):
        listed = isinstance(base.targets, tuple) and isinstance(names, tuple)
        if listed and not set(names) <= set(base.targets):
            continue  # which PEFT refuses
        if {name for name in modules if is_feedforward(names, name)} == on_input:
            return replace(base, feedforward=names)
    return replace(spec, feedforward="|".join(escaped(name) for name in sorted(on_input)))


def escaped(module: str) -> str:
    """A regex that means the name."""
    return re.escape(module)


def _dotted(names: str | tuple[str, ...]) -> Any:
    return names if isinstance(names, str) else tuple(map(dotted, names))


def _with_targets(spec: Any, modules: set[str], layout: Layout, excluded: tuple[str, ...]) -> Any:
    """Take the first way of saying the targets that PEFT resolves to just these modules.

    Raises:
      AdapterError: there is none.
    """
    known, modules = Modules(tuple(layout.by_key)), modules - layout.parameters
    if layout.parameters and isinstance(spec.targets, tuple):  # the names of parameters are no modules'
        meant = tuple(name for name in spec.targets if any(names_module((name,), one) for one in layout.modules))
        spec = replace(spec, targets=meant)
    if not modules:
        return replace(spec, targets=(), exclude=(), layers_to_transform=None, layers_pattern=())
    spec = replace(spec, targets=_dotted(spec.targets), exclude=_dotted(spec.exclude))
    explicit = replace(spec, exclude=(), layers_to_transform=None, layers_pattern=())
    ends = tuple(sorted({_end(name) for name in modules}))
    for candidate in (spec, replace(explicit, targets=ends), replace(explicit, targets=tuple(sorted(modules)))):
        where = replace(candidate.where, saved=excluded)
        if _is_known_to_peft(candidate) and means_just(where, modules, known):
            return candidate
    raise AdapterError(f"PEFT can't be told to adapt just these modules: {sorted(modules)[:5]}")


def _end(module: str) -> str:
    """The last part of a module's name, with the one before where it is a number: those are containers' names too."""
    *before, last = module.split(".")
    return ".".join([*before[-1:], last]) if last.isdigit() else last


def _is_known_to_peft(spec: Any) -> bool:
    """Whether PEFT's config can say the targets in this way."""
    if spec.targets == ALL_LINEAR:
        return False
    if spec.layers_to_transform is None:
        return not spec.layers_pattern
    plain = all(FIXED.fullmatch(pattern) for pattern in spec.layers_pattern)  # PEFT puts no brackets around it
    few = len(spec.targets) < CONDENSED
    return spec.method in HAVE_LAYERS and not isinstance(spec.targets, str) and plain and few
