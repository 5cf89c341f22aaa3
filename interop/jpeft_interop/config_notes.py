"""What a reader of a PEFT config should know: what it says without effect on the base at hand, and what it leaves out.

PEFT passes over most of it without a word.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jpeft.targets import ALL_LINEAR, frozen_mapping, matches_pattern, parts_begin, pattern_value
from jpeft.tree import dotted, nearest
from jpeft_interop.layout import Layout
from jpeft_interop.peft_config import PeftConfig
from jpeft_interop.peft_resolution import TASKS, Modules, heads_of, means, wrapped
from jpeft_interop.peft_types import type_of

MOST = 50  # patterns that are tried one by one
PATTERNS = ("rank_pattern", "alpha_pattern")  # fields of a spec
HEADLESS = ("FEATURE_EXTRACTION",)


def tell_of_config(config: PeftConfig, found: Mapping[str, Any], layout: Layout, file: str) -> None:
    """Warn of targets and patterns that match no module, of a task that is not the base's, and of a missing alpha.

    Args:
      config: the file's, read.
      found: the file's object.
      layout: whose modules it is for.
      file: the config's name.
    """
    told = (_left_out(config, found), _unmatched_targets(config, layout), _unmatched_patterns(config, layout))
    for what in itertools.chain(*told, _other_task(config, layout)):
        warnings.warn(f"{file}: {what}", stacklevel=4)


def _left_out(config: PeftConfig, found: Mapping[str, Any]) -> Iterable[str]:
    if (kind := type_of(config.spec)) is None:
        return
    for name in kind.stated:
        if name not in found:
            yield f"{name!r} is missing, which PEFT takes for {kind.defaults[name]!r}: write what was trained into it"


def _unmatched_targets(config: PeftConfig, layout: Layout) -> Iterable[str]:
    spec: Any = config.spec
    ends = {module[at:] for module in layout.modules for at in parts_begin(module)}
    names = spec.targets if isinstance(spec.targets, tuple) else ()
    unmatched = [name for name in names if dotted(name) not in ends]
    if unmatched:
        near = nearest(unmatched[0], layout.modules)
        yield f"of the targets {_some(unmatched)} match no module of this base; the nearest to the first are {near}"


def _unmatched_patterns(config: PeftConfig, layout: Layout) -> Iterable[str]:
    spec: Any = config.spec
    patterns = [name for field in PATTERNS for name, _ in frozen_mapping(getattr(spec, field, ()))]
    if spec.targets == ALL_LINEAR or not patterns:
        return
    targeted = [module for module in layout.modules if means(spec.where, module)]
    targeted += layout.parameters if config.parameters else ()
    order = tuple((pattern, at) for at, pattern in enumerate(patterns))
    used = {pattern_value(pairs, (module,), -1) for pairs in (order, order[::-1]) for module in targeted}
    rest = [pattern for pattern, at in order if at not in used]  # no one's first pattern, nor anyone's last
    unmatched = [pattern for pattern in rest[:MOST] if not any(matches_pattern(pattern, one) for one in targeted)]
    if unmatched:
        near = nearest(unmatched[0], targeted)
        yield f"of the patterns {_some(unmatched)} match no target; the nearest to the first are {near}"


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(f"{name!r:.80}" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


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
