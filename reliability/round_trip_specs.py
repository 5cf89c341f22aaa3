"""Adapters at random for `round_trips.py`: every option that PEFT's files have, and names that are easily confused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jpeft
from jpeft.targets import resolve
from jpeft.tree import dotted, module_of
from jpeft_interop.serving import Target
from reliability.round_trip_bases import Base

FOLDERS = ("adapter", "lora", "base_layer", "modules_to_save", "0", "default", "a.b c", "ü", "layers")
NOTHING = ("nothing_here", "roj", "layers.7")  # which no module is called, nor ends in from a dot on
METHODS = ("lora",) * 6 + ("dora",) * 2 + ("adalora", "ia3")


@dataclass(frozen=True)
class Trip:
    """What is saved, and how.

    Attributes:
      spec: of the adapter that `jpeft.init` makes.
      saved_spec: the same with names that mean nothing, as a spec read from a file may have.
      dtype: of the factors.
      task_type: for `save_peft`.
      target: for `save_peft`.
      folder: its name.
      prune: whether an AdaLoRA is pruned.
    """

    seed: int
    spec: Any
    saved_spec: Any
    dtype: Any = jnp.float32
    task_type: str | None = None
    target: Target = "peft"
    folder: str = "adapter"
    prune: bool = False

    def __str__(self) -> str:
        told = {
            "task_type": self.task_type,
            "target": self.target if self.target != "peft" else None,
            "dtype": None if self.dtype == jnp.float32 else jnp.dtype(self.dtype).name,
            "prune": self.prune or None,
        }
        options = "".join(f" {name}={value!r}" for name, value in told.items() if value is not None)
        return f"{self.saved_spec!r}{options}"


def drawn(base: Base, seed: int) -> Trip:
    """The same for the same base and seed."""
    draw = Random(f"{base.name} {seed}")
    method = draw.choice(METHODS)
    names = targetable(base)
    task_type = draw.choice(base.other_tasks if draw.random() < 0.06 else base.tasks)
    where = _where(draw, base, names)
    if task_type == "SEQ_CLS" and "classifier" in base.saved and draw.random() < 0.85:  # PEFT takes it for saved
        where["modules_to_save"] = sorted({*where.get("modules_to_save", ()), "classifier"})
    while not (modules := _resolved(base, where)) and (more := sorted(where.keys() - {"targets", "modules_to_save"})):
        where.pop(draw.choice(more))
    modules = modules or names
    spec = {"lora": _lora, "dora": _dora, "adalora": _adalora, "ia3": _ia3}[method](draw, where, modules)
    plain = method in ("lora", "adalora") and spec.bias == "none" and not spec.modules_to_save
    return Trip(
        seed,
        spec,
        _with_nothing(draw, spec),
        dtype=jnp.bfloat16 if draw.random() < 0.1 else jnp.float32,
        task_type=task_type,
        target="vllm" if plain and draw.random() < 0.2 else "peft",
        folder=draw.choice(FOLDERS),
        prune=method == "adalora" and draw.random() < 0.5,
    )


def targetable(base: Base) -> list[str]:
    """The dotted name of every weight that may be a target: its module's, or its own where it is no module's."""
    return sorted({_label(base, path) for path in base.layout.kernels})


def _label(base: Base, path: str) -> str:
    module = dotted(module_of(path))
    return module if module in base.layout.modules else dotted(path)


def _resolved(base: Base, where: dict[str, Any]) -> list[str]:
    """What the targets mean; nothing where they are refused."""
    try:
        return [_label(base, path) for path in resolve(jpeft.LoRA(**where).where, base.layout.kernels)]
    except jpeft.JpeftError:
        return []


def _maybe(draw: Random, chance: float, make: Any, otherwise: Any) -> Any:
    return make() if draw.random() < chance else otherwise


def _where(draw: Random, base: Base, names: Sequence[str]) -> dict[str, Any]:
    """The targets, and what else says which weights are trained."""
    where: dict[str, Any] = {"targets": _targets(draw, names)}
    if draw.random() < 0.25:
        where["exclude"] = draw.choice([_some(draw, names, 2), rf".*\.{draw.randint(0, 2)}\..*"])
    if draw.random() < 0.2:
        where["layers_to_transform"] = draw.sample(range(2), draw.randint(1, 2))
        where["layers_pattern"] = draw.choice([(), base.numbered])
    if draw.random() < 0.4:
        where["modules_to_save"] = draw.sample(base.saved, draw.choice([1, 1, 2]))
    return where


def _targets(draw: Random, names: Sequence[str]) -> Any:
    kind = draw.choice(["all-linear", "ends", "ends", "suffixes", "full", "regex", "none"])
    if kind == "all-linear":
        return kind
    if kind == "none" and draw.random() < 0.3:
        return []
    if kind == "full":
        return draw.sample(names, draw.randint(1, 5))
    if kind == "regex":
        either = "|".join(re.escape(_end(name)) for name in draw.sample(names, draw.randint(1, 3)))
        return draw.choice([rf".*\.({either})", rf".*\.[01]\..*({either})", rf"(.*\.)?({either})"])
    return _some(draw, names, 4, depth=1 if kind == "ends" else 3)


def _some(draw: Random, names: Sequence[str], most: int, depth: int = 3) -> list[str]:
    """Ends of names, each of so many parts."""
    return sorted({_end(name, draw.randint(1, depth)) for name in draw.sample(names, draw.randint(1, most))})


def _end(name: str, parts: int = 1) -> str:
    return ".".join(name.split(".")[-parts:])


def _patterns(draw: Random, modules: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    """Values by patterns: often two that match one module, the narrower first or last; the order is the meaning."""
    name = draw.choice(modules)
    keys = [_pattern(draw, draw.choice(modules)) for _ in range(draw.randint(0, 2))]
    if draw.random() < 0.6:
        both = [_end(name, draw.randint(2, 4)), _end(name)]
        keys += both if draw.random() < 0.5 else both[::-1]
    return {key: draw.choice(values) for key in keys}


def _pattern(draw: Random, name: str) -> str:
    """A name's end, or a regex that matches it."""
    end = _end(name, draw.randint(1, 4))
    forms = [end, end, re.escape(end), rf".*{_end(name)}", re.sub(r"\b\d+\b", r"\\d+", end), rf"({end}|{_end(name)})"]
    return draw.choice(forms)


