"""Params as a flat mapping of paths to leaves, and back into whatever kind of tree they came as.

A path is the keys joined by `/`, integers as decimals: `model/layers/0/self_attn/q_proj/kernel`. Boxes that hold one
array (`nnx.Variable`, Linen's `Partitioned`) are opened: they are no part of the path, and are kept when leaves change.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.core.meta import AxisMetadata
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from jpeft.errors import KernelError, SpecError


def nnx_type(name: str) -> type | tuple[()]:
    """`flax.nnx.<name>` if someone has imported nnx; else an empty tuple, of which nothing is an instance."""
    nnx = sys.modules.get("flax.nnx")
    return getattr(nnx, name) if nnx else ()


def is_box(x: Any) -> bool:
    """Whether `x` is a wrapper around one array, to be looked through."""
    return isinstance(x, (AxisMetadata, nnx_type("Variable")))


def _key_name(key: Any) -> str:
    match key:
        case DictKey() | FlattenedIndexKey():
            return str(key.key)
        case SequenceKey():
            return str(key.idx)
        case GetAttrKey():
            return key.name
        case _:
            return str(key)


def _leaves(params: Any) -> tuple[list[tuple[str, Any]], Any]:
    pairs, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: is_box(x) or is_weight(x))
    return [("/".join(map(_key_name, path)), leaf) for path, leaf in pairs], treedef


def is_weight(x: Any) -> bool:
    """Whether `x` is an adapted weight: a leaf here, though it holds several arrays."""
    return getattr(type(x), "is_adapted_weight", False)


def _open(leaf: Any) -> Any:
    if not is_box(leaf):
        return leaf
    inner = jax.tree.leaves(leaf, is_leaf=is_weight)
    return inner[0] if len(inner) == 1 else leaf


def flatten(params: Any) -> dict[str, Any]:
    """The leaves of `params` by path, boxes opened.

    Raises:
      SpecError: two leaves have the same path (a key `0` beside a key `"0"`).

    Example:
      >>> flatten({"layers": [{"kernel": 1.0}]})
      {'layers/0/kernel': 1.0}
    """
    flat: dict[str, Any] = {}
    for path, leaf in _leaves(params)[0]:
        if path in flat:
            raise SpecError(f"two leaves of the params have the path {path!r}; rename one of them")
        flat[path] = _open(leaf)
    return flat


def as_they_are(params: Any) -> dict[str, Any]:
    """The leaves by path, boxes left closed: for what a box says of its array."""
    return dict(_leaves(params)[0])


def base_leaves(params: Any) -> dict[str, Any]:
    """`flatten`, of params that have nothing attached.

    Raises:
      KernelError: they have.
    """
    flat = flatten(params)
    for path, leaf in flat.items():
        if is_weight(leaf):
            raise KernelError(f"{path!r} has an adapter attached; give the base params")
    return flat


def parameters(params: Any) -> dict[str, Any]:
    """The leaves that are arrays and parameters, by path: in an `nnx.State`, those in an `nnx.Param`.

    Batch statistics and random keys are none.
    """
    other = lambda leaf: isinstance(leaf, nnx_type("Variable")) and not isinstance(leaf, nnx_type("Param"))
    opened = {path: _open(leaf) for path, leaf in _leaves(params)[0] if not other(leaf)}
    return {path: leaf for path, leaf in opened.items() if hasattr(leaf, "shape")}


def is_floating(leaf: Any) -> bool:
    """Whether an array holds floats."""
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def replace(params: Any, new: Mapping[str, Any]) -> Any:
    """`params` with the leaves named in `new` exchanged; the same kind of tree."""
    pairs, treedef = _leaves(params)
    leaves = [_refill(leaf, new[path]) if path in new else leaf for path, leaf in pairs]
    return jax.tree_util.tree_unflatten(treedef, leaves)


def _refill(leaf: Any, value: Any) -> Any:
    if not is_box(leaf):
        return value
    return jax.tree.unflatten(jax.tree.structure(leaf, is_leaf=is_weight), [value])


def map_leaves(function: Callable[[str, Any], Any], params: Any) -> Any:
    """`function(path, leaf)` on every leaf; the same kind of tree."""
    return replace(params, {path: function(path, leaf) for path, leaf in flatten(params).items()})


def module_of(path: str) -> str:
    """The path without its leaf: what a target names."""
    return path.rpartition("/")[0]


def beside(path: str, name: str) -> str:
    """The path of the leaf `name` in the same module.

    Example:
      >>> beside("layers/0/kernel", "bias"), beside("kernel", "bias")
      ('layers/0/bias', 'bias')
    """
    return "/".join([*path.split("/")[:-1], name])


def dotted(path: str) -> str:
    """A path as torch and PEFT write it."""
    return path.replace("/", ".")


LONGEST = 200  # characters of a name that are compared: to compare more takes time by the square


def nearest(name: str, known: Iterable[str], n: int = 3) -> str:
    """The known names closest to `name`, for an error message.

    Compared with as many of their last parts as `name` has; of several that end alike, the first is shown.

    Example:
      >>> nearest("qproj", ["layers.0.attn.q_proj", "layers.1.attn.q_proj", "layers.0.mlp.up_proj"], n=1)
      "'layers.0.attn.q_proj' (and 2 more)"
    """
    known = list(dict.fromkeys(known))
    parts = lambda path: path.replace("/", ".").split(".")
    wanted = parts(name[-LONGEST:])
    by_tail = {".".join(parts(path)[-len(wanted) :]): path for path in reversed(known)}
    close = difflib.get_close_matches(".".join(wanted), by_tail, n=n, cutoff=0.3)
    shown = [by_tail[tail] for tail in close] or known[:n]
    rest = len(known) - len(shown)
    return ", ".join(map(repr, shown)) + (f" (and {rest} more)" if rest > 0 else "") if known else "(there are none)"
