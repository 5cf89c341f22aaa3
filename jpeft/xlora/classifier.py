"""The classifier: a small MLP from hidden states to logits of the experts.

    x_0 = h,    x_i = dropout(relu(x_{i-1} W_i + b_i)),    logits = x_{n-1} W_n + b_n

with W_n (in, K), or (in, layers, K) where each layer has scalings of its own.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array

from jpeft.draws import uniform
from jpeft.xlora.spec import XLoRA

Dense = dict[str, Array]
Classifier = tuple[Dense, ...]


def init(key: Array, spec: XLoRA, features: int, outputs: tuple[int, ...], dtype: jnp.dtype) -> Classifier:
    """Layers with kernel and bias from U(±1/sqrt(in)), as torch and so PEFT start them.

    Args:
      key: a PRNG key.
      spec: gives depth and width.
      features: the size of a hidden state.
      outputs: (K,), or (layers, K).
      dtype: of the leaves.
    """
    fan_ins = [features, *[spec.hidden] * (spec.depth - 1)]
    fan_outs = [*[(spec.hidden,)] * (spec.depth - 1), outputs]
    keys = jax.random.split(key, spec.depth)
    return tuple(dense(*one, spec.bias, dtype) for one in zip(keys, fan_ins, fan_outs, strict=True))


def dense(key: Array, fan_in: int, outputs: tuple[int, ...], bias: bool, dtype: jnp.dtype) -> Dense:
    """One layer: `kernel` (in, *outputs), and `bias` (*outputs) if it has one."""
    bound, keys = 1 / math.sqrt(fan_in), jax.random.split(key)
    shapes = {"kernel": (fan_in, *outputs)} | ({"bias": outputs} if bias else {})
    return {name: uniform(key, shape, bound, dtype) for key, (name, shape) in zip(keys, shapes.items(), strict=False)}


def logits(spec: XLoRA, classifier: Classifier, hidden: Array, key: Array | None = None) -> Array:
    """Hidden states (..., features) to logits (..., K) or (..., layers, K); with a key, dropout acts."""
    x = hidden.astype(classifier[0]["kernel"].dtype)
    for number, layer in enumerate(classifier[:-1]):
        x = jax.nn.relu(_product(x, layer))
        if key is not None and spec.dropout > 0:
            x = _dropped(jax.random.fold_in(key, number), x, spec.dropout)
    return _product(x, classifier[-1])


def _product(x: Array, layer: Dense) -> Array:
    y = jnp.tensordot(x, layer["kernel"], 1)
    return y + layer["bias"] if "bias" in layer else y


def _dropped(key: Array, x: Array, rate: float) -> Array:
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)
