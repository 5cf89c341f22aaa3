"""What an adapter on the disk holds, told without its base: ranks, scalings, shapes and norms."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

import jpeft
from jpeft.errors import AdapterError
from jpeft.methods import METHODS
from jpeft.safetensors_header import ADAPTER_HEADER_BYTES
from jpeft.tree import dotted, module_of
from jpeft_interop.adapter_files import adapter_file
from jpeft_interop.load_peft import WEIGHTS, check_kinds, read_peft_config
from jpeft_interop.peft_keys import KEYS, PREFIX, keys_of
from jpeft_interop.peft_types import type_of
from jpeft_interop.provenance import Provenance, provenance, read_config_object
from jpeft_interop.safetensors_file import read_safetensors

DIGITS = 20  # of a number in a name; more are letters
AT_ONCE = 1 << 22  # entries of an array that are in float64 at one time


@dataclass(frozen=True)
class Factors:
    """A pair of low-rank factors.

    Attributes:
      module: where it acts.
      rank: r.
      alpha: the numerator of the scaling.
      scaling: s; the largest, where stacked layers differ.
      a: shape of A, as it is stored.
      b: shape of B.
      dtype: of both, or of each.
      norm_a: the Frobenius norm of A.
      norm_b: that of B.
      norm: that of the change: `s A B`, of an AdaLoRA `s A diag(E) B`, of a DoRA before its magnitudes.
      size: the number of entries.
    """

    module: str
    rank: int
    alpha: float
    scaling: float
    a: tuple[int, ...]
    b: tuple[int, ...]
    dtype: str
    norm_a: float
    norm_b: float
    norm: float
    size: int


@dataclass(frozen=True)
class Plain:
    """An array beside the pairs (a vector, a bias, a param trained whole): name, shape, dtype, Frobenius norm, size."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    norm: float
    size: int


@dataclass(frozen=True)
class Summary:
    """An adapter.

    Attributes:
      kind: what kind of file or folder it is.
      provenance: whether it is known to be as it was written.
      config: the fields that differ from their defaults.
      factors: one record a module with low-rank factors.
      plain: one an array beside them.
    """

    kind: str
    provenance: str
    config: Mapping[str, Any]
    factors: tuple[Factors, ...]
    plain: tuple[Plain, ...]

    @property
    def size(self) -> int:
        """The number of entries of all arrays."""
        return sum(one.size for one in (*self.factors, *self.plain))


def summarise(path: str | os.PathLike[str]) -> Summary:
    """What a PEFT folder or a file of `jpeft.save` holds.

    Values that are not finite do not stop it: they show in the norms.

    Raises:
      AdapterError: there is nothing, or nothing that can be read.
    """
    path = Path(path)
    if not path.exists():
        raise AdapterError(f"{path}: no such folder or file; expected a PEFT folder, or a jpeft .safetensors file")
    return _of_folder(path) if path.is_dir() else _of_file(path)


def _of_folder(folder: Path) -> Summary:
    spec, file = read_peft_config(folder).spec, adapter_file(folder, WEIGHTS)
    found, kind, keys = read_config_object(folder), type_of(spec), keys_of(spec)
    defaults = kind.defaults if kind else {}
    config = {name: value for name, value in sorted(found.items()) if value != defaults.get(name)}
    tensors, _ = read_safetensors(file, AdapterError, ADAPTER_HEADER_BYTES)
    check_kinds(str(file), tensors)
    modules: dict[str, dict[str, np.ndarray]] = {}
    plain: list[Plain] = []
    for key, tensor in tensors.items():
        name, leaf = keys.split(key, str(file))
        if leaf in ("a", "b", "e"):
            modules.setdefault(name, {})[leaf] = tensor
        if leaf not in ("a", "b"):
            plain.append(_plain(_told(key.removeprefix(PREFIX)), tensor))
    factors = tuple(_pair(name, leaves, spec, file) for name, leaves in sorted(modules.items(), key=_numbered))
    plain.sort(key=lambda one: _numbered((one.name,)))
    return Summary(f"PEFT folder, {type(spec).__name__}", _provenance(folder), config, factors, tuple(plain))


def _provenance(folder: Path) -> str:
    """What is known, or what is wrong: that is no reason to show nothing."""
    try:
        return str(provenance(folder))
    except AdapterError as error:
        return f"CHANGED: {error}"


def _told(name: str) -> str:
    """A trained bias by its own name; PEFT writes the layer that it wraps into it."""
    return name.replace(".base_layer.bias", ".bias")


def _numbered(named: Sequence[Any]) -> list[tuple[int, str]]:
    """For sorting by a name, which comes first: layer 2 before layer 10."""
    is_number = lambda part: part.isdecimal() and len(part) < DIGITS
    return [(int(part), "") if is_number(part) else (-1, part) for part in named[0].split(".")]


