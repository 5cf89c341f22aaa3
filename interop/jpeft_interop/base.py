"""The base model for a task: a folder's weights under the head that the task needs, and the adapter for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

import jpeft
from jpeft.errors import AdapterError, WeightsError
from jpeft.tree import flatten, replace
from jpeft_interop.adapter_head import LABEL_LAYERS, labels_of
from jpeft_interop.load_model import Home, hf_folder, load_model, read_config
from jpeft_interop.load_peft import load_peft, read_peft_config
from jpeft_interop.models import ModelError, Output, build, family, pure
from jpeft_interop.models.reading import number_of_labels
from jpeft_interop.weights import read_weights


@dataclass(frozen=True)
class TaskKind:
    """What a task is called elsewhere.

    Attributes:
      name: here.
      peft: in PEFT's `task_type`.
      endings: of transformers' class names.
      auto: transformers' class that finds the right one.
    """

    name: str
    peft: str
    endings: tuple[str, ...]
    auto: str


CAUSAL_LM = TaskKind("causal-lm", "CAUSAL_LM", ("ForCausalLM", "LMHeadModel"), "AutoModelForCausalLM")
CLASSIFICATION = TaskKind(
    "classification", "SEQ_CLS", ("ForSequenceClassification",), "AutoModelForSequenceClassification"
)
TASKS = {kind.name: kind for kind in (CAUSAL_LM, CLASSIFICATION)}


@dataclass(frozen=True)
class Base:
    """A base model, ready for its task.

    Attributes:
      folder: with config and safetensors.
      task: what it is for.
      architecture: transformers' class name.
      forward: the pure function.
      params: what it takes.
      heads: the modules of its head that are trained whole; empty for a language model.
      labels: how many classes it tells apart; None for a language model.
    """

    folder: Path
    task: TaskKind
    architecture: str
    forward: Callable[..., Output]
    params: dict[str, Any]
    heads: tuple[str, ...] = ()
    labels: int | None = None


def load_base(
    folder: str | Path,
    task: TaskKind,
    *,
    dtype: DTypeLike | None = None,
    labels: int | None = None,
    key: Any = None,
    home: Home | None = None,
) -> Base:
    """The model of a folder under the task's head.

    Args:
      folder: a Hugging Face folder, or one with a GGUF file.
      task: what it is to do.
      dtype: of the params; the weights' own if None.
      labels: of a classifier, how many classes; what the config says if None.
      key: with which to initialise a classifier's head that the folder lacks.
      home: as of `load_model`.

    Raises:
      ModelError: the family has no model for the task.
      WeightsError: weights that do not fit, or a head for another number of classes.
    """
    folder = hf_folder(folder)
    config = read_config(folder)
    architecture = _architecture(config, task, folder)
    if task is CAUSAL_LM:
        return Base(folder, task, architecture, *load_model(folder, dtype, architecture, home=home))
    labels = number_of_labels(config) if labels is None else labels
    forward, params = load_model(folder, dtype, architecture, init_missing=key, home=home)
    heads = tuple(sorted(set(params) - {family(config.get("model_type")).prefix}))
    if labels != number_of_labels(config):
        _refuse_own_head(folder, heads, number_of_labels(config), labels)
        forward, params = _with_labels(config, architecture, params, labels, key)
    return Base(folder, task, architecture, forward, params, heads, labels)


def _architecture(config: Mapping[str, Any], task: TaskKind, folder: Path) -> str:
    known = [name for name, _ in family(config.get("model_type")).architectures]
    named = [name for name in [*(config.get("architectures") or ()), *known] if name.endswith(task.endings)]
    if not named:
        raise ModelError(f"{folder}: a {config['model_type']} model does not do {task.name}; it has {', '.join(known)}")
    return named[0]


def _refuse_own_head(folder: Path, heads: tuple[str, ...], found: int, wanted: int) -> None:
    if any(key.startswith(tuple(f"{head}." for head in heads)) for key in read_weights(folder)):
        raise WeightsError(
            f"{folder}: the model's own head tells {found} classes apart, the data has {wanted}; use a model without a "
            "head of its own, or data with its labels"
        )


def _with_labels(
    config: Mapping[str, Any], architecture: str, params: dict[str, Any], labels: int, key: Any
) -> tuple[Callable[..., Output], dict[str, Any]]:
    """The same model with a fresh head for that many classes."""
    dtype = jax.tree.leaves(params)[0].dtype
    wanted = {**config, "num_labels": labels, "id2label": None}
    make = lambda rngs=None: build(wanted, dtype, architecture, rngs=rngs)
    forward, abstract = pure(nnx.eval_shape(make))
    shapes = {path: leaf.shape for path, leaf in flatten(abstract).items()}
    other = [path for path, leaf in flatten(params).items() if leaf.shape != shapes[path]]
    draw = jax.jit(lambda key: {path: flatten(nnx.state(make(nnx.Rngs(key))))[path] for path in other})
    return forward, replace(params, draw(jax.random.key(0) if key is None else key))


def load_adapted(
    folder: str | Path, adapter_folder: str | Path | None, *, dtype: DTypeLike | None = None
) -> tuple[Base, jpeft.Adapter | None]:
    """A base and the adapter that PEFT or `save_peft` wrote for it; the adapter's config tells the task.

    Raises:
      AdapterError: the adapter is broken, or does not fit the base.
      WeightsError: the base is broken.
    """
    if adapter_folder is None:
        config = read_config(hf_folder(folder))
        first = str(next(iter(config.get("architectures") or ()), ""))
        task = CLASSIFICATION if first.endswith(CLASSIFICATION.endings) else CAUSAL_LM
        return load_base(folder, task, dtype=dtype), None
    task = _task_of(adapter_folder)
    if task is CAUSAL_LM:
        base = load_base(folder, task, dtype=dtype)
    else:  # the head's values are in the adapter; these only give it a place
        labels = labels_of(adapter_folder)
        if labels is None:
            names = ", ".join(LABEL_LAYERS)
            raise AdapterError(f"{adapter_folder}: expected the weights of a classifier's head ({names}); found none")
        base = load_base(folder, task, dtype=dtype, labels=labels, key=jax.random.key(0))
    return base, load_peft(adapter_folder, base.params)


def _task_of(adapter_folder: str | Path) -> TaskKind:
    stated = read_peft_config(adapter_folder).task_type
    found = next((kind for kind in TASKS.values() if kind.peft == stated), CAUSAL_LM if stated is None else None)
    if found is None:
        known = ", ".join(kind.peft for kind in TASKS.values())
        raise AdapterError(f"{adapter_folder}: expected a task_type of {known}; found {stated!r}")
    return found
