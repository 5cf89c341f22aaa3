"""The geometry of a model's weights, read off its program: what each meets, and along which axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from jpeft.errors import KernelError
from jpeft.kernel import Kernel, Kernels
from jpeft.lift import observe
from jpeft.rewrite.program import Program, Result, Use
from jpeft.rewrite.weight import Weight, watched_kernel
from jpeft.tree import base_leaves, nnx_type, parameters, replace
from jpeft.view import View


def kernels(fn: Callable[..., Any], params: Any, *example: Any, **kwargs: Any) -> Kernels:
    """Traces `fn(params, *example, **kwargs)` abstractly and reports the geometry of every weight in it.

    Axes come from the operations that a weight reaches, not from names or shapes: contracted, output and batch axes of
    products, lookups and convolutions, under scan, remat, cond and jit. The output head is a product that nothing but
    the function's result reads.

    Args:
      fn: the forward function, returning logits (not a loss).
      params: the params, the first argument; for `model.apply`, `{"params": params}`, whose paths then start below
        `params`. Arrays or `jax.ShapeDtypeStruct`.
      *example: the other arguments, likewise.
      **kwargs: keyword arguments.

    Raises:
      KernelError: `fn` reads none of the params in a product.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"qkv": jnp.ones((4, 2, 3)), "out": jnp.ones((2, 3, 5))}
      >>> fn = lambda p, x: jnp.tanh(jnp.einsum("td,dhk->thk", x, p["qkv"])).sum() * p["out"].sum()
      >>> print(kernels(fn, params, jnp.ones((7, 4))))
      qkv  product (4, 2, 3) contracted=(0,) output=(1, 2)
      out  -  is read, but by no product, lookup or convolution: reduce_sum
    """
    program = Program(watch=True)
    watched, root = _watched(params)
    base_leaves(root)
    head: set[str] = set()
    is_head = lambda out: isinstance(out, Result) and not out.squashed
    observe(
        fn, program, (watched, *example), kwargs, lambda outs: head.update(out.path for out in filter(is_head, outs))
    )
    found = _report(parameters(root), program.uses, head - program.passed_on)
    if not found:
        raise KernelError("the function reads none of its first argument's leaves in a product; are these its params?")
    return found


def _watched(params: Any) -> tuple[Any, Any]:
    """The params with every leaf watched, and the part of them that paths start from."""
    if isinstance(params, Mapping) and "params" in params and not isinstance(params, nnx_type("State")):
        return {**params, "params": _watched(params["params"])[0]}, params["params"]
    return replace(params, {path: _watch(path, leaf) for path, leaf in parameters(params).items()}), params


def _watch(path: str, leaf: Any) -> Weight:
    shape = tuple(leaf.shape)
    return Weight(leaf, (), path, watched_kernel(shape), View.whole(shape), ())


def _report(flat: Mapping[str, Any], uses: list[Use], heads: set[str]) -> Kernels:
    entries, unknown = [], []
    for path, leaf in flat.items():
        mine = [use for use in uses if use.path == path]
        found = _geometry(tuple(leaf.shape), mine, path in heads)
        if isinstance(found, Kernel) and found.kind == "embedding" and path.rpartition("/")[2] == "bias":
            found = "is a bias, of which a lookup takes rows (an expert's), and no embedding"
        if isinstance(found, Kernel):
            entries.append((path, found))
        elif len(leaf.shape) >= 2:
            unknown.append((path, found))
    return Kernels(tuple(entries), tuple(unknown))


def _geometry(shape: tuple[int, ...], uses: list[Use], head: bool) -> Kernel | str:
    """The geometry that a weight's uses agree on, or why there is none."""
    exact = [use for use in uses if use.roles is not None]
    if not exact:
        met = ", ".join(dict.fromkeys(use.equation for use in uses))
        return f"is read, but by no product, lookup or convolution: {met}" if met else "is never read"
    lookups = [use for use in exact if use.how == "lookup"]
    first = (lookups or exact)[0]
    axes = _axes(first)
    if axes is None:
        return "is used in part: a product contracts a piece of one of its axes"
    for use in exact:
        other = _axes(use)
        if other is None or {other[:2], other[1::-1]}.isdisjoint({axes[:2]}):
            found = f"{first.equation} contracts {axes[0]}, {use.equation} {other and other[0]}"
            return f"has uses of different geometry: {found}"
    kind = "embedding" if lookups else "conv" if first.how == "conv" else "product"
    contracted, output, batch, experts = axes
    if not contracted or not output:
        return f"is a vector to {first.equation}: contracted {contracted}, output {output}"
    met = tuple(use.how if use.roles is not None else use.equation for use in uses)
    return Kernel(shape, contracted, output, batch, kind, first.groups, head, met, experts)


def _axes(use: Use) -> tuple[tuple[int, ...], ...] | None:
    """Contracted, output and batch axes of the original weight, and which of the last are the product's own.

    None if a use divides an axis between roles.
    """
    assert use.view is not None and use.roles is not None
    contracted, output, batch = ({atom.axis for atom in use.view.atoms(dimensions)} for dimensions in use.roles)
    whole = all(_size(use.view, atom.axis) == use.shape[atom.axis] for atom in use.view.all_atoms)
    if not whole or contracted & output or contracted & batch or output & batch:
        return None
    consumed = set(range(len(use.shape))) - contracted - output - batch
    return tuple(sorted(contracted)), tuple(sorted(output)), tuple(sorted(batch | consumed)), tuple(sorted(batch))


def _size(view: View, axis: int) -> int:
    """How much of an axis a view holds."""
    return math.prod(atom.size for atom in view.all_atoms if atom.axis == axis)
