"""Many adapters as one: the same leaves, with an axis in front for the adapters, for `jax.vmap` and `jax.lax.map`.

A row of a batch to each its own adapter, of those stacked, costs little more than one adapter for all:

    fast, many = jpeft.lift(forward), jpeft.stack(adapters)
    one = lambda adapter, row: fast(jpeft.attach(params, adapter), row[None])[0]
    logits = jax.vmap(one)(jax.tree.map(lambda leaf: leaf[ids], many), rows)

`ids` (rows,) may change without compiling again. The product with the frozen weight stays one product for all rows:
only the adapter and the row are mapped over. `attach(..., gates=ids)` does the same with all adapters side by side, for
any number of low-rank adapters of different shapes and for gates of any kind; its arithmetic grows with their number.
"""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp

from jpeft.adapter import Adapter
from jpeft.errors import SpecError


def stack(adapters: Iterable[Adapter]) -> Adapter:
    """Adapters of one kind as one whose leaves have an axis in front, for `jax.vmap`; no adapter itself to `attach`.

    Args:
      adapters: alike but for the values: the same weights, methods, ranks and dropout. They may differ in alpha.

    Returns:
      the leaves stacked, and the first one's spec; `jax.tree.map(lambda leaf: leaf[k], stacked)` is the k-th.

    Raises:
      SpecError: there are none, or they differ in more than values.

    Example: three rows, the second adapter for the first of them and the first one for the others.
      >>> import jpeft
      >>> params = {"kernel": jnp.ones((4, 2))}
      >>> many = stack(jpeft.init(jax.random.key(k), jpeft.LoRA(rank=1), params) for k in range(2))
      >>> forward = jpeft.lift(lambda params, x: x @ params["kernel"])
      >>> one = lambda adapter, row: forward(jpeft.attach(params, adapter), row[None])[0]
      >>> jax.vmap(one)(jax.tree.map(lambda leaf: leaf[jnp.array([1, 0, 0])], many), jnp.ones((3, 4))).shape
      (3, 2)
    """
    found = list(adapters)
    if not found:
        raise SpecError("stack takes one adapter or more; found none")
    for number, adapter in enumerate(found):
        _check_alike(found[0], adapter, number)
    leaves = [(adapter.trained, adapter.constant) for adapter in found]
    trained, constant = jax.tree.map(lambda *values: jnp.stack(values), *leaves)
    return found[0].replace(trained=trained, constant=constant)


def _check_alike(first: Adapter, other: Adapter, number: int) -> None:
    advice = "only adapters that differ in nothing but values can be stacked; attach(..., gates=) takes others, too"
    if (own := other.spec.dropout_rate) != first.spec.dropout_rate:
        raise SpecError(f"adapter {number} has dropout {own}, adapter 0 has {first.spec.dropout_rate}; {advice}")
    sites, wanted = ({site.path: site for site in adapter.sites} for adapter in (other, first))
    for path in sorted({*sites, *wanted}):
        if sites.get(path) != wanted.get(path):
            raise SpecError(
                f"{path!r}: adapter {number} has {_told(sites, path)}, adapter 0 {_told(wanted, path)}; {advice}"
            )
        shapes = [{name: leaf.shape for name, leaf in adapter.leaves(path).items()} for adapter in (other, first)]
        if shapes[0] != shapes[1]:
            raise SpecError(f"{path!r}: adapter {number} has leaves {shapes[0]}, adapter 0 {shapes[1]}; {advice}")


def _told(sites: dict, path: str) -> str:
    return f"{sites[path].method} of rank {sites[path].rank}" if path in sites else "nothing"
