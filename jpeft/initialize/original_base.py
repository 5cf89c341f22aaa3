"""From a changed base back to the original one: an ordinary LoRA of twice the rank, exactly the same model.

W + ΔW = W_res + s A B  and  W = W_res + s A₀ B₀,    so  ΔW = s (A B - A₀ B₀) = s [A, A₀] [B; -B₀]
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

from jpeft.adapter import Adapter
from jpeft.errors import SpecError
from jpeft.kernel import Kernel
from jpeft.methods.lora import LoRA
from jpeft.targets import frozen_mapping


def on_original_base(adapter: Adapter, initial: Adapter) -> Adapter:
    """The LoRA that does on the original base what `adapter` does on the base its initialiser changed.

    Ranks double, alpha is raised so that the scaling stays; it can go on training, or be exported for everybody.

    Args:
      adapter: after training.
      initial: as the initialiser returned it.

    Raises:
      SpecError: the two are no LoRAs of the same weights, ranks and scaling.

    Example:
      >>> import jax, jpeft
      >>> from jpeft.initialize import pissa
      >>> params = {"kernel": jnp.array([[3.0, 0.0], [0.0, 1.0]])}
      >>> initial, residual = pissa(jpeft.init(jax.random.key(0), jpeft.LoRA(rank=1), params), params)
      >>> trained = initial.replace(trained=jax.tree.map(lambda leaf: leaf + 1, initial.trained))
      >>> one = jpeft.apply(residual, trained)["kernel"]
      >>> other = jpeft.apply(params, on_original_base(trained, initial))["kernel"]
      >>> bool(jnp.allclose(one, other, atol=1e-6))
      True
    """
    if type(adapter.spec) is not LoRA:
        raise SpecError(f"on_original_base is for a jpeft.LoRA; found {type(adapter.spec).__name__}")
    _check_same(adapter, initial)
    spec = _doubled(adapter.spec)
    new = tuple(dataclasses.replace(s, rank=2 * s.rank) if s.method == "lora" else s for s in adapter.sites)
    trained = {
        site.path: _joined(adapter.trained[site.path], initial.trained[site.path], site.kernel)
        if site.method == "lora"
        else adapter.trained[site.path]
        for site in adapter.sites
    }
    return adapter.replace(trained=trained, meta=dataclasses.replace(adapter.meta, spec=spec, sites=new))


def _check_same(adapter: Adapter, initial: Adapter) -> None:
    if adapter.meta != initial.meta:
        raise SpecError(
            "the two adapters differ in more than their trained arrays; give the trained adapter and the one that its "
            f"initialiser returned. Found {adapter.spec} and {initial.spec}{_first_difference(adapter, initial)}"
        )
    for site in adapter.sites:
        if "mask" in adapter.constant.get(site.path, {}):
            raise SpecError(f"{site.path!r} holds blocks of directions (a mask); no initialiser makes such")
        one, other = (a.constant.get(site.path, {}).get("scaling") for a in (adapter, initial))
        if site.method == "lora" and not _equal(one, other):
            raise SpecError(f"{site.path!r}: the scaling changed from {other} to {one}; the start has the first")


def _equal(one: Any, other: Any) -> bool:
    # Under jit values are not there to compare.
    return isinstance(one, Tracer) or isinstance(other, Tracer) or bool(jnp.array_equal(one, other))


def _first_difference(adapter: Adapter, initial: Adapter) -> str:
    ours, theirs = ({site.path: site for site in a.sites} for a in (adapter, initial))
    differ = [path for path in sorted(ours | theirs) if ours.get(path) != theirs.get(path)]
    return f"; the sites differ first at {differ[0]!r}" if differ else ""


def _joined(leaves: dict[str, Array], first: dict[str, Array], kernel: Kernel) -> dict[str, Array]:
    """[A, A₀] and [B; -B₀] in the weight's own axes; a bias of B adds up like the product."""
    rank_axis = len(kernel.batch)
    joined = {
        "a": jnp.concatenate([leaves["a"], first["a"].astype(leaves["a"].dtype)], -1),
        "b": jnp.concatenate([leaves["b"], -first["b"].astype(leaves["b"].dtype)], rank_axis),
    }
    return joined | ({"bias": leaves["bias"] - first["bias"]} if "bias" in leaves else {})


def _doubled(spec: LoRA) -> LoRA:
    """Ranks doubled, alpha so that alpha / r (or alpha / √r) stays."""
    factor: Any = 2**0.5 if spec.rank_stabilized else 2
    return dataclasses.replace(
        spec,
        rank=2 * spec.rank,
        alpha=factor * (spec.rank if spec.alpha is None else spec.alpha),
        rank_pattern=tuple((name, 2 * rank) for name, rank in frozen_mapping(spec.rank_pattern)),
        alpha_pattern=tuple((name, factor * alpha) for name, alpha in frozen_mapping(spec.alpha_pattern)),
    )
