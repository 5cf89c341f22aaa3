"""Mixtures with other experts: the classifier keeps what it knows of those that stay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from jpeft.adapter import Adapter
from jpeft.errors import SpecError
from jpeft.xlora import classifier as mlp
from jpeft.xlora.mixture import Mixture, check_experts, layers_of, outputs_of


def select(mixture: Mixture, names: Sequence[str]) -> Mixture:
    """The mixture of some of its experts, in this order: to remove one, to switch two.

    Raises:
      SpecError: no such expert, one twice, or fewer than `top_k`.

    Example:
      >>> import jpeft
      >>> params = {"kernel": jax.numpy.ones((3, 2))}
      >>> expert = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=1), params)
      >>> mixture = jpeft.xlora.init(jax.random.key(1), jpeft.xlora.XLoRA(), {"a": expert, "b": expert}, features=3)
      >>> select(mixture, ["b"]).names
      ('b',)
    """
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        if name not in mixture.experts or names.count(name) > 1:
            known = f"{list(mixture.names)!s:.500}"
            raise SpecError(f"expected some of the experts {known}, each once; found {name!r:.100}")
    experts = {name: mixture.experts[name] for name in names}
    check_experts(mixture.spec, experts)
    return _changed(mixture, experts, jax.random.key(0))  # nothing is new, so nothing that is drawn stays


def add(mixture: Mixture, name: str, expert: Adapter, key: Array) -> Mixture:
    """The mixture with one expert more, the last: for it, and for layers that are new, the classifier starts anew.

    Raises:
      SpecError: the name is taken, or the expert can't be mixed.
      TypeError: it is no adapter.
    """
    if name in mixture.experts:
        known = f"{list(mixture.names)!s:.500}"
        raise SpecError(f"there is an expert {name!r:.100} already, of {known}; remove it first: xlora.select")
    experts = {**{known: mixture.experts[known] for known in mixture.names}, name: expert}
    check_experts(mixture.spec, experts)
    return _changed(mixture, experts, key)


def _changed(mixture: Mixture, experts: dict[str, Adapter], key: Array) -> Mixture:
    """A last layer for these experts; the columns of what was there before are carried over."""
    to, source = (np.array(one) for one in zip(*_shared(mixture, experts), strict=True))
    old = mixture.classifier[-1]
    fan_in, dtype, outputs = old["kernel"].shape[0], old["kernel"].dtype, outputs_of(mixture.spec, experts)
    flat = lambda leaf: leaf.reshape(*leaf.shape[: leaf.ndim - len(outputs)], -1)
    carried = {
        name: flat(leaf).at[..., to].set(flat(old[name])[..., source]).reshape(leaf.shape)
        for name, leaf in mlp.dense(key, fan_in, outputs, mixture.spec.bias, dtype).items()
    }
    return Mixture(experts, (*mixture.classifier[:-1], carried), mixture.spec, tuple(experts))


def _shared(mixture: Mixture, experts: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """New and old number of each output that both have."""
    new = _columns(mixture, experts, tuple(experts))
    old = _columns(mixture, mixture.experts, mixture.names)
    return ((number, old[what]) for what, number in new.items() if what in old)


def _columns(mixture: Mixture, experts: Mapping[str, Adapter], names: tuple[str, ...]) -> dict[Any, int]:
    """The number of each output, in one row: by matrix of a layer and expert, or by expert."""
    matrices: list[Any] = [None]
    if mixture.spec.layerwise:
        matrices = [(layer.path, index) for layer in layers_of(experts) for index in range(layer.size)]
    outputs = [(matrix, name) for matrix in matrices for name in names]
    return {what: number for number, what in enumerate(outputs)}