def _low_rank(draw: Random, where: dict[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    alphas = [1, 3, 8, 16.5, 0.7]
    return {
        **where,
        "rank": draw.choice([1, 2, 3, 4, 6]) if draw.random() < 0.97 else 0,
        "alpha": draw.choice([None, *alphas]),
        "rank_stabilized": draw.random() < 0.3,
        "rank_pattern": _maybe(draw, 0.45, lambda: _patterns(draw, modules, [0, 1, 2, 3, 5, 7]), {}),
        "alpha_pattern": _maybe(draw, 0.35, lambda: _patterns(draw, modules, alphas), {}),
        "bias": draw.choice(["none", "none", "none", "all", "lora_only"]),
    }


def _lora(draw: Random, where: dict[str, Any], modules: Sequence[str]) -> jpeft.LoRA:
    return jpeft.LoRA(**_low_rank(draw, where, modules), factor_bias=draw.random() < 0.12)


def _dora(draw: Random, where: dict[str, Any], modules: Sequence[str]) -> jpeft.DoRA:
    return jpeft.DoRA(**_low_rank(draw, where, modules))


def _adalora(draw: Random, where: dict[str, Any], modules: Sequence[str]) -> jpeft.AdaLoRA:
    return jpeft.AdaLoRA(
        **where,
        rank=draw.randint(2, 5),
        target_rank=draw.randint(1, 2),
        alpha=draw.choice([None, 3, 16.5]),
        total_steps=10 if draw.random() < 0.95 else None,
        bias=draw.choice(["none", "none", "all", "lora_only"]),
    )


def _ia3(draw: Random, where: dict[str, Any], modules: Sequence[str]) -> jpeft.IA3:
    feedforward = _maybe(draw, 0.6, lambda: _some(draw, modules, min(2, len(modules))), [])
    if feedforward and draw.random() < 0.3:
        feedforward = rf".*{re.escape(feedforward[0])}"
    return jpeft.IA3(**where, feedforward=feedforward, bias="all" if draw.random() < 0.05 else "none")


def _with_nothing(draw: Random, spec: Any) -> Any:
    """The spec, now and then with a name that means nothing, as in files that `load_peft` reads."""
    if draw.random() < 0.12 and isinstance(spec, jpeft.LoRA):
        named = "rank_pattern" if draw.random() < 0.5 else "alpha_pattern"
        old, more = getattr(spec, named), ((draw.choice(NOTHING), 4),)
        return replace(spec, **{named: (*more, *old) if draw.random() < 0.5 else (*old, *more)})
    if draw.random() < 0.06 and isinstance(spec.targets, tuple) and spec.targets:
        return replace(spec, targets=(*spec.targets, draw.choice(NOTHING)))
    return spec


def made(base: Base, trip: Trip) -> jpeft.Adapter:
    """The trip's adapter, every trained value of it random, none without effect.

    Raises:
      JpeftError: `jpeft.init` refuses the spec.
    """
    adapter = jpeft.init(
        jax.random.key(trip.seed), trip.spec, base.params, kernels=base.layout.kernels, dtype=trip.dtype
    )
    draw = np.random.default_rng(trip.seed)
    trained = {path: _filled(draw, adapter, path) for path in sorted(adapter.trained)}
    adapter = adapter.replace(trained=trained)
    adapter = jpeft.prune(adapter) if trip.prune else adapter
    meta = adapter.meta if trip.saved_spec == trip.spec else replace(adapter.meta, spec=trip.saved_spec)
    return adapter.replace(meta=meta)


def _filled(draw: np.random.Generator, adapter: jpeft.Adapter, path: str) -> dict[str, Any]:
    """Values whose ΔW is as large as the base's weights, whatever the scaling."""
    leaves = adapter.trained[path]
    scaling = np.asarray(adapter.constant.get(path, {}).get("scaling", 1))
    rank = max(1, next(site.rank for site in adapter.sites if site.path == path))
    size = 0.1 / (max(1e-3, float(np.abs(scaling).max())) * rank**0.5)
    new = {}
    for name, leaf in sorted(leaves.items()):
        noise = draw.standard_normal(leaf.shape, np.float32)
        value = {
            "a": noise,
            "b": size * noise,
            "e": noise * (draw.random(leaf.shape) < 0.7),
            "bias": size * noise,
            "l": 1 + 0.3 * noise,
            "l_in": 1 + 0.3 * noise,
            "m": np.asarray(leaf, np.float32) * (1 + 0.2 * noise),
            "value": np.asarray(leaf, np.float32) + 0.1 * noise,
        }[name]
        new[name] = jnp.asarray(value, leaf.dtype)
    return new
