"""An adapter taken apart into those of the torch matrices that its weights hold: the inverse of `join`.

The parts of a fused weight (q, k and v) share its A, or have each their own block of it where a mask says so; a matrix
of torch's that is fused of several weights here has their directions one after another.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from jpeft.adapter import Adapter
from jpeft.errors import AdapterError
from jpeft.kernel import Kernel
from jpeft.site import Site
from jpeft_interop.layout import Layout, Link
from jpeft_interop.layout.factors import at_batch, is_adapted, matrix_of
from jpeft_interop.layout.geometry import BATCH, OUTPUT
from jpeft_interop.lora_keys import Leaves
from jpeft_interop.parts import why_not_parts
from jpeft_interop.peft_keys import KEYS, Spot, spot_of
from jpeft_interop.target_parameters import stored_names

ROWS = {"a": -1, "b": -2, "e": -1}  # the axis of each leaf's directions


@dataclass(frozen=True)
class Matrix:
    """The adapter of one torch matrix.

    Attributes:
      spot: its module.
      leaves: A (in, r), B (r, out), m (out), …: each leaf's own axes joined; with the experts first, of their kernels.
      scaling: s; 1 where the method has none.
      site: the weight here, or one of them.
    """

    spot: Spot
    leaves: Leaves
    scaling: float
    site: Site

    @property
    def rank(self) -> int:
        """r; 0 where the method has none."""
        return self.leaves["a"].shape[-1] if "a" in self.leaves else 0


def matrices(adapter: Adapter, layout: Layout) -> list[Matrix]:
    """The adapter of each torch matrix, those of rank 0 left out where PEFT has none.

    Raises:
      AdapterError: a weight without a place, or adapters of several weights that are not one of torch's matrix.
    """
    found: dict[str, list[tuple[Link, Matrix]]] = defaultdict(list)
    for site in adapter.sites:
        if site.method in KEYS:
            for link, spot in _places(site, layout):
                if (one := _matrix(adapter, site, link, spot)) is not None:
                    found[spot.module].append((link, one))
    joined = [_fused([one for _, one in parts], layout.by_key[parts[0][0].key]) for parts in found.values()]
    kept = [one for one in joined if KEYS[one.site.method].has_rank_zero or one.rank > 0]
    stored = stored_names(one.spot.module for one in kept if one.spot.is_parameter)
    return [replace(one, spot=one.spot._replace(stored=stored.get(one.spot.module))) for one in kept]


def _places(site: Site, layout: Layout) -> Iterator[tuple[Link, Spot]]:
    """The regions of a weight that an adapter acts on, each with its torch matrix."""
    if site.path not in layout:
        raise AdapterError(
            f"the layout has no place for {site.path!r}; add one: Place.of(axes, {{torch_key: torch_axes}})"
        )
    if layout[site.path].shape != site.kernel.shape:
        raise AdapterError(
            f"{site.path!r}: the adapter is for shape {site.kernel.shape}, the layout for {layout[site.path].shape}"
        )
    for link in layout.links[site.path]:
        if link.kind == "plain":
            raise AdapterError(f"{site.path!r} lies in {link.key!r}, which the layout has for the weight of no product")
        if why := why_not_parts(KEYS[site.method].parts, site.method, link, layout.links[site.path], site.kernel):
            raise AdapterError(f"{site.path!r} has no place in a PEFT file: {why}")
        spot = spot_of(link, site.kernel, layout)
        if is_adapted(site, link) and (site.use is None or (site.use == "product") == spot.as_head):
            yield link, spot


def _matrix(adapter: Adapter, site: Site, link: Link, spot: Spot) -> Matrix | None:
    """The adapter of one region; None where a mask leaves nothing of it."""
    kernel = site.kernel
    if (reason := KEYS[site.method].why_not(spot)) is not None:
        raise AdapterError(f"{site.path!r} has no place in a PEFT file: {reason}")
    constant = adapter.constant.get(site.path, {})
    own = {name: np.asarray(leaf) for name, leaf in adapter.trained[site.path].items()}
    if "a" in own:
        own["a"] = np.broadcast_to(own["a"], (*kernel.batch_shape, *own["a"].shape[len(kernel.batch) :]))
    leaves = {name: _flat(name, matrix_of(leaf, name, link, kernel), spot.kernel) for name, leaf in own.items()}
    if "m" in leaves:
        leaves["m"] = (leaves["m"] / np.asarray(link.scale, leaves["m"].dtype)).astype(leaves["m"].dtype)
    scaling = float(np.max(at_batch(np.asarray(constant["scaling"]), link, kernel))) if "scaling" in constant else 1.0
    kept = _kept(np.asarray(constant["mask"]), site, link) if "mask" in constant else None
    if kept is not None:
        if not kept.any():
            return None
        scaling *= float(kept.max())
        leaves = {name: _rows(name, leaf, kept) for name, leaf in leaves.items()}
    return Matrix(spot, leaves, scaling / link.scale, site)


def _flat(name: str, leaf: np.ndarray, kernel: Kernel) -> np.ndarray:
    """With the inputs joined, and the outputs."""
    lead = len(kernel.batch)
    batch, own = leaf.shape[:lead], leaf.shape[lead:]
    shapes = {"a": (math.prod(own[:-1]), own[-1]), "b": (own[0], math.prod(own[1:]))} if name in ("a", "b") else {}
    return leaf.reshape(*batch, *shapes.get(name, (math.prod(own),)))


def _rows(name: str, leaf: np.ndarray, kept: np.ndarray) -> np.ndarray:
    return np.compress(kept != 0, leaf, axis=ROWS[name]) if name in ROWS else leaf


def _kept(mask: np.ndarray, site: Site, link: Link) -> np.ndarray:
    """How much each direction acts on this region's outputs: 0, or all the same number.

    Raises:
      AdapterError: a direction acts on some of the outputs alone.
    """
    kernel, output = site.kernel, site.kernel.sizes(site.kernel.output)
    if site.method == "ia3":
        return np.unique(_values(matrix_of(mask, "l", link, kernel)[None], link)[0])
    full = np.broadcast_to(mask, (*kernel.batch_shape, site.rank, *output))
    found = matrix_of(full, "b", link, kernel)
    values = _values(found[0] if link.kind in BATCH else found, link)
    if not (values == values[:, :1]).all() or len(np.unique(values[values != 0])) > 1:
        raise AdapterError(f"{link.key!r}: the mask of {site.path!r} is not the same for all its outputs")
    return values[:, 0]


def _values(matrix: np.ndarray, link: Link) -> np.ndarray:
    """(rows, region): those of torch's outputs that lie in this weight."""
    flat = matrix.reshape(matrix.shape[0], math.prod(matrix.shape[1:]))
    axis = link.torch[OUTPUT[link.kind][0]]
    if axis.length(link.sizes) == axis.size:
        return flat
    return flat[:, axis.start : axis.start + axis.length(link.sizes)]


