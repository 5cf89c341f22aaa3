"""Rotary positions: the frequencies as each scaling has them, the tables once a forward, the rotation.

A head of width `d` is `d/2` planes; the token at position `p` is turned by `p · θ^(-2i/d)` in plane `i`, whose axes are
`i` and `i + d/2` (Su et al. 2021, https://arxiv.org/abs/2104.09864, in the layout of Llama checkpoints).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from jpeft.whole import whole
from jpeft_interop.models.errors import ModelError

NEEDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}
OLD_TYPES = {"su": "longrope"}


@dataclass(frozen=True)
class Rope:
    """How positions rotate.

    Attributes:
      rope_type: a key of `NEEDS`.
      theta: the base of the frequencies.
      dim: how much of a head's width is rotated, from its start.
      max_position_embeddings: the length that `dynamic` starts to stretch at, and that `longrope` reaches.
      options: the numbers that the type takes besides (`factor`, `low_freq_factor`, …), sorted by name.
    """

    rope_type: str
    theta: float
    dim: int
    max_position_embeddings: int
    options: tuple[tuple[str, Any], ...] = ()

    def option(self, name: str) -> Any:
        """The option `name`, which `read_rope` saw to."""
        return dict(self.options)[name]


def read_rope(config: Mapping[str, Any], dim: int, partial: bool = False) -> Rope:
    """Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (transformers 4 and older files).

    Args:
      config: the model's.
      dim: the width of a head.
      partial: whether the model may rotate only a part of it (`partial_rotary_factor`).

    Raises:
      ModelError: a type not in `NEEDS` or without what it needs, types that differ by layer, or a rotation of only a
        part of the head in a model that has none.
    """
    given = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    if any(isinstance(value, Mapping) for value in given.values()):
        raise ModelError(f"rope parameters that differ by layer are not supported; found {given}")
    rope_type = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    rope_type = OLD_TYPES.get(rope_type, rope_type)
    if rope_type not in NEEDS:
        raise ModelError(f"rope_type {rope_type!r} is not supported; supported: {', '.join(NEEDS)}")
    missing = [name for name in NEEDS[rope_type] if given.get(name) is None]
    if missing:
        raise ModelError(f"rope_type {rope_type!r} needs {', '.join(map(repr, missing))}; the config gives {given}")
    share = given.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or 1.0
    if share != 1.0 and not partial:
        raise ModelError(f"partial_rotary_factor {share} is not supported; only whole heads are rotated (1.0)")
    theta = given.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    length = config.get("max_position_embeddings") or 2048
    if rope_type in ("llama3", "yarn", "longrope"):
        outside = config.get("original_max_position_embeddings")
        given["original_max_position_embeddings"] = outside or given.get("original_max_position_embeddings") or length
    options = tuple(sorted((name, _hashable(value)) for name, value in given.items()))
    rope = Rope(rope_type, float(theta), int(dim * share), int(length), options)
    _require_factors(rope)
    return rope


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _require_factors(rope: Rope) -> None:
    """Of `longrope`, one number a plane."""
    if rope.rope_type == "longrope":
        for name in NEEDS["longrope"]:
            found = rope.option(name)
            if not isinstance(found, tuple) or len(found) != rope.dim // 2:
                raise ModelError(
                    f"rope_type 'longrope' needs {rope.dim // 2} numbers as {name!r}; found {found!r:.200}"
                )


def rope_tables(rope: Rope, position_ids: Array, dtype: DTypeLike) -> tuple[Array, Array]:
    """The cosines and sines of every angle, each `(batch or 1, time, 1, planes)`: worked out in fp32, then cast.

    Args:
      rope: how positions rotate.
      position_ids: `(batch or 1, time)`.
      dtype: what the tables are used in.
    """
    inv_freq, scale = _FREQUENCIES[rope.rope_type](rope, position_ids)
    cos, sin = _cos_sin(position_ids[:, :, None, None].astype(jnp.float32) * inv_freq, jnp.float32(scale))
    return cos.astype(dtype), sin.astype(dtype)


@whole
def _cos_sin(angles: Array, scale: Array) -> tuple[Array, Array]:
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x: Array, tables: tuple[Array, Array]) -> Array:
    """Turns `x`, `(batch, time, heads, dim)`, by the angles of the tables; what is beyond their planes stays."""
    cos, sin = tables
    planes = cos.shape[-1]
    first, second, rest = jnp.split(x, (planes, 2 * planes), axis=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate((*turned, rest) if rest.shape[-1] else turned, axis=-1)


def _base_frequencies(rope: Rope) -> np.ndarray:
    exponents = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    return np.float32(1.0) / np.float32(rope.theta) ** exponents


def _default(rope: Rope, position_ids: Array) -> tuple[Any, float]:
    return _base_frequencies(rope), 1.0


def _linear(rope: Rope, position_ids: Array) -> tuple[Any, float]:
    return _base_frequencies(rope) / np.float32(rope.option("factor")), 1.0


def _dynamic(rope: Rope, position_ids: Array) -> tuple[Any, float]:
    """NTK-aware scaling: θ grows with the longest position beyond the trained length L, θ·(s·n/L - (s - 1))^(d/(d-2)).

    transformers keeps the largest θ it has met between calls; here each call stands alone.
    """
    length = rope.max_position_embeddings
    longest = jnp.maximum(jnp.max(position_ids) + 1, length).astype(jnp.float32)
    factor = rope.option("factor")
    theta = rope.theta * (factor * longest / length - (factor - 1)) ** (rope.dim / (rope.dim - 2))
    exponents = jnp.arange(0, rope.dim, 2, dtype=jnp.float32) / rope.dim
    stretched = 1.0 / theta**exponents
    return jnp.where(longest > length, stretched, _base_frequencies(rope)), 1.0


def _llama3(rope: Rope, position_ids: Array) -> tuple[Any, float]:
    """Long wavelengths are divided by the factor, short ones kept, those between blended (Llama 3.1)."""
    inv_freq = _base_frequencies(rope)
    factor, low, high = (rope.option(name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    length = rope.option("original_max_position_embeddings")
    wavelength = 2 * np.float32(np.pi) / inv_freq
    smooth = (length / wavelength - low) / (high - low)
    blended = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    long, short = wavelength > length / low, wavelength < length / high
    return np.where(long, inv_freq / factor, np.where(short, inv_freq, blended)).astype(np.float32), 1.0


def _yarn(rope: Rope, position_ids: Array) -> tuple[Any, float]:
    """Interpolates slow planes, keeps fast ones, and scales the tables (Peng et al. 2023, https://arxiv.org/abs/2309.00071)."""
    options = dict(rope.options)
    factor, length = rope.option("factor"), rope.option("original_max_position_embeddings")
    low, high = (_yarn_plane(rope, options.get(key) or default, length) for key, default in _YARN_BETAS)
    if options.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    ramp = (np.arange(rope.dim // 2, dtype=np.float32) - low) / (high - low if high != low else 0.001)
    slow = np.clip(ramp, 0, 1).astype(np.float32)
    inv_freq = _base_frequencies(rope)
    return (inv_freq / factor * slow + inv_freq * (1 - slow)).astype(np.float32), _yarn_scale(options, factor)


_YARN_BETAS = (("beta_fast", 32), ("beta_slow", 1))


def _yarn_plane(rope: Rope, rotations: float, length: int) -> float:
    """The plane that turns `rotations` times over the trained length."""
    return rope.dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))


def _yarn_scale(options: Mapping[str, Any], factor: float) -> float:
    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if options.get("attention_factor") is not None:
        return options["attention_factor"]
    if options.get("mscale") and options.get("mscale_all_dim"):
        return mscale(options["mscale"]) / mscale(options["mscale_all_dim"])
    return mscale(1.0)


def _longrope(rope: Rope, position_ids: Array) -> tuple[Any, float]:
    """Each plane slowed by a factor of its own, of two sets: one up to the trained length, one for anything longer.

    Which it is, is asked of a forward's own positions (Ding et al. 2024, https://arxiv.org/abs/2402.13753): keys that
    a cache holds from before a text outgrew the trained length keep the angles of the short set.
    """
    length = rope.option("original_max_position_embeddings")
    short, long = (np.asarray(rope.option(name), np.float32) for name in ("short_factor", "long_factor"))
    factors = jnp.where(jnp.max(position_ids) + 1 > length, long, short)
    return _base_frequencies(rope) / factors, _longrope_scale(rope, length)


def _longrope_scale(rope: Rope, length: int) -> float:
    options = dict(rope.options)
    if options.get("attention_factor") is not None:
        return options["attention_factor"]
    factor = options.get("factor") or rope.max_position_embeddings / length
    return math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0


_FREQUENCIES = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
