"""A folder of Hugging Face PEFT, read into an adapter for the params at hand: exactly, or with the reason why not."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jpeft.adapter import Adapter, Meta
from jpeft.errors import AdapterError, JpeftError
from jpeft.kernel import Kernel, Kernels
from jpeft.methods import METHODS
from jpeft.safetensors_header import ADAPTER_HEADER_BYTES
from jpeft.save import check_base as require_base
from jpeft.save import check_tensor
from jpeft.shared import has_values
from jpeft.site import Site
from jpeft.spec import Spec
from jpeft.targets import ALL_LINEAR, Targets, is_kept, names_module, saves_module
from jpeft.tree import dotted, flatten, nearest
from jpeft_interop.adapter_files import adapter_file
from jpeft_interop.ia3_keys import as_peft_reads
from jpeft_interop.join import MOST_PADDED, ROOM, Joined, Piece
from jpeft_interop.layout import Layout, Link, default_layout, find
from jpeft_interop.lora_keys import Leaves
from jpeft_interop.peft_config import PeftConfig, read_config
from jpeft_interop.peft_keys import PREFIX, Keys, Spot, keys_of, spot_of
from jpeft_interop.peft_resolution import Modules, around, excluded_heads, heads_of, means, wrapped
from jpeft_interop.provenance import (
    CONFIG,
    WEIGHTS,
    adapted_keys,
    base_fingerprint,
    read_config_object,
    read_stated,
)
from jpeft_interop.safetensors_file import Tensors, read_safetensors
from jpeft_interop.saved_modules import copied_keys, is_trained_bias
from jpeft_interop.target_parameters import is_targeted, stored_names
from jpeft_interop.without_effect import tell_without_effect

PICKLE = "adapter_model.bin"
LEAST_RANK = 1024  # that is taken, however small the weight: more than its own sides is no low rank
LONGEST = 2_000  # characters of an error
MOST_KEYS = 10  # of a file, for each of the base's tensors


def load_peft(
    folder: str | os.PathLike[str],
    params: Any,
    *,
    layout: Layout | None = None,
    kernels: Kernels | None = None,
    blocks: bool = True,
    check_digest: bool = True,
    check_base: bool = True,
) -> Adapter:
    """An adapter from a folder that PEFT wrote (or `save_peft`).

    Args:
      folder: holds `adapter_config.json` and `adapter_model.safetensors`.
      params: the base it is for: as `load_model` or `params_from_torch` give them, or any with a `layout`.
      layout: where each path of the params lies in torch, for params with other names or shapes.
      kernels: the weights' geometry, from `jpeft.kernels`, where the layout does not tell it all: which axes of a stack
        are the model's own batch axes. The layout's by default.
      blocks: False refuses what would need a mask: parts of a fused weight with factors of their own, and stacked
        layers of different ranks.
      check_digest: where the file carries a digest (as those of `save_peft`), what is there must have it.
      check_base: where the file carries its base's fingerprint, the params must have it. False loads it onto another.

    Returns:
      the adapter: its spec is the folder's config, its arrays are in the file's dtypes. A fused weight's has a block of
      directions for each torch module that has factors of its own, held apart by a constant mask; so have stacked
      layers of different ranks.

    Raises:
      AdapterError: a file missing, broken or foreign, an option not done here, a key or shape that does not fit the
        params; or the files have changed since they were written, or are for another base. Nothing is applied or
        kept. `provenance` tells whether that was known.
    """
    folder, flat = Path(folder), flatten(params)
    layout = default_layout(flat) if layout is None else layout
    layout.check(flat)
    config = _config_object(folder)
    tensors, metadata = _read_tensors(folder, MOST_KEYS * (1 + len(layout.by_key)))
    return parse_peft(
        folder,
        config,
        tensors,
        metadata,
        flat,
        layout,
        kernels=kernels,
        blocks=blocks,
        check_digest=check_digest,
        check_base=check_base,
    )


def parse_peft(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    flat: Mapping[str, Any],
    layout: Layout,
    *,
    kernels: Kernels | None = None,
    blocks: bool = True,
    check_digest: bool = True,
    check_base: bool = True,
    warn: bool = True,
) -> Adapter:
    """`load_peft`, of what is in the files of a folder; `folder` names them in errors.

    Args:
      folder: as for `load_peft`, and the rest.
      config: the object of `adapter_config.json`.
      tensors: those of `adapter_model.safetensors`, or arrays by the same keys.
      metadata: the file's.
      flat: the base, by path.
      layout: where its leaves lie in torch.
      kernels: as for `load_peft`.
      blocks: as for `load_peft`.
      check_digest: as for `load_peft`.
      check_base: as for `load_peft`.
      warn: warn of what the config says without effect.

    Raises:
      AdapterError: as `load_peft`.
    """
    file = str(folder / WEIGHTS)
    checked = read_config(config, str(folder / CONFIG), warn)
    copies = copied_keys(metadata, file)
    reading = _Reading(file, checked, flat, layout, kernels or layout.kernels, tensors, blocks, copies)
    try:
        if warn:
            tell_without_effect(checked, layout, str(folder / CONFIG))
        check_kinds(file, tensors)
        stated = read_stated(file, metadata)
        reading.check_keys_and_shapes()
        for key, tensor in tensors.items():
            check_tensor(key, tensor, file)
        if stated is not None and check_digest:
            stated.check_digest(tensors, config)
        if stated is not None and stated.base is not None and check_base:
            found = base_fingerprint(adapted_keys(tensors, layout), layout, flat)
            require_base(file, stated.base, found, "load_peft(..., check_base=False)")
        return reading.adapter()
    except (JpeftError, ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
        told = str(error) if isinstance(error, JpeftError) else f"{file}: {error!r}"
        if type(error) is AdapterError and len(told) <= LONGEST:
            raise
        where = "" if isinstance(error, AdapterError) or not isinstance(error, JpeftError) else f"{file}: "
        raise AdapterError(f"{where}{told[:LONGEST]}") from error


def read_peft_config(folder: str | os.PathLike[str]) -> PeftConfig:
    """The `adapter_config.json` of a folder, checked.

    Raises:
      AdapterError: it is not there, or not one that can be done here.
    """
    return read_config(_config_object(Path(folder)), str(Path(folder) / CONFIG))


def _config_object(folder: Path) -> dict[str, Any]:
    if not os.path.lexists(folder / CONFIG):
        raise AdapterError(f"{folder}: no {CONFIG} there; is it an adapter's folder?")
    return read_config_object(folder)


def _read_tensors(folder: Path, most: int) -> tuple[Tensors, dict[str, str]]:
    file = adapter_file(folder, WEIGHTS)
    if not os.path.lexists(file):
        hint = f"; {PICKLE} is a pickle, which is never read: save it again with safe_serialization=True"
        raise AdapterError(f"{folder}: no {WEIGHTS} there{hint if (folder / PICKLE).exists() else ''}")
    return read_safetensors(file, AdapterError, ADAPTER_HEADER_BYTES, most)


def check_kinds(file: str, tensors: Mapping[str, np.ndarray]) -> None:
    """Raise AdapterError for what is no array of floats; no value is looked at."""
    for key, tensor in tensors.items():
        if not jnp.issubdtype(tensor.dtype, jnp.floating) or not tensor.shape:
            raise AdapterError(
                f"{file}: key {key!r:.200}: expected an array of floats, found {tensor.dtype} {tensor.shape}"
            )


@dataclass(frozen=True)
class _Reading:
    """One file against one base: everything that a step of the reading needs to see."""

    file: str
    config: PeftConfig
    flat: Mapping[str, Any]
    layout: Layout
    kernels: Mapping[str, Kernel]
    tensors: Mapping[str, np.ndarray]
    blocks: bool
    copies: frozenset[str]

    @property
    def spec(self) -> Any:
        return self.config.spec

    @property
    def keys(self) -> Keys:
        return keys_of(self.spec)

    @cached_property
    def _where(self) -> Targets:
        """The targets, as PEFT has them for the task: heads that it trains whole are none of them."""
        where = self.spec.where
        return replace(where, saved=(*where.saved, *excluded_heads(self.config.task_type)))

    @cached_property
    def _parameters(self) -> list[str]:
        """The parameters that the config targets as such."""
        for name in self.config.parameters:
            if not any(is_targeted(known, (name,)) for known in self.layout.parameters):
                raise AdapterError(
                    f"{self.file}: {name!r}, in 'target_parameters' in {CONFIG}, is no stacked kernel or router here; "
                    f"the nearest are {nearest(name, self.layout.parameters)}"
                )
        return [name for name in self.layout.parameters if is_targeted(name, self.config.parameters)]

    @cached_property
    def _stored(self) -> dict[str, str]:
        return stored_names(self._parameters)

    def check_keys_and_shapes(self) -> None:
        """Everything that the header and the config can tell, before a value is read."""
        try:
            factors, plain = self._sorted()
            for name, key in plain.items():
                find(self.layout, self._torch_name(name, plain), self.file, key)
            self._by_path(factors)
            self._check_targets(factors)
            self._check_saved({self._torch_name(name, plain) for name in plain}, factors)
        except AdapterError as error:
            raise AdapterError(f"{error}{self._difference()}") from error

    def _difference(self) -> str:
        """How the file's keys differ from those that the config's targets have, all in all."""
        if self.spec.where.targets == ALL_LINEAR:
            return ""
        expected = {key for module, kernel in self._targeted() for key in self._wanted(Spot(module, kernel))}
        plain = {key: self.keys.split(key, self.file) for key in self.tensors if key.startswith(PREFIX)}
        known = {
            key
            for key, (name, leaf) in plain.items()
            if leaf is None and self._torch_name(name, ()) in self.layout.by_key
        }
        missing, unexpected = sorted(expected - self.tensors.keys()), sorted(self.tensors.keys() - expected - known)
        if len(missing) + len(unexpected) < 2:
            return ""
        return (
            f". In all, of {len(expected)} keys of targets missing: {_some(missing)}; unexpected: {_some(unexpected)}"
        )

    def _wanted(self, spot: Spot) -> Iterator[str]:
        has_bias = getattr(self.spec, "factor_bias", False)
        return (key for leaf, key in self.keys.names(spot).items() if leaf != "bias" or has_bias)

    def _saved_here(self, spec: Spec, factors: Collection[str], whole: Collection[str]) -> tuple[str, ...]:
        """Names for what is trained whole: PEFT's are ends of paths, a task has more of them, a tied weight has two."""
        first = {next(iter(self._tied_names.get(key, (key,)))) for key in self.layout.by_key}
        is_bias = lambda key: is_trained_bias(key, spec.bias, factors)
        trained = {key for key in whole if key in first and not is_bias(key)}
        named = tuple(n for n in spec.modules_to_save if any(saves_module((n,), key) for key in first))
        if {key for key in first if saves_module(named, key) and not is_bias(key)} == trained:
            return named
        owners = {key.rpartition(".")[0] for key in trained}
        partial = {o for o in owners if any(k.rpartition(".")[0] == o and k not in trained for k in first)}
        leaves = {dotted(self.layout.by_key[k][0].path) for k in trained if k.rpartition(".")[0] in partial}
        return tuple(sorted((owners - partial) | leaves))

    def _targeted(self) -> Iterator[tuple[str, Kernel]]:
        """The modules that the config targets and that have factors in a file."""
        for module, kernel in self.layout.modules.items():
            if means(self._where, module) and (self.keys.has_rank_zero or self.spec.rank_of(module) > 0):
                yield module, kernel

    def adapter(self) -> Adapter:
        """What is in the file, once it is known to fit."""
        factors, plain = self._sorted()
        by_path = self._by_path(factors)
        joined = {path: self._joined(path, found) for path, found in by_path.items()}
        self._check_padding(joined)
        parts = [self._adapted(path, whole) for path, whole in joined.items()]
        whole = self._params_of(plain, factors)
        parts += self._replaced(whole)
        self._check_biases({site.path for site, _, _ in parts})
        sites = tuple(sorted((site for site, _, _ in parts), key=lambda site: site.path))
        trained = {site.path: {n: jnp.asarray(leaf) for n, leaf in leaves.items()} for site, leaves, _ in parts}
        constant = {site.path: {n: jnp.asarray(leaf) for n, leaf in held.items()} for site, _, held in parts if held}
        return Adapter(trained, constant, Meta(self._spec_here(factors, whole), sites))

    def _spec_here(self, factors: Mapping[str, Leaves], whole: Collection[str]) -> Spec:
        """The file's spec where its names mean here what they mean to PEFT, else with each module named whole."""
        spec: Any = as_peft_reads(self.spec, factors)
        spec = replace(spec, modules_to_save=self._saved_here(spec, factors, whole))
        where = spec.where
        here = {m for m, k in self.layout.modules.items() if names_module(where.targets, m) and _is_kept(where, m, k)}
        if where.targets == ALL_LINEAR or (not self.config.parameters and here == set(factors)):
            return spec
        # Here a name may mean a parameter too, and a layer's number may stand at the top of the model: to mean no more
        # than PEFT does, each is named whole.
        return replace(spec, targets=tuple(sorted(factors)), exclude=(), layers_to_transform=None, layers_pattern=())

    def _sorted(self) -> tuple[dict[str, Leaves], dict[str, str]]:
        """Factors by torch module, and the other keys by the name of the param that they are for."""
        factors: dict[str, Leaves] = {}
        plain: dict[str, str] = {}
        owned = {stored: parameter for parameter, stored in self._stored.items()}
        for key, tensor in self.tensors.items():
            name, leaf = self.keys.split(key, self.file)
            name = owned.get(name, name) if leaf is not None else name
            if leaf is None:
                plain[name] = key
                continue
            if leaf in factors.setdefault(name, {}):
                raise AdapterError(f"{self.file}: key {key!r}: the file has another for the same factor")
            factors[name][leaf] = tensor
        return factors, plain

    def _check_complete(self, spot: Spot, leaves: Leaves) -> None:
        """The keys are those of such a weight, all of them."""
        names = self.keys.names(spot)
        has_bias = getattr(self.spec, "factor_bias", False) and not spot.is_lookup
        for leaf, key in names.items():
            if key not in self.tensors and (leaf != "bias" or has_bias):
                raise AdapterError(f"{self.file}: key {key!r} is missing; the others of that module are there")
        if "bias" in leaves and not has_bias:
            key = f"{PREFIX}{spot.module}{self.keys.suffixes['bias']}"
            raise AdapterError(f"{self.file}: key {key!r} is unexpected: 'lora_bias' is false in {CONFIG}")

    def _check_targets(self, factors: Mapping[str, Leaves]) -> None:
        """The config's targets and the file's modules are the same."""
        where = self._where
        if where.targets == ALL_LINEAR:
            return
        for parameter in self._parameters:
            if parameter not in factors:
                raise AdapterError(
                    f"{self.file}: {parameter!r} is in 'target_parameters' in {CONFIG}, and its factors are missing"
                )
        targeted = {module for module, _ in self._targeted()}
        for module in self.layout.modules:
            if module in targeted and module not in factors:
                raise AdapterError(
                    f"{self.file}: {module!r} is a target in {CONFIG}, and its factors are missing from the file"
                )
            if module in factors and module not in targeted:
                raise AdapterError(
                    f"{self.file}: {module!r} has factors, and is no target in {CONFIG}: {where.targets!r:.300}"
                )

    def _check_saved(self, there: Collection[str], adapted: Collection[str]) -> None:
        """The file has every tensor of the modules that PEFT wraps, for the config's names and for the task's."""
        modules, heads = Modules(tuple(self.layout.by_key)), heads_of(self.config.task_type)
        tied = self._tied_names if self.config.ties else {}
        for names, why in (
            (self.spec.modules_to_save, "'modules_to_save'"),
            (heads, f"task_type={self.config.task_type!r}"),
        ):
            wanted = modules.below(wrapped(names, modules, adapted))
            missing = sorted(key for key in wanted if key not in there and not self._comes_with(key, tied))
            if missing:
                raise AdapterError(
                    f"{self.file}: {PREFIX + missing[0]!r} is missing: {why} in {CONFIG} trains its module whole, and "
                    f"PEFT raises KeyError for this file; the file has {nearest(PREFIX + missing[0], self.tensors)}. "
                    f"If the module was not trained, take it out of {CONFIG}"
                )

    @cached_property
    def _tied_names(self) -> Mapping[str, Collection[str]]:
        """The torch names of each tied weight, by each of them."""
        found: dict[str, Collection[str]] = {}
        for links in self.layout.links.values():
            regions: dict[Any, list[str]] = {}
            for link in links:
                regions.setdefault((link.leaf, link.index), []).append(link.key)
            found |= {key: keys for keys in regions.values() if len(keys) > 1 for key in keys}
        return found

    def _torch_name(self, name: str, known: Container[str]) -> str:
        """The param that a key which is no factor is for: one of the base's own names, or PEFT's for one."""
        return name if name in self.layout.by_key else _torch_name(name, known)

    def _is_original(self, name: str) -> bool:
        """Whether it is the base's copy of a saved module, which PEFT leaves in the file and never uses."""
        return ".original_module." in name and name not in self.layout.by_key

    def _comes_with(self, key: str, tied: Mapping[str, Collection[str]]) -> bool:
        """Whether PEFT makes a tensor out of another: what else a tied head has is dropped."""
        module = key.rpartition(".")[0]
        return any(other.rpartition(".")[0] == module for other in tied) and key not in tied

    def _by_path(self, factors: Mapping[str, Leaves]) -> dict[str, list[Piece]]:
        """The factors of each weight, matrix by matrix."""
        found: dict[str, list[Piece]] = {}
        for module, leaves in factors.items():
            told = f"{PREFIX}{module}{next(iter(self.keys.suffixes.values()))}"
            key = module if module in self._stored else f"{module}.weight"
            for link in find(self.layout, key, self.file, told):
                one = Piece(self._spot(link), leaves, link)
                self._check_complete(one.spot, leaves)
                self._check_shapes(one)
                _add(found.setdefault(link.path, []), one, self._both_uses)
        return found

    def _spot(self, link: Link) -> Spot:
        if link.kind == "plain":
            raise AdapterError(
                f"{self.file}: {link.path!r} has factors, and in the layout it is the weight of no product"
            )
        spot = spot_of(link, self.kernels[link.path], self.layout)
        spot = spot._replace(stored=self._stored.get(spot.module))
        if (reason := self.keys.why_not(spot)) is not None:
            raise AdapterError(f"{self.file}: {spot.module!r} can't be loaded: {reason}")
        return spot

    def _both_uses(self, one: Piece, other: Piece) -> Piece:
        """A tied weight with the same change on either side is adapted in all its uses."""
        embedding, head = (other, one) if one.spot.as_head else (one, other)
        pairs = ((embedding.leaves["a"], head.leaves["b"].T), (embedding.leaves["b"], head.leaves["a"].T))
        same_scale = self.spec.alpha_of(one.spot.module) == self.spec.alpha_of(other.spot.module)
        if not same_scale or not all(np.array_equal(x, y) for x, y in pairs):
            raise AdapterError(
                f"{self.file}: {one.spot.module!r} and {other.spot.module!r} are one tied weight, {one.link.path!r}, "
                "with different factors; an adapter holds one change of a weight: save them as two adapters"
            )
        return replace(embedding, both=True)

    def _joined(self, path: str, found: list[Piece]) -> Joined:
        scales = [self._scaling(one) * one.link.scale for one in found]
        return Joined(self.file, self.spec, self.kernels[path], found, scales, self.layout.links[path], self.keys)

    def _check_padding(self, joined: Mapping[str, Joined]) -> None:
        """One layer's rank becomes that of all that are stacked with it: a file of a few bytes could ask for much."""
        padding = {path: whole.padding for path, whole in joined.items()}
        if sum(padding.values()) > ROOM:
            path = max(padding, key=lambda path: padding[path])
            raise AdapterError(
                f"{self.file}: the matrices stacked in {path!r} have ranks of up to {joined[path].rank}; with zeros "
                f"up to that one they have {padding[path]} numbers more than {MOST_PADDED} times what is in the file; "
                "give params whose layers are leaves of their own, or lower that rank"
            )

    def _adapted(self, path: str, whole: Joined) -> tuple[Site, Leaves, Leaves]:
        """The site of one weight, its trained leaves, and its constant ones."""
        found, use = whole.pieces, _use(whole.pieces, self.layout.links[path])
        site = Site(path, self.spec.method, whole.kernel, whole.rank, whole.layers, use)
        constant = METHODS[site.method].constant(self.spec, site)
        held = {name: np.asarray(leaf) for name, leaf in constant.items()} | whole.constant()
        if "mask" in held and not self.blocks:
            modules = ", ".join(repr(one.spot.module) for one in found[:3])
            raise AdapterError(
                f"{self.file}: {modules} lie in one weight, {path!r}, and have factors of their own: one adapter of it "
                "would have to keep them apart by a mask, which blocks=True allows"
            )
        return site, whole.trained, held

    def _scaling(self, one: Piece) -> float:
        return 1.0 if self.keys.scaling is None else self.keys.scaling(self.spec, one.spot.module)

    def _check_shapes(self, one: Piece) -> None:
        wanted, names = self.keys.shapes(self.spec, one.spot), self.keys.names(one.spot)
        rank = f"rank {self.spec.rank_of(one.spot.module)} on " if "a" in wanted else ""
        most = max(LEAST_RANK, one.spot.kernel.fan_in, one.spot.kernel.fan_out)
        if (found := self.spec.rank_of(one.spot.module)) > most:
            raise AdapterError(
                f"{self.file}: {one.spot.module!r} has the rank {found} in {CONFIG}: expected at most {most} on a "
                f"weight of shape {one.spot.kernel.shape}"
            )
        for leaf, tensor in one.leaves.items():
            if tensor.shape != wanted[leaf]:
                raise AdapterError(
                    f"{self.file}: key {names[leaf]!r}: expected shape {wanted[leaf]} ({rank}a weight of shape "
                    f"{one.spot.kernel.shape}), found {tensor.shape}"
                )

    def _params_of(self, plain: Mapping[str, str], factors: Mapping[str, Leaves]) -> dict[str, str]:
        """The params replaced whole: torch name to key. PEFT's names for the same param are folded together."""
        found: dict[str, str] = {}
        for name, key in plain.items():
            if self._is_original(name):
                self._check_is_copy(self._torch_name(name, plain), key)
                continue
            known = name in self.layout.by_key
            kept = name if known else _without_wrapper(name, plain)
            if kept != name and kept in plain:
                self._check_same(key, plain[kept])
                continue
            module, _, leaf = ("", "", "") if known else kept.rpartition(".base_layer.")
            if module and module not in factors and leaf != "weight":
                raise AdapterError(f"{self.file}: key {key!r} is of a layer that has no factors in the file")
            kept = f"{module}.{leaf}" if module else kept
            if kept in found:
                self._check_same(key, found[kept])
            elif self._is_trained(kept) and not self._is_copy(kept, key):
                found[kept] = key
            elif kept in self.copies:
                continue
            else:
                self._check_is_base(kept, key)
        return found

    def _is_trained(self, name: str) -> bool:
        """Whether the config says that a param of the base is trained whole.

        Of `modules_to_save` as PEFT reads it: the end of a module's path, at a dot or not (`norm`, `input_layernorm`).
        """
        module, _, leaf = name.rpartition(".")
        names = (*self.spec.modules_to_save, *heads_of(self.config.task_type))
        tied = self._tied_names.get(name, ()) if self.config.ties else ()
        owners = (module, *(other.rpartition(".")[0] for other in tied))
        saved = any(path.endswith(names) for owner in owners for path in around(owner))
        return saved or (leaf == "bias" and self.spec.bias != "none")

    def _is_copy(self, name: str, key: str) -> bool:
        """Whether the file says that it holds a tensor of the base's own beside those that are trained, and does."""
        if name not in self.copies or not all(has_values(self.flat[link.path]) for link in self.layout.by_key[name]):
            return False
        base, found = self.layout.tensor(name, self.flat), self.tensors[key]
        return found.dtype == base.dtype and np.array_equal(found, base)

    def _check_same(self, key: str, other: str) -> None:
        if not np.array_equal(self.tensors[key], self.tensors[other]):
            raise AdapterError(f"{self.file}: keys {key!r} and {other!r} are one param, and hold different values")

    def _check_is_copy(self, name: str, key: str) -> None:
        """What stands beside a module that is trained whole, and is never used: it need only be such a thing."""
        wanted = find(self.layout, name, self.file, key)[0].torch_shape
        if not self._is_trained(name):
            raise AdapterError(f"{self.file}: key {key!r}: its module is none of 'modules_to_save' in {CONFIG}")
        if (found := self.tensors[key].shape) != wanted:
            raise AdapterError(f"{self.file}: key {key!r}: expected shape {wanted}, found {found}")

    def _check_is_base(self, name: str, key: str) -> None:
        """What is not trained may only say what the base is: PEFT stores a targeted embedding's weight, for one."""
        links = find(self.layout, name, self.file, key)
        path = links[0].path
        if not all(has_values(self.flat[link.path]) for link in links):
            raise AdapterError(
                f"{self.file}: key {key!r} is the base's own weight, and {path!r} in the params is only a shape, which "
                "can't be compared with it; give params with values"
            )
        base, found = self.layout.tensor(name, self.flat), self.tensors[key]
        if found.shape != base.shape or not np.array_equal(found.astype(base.dtype), base):
            raise AdapterError(
                f"{self.file}: key {key!r} is the base's own weight ({CONFIG} has it neither in 'modules_to_save' nor "
                f"as a bias), and differs from {path!r} in the params: an adapter never changes the base "
                "unasked. Was it trained on another base (a resized vocabulary)? Load that one"
            )

    def _replaced(self, plain: Mapping[str, str]) -> Iterator[tuple[Site, Leaves, Leaves]]:
        """The leaves that are replaced whole, from the keys of all that they hold."""
        paths: dict[str, str] = {}
        for name, key in plain.items():
            for link in find(self.layout, name, self.file, key):
                self._check_whole(link, plain, key)
                paths.setdefault(link.path, key)
        for path, key in paths.items():
            wanted = tuple(self.flat[path].shape)
            value = self._value(path, plain, key, wanted)
            kernel = Kernel(wanted, (), tuple(range(len(wanted))), kind="replacement")
            yield Site(path, "replacement", kernel), {"value": value}, {}

    def _check_whole(self, link: Link, plain: Mapping[str, str], key: str) -> None:
        """Everything that lies in the leaf is there, of a tied one the same under each name, and it is no other's."""
        others = self.layout.links[link.path]
        tied = self._tied_names.get(link.key, ())
        if missing := [other.key for other in others if other.key not in plain and not _is_tied_bias(other.key, tied)]:
            part = "one use" if set(missing) & set(tied) else "a part"
            raise AdapterError(
                f"{self.file}: key {key!r} replaces {part} of {link.path!r}, without {missing[0]!r}; give params where "
                "it is a leaf of its own"
            )
        for other in tied:
            if other in plain:
                self._check_same(plain[other], key)

    def _value(self, path: str, plain: Mapping[str, str], key: str, wanted: tuple[int, ...]) -> np.ndarray:
        links = self.layout.links[path]
        named = {link.key: self._named(link.key, plain) for link in links}
        state = {key: self.tensors[plain[name]] for key, name in named.items()}
        for link in links:
            if (found := state[link.key].shape) != link.torch_shape:
                raise AdapterError(
                    f"{self.file}: key {plain[named[link.key]]!r}: expected a tensor for {path!r} of shape "
                    f"{link.torch_shape} (here {wanted}), found {found}"
                )
        if len(dtypes := {tensor.dtype.name for tensor in state.values()}) > 1:
            raise AdapterError(
                f"{self.file}: {path!r} holds {key!r} and others in one array, and in the file they are of the dtypes "
                f"{sorted(dtypes)}: expected one"
            )
        return self.layout.leaf(path, state)

    def _named(self, key: str, plain: Container[str]) -> str:
        """The name by which the file has a tensor: of a tied bias, any."""
        return key if key in plain else next(name for name in self._tied_names[key] if name in plain)

    def _check_biases(self, found: set[str]) -> None:
        """With `bias` set, every bias that PEFT trains is in the file."""
        has = {path: any(link.path in found for link in links) for path, links in self.layout.by_key.items()}
        adapted = {key.rpartition(".")[0] for key, is_found in has.items() if is_found}
        for key, links in self.layout.by_key.items():
            module, _, leaf = key.rpartition(".")
            if leaf != "bias" or self.spec.bias == "none" or links[0].path in found:
                continue
            if self.spec.bias == "all" or module in adapted:
                raise AdapterError(
                    f"{self.file}: 'bias' is {self.spec.bias!r} in {CONFIG}, and {PREFIX + key!r} is missing; the file "
                    f"has {nearest(PREFIX + key, self.tensors)}"
                )


