"""A folder of Hugging Face PEFT, read into an adapter for the params at hand: exactly, or with the reason why not."""

from __future__ import annotations

import os
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jpeft.adapter import Adapter, Meta
from jpeft.errors import AdapterError
from jpeft.kernel import Kernel
from jpeft.methods import METHODS
from jpeft.site import Site
from jpeft.spec import Spec
from jpeft.targets import ALL_LINEAR, is_kept, names_module
from jpeft.tree import dotted, flatten, nearest
from jpeft_interop.ia3_keys import as_peft_reads, bias_of_head
from jpeft_interop.json_file import read_json_object
from jpeft_interop.old_layout import Entry, Index, Layout, default_layout, find, invert, leaf_from_torch
from jpeft_interop.lora_keys import Leaves
from jpeft_interop.peft_config import PeftConfig, read_config
from jpeft_interop.peft_keys import PREFIX, Keys, Spot, keys_of
from jpeft_interop.safetensors_file import read_safetensors

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


def load_peft(folder: str | os.PathLike[str], params: Any, *, layout: Layout | None = None) -> Adapter:
    """An adapter from a folder that PEFT wrote (or `save_peft`).

    Args:
      folder: holds `adapter_config.json` and `adapter_model.safetensors`.
      params: the base it is for: as `load_model` or `params_from_torch` give them, or any with a `layout`.
      layout: where each path of the params lies in torch, for params with other names or shapes.

    Returns:
      the adapter; its spec is the folder's config, its arrays are in the file's dtypes.

    Raises:
      AdapterError: a file missing, broken or foreign, an option not done here, a key or shape that does not fit the
        params. Nothing is applied or kept.
    """
    folder = Path(folder)
    config = read_peft_config(folder)
    tensors = _read_tensors(folder)
    flat = flatten(params)
    layout = default_layout(flat) if layout is None else layout
    reading = _Reading(str(folder / WEIGHTS), config, flat, layout, invert(layout), tensors)
    return reading.adapter()


def read_peft_config(folder: str | os.PathLike[str]) -> PeftConfig:
    """The `adapter_config.json` of a folder, checked.

    Raises:
      AdapterError: it is not there, or not one that can be done here.
    """
    file = Path(folder) / CONFIG
    if not file.exists():
        raise AdapterError(f"{folder}: no {CONFIG} there; is it an adapter's folder?")
    return read_config(read_json_object(file), str(file))


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    file = folder / WEIGHTS
    if not file.exists():
        hint = f"; {PICKLE} is a pickle, which is never read: save it again with safe_serialization=True"
        raise AdapterError(f"{folder}: no {WEIGHTS} there{hint if (folder / PICKLE).exists() else ''}")
    tensors, _ = read_safetensors(file)
    for key, tensor in tensors.items():
        if not jnp.issubdtype(tensor.dtype, jnp.floating) or tensor.ndim == 0:
            raise AdapterError(f"{file}: key {key!r}: expected an array of floats, found {tensor.dtype} {tensor.shape}")
        if not np.isfinite(np.asarray(tensor, np.float32)).all():
            raise AdapterError(f"{file}: key {key!r} holds values that are not finite")
    return dict(tensors)


@dataclass(frozen=True)
class _Matrix:
    """What the file has of one matrix."""

    spot: Spot
    leaves: Leaves
    use: str | None

    @property
    def rank(self) -> int:
        """r; 0 where the method has none."""
        return self.leaves["a"].shape[0] if "a" in self.leaves else 0


