"""What a PEFT config says to no effect on the base at hand: PEFT passes over most of it, and a reader should know."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from jpeft.targets import matches_pattern, names_module
from jpeft.tree import nearest
from jpeft_interop.layout import Layout
from jpeft_interop.peft_config import PeftConfig
from jpeft_interop.peft_resolution import TASKS, Modules, heads_of, means, wrapped

MOST = 1_000  # names and patterns that are looked at one by one
HEADLESS = ("FEATURE_EXTRACTION",)


def tell_without_effect(config: PeftConfig, layout: Layout, file: str) -> None:
    """Warn of targets and patterns that match no module, and of a task that the base has no head for.

    Args:
      config: the file's.
      layout: whose modules it is for.
      file: the config's name.
    """
    for what in (
        *_unmatched_targets(config, layout),
        *_unmatched_patterns(config, layout),
        *_other_task(config, layout),
    ):
        warnings.warn(f"{file}: {what}", stacklevel=4)


def _unmatched_targets(config: PeftConfig, layout: Layout) -> Iterable[str]:
    spec: Any = config.spec
    names = spec.targets if isinstance(spec.targets, tuple) else ()
    for name in names[:MOST]:
        if not any(names_module((name,), module) for module in layout.modules):
            yield f"the target {name!r} matches no module of this base; the nearest are {nearest(name, layout.modules)}"


def _unmatched_patterns(config: PeftConfig, layout: Layout) -> Iterable[str]:
    spec: Any = config.spec
    targeted = [module for module in layout.modules if means(spec.where, module)]
    targeted += [parameter for parameter in layout.parameters if config.parameters]
    for name in spec.patterns[:MOST] if spec.targets != "all-linear" else ():
        if not any(matches_pattern(name, module) for module in targeted):
            yield f"the pattern {name!r} matches no target; the nearest are {nearest(name, targeted)}"


def _other_task(config: PeftConfig, layout: Layout) -> Iterable[str]:
    """Tell a task whose head the base lacks, and one without a head where the base has another's."""
    task, heads = config.task_type, _heads(layout)
    if heads_of(task) and not heads[task or ""]:
        yield f"'task_type' is {task!r}, and this base has no module {' or '.join(map(repr, heads_of(task)))}"
    if (head := other_tasks_head(task, layout)) is not None:
        yield f"'task_type' is {task!r}, and this base ends in {head!r}: is it the model that was adapted?"


def other_tasks_head(task: str | None, layout: Layout) -> str | None:
    """The head of the base, where it is another task's and the task has none; PEFT's model for the task refuses it."""
    if task is None or task in HEADLESS or heads_of(task):
        return None
    return min((head for found in _heads(layout).values() for head in found if "." not in head), default=None)


def _heads(layout: Layout) -> dict[str, set[str]]:
    """The modules of the base that are heads of each task."""
    modules = Modules(tuple(layout.by_key))
    return {task: wrapped(heads_of(task), modules) for task in TASKS if heads_of(task)}