def _pair(module: str, leaves: Mapping[str, np.ndarray], spec: Any, file: Path) -> Factors:
    """torch's A (r, in, …) and B (out, r, …) as matrices (in, r) and (r, out)."""
    if not {"a", "b"} <= leaves.keys():
        raise AdapterError(f"{file}: {module!r} has only its factor {next(iter(leaves)).upper()}")
    rank, width = leaves["a"].shape[0], leaves["b"].shape[1] if leaves["b"].ndim > 1 else None
    if width != rank or ("e" in leaves and leaves["e"].size != rank):
        found = " and ".join(f"{name.upper()} of shape {leaf.shape}" for name, leaf in leaves.items())
        raise AdapterError(f"{file}: {module!r}: {found} have no rank in common")
    a = leaves["a"].reshape(rank, math.prod(leaves["a"].shape[1:])).T
    b = np.moveaxis(leaves["b"], 1, -1).reshape(math.prod(leaves["b"].shape[:1] + leaves["b"].shape[2:]), rank).T
    alpha = _alpha(spec, module)
    scaling = spec.scaling if spec.method == "adalora" else spec.scaling(rank, alpha)
    e = leaves["e"].reshape(rank) if "e" in leaves else None
    return _factors(module, alpha, np.asarray(scaling), a, b, e, leaves)


def _alpha(spec: Any, module: str) -> float:
    if spec.method == "adalora":
        return spec.rank if spec.alpha is None else spec.alpha
    return spec.alpha_of(module)


def _of_file(file: Path) -> Summary:
    adapter = jpeft.load(file)
    spec = adapter.spec
    factors: list[Factors] = []
    plain: list[Plain] = []
    for site in adapter.sites:
        leaves = {name: np.asarray(leaf) for name, leaf in adapter.trained[site.path].items()}
        if site.method == "replacement":
            plain += [_plain(dotted(site.path), leaf) for leaf in leaves.values()]
            continue
        module = dotted(module_of(site.path))
        if "a" in leaves:
            held: Any = {name: np.asarray(leaf) for name, leaf in adapter.leaves(site.path).items()}
            matrices = METHODS[site.method].matrices(held, site.kernel)
            a, b, scaling = (np.asarray(matrices[name]) for name in ("a", "b", "scaling"))
            alpha, e = _alpha(spec, module_of(site.path)), leaves.get("e")
            factors.append(_factors(module, alpha, scaling, a, b, e, leaves))
        suffixes = {"l_in": ".ia3_l"} | dict(KEYS[site.method].suffixes) if site.method in KEYS else {}
        others = [name for name in leaves if name not in ("a", "b")]
        plain += [_plain(f"{module}{suffixes.get(name, f'.{name}')}", leaves[name]) for name in others]
    factors.sort(key=lambda one: _numbered((one.module,)))
    _, metadata = read_safetensors(file, AdapterError, ADAPTER_HEADER_BYTES)
    known = str(Provenance("ok" if "digest" in metadata else "unverified", "unverified"))  # `load` has compared it
    return Summary(f"jpeft file, {type(spec).__name__}", known, _differing(spec), tuple(factors), tuple(plain))


def _differing(spec: Any) -> dict[str, Any]:
    values = {field.name: (getattr(spec, field.name), field.default) for field in fields(spec)}
    return {name: value for name, (value, default) in values.items() if value != default}


def _factors(
    module: str,
    alpha: float,
    scaling: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    e: np.ndarray | None,
    stored: Mapping[str, np.ndarray],
) -> Factors:
    dtypes = dict.fromkeys(str(stored[name].dtype) for name in ("a", "b"))
    sizes = stored["a"].size + stored["b"].size
    largest = float(np.max(scaling, initial=0.0))
    acting = a if e is None else a * e[..., None, :]
    norms = _norm(stored["a"]), _norm(stored["b"]), _norm_of_product(scaling, acting, b)
    shapes = stored["a"].shape, stored["b"].shape
    return Factors(module, a.shape[-1], alpha, largest, *shapes, " ".join(dtypes), *norms, sizes)


def _plain(name: str, tensor: np.ndarray) -> Plain:
    return Plain(name, tensor.shape, str(tensor.dtype), _norm(tensor), tensor.size)


def _norm(array: np.ndarray) -> float:
    flat = array.reshape(-1)
    parts = (flat[begin : begin + AT_ONCE].astype(np.float64) for begin in range(0, flat.size, AT_ONCE))
    return float(np.sqrt(sum(part @ part for part in parts)))


def _norm_of_product(scaling: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """‖s A B‖ by ‖A B‖² = tr(Bᵀ Aᵀ A B) = <Aᵀ A, B Bᵀ>: two r x r matrices, where A B is no smaller than those."""
    rank, sides = a.shape[-1], a.shape[-2] * b.shape[-1]
    squares = _product(a, b) ** 2 if sides < rank**2 else _product(a.mT, a) * _product(b, b.mT)
    inner = np.sum(squares, axis=(-2, -1))
    return float(np.sqrt(np.maximum(np.sum(scaling.astype(np.float64) ** 2 * inner), 0.0)))


def _product(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x y in float64, some of it at a time: a file in 8 bits would take eight times its size at once."""
    width = max(1, AT_ONCE * x.shape[-1] // max(1, x.size, y.size))
    total = np.zeros((*x.shape[:-1], y.shape[-1]))
    for begin in range(0, x.shape[-1], width):
        left, right = x[..., begin : begin + width], y[..., begin : begin + width, :]
        total += left.astype(np.float64) @ right.astype(np.float64)
    return total
