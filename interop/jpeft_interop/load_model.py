"""A Hugging Face folder as a pure function and its params.

forward, params = load_model(folder)
logits = forward(params, input_ids, attention_mask).logits
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from jpeft.errors import WeightsError
from jpeft.finite import is_finite
from jpeft.strict_json import read_json_object
from jpeft.tree import flatten
from jpeft_interop.abstract import abstract_model
from jpeft_interop.arrays import own
from jpeft_interop.checkpoint import match, model_table
from jpeft_interop.fit import some
from jpeft_interop.gguf import convert_gguf, gguf_file
from jpeft_interop.models import Output, build, family, pure
from jpeft_interop.stacks import join_stacks
from jpeft_interop.torch_table import TorchKey, nest, to_jax
from jpeft_interop.weights import INDEX, SINGLE, Weights, read_weights

CONFIG = "config.json"
Home = Callable[[tuple[int, ...]], jax.sharding.Sharding]
logger = logging.getLogger(__name__)


def load_model(
    folder: str | os.PathLike[str],
    dtype: DTypeLike | None = None,
    architecture: str | None = None,
    *,
    init_missing: jax.Array | None = None,
    home: Home | None = None,
) -> tuple[Callable[..., Output], dict[str, Any]]:
    """The model in a folder, as a pure forward and its params.

    Every key of the weights is accounted for before one is read. Files are mapped and copied tensor by tensor, so that
    at most one tensor is in memory twice. What is not read (ties, buffers, heads of other architectures) is logged.

    Args:
      folder: `config.json` with `model.safetensors`, or shards and their index; or a GGUF file, itself or in a folder,
        which is converted once (that needs torch, transformers and gguf).
      dtype: of the params; by default the weights' own.
      architecture: torch's class name, `BertForSequenceClassification`; by default the first that the config names.
      init_missing: a key with which to initialise a head that the folder has no weights for.
      home: where on a mesh a weight of a shape lives. Each process then reads, and checks, no more than its devices'
        parts. A head that is initialised stays where it was made.

    Returns:
      `(forward, params)`: `forward(params, input_ids, attention_mask=None, ...)` takes transformers' input names and
      returns a record with `logits`, `hidden_states`, …; params are a nested dict at torch's names.

    Raises:
      WeightsError: a file is missing or broken, a key missing, unexpected or of another shape, a value not finite.
        Names file, key, expected and found.
      ModelError: the model is none of those in `jpeft_interop.models`.
    """
    asked = None if dtype is None else _floating(dtype)
    folder = hf_folder(folder)
    config = read_config(folder)
    known = family(config.get("model_type"))
    weights = join_stacks(read_weights(folder), known.stacks)
    dtype = asked or _own_dtype(weights, folder)

    def make(rngs: nnx.Rngs | None = None) -> nnx.Module:
        return build(config, dtype, architecture, rngs=rngs)

    forward, abstract = pure(abstract_model(make))
    shapes = flatten(abstract)
    table = model_table(shapes, known)
    name = architecture or str(next(iter(config.get("architectures") or ["the model"])))
    found = match(weights, table, shapes, known, name)
    _log(found.ignored, folder)
    fresh = _initialised(make, found.missing, init_missing, folder, name)
    leaves = {
        path: _read(weights, found.sources[path], table[path], dtype, home) for path in table if path not in fresh
    }
    return forward, nest({path: fresh[path] if path in fresh else leaves[path] for path in table})


def hf_folder(path: str | os.PathLike[str]) -> Path:
    """The folder with config and safetensors for `path`: itself, or that of the GGUF file there, converted."""
    path = Path(path)
    has_weights = any(os.path.lexists(path / name) for name in (SINGLE, INDEX))
    return path if has_weights or gguf_file(path) is None else convert_gguf(path)


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The folder's `config.json`.

    Raises:
      WeightsError: it is missing, broken, or describes quantised weights.
    """
    config = read_json_object(Path(folder) / CONFIG, WeightsError)
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise WeightsError(f"{Path(folder) / CONFIG}: 'architectures': expected a list of names, found {names!r:.200}")
    if (quantised := config.get("quantization_config")) is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise WeightsError(
            f"{Path(folder) / CONFIG}: the weights are quantised ({method!r}), which is not supported; dequantise them "
            "with transformers (model.dequantize()) and save them again"
        )
    return config


def _floating(dtype: DTypeLike) -> np.dtype:
    found = jnp.dtype(dtype)
    if not jnp.issubdtype(found, jnp.floating):
        raise WeightsError(f"dtype: expected a floating point type such as float32 or bfloat16, found {found.name}")
    return found


def _own_dtype(weights: Weights, folder: Path) -> np.dtype:
    """The one floating dtype of the weights."""
    dtypes = {weights.spec(key).dtype for key in weights}
    floating = sorted(dtype.name for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating))
    if len(floating) != 1:
        raise WeightsError(
            f"{folder}: expected weights of one floating dtype, found {', '.join(floating) or 'none'}; choose one: "
            f"load_model(folder, dtype={floating[-1] if floating else 'float32'!r})"
        )
    return jnp.dtype(floating[0])


def _read(weights: Weights, key: str, entry: TorchKey, dtype: np.dtype, home: Home | None) -> jax.Array | np.ndarray:
    array = to_jax(weights[key], entry)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise WeightsError(f"{weights.file(key)}: {key!r}: expected floating point values, found {array.dtype.name}")
    part = lambda index: _checked(array[index], dtype, f"{weights.file(key)}: {key!r}")
    leaf = part(...) if home is None else jax.make_array_from_callback(array.shape, home(array.shape), part)
    weights.release(key)
    return leaf


def _checked(array: np.ndarray, dtype: np.dtype, where: str) -> jax.Array | np.ndarray:
    if not is_finite(array):
        raise WeightsError(f"{where} holds values that are not finite")
    leaf = own(array, dtype)
    if np.finfo(np.float32).max > jnp.finfo(dtype).max and not is_finite(np.asarray(leaf)):
        raise WeightsError(f"{where} holds values beyond the range of {dtype.name}")
    return leaf


def _initialised(
    make: Callable[..., nnx.Module], missing: tuple[str, ...], key: jax.Array | None, folder: Path, model: str
) -> Mapping[str, jax.Array]:
    if not missing:
        return {}
    if key is None:
        raise WeightsError(
            f"{folder} has no weights for the head of {model}: {some(missing)}. To begin with random ones: "
            f"load_model(folder, architecture={model!r}, init_missing=jax.random.key(0))"
        )

    @jax.jit  # what is not returned is not computed: the base's weights are never made
    def initialise(key: jax.Array) -> dict[str, jax.Array]:
        flat = flatten(nnx.state(make(nnx.Rngs(key))))
        return {path: flat[path] for path in missing}

    return initialise(key)


def _log(ignored: Mapping[str, str], folder: Path) -> None:
    for key, reason in ignored.items():
        logger.info("%s: %r is not read: %s", folder, key, reason)
