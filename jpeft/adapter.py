"""An adapter: arrays by path, and a spec. A pytree, apart from the params it was made for.

`trained` is what an optimizer updates; `constant` is what it must not touch (the scaling of each kernel); `meta` is
static and hashable: the spec, and for each path the method and the geometry of the weight there.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array

from jpeft.errors import KernelError, SpecError
from jpeft.init_on_mesh import Maker
from jpeft.kernel import Kernel, Kernels
from jpeft.method import Leaves
from jpeft.methods import METHODS
from jpeft.shardings import on_mesh, shardings
from jpeft.site import Site
from jpeft.spec import Spec
from jpeft.targets import matches_pattern, resolve, saves_module, selected_layers
from jpeft.tree import base_leaves, dotted, is_floating, module_of, nearest, parameters

Part = dict[str, Leaves]


@dataclass(frozen=True)
class Meta:
    """The static part: the spec and the sites, sorted by path."""

    spec: Spec
    sites: tuple[Site, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapter:
    """Arrays by path and leaf name, trained and constant apart, and the static `meta`.

    Example: the gradient of the trained part alone.
      >>> import jpeft
      >>> params = {"dense": {"kernel": jnp.ones((3, 2))}}
      >>> adapter = init(jax.random.key(0), jpeft.LoRA(rank=1), params)
      >>> jax.tree.map(jnp.shape, adapter.trained)
      {'dense/kernel': {'a': (3, 1), 'b': (1, 2)}}
    """

    trained: Part
    constant: Part
    meta: Meta = field(metadata={"static": True})

    @property
    def spec(self) -> Spec:
        """What was asked for."""
        return self.meta.spec

    @property
    def sites(self) -> tuple[Site, ...]:
        """What is done, weight by weight, sorted by path."""
        return self.meta.sites

    def replace(self, **parts: Any) -> Adapter:
        """The adapter with another `trained`, `constant` or `meta`."""
        return replace(self, **parts)

    def leaves(self, path: str) -> Leaves:
        """Everything at a path, trained and constant together."""
        return self.constant.get(path, {}) | self.trained[path]


class HasKernels(Protocol):
    """What knows the geometry of the weights: a layout of `jpeft_interop`, say."""

    @property
    def kernels(self) -> Kernels:
        """The geometry."""
        ...


def init(
    key: Array,
    spec: Spec,
    params: Any,
    *,
    kernels: Kernels | None = None,
    layout: HasKernels | None = None,
    dtype: Any = jnp.float32,
) -> Adapter:
    """A new adapter that changes nothing yet.

    Each weight's key is `key` folded with its path, so that values do not depend on the other targets, the mesh or the
    number of hosts. Where the params live on a mesh, so does the adapter, as `jpeft.shardings` has it: each device
    makes its own part.

    Args:
      key: a JAX PRNG key.
      spec: what to do and where.
      params: the base: arrays or `jax.ShapeDtypeStruct`, in any kind of tree. Biases and modules that the spec trains
        whole are copied, and DoRA starts from the weights' norms, so they need arrays.
      kernels: the geometry, from `jpeft.kernels`; without it two-dimensional leaves named `kernel` or `embedding` are
        known, and the output head is a kernel like any other.
      layout: the same from a layout, in place of `kernels`.
      dtype: of the factors. float32 is right for a bf16 base too: small updates are lost in bf16.

    Raises:
      SpecError: `spec` is not a spec, or a target matches nothing.
      KernelError: a targeted weight's geometry is not known.
    """
    if not isinstance(spec, Spec):
        raise SpecError(f"init takes a spec, as in init(key, jpeft.LoRA(rank=8), params); found {type(spec).__name__}")
    flat = base_leaves(params)
    sites = _sites(spec, flat, parameters(params), _kernels(flat, kernels, layout))
    constant = {site.path: METHODS[site.method].constant(spec, site) for site in sites}
    kept: Part = {path: leaves for path, leaves in constant.items() if leaves}
    new = lambda s: METHODS[s.method].init(_fold(key, s.path), s, spec, flat[s.path], dtype)
    if not on_mesh(flat):
        return Adapter({site.path: new(site) for site in sites}, kept, Meta(spec, sites))
    shapes = {site.path: jax.eval_shape(partial(new, site)) for site in sites}
    homes, maker = shardings(params, Adapter(shapes, kept, Meta(spec, sites))), Maker(spec, dtype)
    made = lambda s: maker.trained(_fold(key, s.path), s, flat[s.path], homes.trained[s.path])
    placed = jax.jit(lambda: kept, out_shardings=homes.constant)()
    return Adapter({site.path: made(site) for site in sites}, placed, Meta(spec, sites))


def _sites(spec: Spec, flat: Mapping[str, Any], own: Mapping[str, Any], kernels: Kernels) -> tuple[Site, ...]:
    """What is done where, for the leaves `flat`, those named in `own` being parameters."""
    _check_fit(kernels, flat)
    sites = [_site(spec, path, kernels[path]) for path in resolve(spec.where, kernels)]
    _check_sites(spec, sites, flat)
    trainable = {path: leaf for path, leaf in own.items() if is_floating(leaf)}
    replaced = [
        _replacement(path, flat[path].shape) for path in _replaced_paths(spec, [s.path for s in sites], trainable)
    ]
    if not sites and not replaced:
        raise SpecError(
            f"{spec} trains nothing: it has no targets, no modules_to_save and no biases that these params have"
        )
    return tuple(sorted([*sites, *replaced], key=lambda site: site.path))


def _kernels(flat: Mapping[str, Any], kernels: Kernels | None, layout: HasKernels | None) -> Kernels:
    if kernels is not None and layout is not None:
        raise SpecError("init takes kernels= or layout=, which both say the weights' geometry; give one")
    if layout is not None:
        return layout.kernels
    return default_kernels(flat) if kernels is None else kernels


def _fold(key: Array, path: str) -> Array:
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def _site(spec: Spec, path: str, kernel: Kernel) -> Site:
    module = module_of(path)
    return Site(path, spec.method, kernel, spec.rank_of(module, path), selected_layers(spec.where, module, kernel))


def _check_sites(spec: Spec, sites: list[Site], flat: Mapping[str, Any]) -> None:
    """Weights have to be floating, and each pattern has to mean one of them."""
    for site in sites:
        if not is_floating(flat[site.path]):
            raise KernelError(
                f"{site.path!r} holds {flat[site.path].dtype}; expected a floating dtype: dequantize it first"
            )
    spec.check_kernels(site.kernel for site in sites)
    for name in spec.patterns:
        if not any(matches_pattern(name, module_of(site.path), site.path) for site in sites):
            modules = [dotted(module_of(site.path)) for site in sites]
            raise SpecError(f"the pattern {name!r} matches no target; the nearest are {nearest(dotted(name), modules)}")


def _replaced_paths(spec: Spec, adapted: list[str], flat: Mapping[str, Any]) -> list[str]:
    """The leaves that are copied and trained whole: saved modules, and the biases asked for."""
    beside = {module_of(path) for path in adapted}
    is_bias = lambda path: path.rpartition("/")[2] == "bias" and (spec.bias == "all" or module_of(path) in beside)
    saved = [path for path in flat if saves_module(spec.modules_to_save, path)]
    for name in spec.modules_to_save:
        if not any(saves_module((name,), path) for path in flat):
            raise SpecError(
                f"modules_to_save: {name!r} matches nothing; the nearest are {nearest(name, map(module_of, flat))}"
            )
    biases = [path for path in flat if spec.bias != "none" and is_bias(path)]
    return sorted({*saved, *biases})


def _replacement(path: str, shape: tuple[int, ...]) -> Site:
    axes = tuple(range(len(shape)))
    return Site(path, "replacement", Kernel(tuple(shape), (), axes, kind="replacement"))


def _check_fit(kernels: Kernels, flat: Mapping[str, Any]) -> None:
    for path, kernel in kernels.items():
        if path not in flat:
            raise KernelError(f"kernels= names {path!r}, which the params do not have; nearest: {nearest(path, flat)}")
        if tuple(flat[path].shape) != kernel.shape:
            raise KernelError(f"kernels= has {path!r} of shape {kernel.shape}; the params have {flat[path].shape}")


def default_kernels(flat: Mapping[str, Any]) -> Kernels:
    """What is known without an example: 2-D leaves named `kernel` (in, out) or `embedding` (vocabulary, features)."""
    entries, unknown = [], []
    for path, leaf in flat.items():
        name, shape = path.rpartition("/")[2], tuple(getattr(leaf, "shape", ()))
        if name in ("kernel", "embedding") and len(shape) == 2:
            entries.append((path, Kernel(shape, (0,), (1,), kind="product" if name == "kernel" else "embedding")))
        elif len(shape) >= 2:
            call = "give its axes by an example: jpeft.init(key, spec, params, kernels=jpeft.kernels(fn, params, x))"
            unknown.append((path, f"has shape {shape}: which axes are contracted can't be told from a shape; {call}"))
    return Kernels(tuple(entries), tuple(unknown))


@dataclass(frozen=True)
class Count:
    """How many parameters an adapter trains, of how many; prints as the sentence people know."""

    trainable: int
    total: int

    @property
    def percent(self) -> float:
        """Of all parameters, how many in a hundred are trained."""
        return 100 * self.trainable / self.total

    def __str__(self) -> str:
        return f"trainable params: {self.trainable:,} || all params: {self.total:,} || trainable%: {self.percent:.4f}"


def count(params: Any, adapter: Adapter) -> Count:
    """The number of trained and of all parameters, as PEFT counts them: the adapter's come on top of the base's.

    Example:
      >>> import jpeft
      >>> params = {"dense": {"kernel": jnp.ones((3, 2))}}
      >>> print(count(params, init(jax.random.key(0), jpeft.LoRA(rank=1), params)))
      trainable params: 5 || all params: 11 || trainable%: 45.4545
    """
    trained = sum(_trained_size(adapter, site) for site in adapter.sites)
    base_leaves(params)
    return Count(trained, trained + sum(math.prod(leaf.shape) for leaf in parameters(params).values()))


def _trained_size(adapter: Adapter, site: Site) -> int:
    size = sum(math.prod(leaf.shape) for leaf in adapter.trained[site.path].values())
    return size if site.layers is None else size // site.kernel.depth * len(site.layers)
