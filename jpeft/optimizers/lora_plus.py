"""LoRA+: two learning rates.

    A ← A - η u_A,    B ← B - λ η u_B,    λ > 1

with u what the inner optimizer makes of the gradient. Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large
Models", arXiv:2402.12354. The grouping is PEFT's `create_loraplus_optimizer`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax

from jpeft.adapter import Adapter
from jpeft.errors import SpecError
from jpeft.site import Site

Rate = float | Callable[[Any], Any]
Groups = dict[str, dict[str, str]]


def lora_plus(
    adapter: Adapter,
    learning_rate: Rate,
    ratio: float,
    *,
    inner: optax.GradientTransformation | None = None,
    embedding_learning_rate: Rate = 1e-6,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """An optimizer of `adapter.trained` with `ratio` times the learning rate for B.

    | leaf | learning rate | decays |
    |---|---|---|
    | A; matrices trained whole | `learning_rate` | yes |
    | B; a DoRA's magnitudes; vectors trained whole (norms) | `ratio * learning_rate` | matrices and magnitudes |
    | a bias, of B or trained whole | `ratio * learning_rate` | no |
    | A and B of an embedding | `embedding_learning_rate` | yes |

    A leaf trained whole is judged by its own axes: where layers are stacked, a norm's scales are a matrix here. Of
    vectors that are no biases, PEFT decays those that are not in a LayerNorm; what they are in can't be seen here.

    Args:
      adapter: whose leaves are grouped; its arrays are not read.
      learning_rate: η, a number or an optax schedule.
      ratio: λ; the paper's advice is 16 and up, with a smaller η than usual.
      inner: what comes before the learning rate: `optax.scale_by_adam()` if None, as in AdamW; any other of optax's
        `scale_by_...`, a chain of them, or `optax.identity()` for plain gradient descent.
      embedding_learning_rate: of an adapted embedding's factors, a number or a schedule.
      weight_decay: as in AdamW: each step takes this, times the leaf's own learning rate, from it.

    Raises:
      SpecError: a ratio that is not positive, or `inner` a function instead of what it returns.

    Example:
      >>> import jax, jax.numpy as jnp, jpeft
      >>> adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=1), {"kernel": jnp.ones((3, 2))})
      >>> optimizer = lora_plus(adapter, 0.5, ratio=16, inner=optax.identity())
      >>> ones = jax.tree.map(jnp.ones_like, adapter.trained)
      >>> updates, _ = optimizer.update(ones, optimizer.init(adapter.trained), adapter.trained)
      >>> updates["kernel"]["b"].tolist()
      [[-8.0, -8.0]]
    """
    if not ratio > 0:
        raise SpecError(f"lora_plus: ratio must be > 0; found {ratio}")
    inner = optax.scale_by_adam() if inner is None else inner
    if not isinstance(inner, optax.GradientTransformation):
        raise SpecError(f"lora_plus: inner is a transformation, as in inner=optax.scale_by_lion(); found {inner!r}")
    rates: dict[str, Rate] = {
        "a": learning_rate,
        "b": _times(ratio, learning_rate),
        "bias": _times(ratio, learning_rate),
        "embedding": embedding_learning_rate,
    }
    groups = groups_of(adapter)
    decays = {path: {name: group != "bias" for name, group in leaves.items()} for path, leaves in groups.items()}
    steps: Any = {group: optax.scale_by_learning_rate(rate) for group, rate in rates.items()}
    return optax.chain(inner, optax.add_decayed_weights(weight_decay, decays), optax.partition(steps, groups))


def _times(ratio: float, rate: Rate) -> Rate:
    return (lambda step: ratio * rate(step)) if callable(rate) else ratio * rate


def groups_of(adapter: Adapter) -> Groups:
    """By path and leaf: `a`, `b`, `bias` (B's rate, no decay) or `embedding`.

    Example:
      >>> import jax, jax.numpy as jnp, jpeft
      >>> params = {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}
      >>> groups_of(jpeft.init(jax.random.key(0), jpeft.LoRA(rank=1, bias="all"), params))
      {'dense/bias': {'value': 'bias'}, 'dense/kernel': {'a': 'a', 'b': 'b'}}
    """
    sites = {site.path: site for site in adapter.sites}
    return {
        path: {name: _group(sites[path], name, leaf) for name, leaf in leaves.items()}
        for path, leaves in adapter.trained.items()
    }


def _group(site: Site, name: str, leaf: Any) -> str:
    if site.method == "replacement":
        return "a" if leaf.ndim > 1 and not _is_bias(site.path) else "bias"
    if site.kernel.kind == "embedding":
        return "embedding"
    return {"b": "b", "m": "b", "bias": "bias"}.get(name, "a")


def _is_bias(path: str) -> bool:
    return path.rpartition("/")[2] == "bias"
