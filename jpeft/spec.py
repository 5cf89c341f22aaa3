"""What every spec has: which weights are meant, and what else of the base is trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import numpy as np

from jpeft.errors import SpecError
from jpeft.kernel import Kernel
from jpeft.regex import RegexError, parsed
from jpeft.targets import FIXED, MOST_LAYERS_PATTERNS, MOST_REGEXES, Patterns, Targets, frozen_mapping, frozen_names

Bias = Literal["none", "all", "lora_only"]
LARGEST, SMALLEST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)


@dataclass(frozen=True, repr=False, kw_only=True)
class Spec:
    """The targeting fields of a spec. Frozen, hashable, serialisable.

    Args:
      targets: `"all-linear"`, a regex (matched whole, against the module's path written with dots), or names: a
        module's path, whole or a suffix at a separator; `/` and `.` are the same.
      exclude: names or a regex, never targeted.
      layers_to_transform: layer numbers to adapt; all if None.
      layers_pattern: the path parts in front of a layer number (`"layers"`, `"h"`); any if empty.
      bias: train the base's biases: `none`, `all`, or `lora_only` (those beside an adapted kernel).
      modules_to_save: modules whose weights are copied and trained whole (a classifier).
    """

    targets: str | Sequence[str] = "all-linear"
    exclude: str | Sequence[str] = ()
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] = ()
    bias: Bias = "none"
    modules_to_save: str | Sequence[str] = ()

    method: ClassVar[str]
    shown: ClassVar[tuple[str, ...]] = ("targets",)

    def __post_init__(self) -> None:
        self.freeze("targets", frozen_names(self.targets))
        self.freeze("exclude", frozen_names(self.exclude))
        self.freeze("modules_to_save", frozen_names(self.modules_to_save, regex=False))
        self.freeze("layers_pattern", frozen_names(self.layers_pattern, regex=False))
        if self.layers_to_transform is not None:
            layers = self.layers_to_transform
            self.freeze("layers_to_transform", (layers,) if isinstance(layers, int) else tuple(layers) or None)
        self.check_regexes(*(names for names in (self.targets, self.exclude) if isinstance(names, str)))
        if len(self.layers_pattern) > MOST_LAYERS_PATTERNS:
            raise self.fail(f"{len(self.layers_pattern)} layers_pattern: expected at most {MOST_LAYERS_PATTERNS}")
        self.check_regexes(*self.layers_pattern)
        self.check_one_of("bias", ("none", "all", "lora_only"))

    def __repr__(self) -> str:
        kept = [f for f in fields(self) if f.name in self.shown or getattr(self, f.name) != f.default]
        kept.sort(key=lambda f: (*self.shown, f.name).index(f.name))
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in kept)})"

    @property
    def where(self) -> Targets:
        """The part of the spec that says which weights are meant."""
        layers: Any = self.layers_to_transform  # a tuple or None since __post_init__
        names = frozen_names(self.targets), frozen_names(self.exclude)
        return Targets(*names, layers, frozen_names(self.layers_pattern, regex=False), tuple(self.modules_to_save))

    @property
    def patterns(self) -> tuple[str, ...]:
        """The names and regexes by which single weights are treated apart: each has to mean one."""
        return ()

    @property
    def dropout_rate(self) -> float:
        """Of the dropout on the input of the method's branch; 0 where it has none."""
        return 0.0

    @property
    def penalty_weight(self) -> float:
        """What the method's penalty is multiplied by."""
        return 0.0

    def check_kernels(self, kernels: Iterable[Kernel]) -> None:
        """Raises SpecError where the targeted weights are none that the spec is for."""
        del kernels

    def rank_of(self, *names: str) -> int:
        """The method's rank at the weight of a module, or by its other names; 0 where it has none."""
        del names
        return 0

    def freeze(self, name: str, value: Any) -> None:
        """Sets a field while the spec is made."""
        object.__setattr__(self, name, value)

    def fail(self, what: str) -> SpecError:
        """An error about this spec."""
        return SpecError(f"{type(self).__name__}: {what}")

    def check_regexes(self, *regexes: str) -> None:
        """Raises SpecError for what is no regex, or too many of them; a mere name is one."""
        real = [regex for regex in regexes if FIXED.fullmatch(regex) is None]
        if len(real) > MOST_REGEXES:
            raise self.fail(f"{len(real)} regexes: expected at most {MOST_REGEXES}")
        for regex in real:
            try:
                parsed(regex)
            except RegexError as error:
                hint = f"names go in a list: targets=[{regex!r:.200}]"
                raise self.fail(f"{regex!r:.200} is no regex that is taken here ({error}); {hint}") from error

    def check_ranks(self, name: str, rank: Any, least: int = 0) -> None:
        """Raises SpecError for what is no rank."""
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < least:
            raise self.fail(f"{name} must be an integer >= {least}; found {rank!r}")

    def check_number(self, name: str, value: Any) -> None:
        """Raises SpecError for what float32 has no finite number for."""
        if not abs(value) <= LARGEST:
            raise self.fail(f"{name} must be a finite number of float32; found {value!r}")

    def check_one_of(self, name: str, known: tuple[Any, ...]) -> None:
        """Raises SpecError for an unknown word."""
        if getattr(self, name) not in known:
            raise self.fail(f"{name} must be one of {known}; found {getattr(self, name)!r}")

    def check_rate(self, name: str) -> None:
        """Raises SpecError for what is no rate in [0, 1)."""
        if not 0 <= getattr(self, name) < 1:
            raise self.fail(f"{name} must be in [0, 1); found {getattr(self, name)!r}")


def names_of(patterns: Patterns[Any]) -> tuple[str, ...]:
    """What a pattern mapping names."""
    return tuple(name for name, _ in frozen_mapping(patterns))