def _is_kept(where: Targets, module: str, kernel: Kernel) -> bool:
    """Whether our own targets keep a torch module."""
    return is_kept(where, f"{module}/weight".replace(".", "/"), kernel)


def _is_tied_bias(key: str, names: Collection[str]) -> bool:
    """Whether a file need not have a bias under this one of its names: PEFT's bases keep them tied."""
    return key in names and key.endswith(".bias")


def _torch_name(name: str, known: Container[str]) -> str:
    """The param that a key which is no factor is for: PEFT has several names for one."""
    if ".original_module." in name:
        name = name.replace(".original_module.", ".")
    kept = _without_wrapper(name, known)
    module, _, leaf = kept.rpartition(".base_layer.")
    return f"{module}.{leaf}" if module else kept


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(f"{name!r:.120}" for name in names[:3])
    return f"{len(names)} ({shown}{', …' if len(names) > 3 else ''})" if names else "none"


def _without_wrapper(name: str, known: Container[str]) -> str:
    """A param of a saved module by its own name; of a layer inside it, PEFT's other name has the adapter's in it."""
    outer, wrapper, inner = name.partition(".modules_to_save.")
    kept = f"{outer}.{inner}" if wrapper else name
    shorter = f"{outer}.{inner.partition('.')[2]}"
    return shorter if wrapper and kept not in known and shorter in known else kept


def _add(pieces: list[Piece], one: Piece, both_uses: Callable[[Piece, Piece], Piece]) -> None:
    """Adds a piece; one of the region that another has is the same weight's other use."""
    for i, other in enumerate(pieces):
        if other.region == one.region:
            pieces[i] = both_uses(other, one)
            return
    pieces.append(one)


def _use(found: Sequence[Piece], links: Sequence[Link]) -> str | None:
    """Of a tied weight, the use that is adapted; None for all, and for a weight with one use."""
    uses = {link.kind == "embedding" for link in links if link.kind != "plain"}
    if len(uses) == 1 or all(one.both for one in found):
        return None
    return "product" if found[0].spot.as_head else "lookup"