def _fused(parts: list[Matrix], links: tuple[Link, ...]) -> Matrix:
    """The adapters of several weights here that are one matrix in torch, as one.

    Raises:
      AdapterError: the method has no such.
    """
    first = parts[0]
    if len(links) == 1 or first.spot.as_head:
        return first
    method, module, known = first.site.method, first.spot.module, KEYS[first.site.method].parts
    if known is None or not known.are_blocks or (known.whole is not None and len(parts) != len(links)):
        raise AdapterError(
            f"{module!r} is one matrix in torch, fused of {[link.path for link in links]}; their {method} adapters are "
            "none of it: make it a LoRA first, jpeft.algebra.to_lora(adapter, rank, params=params)"
        )
    if "bias" in first.leaves:
        raise AdapterError(f"{module!r} is fused of several weights, which have each a bias of B; torch's has one")
    shared = all(np.array_equal(first.leaves["a"], part.leaves["a"]) for part in parts)
    scaling = max((part.scaling for part in parts), key=abs)
    b = [part.leaves["b"] * np.asarray(part.scaling / (scaling or 1), part.leaves["b"].dtype) for part in parts]
    a = first.leaves["a"] if shared else np.concatenate([part.leaves["a"] for part in parts], -1)
    leaves = {"a": a, "b": sum(b[1:], b[0]) if shared else np.concatenate(b, -2)}
    return Matrix(first.spot, leaves | _magnitudes(parts), scaling, first.site)


def _magnitudes(parts: list[Matrix]) -> Leaves:
    found = [part.leaves["m"] for part in parts if "m" in part.leaves]
    return {"m": sum(found[1:], found[0])} if found else {}
