"""A PEFT file's factors and params, known to fit, put together as one adapter of the params at hand."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from jpeft.adapter import Adapter, Meta
from jpeft.errors import AdapterError
from jpeft.kernel import Kernel
from jpeft.methods import METHODS
from jpeft.site import Site
from jpeft.spec import Spec
from jpeft.targets import ALL_LINEAR, Targets, is_kept, names_module, saves_module
from jpeft.tree import dotted
from jpeft_interop.ia3_keys import as_peft_reads
from jpeft_interop.join import MOST_PADDED, ROOM, Joined, Piece
from jpeft_interop.layout import Link
from jpeft_interop.load_checks import Pieces
from jpeft_interop.load_names import Named, Source
from jpeft_interop.load_whole import check_biases, replacements, trained_whole
from jpeft_interop.lora_keys import Leaves
from jpeft_interop.saved_modules import is_trained_bias


def assembled(source: Source, names: Named, pieces: Pieces) -> Adapter:
    """Put the adapter together.

    Raises:
      AdapterError: the factors of a weight are not one adapter of it, or what is trained whole is not all there.
    """
    joined = {path: _joined(source, path, found) for path, found in pieces.items()}
    _check_padding(source, joined)
    adapted = [_adapted(source, path, whole) for path, whole in joined.items()]
    whole = trained_whole(source, names)
    parts = [*adapted, *((site, {"value": value}, {}) for site, value in replacements(source, whole))]
    check_biases(source, {site.path for site, _, _ in parts})
    sites = tuple(sorted((site for site, _, _ in parts), key=lambda site: site.path))
    trained = {site.path: {name: jnp.asarray(leaf) for name, leaf in leaves.items()} for site, leaves, _ in parts}
    constant = {site.path: {name: jnp.asarray(leaf) for name, leaf in own.items()} for site, _, own in parts if own}
    return Adapter(trained, constant, Meta(_spec_here(source, names.factors, whole), sites))


def _joined(source: Source, path: str, found: Sequence[Piece]) -> Joined:
    scales = [_scaling(source, one) * one.link.scale for one in found]
    return Joined(source.file, source.spec, source.kernels[path], found, scales, source.layout.links[path], source.keys)


def _scaling(source: Source, one: Piece) -> float:
    return 1.0 if source.keys.scaling is None else source.keys.scaling(source.spec, one.spot.module)


def _check_padding(source: Source, joined: Mapping[str, Joined]) -> None:
    """One layer's rank becomes that of all that are stacked with it: a file of a few bytes could ask for much."""
    padding = {path: whole.padding for path, whole in joined.items()}
    if sum(padding.values()) > ROOM:
        path = max(padding, key=lambda path: padding[path])
        raise AdapterError(
            f"{source.file}: the matrices stacked in {path!r} have ranks of up to {joined[path].rank}; with zeros "
            f"up to that one they have {padding[path]} numbers more than {MOST_PADDED} times what is in the file; "
            "give params whose layers are leaves of their own, or lower that rank"
        )


def _adapted(source: Source, path: str, whole: Joined) -> tuple[Site, Leaves, Leaves]:
    """Give the site of one weight, its trained leaves, and its constant ones."""
    found, use = whole.pieces, _use(whole.pieces, source.layout.links[path])
    site = Site(path, source.spec.method, whole.kernel, whole.rank, whole.layers, use)
    constant = METHODS[site.method].constant(source.spec, site)
    own = {name: np.asarray(leaf) for name, leaf in constant.items()} | whole.constant()
    if "mask" in own and not source.blocks:
        modules = ", ".join(repr(one.spot.module) for one in found[:3])
        raise AdapterError(
            f"{source.file}: {modules} lie in one weight, {path!r}, and have factors of their own: one adapter of it "
            "would have to keep them apart by a mask, which blocks=True allows"
        )
    return site, whole.trained, own


def _use(found: Sequence[Piece], links: Sequence[Link]) -> str | None:
    """Tell which use of a tied weight is adapted; None for all, and for a weight with one use."""
    uses = {link.kind == "embedding" for link in links if link.kind != "plain"}
    if len(uses) == 1 or all(one.both for one in found):
        return None
    return "product" if found[0].spot.as_head else "lookup"


def _spec_here(source: Source, factors: Mapping[str, Leaves], whole: Collection[str]) -> Spec:
    """Give the file's spec where its names mean here what they mean to PEFT, else one with each module named whole."""
    spec: Any = as_peft_reads(source.spec, factors)
    spec = replace(spec, modules_to_save=_saved_here(source, spec, factors, whole))
    where, modules = spec.where, source.layout.modules
    here = {module for module, kernel in modules.items() if _means_here(where, module, kernel)}
    if where.targets == ALL_LINEAR or (not source.config.parameters and here == set(factors)):
        return spec
    # Here a name may mean a parameter too, and a layer's number may stand at the top of the model: to mean no more
    # than PEFT does, each is named whole.
    return replace(spec, targets=tuple(sorted(factors)), exclude=(), layers_to_transform=None, layers_pattern=())


def _means_here(where: Targets, module: str, kernel: Kernel) -> bool:
    """Whether our own targets mean a torch module."""
    return names_module(where.targets, module) and is_kept(where, f"{module}/weight".replace(".", "/"), kernel)


def _parts(key: str) -> Iterator[str]:
    """Yield every run of a name's parts."""
    parts = key.split(".")
    return (".".join(parts[begin:end]) for begin in range(len(parts)) for end in range(begin + 1, len(parts) + 1))


def _saved_here(source: Source, spec: Spec, factors: Collection[str], whole: Collection[str]) -> tuple[str, ...]:
    """Name what is trained whole: PEFT's names are ends of paths, a task has more of them, a tied weight has two."""
    first = {next(iter(source.tied_names.get(key, (key,)))) for key in source.layout.by_key}
    is_bias = lambda key: is_trained_bias(key, spec.bias, factors)
    trained = {key for key in whole if key in first and not is_bias(key)}
    meant = {part for key in first for part in _parts(key)}
    own = tuple(name for name in spec.modules_to_save if dotted(name) in meant)
    if {key for key in first if saves_module(own, key) and not is_bias(key)} == trained:
        return own
    owner = lambda key: key.rpartition(".")[0]
    partial = {owner(key) for key in first - trained} & {owner(key) for key in trained}
    leaves = {dotted(source.layout.by_key[key][0].path) for key in trained if owner(key) in partial}
    return tuple(sorted({owner(key) for key in trained} - partial | leaves))