@dataclass(frozen=True)
class _Reading:
    """One file against one base: everything that a step of the reading needs to see."""

    file: str
    config: PeftConfig
    flat: Mapping[str, Any]
    layout: Layout
    entries: Mapping[str, Entry]
    tensors: Mapping[str, np.ndarray]

    @property
    def spec(self) -> Any:
        return self.config.spec

    @property
    def keys(self) -> Keys:
        return keys_of(self.spec)

    def adapter(self) -> Adapter:
        factors, plain = self._sorted()
        by_path = self._by_path(factors)
        self._check_targets(factors)
        parts = [self._adapted(path, found) for path, found in by_path.items()]
        parts += [self._replaced(name, key) for name, key in self._params_of(plain, factors).items()]
        self._check_biases({site.path for site, _, _ in parts})
        sites = tuple(sorted((site for site, _, _ in parts), key=lambda site: site.path))
        trained = {site.path: {n: jnp.asarray(leaf) for n, leaf in leaves.items()} for site, leaves, _ in parts}
        constant = {site.path: {n: jnp.asarray(leaf) for n, leaf in held.items()} for site, _, held in parts if held}
        return Adapter(trained, constant, Meta(self._spec_here(factors), sites))

    def _spec_here(self, factors: Mapping[str, Leaves]) -> Spec:
        return as_peft_reads(self.spec, factors)

    def _sorted(self) -> tuple[dict[str, Leaves], dict[str, str]]:
        """Factors by torch module, and the other keys by the name of the param that they are for."""
        factors: dict[str, Leaves] = {}
        plain: dict[str, str] = {}
        for key, tensor in self.tensors.items():
            name, leaf = self.keys.split(key, self.file)
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
        where = self.spec.where
        if where.targets == ALL_LINEAR:
            return
        for key, entry in self.entries.items():
            module, kernel = key.removesuffix(".weight"), self.layout[entry.path].kernel
            if kernel is None or not key.endswith(".weight"):
                continue
            path = f"{module}/weight".replace(".", "/")
            targeted = names_module(where.targets, module) and is_kept(where, path, kernel)
            if targeted and module not in factors and (self.keys.has_rank_zero or self.spec.rank_of(module) > 0):
                raise AdapterError(
                    f"{self.file}: {module!r} is a target in {CONFIG}, and its factors are missing from the file"
                )
            if module in factors and not targeted:
                raise AdapterError(
                    f"{self.file}: {module!r} has factors, and is no target in {CONFIG}: {where.targets!r}"
                )

    def _by_path(self, factors: Mapping[str, Leaves]) -> dict[str, dict[Index, _Matrix]]:
        """The factors of each weight, by index on its batch axes."""
        found: dict[str, dict[Index, _Matrix]] = {}
        for module, leaves in factors.items():
            told = f"{PREFIX}{module}{next(iter(self.keys.suffixes.values()))}"
            entry = find(self.entries, f"{module}.weight", self.file, told)
            one = _Matrix(self._spot(module, entry), leaves, entry.use)
            self._check_complete(one.spot, leaves)
            group = found.setdefault(entry.path, {})
            group[entry.index] = self._both_uses(entry.path, group[entry.index], one) if entry.index in group else one
        return found

    def _spot(self, module: str, entry: Entry) -> Spot:
        kernel = self.layout[entry.path].kernel
        if kernel is None:
            raise AdapterError(f"{self.file}: {entry.path!r} has factors, and the layout gives it no axes (a kernel)")
        as_head = entry.use == "product"
        spot = Spot(module, kernel, as_head, bias_of_head(module, self.layout) if as_head else None)
        if (reason := self.keys.why_not(spot)) is not None:
            raise AdapterError(f"{self.file}: {module!r} can't be loaded: {reason}")
        return spot

    def _both_uses(self, path: str, one: _Matrix, other: _Matrix) -> _Matrix:
        """A tied weight with the same change on either side is adapted in all its uses."""
        embedding, head = (one, other) if one.use == "lookup" else (other, one)
        pairs = ((embedding.leaves["a"], head.leaves["b"].T), (embedding.leaves["b"], head.leaves["a"].T))
        same_scale = self.spec.alpha_of(one.spot.module) == self.spec.alpha_of(other.spot.module)
        if not same_scale or not all(np.array_equal(x, y) for x, y in pairs):
            raise AdapterError(
                f"{self.file}: {one.spot.module!r} and {other.spot.module!r} are one tied weight, {path!r}, with "
                "different factors; an adapter holds one change of a weight: save them as two adapters"
            )
        return replace(embedding, use=None)

    def _adapted(self, path: str, found: Mapping[Index, _Matrix]) -> tuple[Site, Leaves, Leaves]:
        """The site of one weight, its trained leaves, and its constant ones."""
        first = next(iter(found.values()))
        kernel, ranks = first.spot.kernel, {one.rank for one in found.values()}
        rank = max(ranks)
        if len(ranks) != 1 and self.spec.method != "adalora":
            raise AdapterError(f"{self.file}: the layers stacked in {path!r} have different ranks, {sorted(ranks)}")
        stacked: Leaves = {}
        for index, one in found.items():
            self._check_shapes(one)
            leaves = self.keys.from_file(self.spec, one.leaves, one.spot)
            for name, leaf in (_padded(leaves, rank) if len(ranks) != 1 else leaves).items():
                whole = stacked.setdefault(name, np.zeros((*kernel.batch_shape, *leaf.shape), leaf.dtype))
                whole[index] = leaf
        if {"l", "l_in"} <= stacked.keys():
            raise AdapterError(f"{self.file}: of the layers stacked in {path!r} some are scaled at the input, some not")
        site = Site(path, self.spec.method, kernel, rank, _layers(kernel, found, self.file, path), first.use)
        return site, stacked, self._constant(site, found)

    def _constant(self, site: Site, found: Mapping[Index, _Matrix]) -> Leaves:
        """What the method holds beside what it trains: the scaling by torch's names, which patterns are in."""
        held = {name: np.asarray(leaf) for name, leaf in METHODS[site.method].constant(self.spec, site).items()}
        if self.keys.scaling is not None:
            scaling = np.zeros(site.kernel.batch_shape, np.float32)
            for index, one in found.items():
                scaling[index] = self.keys.scaling(self.spec, one.spot.module)
            held["scaling"] = scaling
        return held

    def _check_shapes(self, one: _Matrix) -> None:
        wanted, names = self.keys.shapes(self.spec, one.spot), self.keys.names(one.spot)
        rank = f"rank {self.spec.rank_of(one.spot.module)} on " if "a" in wanted else ""
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
            if ".original_module." in name:  # PEFT leaves the base's copy in the file, and never uses it
                continue
            kept = _without_wrapper(name, plain)
            if kept != name and kept in plain:
                self._check_same(key, plain[kept])
                continue
            module, _, leaf = kept.rpartition(".base_layer.")
            if module and module not in factors and leaf != "weight":
                raise AdapterError(f"{self.file}: key {key!r} is of a layer that has no factors in the file")
            kept = f"{module}.{leaf}" if module else kept
            if self._is_trained(kept):
                found[kept] = key
            else:
                self._check_is_base(kept, key)
        return found

    def _is_trained(self, name: str) -> bool:
        """Whether the config says that a param of the base is trained whole.

        Of `modules_to_save` as PEFT reads it: the end of a module's path, at a dot or not (`norm`, `input_layernorm`).
        """
        *modules, leaf = name.split(".")
        paths = [".".join(modules[: i + 1]) for i in range(len(modules))]
        saved = any(path.endswith(end) for path in paths for end in self.spec.modules_to_save)
        return saved or (leaf == "bias" and self.spec.bias != "none")

    def _check_same(self, key: str, other: str) -> None:
        if not np.array_equal(self.tensors[key], self.tensors[other]):
            raise AdapterError(f"{self.file}: keys {key!r} and {other!r} are one param, and hold different values")

    def _check_is_base(self, name: str, key: str) -> None:
        """What is not trained may only say what the base is: PEFT stores a targeted embedding's weight, for one."""
        entry = find(self.entries, name, self.file, key)
        base = np.asarray(self.flat[entry.path])
        found = leaf_from_torch(self.tensors[key], self.layout[entry.path])
        if found.shape != base.shape or not np.array_equal(found.astype(base.dtype), base):
            raise AdapterError(
                f"{self.file}: key {key!r} is the base's own weight ({CONFIG} has it neither in 'modules_to_save' nor "
                f"as a bias), and differs from {entry.path!r} in the params: an adapter never changes the base "
                "unasked. Was it trained on another base (a resized vocabulary)? Load that one"
            )

    def _replaced(self, name: str, key: str) -> tuple[Site, Leaves, Leaves]:
        entry = find(self.entries, name, self.file, key)
        place = self.layout[entry.path]
        if entry.use is not None or entry.index:
            raise AdapterError(
                f"{self.file}: key {key!r} replaces {'one use' if entry.use else 'one slice'} of {entry.path!r}; give "
                "params where it is a leaf of its own"
            )
        value = leaf_from_torch(self.tensors[key], place)
        wanted = tuple(self.flat[entry.path].shape)
        if value.shape != wanted:
            raise AdapterError(
                f"{self.file}: key {key!r}: expected a tensor for {entry.path!r} of shape {wanted}, found {value.shape}"
            )
        kernel = Kernel(wanted, (), tuple(range(len(wanted))), kind="replacement")
        return Site(entry.path, "replacement", kernel), {"value": value}, {}

    def _check_biases(self, found: set[str]) -> None:
        """With `bias` set, every bias that PEFT trains is in the file."""
        adapted = {dotted(path.rpartition("/")[0]) for path in found}
        for key, entry in self.entries.items():
            module, _, leaf = key.rpartition(".")
            if leaf != "bias" or self.spec.bias == "none" or entry.path in found:
                continue
            if self.spec.bias == "all" or module in adapted:
                raise AdapterError(
                    f"{self.file}: 'bias' is {self.spec.bias!r} in {CONFIG}, and {PREFIX + key!r} is missing; the file "
                    f"has {nearest(PREFIX + key, self.tensors)}"
                )


