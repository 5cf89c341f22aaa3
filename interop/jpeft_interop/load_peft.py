"""A folder of Hugging Face PEFT, read into an adapter for the params at hand: exactly, or with the reason why not."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

import jpeft
from jpeft.adapter import Adapter, Meta
from jpeft.site import Site
from jpeft.errors import AdapterError
from jpeft.kernel import Kernel
from jpeft.targets import ALL_LINEAR, is_kept, names_module
from jpeft.tree import dotted, flatten, nearest
from jpeft_interop.json_file import read_json_object
from jpeft_interop.layout import Entry, Index, Layout, default_layout, find, invert, leaf_from_torch
from jpeft_interop.lora_keys import PREFIX, Leaves, from_file, keys_of, shapes, split_key
from jpeft_interop.peft_config import PeftConfig, read_config
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
      AdapterError: it is not there, or not one of a LoRA that can be done here.
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


class _Matrix(NamedTuple):
    """The factors of one matrix in the file."""

    module: str
    leaves: Leaves
    use: str | None


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
    def spec(self) -> jpeft.LoRA:
        return self.config.spec

    def adapter(self) -> Adapter:
        factors, plain = self._sorted()
        by_path = self._by_path(factors)
        self._check_targets(factors)
        parts = [self._lora(path, found) for path, found in by_path.items()]
        parts += [self._replaced(name, key) for name, key in self._params_of(plain, factors).items()]
        self._check_biases({site.path for site, _, _ in parts})
        sites = tuple(sorted((site for site, _, _ in parts), key=lambda site: site.path))
        trained = {site.path: {n: jnp.asarray(leaf) for n, leaf in leaves.items()} for site, leaves, _ in parts}
        constant = {site.path: {"scaling": jnp.asarray(s)} for site, _, s in parts if s is not None}
        return Adapter(trained, constant, Meta(self.spec, sites))

    def _sorted(self) -> tuple[dict[str, Leaves], dict[str, str]]:
        """Factors by torch module, and the other keys by the name of the param that they are for."""
        factors: dict[str, Leaves] = {}
        plain: dict[str, str] = {}
        for key, tensor in self.tensors.items():
            name, leaf = split_key(key, self.file)
            if leaf is None:
                plain[name] = key
            else:
                factors.setdefault(name, {})[leaf] = tensor
        for module, leaves in factors.items():
            self._check_pair(module, leaves)
        return factors, plain

    def _check_pair(self, module: str, leaves: Leaves) -> None:
        embedding = (
            f"{PREFIX}{module}.lora_embedding_A" in self.tensors or f"{PREFIX}{module}.lora_embedding_B" in self.tensors
        )
        names = keys_of(module, embedding)
        needed = ("a", "b", "bias") if self.spec.factor_bias and not embedding else ("a", "b")
        for leaf in needed:
            if names[leaf] not in self.tensors:
                raise AdapterError(f"{self.file}: key {names[leaf]!r} is missing; the others of that module are there")
        if "bias" in leaves and not self.spec.factor_bias:
            raise AdapterError(f"{self.file}: key {names['bias']!r} is unexpected: 'lora_bias' is false in {CONFIG}")

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
            if targeted and module not in factors and self.spec.rank_of(module) > 0:
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
            told = f"{PREFIX}{module}.lora_A.weight"
            entry = find(self.entries, f"{module}.weight", self.file, told)
            one = _Matrix(module, leaves, entry.use)
            group = found.setdefault(entry.path, {})
            group[entry.index] = self._both_uses(entry.path, group[entry.index], one) if entry.index in group else one
        return found

    def _both_uses(self, path: str, one: _Matrix, other: _Matrix) -> _Matrix:
        """A tied weight with the same change on either side is adapted in all its uses."""
        embedding, head = (one, other) if one.use == "lookup" else (other, one)
        pairs = ((embedding.leaves["a"], head.leaves["b"].T), (embedding.leaves["b"], head.leaves["a"].T))
        same_scale = self.spec.alpha_of(one.module) == self.spec.alpha_of(other.module)
        if not same_scale or not all(np.array_equal(x, y) for x, y in pairs):
            raise AdapterError(
                f"{self.file}: {one.module!r} and {other.module!r} are one tied weight, {path!r}, with different "
                "factors; an adapter holds one change of a weight: save them as two adapters"
            )
        return embedding._replace(use=None)

    def _lora(self, path: str, found: Mapping[Index, _Matrix]) -> tuple[Site, Leaves, np.ndarray]:
        kernel = self.layout[path].kernel
        if kernel is None:
            raise AdapterError(f"{self.file}: {path!r} has factors, and the layout gives it no axes (a kernel)")
        ranks = {one.leaves["a"].shape[0] for one in found.values()}
        if len(ranks) != 1:
            raise AdapterError(f"{self.file}: the layers stacked in {path!r} have different ranks, {sorted(ranks)}")
        rank, use = ranks.pop(), next(iter(found.values())).use
        scaling = np.zeros(kernel.batch_shape, np.float32)
        stacked: Leaves = {}
        for index, one in found.items():
            as_head = one.use == "product"
            self._check_shapes(one.module, one.leaves, kernel, rank, as_head)
            scaling[index] = self.spec.scaling(rank, self.spec.alpha_of(one.module))
            for name, leaf in from_file(one.leaves, kernel, as_head).items():
                whole = stacked.setdefault(name, np.zeros((*kernel.batch_shape, *leaf.shape), leaf.dtype))
                whole[index] = leaf
        return Site(path, "lora", kernel, rank, _layers(kernel, found, self.file, path), use), stacked, scaling

    def _check_shapes(self, module: str, leaves: Leaves, kernel: Kernel, rank: int, as_head: bool) -> None:
        wanted = shapes(kernel, self.spec.rank_of(module), as_head)
        names = keys_of(module, kernel.kind == "embedding" and not as_head)
        for leaf, tensor in leaves.items():
            if tensor.shape != wanted[leaf]:
                raise AdapterError(
                    f"{self.file}: key {names.get(leaf, module)!r}: expected shape {wanted[leaf]} (rank "
                    f"{self.spec.rank_of(module)} on a weight of shape {kernel.shape}), found {tensor.shape}"
                )

    def _params_of(self, plain: Mapping[str, str], factors: Mapping[str, Leaves]) -> dict[str, str]:
        """The params replaced whole: torch name to key. PEFT's names for the same param are folded together."""
        found: dict[str, str] = {}
        for name, key in plain.items():
            if ".original_module." in name:  # PEFT leaves the base's copy in the file, and never uses it
                continue
            kept = name.replace(".modules_to_save.", ".")
            if kept != name and kept in plain:
                self._check_same(key, plain[kept])
                continue
            module, _, leaf = kept.rpartition(".base_layer.")
            if module and leaf == "weight":
                self._check_base_weight(module, key)
                continue
            if module and module not in factors:
                raise AdapterError(f"{self.file}: key {key!r} is of a layer that has no factors in the file")
            found[f"{module}.{leaf}" if module else kept] = key
        return found

    def _check_same(self, key: str, other: str) -> None:
        if not np.array_equal(self.tensors[key], self.tensors[other]):
            raise AdapterError(f"{self.file}: keys {key!r} and {other!r} are one param, and hold different values")

    def _check_base_weight(self, module: str, key: str) -> None:
        """PEFT stores a targeted embedding's base weight too: it has to be the one that is here."""
        entry = find(self.entries, f"{module}.weight", self.file, key)
        base = np.asarray(self.flat[entry.path])
        found = leaf_from_torch(self.tensors[key], self.layout[entry.path])
        if found.shape != base.shape or not np.array_equal(found.astype(base.dtype), base):
            raise AdapterError(
                f"{self.file}: key {key!r} is the base's own weight, and differs from {entry.path!r} in the params: "
                "the adapter was trained on another base (a resized vocabulary?); load that base"
            )

    def _replaced(self, name: str, key: str) -> tuple[Site, Leaves, None]:
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
        return Site(entry.path, "replacement", kernel), {"value": value}, None

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


def _layers(kernel: Kernel, found: Mapping[Index, Any], file: str, path: str) -> tuple[int, ...] | None:
    """Of a stacked weight, the slices that the file has; None for all."""
    if not kernel.batch or len(found) == int(np.prod(kernel.batch_shape)):
        return None
    firsts = sorted({index[0] for index in found})
    if len(found) != len(firsts) * int(np.prod(kernel.batch_shape[1:])):
        raise AdapterError(f"{file}: of the weights stacked in {path!r} only some have factors: {sorted(found)}")
    return tuple(firsts)
