"""The two passes of an X-LoRA: one to see what a token is about, one with the experts mixed for it.

    h = model(W),    z_tlk = classifier(h_t),    s_tl = top-k(softmax(z_tl / T)),
    y_t = x_t W_l + w Σ_k s_tlk (α_k/r_k) (x_t A_lk) B_lk       at each adapted weight l, for each token t

with h the last hidden states, no gradient through them, and w the global weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jpeft.attach import attach
from jpeft.errors import LiftError
from jpeft.kernel import wide
from jpeft.lift import lift as lift_adapters
from jpeft.xlora import classifier as mlp
from jpeft.xlora.mixture import Layer, Mixture, layers_of
from jpeft.xlora.spec import XLoRA


def last_hidden_state(output: Any) -> Array:
    """(batch, tokens, features), of a record or mapping with `last_hidden_state`, or with `hidden_states`.

    Raises:
      LiftError: it has neither.
    """
    get = output.get if isinstance(output, Mapping) else lambda name: getattr(output, name, None)
    if (last := get("last_hidden_state")) is not None:
        return last
    if states := get("hidden_states"):
        return states[-1]
    raise LiftError(
        f"the model's result, a {type(output).__name__}, has neither last_hidden_state nor hidden_states; say where "
        "the hidden states are: jpeft.xlora.lift(model, hidden=lambda output: ...)"
    )


def lift(
    model: Callable[..., Any], *, hidden: Callable[[Any], Array] = last_hidden_state
) -> Callable[..., tuple[Any, Array]]:
    """`model` with a mixture: `run(params, mixture, *inputs, dropout_key=None, **options) -> (output, scalings)`.

    The output is the model's own, of the second pass; `scalings` is what each expert got, see `scalings`. Pure, for
    jit and grad; nothing flows back through the first pass, as in PEFT.

    Args:
      model: a plain function of params and inputs, not lifted.
      hidden: the hidden states (batch, tokens, features) in the model's result.

    Raises (the function it returns):
      LiftError: no hidden states, or of another shape; a cache, which only holds what one of the passes saw.
      KernelError: the experts were made for other params.

    Example:
      >>> import jpeft
      >>> model = lambda params, x: {"last_hidden_state": x @ params["kernel"]}
      >>> params = {"kernel": jnp.ones((3, 3))}
      >>> expert = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=1), params)
      >>> mixture = jpeft.xlora.init(jax.random.key(1), jpeft.xlora.XLoRA(), {"a": expert}, features=3)
      >>> output, scalings = lift(model)(params, mixture, jnp.ones((1, 4, 3)))
      >>> scalings.shape  # batch, tokens, layers, experts
      (1, 4, 1, 1)
    """
    lifted = lift_adapters(model)

    def run(params: Any, mixture: Mixture, *inputs: Any, dropout_key: Array | None = None, **options: Any) -> Any:
        _check(mixture, options)
        keys = (None, None, None) if dropout_key is None else tuple(jax.random.split(dropout_key, 3))
        first = lifted(_first_params(params, mixture, keys[0]), *inputs, **options)
        states = jax.lax.stop_gradient(hidden(first))
        mixed = scalings(mixture, states, dropout_key=keys[1])
        experts = [mixture.experts[name] for name in mixture.names]
        gates = _by_path(mixture.spec.global_weight * mixed, layers_of(mixture.experts))
        return lifted(attach(params, experts, gates=gates, dropout_key=keys[2]), *inputs, **options), mixed

    return run


def scalings(mixture: Mixture, hidden: Array, *, dropout_key: Array | None = None) -> Array:
    """How much of each expert each token gets, without the global weight.

    Args:
      mixture: K experts on some weights, the layers.
      hidden: (batch, tokens, features).
      dropout_key: turns on the classifier's dropout.

    Returns:
      (batch, tokens, layers, K), fp32 at least: layers as `layers_of` has them, experts as `mixture.names`. Equal for
      all layers unless the spec is layer-wise. PEFT's `get_latest_scalings` is the same before the top-k.

    Raises:
      LiftError: hidden states of another shape.
    """
    if hidden.ndim != 3 or hidden.shape[-1] != mixture.features:
        raise LiftError(
            f"expected hidden states (batch, tokens, {mixture.features}), as the classifier reads; found {hidden.shape}"
        )
    found = from_logits(mixture.spec, mlp.logits(mixture.spec, mixture.classifier, hidden, dropout_key))
    if mixture.spec.layerwise:
        return found
    layers = sum(layer.size for layer in layers_of(mixture.experts))
    return jnp.broadcast_to(found[..., None, :], (*found.shape[:-1], layers, found.shape[-1]))


def from_logits(spec: XLoRA, logits: Array) -> Array:
    """The scalings (..., K) that logits (..., K) stand for.

    PEFT leaves a scaling of exactly 0 out of the softmax of the top-k; here those that were chosen are in it.
    """
    found = wide(logits)
    if spec.softmax:
        found = jax.nn.softmax(found / spec.temperature, axis=-1)
    if spec.top_k is None:
        return found
    kept = jax.nn.one_hot(jax.lax.top_k(found, spec.top_k)[1], found.shape[-1], dtype=bool).any(-2)
    if spec.softmax_topk:
        return jax.nn.softmax(found, axis=-1, where=kept)
    return jnp.where(kept, found, 0)


def _first_params(params: Any, mixture: Mixture, key: Array | None) -> Any:
    """What the first pass runs on: the base alone, or with every expert at the same value."""
    value = mixture.spec.scaling_pass_value
    if value == 0:
        return params
    weight = mixture.spec.global_weight * (1 / len(mixture.names) if value is None else value)
    experts = [mixture.experts[name] for name in mixture.names]
    return attach(params, experts, [weight] * len(experts), dropout_key=key)


def _by_path(gates: Array, layers: tuple[Layer, ...]) -> dict[str, Array]:
    """(batch, tokens, layers, K) as (*stack, batch, tokens, K) by path."""
    found, start = {}, 0
    for path, shape in layers:
        size = Layer(path, shape).size
        own = jnp.moveaxis(gates[:, :, start : start + size], 2, 0)
        found[path] = own.reshape(*shape, *own.shape[1:])
        start += size
    return found


def _check(mixture: Any, options: Mapping[str, Any]) -> None:
    if not isinstance(mixture, Mixture):
        raise TypeError(
            f"expected a mixture, made by jpeft.xlora.init(key, spec, experts, features); found "
            f"{type(mixture).__name__}"
        )
    if options.get("cache") is not None:
        raise LiftError(
            "an X-LoRA reads every token twice, and a cache holds what one of the passes saw; leave cache= out"
        )
