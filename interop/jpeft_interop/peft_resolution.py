"""What PEFT makes of the names in a config: which modules it adapts, and which it trains whole.

PEFT 0.21 walks over every module of the model, containers and activations too, and raises where a name means one that
it has no adapter for. It takes `modules_to_save` for the ends of paths at any letter (`norm` is `input_layernorm` too),
and of the patterns that match a module the first one, in an order that its own `save_pretrained` loses: it sorts them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from jpeft.targets import Targets, names_module, number_after, saves_module

# The heads that PEFT's model of a task trains whole, whatever the config says, and asks the file for.
TASKS: Mapping[str, tuple[str, ...]] = {
    "CAUSAL_LM": (),
    "FEATURE_EXTRACTION": (),
    "QUESTION_ANS": ("qa_outputs",),
    "SEQ_2_SEQ_LM": (),
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
}
# The tasks whose heads PEFT leaves out of the targets; for the others it wraps them when the adapters are in place.
EXCLUDED_FIRST = ("SEQ_CLS",)
INSIDE = ("base_layer", "lora_A.default")  # what PEFT has inside a module that it adapts
NUMBERED = re.compile(r"(?<![^.])\d+(?![^.])")
UNSEEN = "_"  # stands for the name of any module
LAYER = re.compile(r".*?\.[^.]*\.(\d+)\.")


@dataclass(frozen=True)
class Modules:
    """The modules of a torch model, as far as the names of its tensors tell."""

    keys: tuple[str, ...]

    @cached_property
    def names(self) -> frozenset[str]:
        """Every module that holds a tensor, or holds one that does."""
        return frozenset(path for key in self.keys for path in around(key.rpartition(".")[0]))

    @cached_property
    def possible(self) -> frozenset[str]:
        """Names that modules without a tensor may have: a config that means one of them may mean what PEFT refuses.

        They are what the same module of another layer has, the numbers that a row of modules leaves out, and one more
        name in each module.
        """
        alike: dict[str, set[str]] = defaultdict(set)
        for parent, names in self._children.items():
            alike[NUMBERED.sub("#", parent)] |= {name for name in names if not name.isdigit()}
        found: set[str] = set()
        for parent, names in self._children.items():
            others = alike[NUMBERED.sub("#", parent)] | _left_out(names) | {UNSEEN}
            found |= {f"{parent}.{name}" if parent else name for name in others - names}
        return frozenset(found)

    @cached_property
    def _children(self) -> Mapping[str, set[str]]:
        found: dict[str, set[str]] = defaultdict(set)
        for path in self.names:
            parent, _, name = path.rpartition(".")
            found[parent].add(name)
        return found

    @cached_property
    def _own(self) -> Mapping[str, list[str]]:
        found: dict[str, list[str]] = defaultdict(list)
        for key in self.keys:
            for path in around(key.rpartition(".")[0]):
                found[path].append(key)
        return found

    def below(self, modules: Iterable[str]) -> set[str]:
        """The tensors of these modules, and of all that they hold."""
        return {key for module in modules for key in self._own.get(module, ())}

    def is_row(self, module: str) -> bool:
        """Whether a module is a mere row of others, which PEFT can't wrap: a `ModuleList`."""
        names = self._children.get(module, set())
        owns = any(key.rpartition(".")[0] == module for key in self._own[module])
        return bool(names) and not owns and all(name.isdigit() for name in names)


def _left_out(names: Collection[str]) -> set[str]:
    """The numbers that are missing in a row of modules, and the two that would follow: activations have no tensors."""
    numbers = [int(name) for name in names if name.isdigit()]
    return {str(number) for number in range(max(numbers) + 3)} - set(names) if len(numbers) > 0 else set()


def around(module: str) -> list[str]:
    """A module's path and those of the modules that it lies in; the outermost first.

    Example:
      >>> around("model.norm")
      ['model', 'model.norm']
    """
    parts = module.split(".") if module else []
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def lies_in(module: str, others: Collection[str]) -> bool:
    """Whether a module is one of `others`, or lies in one of them."""
    return any(path in others for path in around(module))


def heads_of(task_type: str | None) -> tuple[str, ...]:
    """The names that PEFT adds to `modules_to_save` for a task."""
    return TASKS.get(task_type or "", ())


def excluded_heads(task_type: str | None) -> tuple[str, ...]:
    """The names among them that PEFT's targets can't mean."""
    return heads_of(task_type) if task_type in EXCLUDED_FIRST else ()


def wrapped(saved: Sequence[str], modules: Modules, adapted: Collection[str] = ()) -> set[str]:
    """The modules that `modules_to_save` means: those whose path ends so, and what PEFT has in those it adapts."""
    inside = {f"{module}.{name}" for module in adapted for name in INSIDE}
    return {name for name in modules.names | inside if name.endswith(tuple(saved))} if saved else set()


def excluding(saved: Iterable[str], module: str) -> str | None:
    """Find the name in `modules_to_save` for which PEFT leaves a module out of its targets: it takes each for a regex.

    Args:
      saved: names, none of them a stranger's: they are tried as Python's regexes.
      module: one that is adapted.
    """
    for name in saved:
        try:
            if re.match(rf"(^|.*\.){name}($|\..*)", module):
                return name
        except re.error:
            return name  # at which PEFT raises
    return None


def means(where: Targets, module: str) -> bool:
    """Whether PEFT's targets mean a module; what is excluded or saved whole they never do."""
    if not names_module(where.targets, module):
        return False
    if names_module(where.exclude, module) or saves_module(where.saved, module):
        return False
    named_whole = not isinstance(where.targets, str) and module in where.targets
    return where.layers is None or named_whole or _layer(module, where.layers_pattern) in where.layers


def _layer(module: str, patterns: tuple[str, ...]) -> int | None:
    """The layer's number as PEFT finds it: not at the top of the model, unless a pattern says what stands before it."""
    if not patterns:
        found = LAYER.match(module)
        return int(found[1]) if found else None
    return next((number for pattern in patterns if (number := number_after(pattern, module)) is not None), None)


def means_just(where: Targets, modules: set[str], known: Modules) -> bool:
    """Whether PEFT would adapt just these modules, and nothing that the names of tensors do not show."""
    meant = {name for name in known.names if means(where, name)}
    return meant == modules and not any(means(where, name) for name in known.possible)