def _without_wrapper(name: str, known: Container[str]) -> str:
    """A param of a saved module by its own name; of a layer inside it, PEFT's other name has the adapter's in it."""
    outer, wrapper, inner = name.partition(".modules_to_save.")
    kept = f"{outer}.{inner}" if wrapper else name
    shorter = f"{outer}.{inner.partition('.')[2]}"
    return shorter if wrapper and kept not in known and shorter in known else kept


def _padded(leaves: Leaves, rank: int) -> Leaves:
    """Factors of an AdaLoRA, with directions that are zero added to have so many."""
    wider = lambda leaf, axis: np.pad(leaf, [(0, rank - leaf.shape[i] if i == axis else 0) for i in range(leaf.ndim)])
    return {"a": wider(leaves["a"], leaves["a"].ndim - 1), "b": wider(leaves["b"], 0), "e": wider(leaves["e"], 0)}


def _layers(kernel: Kernel, found: Mapping[Index, Any], file: str, path: str) -> tuple[int, ...] | None:
    """Of a stacked weight, the slices that the file has; None for all."""
    if not kernel.batch or len(found) == int(np.prod(kernel.batch_shape)):
        return None
    firsts = sorted({index[0] for index in found})
    if len(found) != len(firsts) * int(np.prod(kernel.batch_shape[1:])):
        raise AdapterError(f"{file}: of the weights stacked in {path!r} only some have factors: {sorted(found)}")
    return tuple(firsts)
