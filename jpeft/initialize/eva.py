"""EVA: A starts as the principal components of each weight's input, and ranks go where they explain most.

    X - mean(X) = U S Vᵀ,    A = V_r,    B = 0,    r of each weight: its share of the Σ r largest  S_i² / Σ S²

Paischer et al. 2024, "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation",
arXiv:2410.07170. Batches are taken in one after another until no direction that is needed turns any more, and the ranks
are dealt out, as PEFT does it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from jpeft.adapter import Adapter, Site
from jpeft.errors import KernelError, SpecError
from jpeft.initialize.factors import sites
from jpeft.initialize.incremental_pca import Components, Moments, similarity, update
from jpeft.initialize.tap import Measured
from jpeft.methods.lora import LoRA
from jpeft.targets import Patterns, pattern_value
from jpeft.tree import dotted, module_of, nearest

Unit = tuple[str, tuple[int, ...]]  # a path and the index of one matrix in a stack


def eva(
    adapter: Adapter,
    stream: Iterable[Measured],
    *,
    rho: float = 2.0,
    tau: float = 0.99,
    whiten: bool = False,
    adjust_alpha: bool = True,
    order: Sequence[str] | None = None,
    max_batches: int = 1000,
) -> Adapter:
    """The adapter with A from the data, and the same number of ranks in all, dealt out anew; the base stays.

    A weight may end with rank 0. The spec's `rank_pattern` and `alpha_pattern` say what came of it.

    Args:
      adapter: a new LoRA, from `jpeft.init`.
      stream: what `tap(fn, moments)` measured, batch by batch; gone through again and again until the directions stand
        still, so a list, or `Stream(tapped, attached_params, batches)`.
      rho: a weight gets at most `rho * r` ranks; 1 leaves all ranks as they are, and is what stacked layers need.
      tau: a direction stands still when its cosine with what it was before the last batch is at least this.
      whiten: divide each direction by the root of its singular value.
      adjust_alpha: alpha times the change of rank, so that every weight's gradients keep their scale.
      order: paths; of weights with the same input, an odd rank goes to the first. By path if None; PEFT's own is that
        of the modules in the model.
      max_batches: when to give up.

    Raises:
      SpecError: not a new LoRA, `rho` or `tau` out of range, or no convergence.
      KernelError: an embedding or a convolution, a weight that the stream does not have or that saw no input, or
        `rho > 1` with stacked layers, which share one rank.

    Example: inputs along one direction.
      >>> import jax, jpeft
      >>> params = {"kernel": jnp.ones((2, 3))}
      >>> adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=1), params)
      >>> x = jnp.array([[0.0, 1.0], [0.0, 3.0]])
      >>> sums = {"kernel": {"gram": x.T @ x, "sum": x.sum(0), "count": jnp.array(2.0)}}
      >>> eva(adapter, [sums], rho=1).trained["kernel"]["a"]
      Array([[0.],
             [1.]], dtype=float32)
    """
    if rho < 1 or not 0 <= tau <= 1:
        raise SpecError(f"rho must be >= 1 and tau in [0, 1]; found rho={rho}, tau={tau}")
    found = _ordered(sites(adapter), order)
    for site in found:
        _check_site(site, rho)
    search = _Search(found, rho, tau)
    for count, measured in enumerate(_again(stream)):
        if search.advance():
            return _with_components(adapter, found, search, whiten, adjust_alpha)
        if count == max_batches:
            raise SpecError(f"not converged after {max_batches} batches; lower tau={tau}, or give more rows a batch")
        search.take(measured)
    raise SpecError("the stream ended before the directions stood still; give one that can be gone through again")


def _ordered(found: list[Site], order: Sequence[str] | None) -> list[Site]:
    if order is None:
        return found
    place = {path: i for i, path in enumerate(order)}
    for site in found:
        if site.path not in place:
            raise SpecError(f"order has no {site.path!r}; the nearest are {nearest(site.path, place)}")
    return sorted(found, key=lambda site: place[site.path])


def _check_site(site: Site, rho: float) -> None:
    most = round(site.rank * rho)
    if most > site.kernel.fan_in:
        raise KernelError(f"{site.path!r}: rho * rank is {most}, and its input has {site.kernel.fan_in} directions")
    if site.kernel.batch and most != site.rank:
        raise KernelError(f"{site.path!r} is a stack of layers, which share one rank: use eva(..., rho=1)")


def _again(stream: Iterable[Measured]) -> Iterator[Measured]:
    """The stream, over and over, as long as it has something."""
    while True:
        empty = True
        for measured in stream:
            empty = False
            yield measured
        if empty:
            return


class _Search:
    """The components of every input, batch after batch, and the ranks that they would get now.

    Weights with the same input (q, k and v) share one set of components, that of the first of them: their leader.
    """

    def __init__(self, found: Sequence[Site], rho: float, tau: float):
        self.units: list[Unit] = [(s.path, index) for s in found for index in np.ndindex(s.kernel.batch_shape)]
        ranks = {site.path: site.rank for site in found}
        self.tau, self.budget = tau, sum(ranks[path] for path, _ in self.units)
        self.most = {unit: round(ranks[unit[0]] * rho) for unit in self.units}
        self.leader: dict[Unit, Unit] = {}
        self.components: dict[Unit, Components] = {}
        self.still: dict[Unit, np.ndarray] = {}
        self.done: set[Unit] = set()
        self.rank: dict[Unit, int] = {}

    def advance(self) -> bool:
        """Whether every direction that is needed stands still. Leaders that do take no more batches."""
        leaders = self._leaders()
        self.done = {unit for unit in leaders if self.still[unit][: self.rank[unit]].all()}
        return bool(leaders) and len(self.done) == len(leaders)

    def take(self, measured: Measured) -> None:
        """Another batch."""
        if not self.leader:
            self._begin(measured)
        for unit in self._leaders():
            batch = _moments(measured, unit)
            if unit not in self.done and batch.count >= self.most[unit]:
                self._update(unit, batch)
        if len(self.components) == len(self._leaders()):
            self._deal()

    def _leaders(self) -> list[Unit]:
        return [unit for unit in self.units if self.leader.get(unit) == unit]

    def _begin(self, measured: Measured) -> None:
        """Who has whose input; the largest rank of those that share one is the rank of all."""
        inputs = {unit: _moments(measured, unit) for unit in self.units}
        for unit in self.units:
            same = (u for u in self.leader if self.leader[u] == u and _are_same(inputs[u], inputs[unit]))
            self.leader[unit] = next(same, unit)
        group = lambda unit: [u for u in self.units if self.leader[u] == self.leader[unit]]
        self.most = {unit: max(self.most[u] for u in group(unit)) for unit in self.units}
        self.still = {unit: np.zeros(self.most[unit], bool) for unit in self._leaders()}
        self.rank = dict(self.most)

    def _update(self, unit: Unit, batch: Moments) -> None:
        old = self.components.get(unit)
        new = update(old, batch, self.most[unit])
        self.components[unit] = new
        if old is not None:
            self.still[unit] = similarity(new, old) >= self.tau

    def _deal(self) -> None:
        """The budget to the directions that explain most, leaders first; a leader has no less than those it leads."""
        order = [*self._leaders(), *(unit for unit in self.units if self.leader[unit] != unit)]
        offers = [(unit, share) for unit in order for share in self.components[self.leader[unit]].explained]
        best = np.argsort([-share for _, share in offers], kind="stable")[: self.budget]
        rank = dict.fromkeys(order, 0)
        for i in best:
            rank[offers[i][0]] += 1
        for unit in order:
            leader = self.leader[unit]
            if rank[leader] < rank[unit]:
                rank[leader], rank[unit] = rank[unit], rank[leader]
        self.rank = rank


def _moments(measured: Measured, unit: Unit) -> Moments:
    path, index = unit
    if path not in measured:
        raise KernelError(f"the stream has no {path!r}; the nearest are {nearest(path, measured)}")
    gram, sum_, count = (np.asarray(measured[path][name], np.float64)[index] for name in ("gram", "sum", "count"))
    if count == 0:
        raise KernelError(f"{path!r} saw no input: nothing that depends on it is among the function's results")
    if not np.isfinite(gram).all():
        raise KernelError(f"{path!r}: its input holds values that are not finite")
    return Moments(gram, sum_, float(count))


def _are_same(one: Moments, other: Moments) -> bool:
    # Equal inputs may be summed by differently compiled programs; different inputs are never this close.
    a, b = one.gram.diagonal(), other.gram.diagonal()
    return a.shape == b.shape and one.count == other.count and np.allclose(a, b, rtol=1e-5, atol=0)


def _with_components(adapter: Adapter, found: Sequence[Site], search: _Search, whiten: bool, adjust: bool) -> Adapter:
    spec: Any = adapter.spec
    trained, constant, new_sites, alphas = dict(adapter.trained), dict(adapter.constant), {}, {}
    for site in found:
        names = (module_of(site.path), site.path)
        rank = search.rank[next(unit for unit in search.units if unit[0] == site.path)]
        alpha = spec.alpha_of(*names)
        alphas[site.path] = alpha * rank / site.rank if adjust and rank else alpha
        change = spec.scaling(rank, alphas[site.path]) / spec.scaling(site.rank, alpha)
        new_sites[site.path] = dataclasses.replace(site, rank=rank)
        trained[site.path] = trained[site.path] | _factors(adapter, site, rank, search, whiten)
        constant[site.path] = constant[site.path] | {"scaling": constant[site.path]["scaling"] * np.float32(change)}
    all_sites = tuple(new_sites.get(site.path, site) for site in adapter.sites)
    spec = _with_patterns(spec, all_sites, alphas)
    return Adapter(trained, constant, dataclasses.replace(adapter.meta, spec=spec, sites=all_sites))


def _factors(adapter: Adapter, site: Site, rank: int, search: _Search, whiten: bool) -> dict[str, Array]:
    kernel, leaves = site.kernel, adapter.trained[site.path]
    a = np.zeros((*kernel.batch_shape, kernel.fan_in, rank))
    for index in np.ndindex(kernel.batch_shape):
        components = search.components[search.leader[site.path, index]]
        roots = np.sqrt(components.s[:rank, None]) if whiten else 1
        a[index] = (components.v[:rank] / roots).T
    a_shape = (*kernel.batch_shape, *kernel.sizes(kernel.contracted), rank)
    b_shape = (*kernel.batch_shape, rank, *kernel.sizes(kernel.output))
    return {
        "a": jnp.asarray(a.reshape(a_shape), leaves["a"].dtype),
        "b": jnp.zeros(b_shape, leaves["b"].dtype),
    }


def _with_patterns(spec: LoRA, all_sites: Sequence[Site], alphas: Mapping[str, float]) -> LoRA:
    """The spec with patterns that say each weight's rank and alpha."""
    adapted = [site for site in all_sites if site.method == "lora"]
    modules = [module_of(site.path) for site in adapted]
    names = {s.path: m if m and modules.count(m) == 1 else s.path for s, m in zip(adapted, modules, strict=True)}
    ranks = {names[site.path]: site.rank for site in adapted}
    alpha = {names[s.path]: alphas.get(s.path, spec.alpha_of(module_of(s.path), s.path)) for s in adapted}
    default = float(spec.rank if spec.alpha is None else spec.alpha)
    return dataclasses.replace(spec, rank_pattern=_patterns(ranks, spec.rank), alpha_pattern=_patterns(alpha, default))


def _patterns(values: Mapping[str, Any], default: Any) -> Patterns[Any]:
    """Whole names for what is not the default; for all, longest first, where a name is the end of another."""
    few = tuple((dotted(name), value) for name, value in values.items() if value != default)
    if all(pattern_value(few, (name,), default) == value for name, value in values.items()):
        return few
    return tuple((dotted(name), values[name]) for name in sorted(values, key=len, reverse=True))
