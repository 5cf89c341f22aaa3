"""Where an adapter lives on a mesh: derived from where the base lives, and typed by nobody.

A kernel W[contracted, output, batch] whose axes are split in some way over the devices gives

    A[batch, contracted, r]    the contracted axes' split        B[batch, r, output]    the output axes'

and what has one value a layer or an expert that of the batch axes. The rank is never split. So x A and (x A) B meet
their factors where x W meets W, and nothing as large as W has to move for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
from flax.core.meta import AxisMetadata
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jpeft.errors import ShardingError
from jpeft.method import Axes
from jpeft.methods import METHODS
from jpeft.site import Site
from jpeft.tree import as_they_are, flatten, is_box, nearest

if TYPE_CHECKING:  # which imports this: a new adapter is put where its base lives
    from jpeft.adapter import Adapter, Part

Rules = Sequence[tuple[str, Any]]


def shardings(params: Any, adapter: Adapter, *, mesh: Mesh | None = None, rules: Rules | None = None) -> Adapter:
    """The sharding of each array of an adapter, from that of the weight it acts on.

    Args:
      params: the base, or anything of its structure that says where it lives: arrays or `jax.ShapeDtypeStruct` with a
        `NamedSharding`, `NamedSharding`s or `PartitionSpec`s themselves, Linen's `Partitioned` boxes or NNX variables
        with names of axes. What of it says nothing counts as not split.
      adapter: for that base; its arrays may be `jax.ShapeDtypeStruct` (of `jax.eval_shape`). One of `jpeft.stack` too:
        the axis of the adapters is not split.
      mesh: of the names and `PartitionSpec`s; the arrays' own by default.
      rules: pairs of a logical name and the mesh axis (or axes) that it means; a box's own by default.

    Returns:
      an `Adapter` with a `NamedSharding` in the place of each array, or a `PartitionSpec` where no mesh is known: for
      `jax.jit(..., out_shardings=)`, `jax.device_put`, or a restore.

    Raises:
      ShardingError: nothing in `params` says where it lives; arrays on several meshes; a name that is no mesh axis.

    Example:
      >>> import jpeft
      >>> from jax.sharding import PartitionSpec as P
      >>> params = {"kernel": jax.ShapeDtypeStruct((8, 4), "float32")}
      >>> adapter = jax.eval_shape(lambda: jpeft.init(jax.random.key(0), jpeft.LoRA(rank=2), params))
      >>> shardings({"kernel": P("fsdp", "tensor")}, adapter).trained["kernel"]
      {'a': P('fsdp', None), 'b': P(None, 'tensor')}
    """
    leaves = as_they_are(params)
    for path in (site.path for site in adapter.sites):
        if path not in leaves:
            raise ShardingError(f"the adapter has {path!r}, which the params do not; nearest: {nearest(path, leaves)}")
    found = {path: _spec(path, leaf, rules) for path, leaf in leaves.items()}
    if all(spec is None for spec in found.values()):
        raise ShardingError(
            "nothing in the params says where it lives: expected a NamedSharding (of arrays, of jax.ShapeDtypeStruct, "
            "or itself), a PartitionSpec, or a box with names of axes; put the base on a mesh first, by jax.device_put"
        )
    mesh = _mesh(leaves.values()) if mesh is None else mesh
    sites = {site.path: site for site in adapter.sites}

    def derived(part: Part) -> Any:
        return {
            path: {
                name: _placed(_split(sites[path], name, leaf.shape, found[path]), mesh, path)
                for name, leaf in of.items()
            }
            for path, of in part.items()
        }

    return adapter.replace(trained=derived(adapter.trained), constant=derived(adapter.constant))


def optimizer_shardings(state: Any, where: Adapter) -> Any:
    """The sharding of each array of an optimizer's state: that of the trained array it belongs to.

    An array of the state belongs to the trained one at the same path, of the same leaf: whatever optax wraps around.
    What belongs to none, or has another number of axes, is on every device whole.

    Args:
      state: of any optax optimizer on `adapter.trained`; `jax.eval_shape(optimizer.init, adapter.trained)` will do.
      where: what `shardings` gave.

    Example:
      >>> import jpeft, optax
      >>> from jax.sharding import PartitionSpec as P
      >>> params = {"kernel": jax.ShapeDtypeStruct((8, 4), "float32")}
      >>> adapter = jax.eval_shape(lambda: jpeft.init(jax.random.key(0), jpeft.LoRA(rank=2), params))
      >>> where = shardings({"kernel": P("fsdp")}, adapter)
      >>> state = jax.eval_shape(optax.adam(1e-3).init, adapter.trained)
      >>> optimizer_shardings(state, where)[0].mu["kernel"]
      {'a': P('fsdp', None), 'b': P(None, None)}
    """
    homes = jax.tree_util.tree_flatten_with_path(where.trained, is_leaf=_is_home)[0]
    by_path = {tuple(map(str, path)): home for path, home in homes}
    first = homes[0][1] if homes else PartitionSpec()
    whole = NamedSharding(first.mesh, PartitionSpec()) if isinstance(first, NamedSharding) else PartitionSpec()

    def home(path: tuple[Any, ...], leaf: Any) -> Any:
        found = by_path.get(tuple(map(str, path[-2:])))
        return found if found is not None and len(_entries(found)) == leaf.ndim else whole

    return jax.tree_util.tree_map_with_path(home, state)


def _is_home(x: Any) -> bool:
    return isinstance(x, NamedSharding | PartitionSpec)


def _entries(home: Any) -> PartitionSpec:
    return home.spec if isinstance(home, NamedSharding) else home


def on_mesh(params: Any) -> bool:
    """Whether some of the params are spread over the devices of a mesh."""
    named = (_named(leaf) for leaf in flatten(params).values())
    return any(found is not None and found.mesh.size > 1 for found in named)


def _named(leaf: Any) -> NamedSharding | None:
    """The leaf's own sharding on a mesh. A tracer has none: what is traced lives nowhere yet."""
    found = leaf if isinstance(leaf, NamedSharding) else None
    if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and not isinstance(leaf, Tracer):
        found = leaf.sharding
    return found if isinstance(found, NamedSharding) else None


def _mesh(leaves: Iterable[Any]) -> Any:
    """That of the arrays and boxes, if any has one."""
    homes = [_named(inner) or getattr(leaf, "mesh", None) for leaf in leaves for inner in _within(leaf)]
    meshes = {home.mesh if isinstance(home, NamedSharding) else home for home in homes if home is not None}
    if len(meshes) > 1:
        raise ShardingError(f"the params live on several meshes: {', '.join(sorted(map(str, meshes)))}; give them one")
    return meshes.pop() if meshes else None


def _within(leaf: Any) -> list[Any]:
    return jax.tree.leaves(leaf, is_leaf=_is_home) if is_box(leaf) else [leaf]


def _spec(path: str, leaf: Any, rules: Rules | None) -> PartitionSpec | None:
    """How a leaf is split, by the array itself where it lives on a mesh, else by its box; None where nothing says."""
    inner = _within(leaf)
    if len(inner) == 1 and (named := _named(inner[0])) is not None:
        return named.spec
    if len(inner) == 1 and isinstance(inner[0], PartitionSpec):
        return _meant(tuple(inner[0]), rules)
    names, own = _names(leaf)
    return None if names is None else _meant(names, own if rules is None else rules)


def _names(leaf: Any) -> tuple[tuple[Any, ...] | None, Rules | None]:
    """The names of a box's axes, and its own rules: Linen's, or those of NNX, which calls them `out_sharding`."""
    if isinstance(leaf, AxisMetadata):
        names, rules = getattr(leaf, "names", None), getattr(leaf, "rules", None)
    elif is_box(leaf):
        names, rules = (leaf.get_metadata().get(name) for name in ("out_sharding", "sharding_rules"))
    else:
        return None, None
    return (None if names is None else tuple(names)), rules


def _meant(names: tuple[Any, ...], rules: Rules | None) -> PartitionSpec:
    if not rules:
        return PartitionSpec(*names)
    from flax.linen.spmd import logical_to_mesh_axes  # here: most have no rules, and Linen takes a second to import

    return logical_to_mesh_axes(names, rules) or PartitionSpec()


def _split(site: Site, name: str, shape: tuple[int, ...], spec: PartitionSpec | None) -> PartitionSpec:
    """The split of one array of the adapter; an axis that a stack has in front, or that is shared, is not split."""
    kernel = site.kernel
    axes: Axes = METHODS[site.method].axes(kernel)[name]
    axes = (*[None] * (len(shape) - len(axes)), *axes)
    entries = (*(spec or ()), *[None] * len(kernel.shape))
    shared = [axis is None or kernel.shape[axis] != size for axis, size in zip(axes, shape, strict=True)]
    return PartitionSpec(*(None if whole else entries[axis] for axis, whole in zip(axes, shared, strict=True)))  # pyright: ignore[reportArgumentType, reportCallIssue]


def _placed(spec: PartitionSpec, mesh: Any, path: str) -> Any:
    if mesh is None:
        return spec
    used = [axis for entry in spec for axis in (entry if isinstance(entry, tuple) else (entry,))]
    for axis in used:
        if isinstance(axis, str) and axis not in mesh.axis_names:
            raise ShardingError(
                f"{path!r} is split along {axis!r}, which is no axis of the mesh {mesh.axis_names}: say what it means, "
                f"rules=[({axis!r}, {mesh.axis_names[-1]!r})]"
            )
    return NamedSharding(mesh, spec)
