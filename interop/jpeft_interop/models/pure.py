"""A model as a pure function of its params."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from jpeft_interop.models.errors import ModelError
from jpeft_interop.models.output import Output

Params = dict[str, Any]


def pure(module: nnx.Module, compute_dtype: DTypeLike | None = None) -> tuple[Callable[..., Output], Params]:
    """`(forward, abstract_params)` of a model: a function without state, and the shapes of what it takes.

    `forward(params, input_ids, attention_mask=None, **options)` takes transformers' input names: `position_ids`,
    `inputs_embeds`, `token_type_ids` (where the model has them), `output_hidden_states`, `logits_to_keep` and
    `next_tokens` (language models) and `cache` (decoders, see `init_cache`). It is deterministic, and may be jitted,
    differentiated, vmapped and rematerialised.

    Args:
      module: a model of `build`, abstract or with weights; only its structure is kept.
      compute_dtype: what params are cast to at the start of a forward; None leaves each as it is.

    Returns:
      The forward, and a nested dict with string keys of `jax.ShapeDtypeStruct`, at torch's names: Linear's `weight` is
      `kernel` (in, out), Embedding's is `embedding`, all others keep theirs.
    """
    graphdef, state = nnx.split(module)
    leaves = {path: variable.get_value() for path, variable in nnx.to_flat_state(state)}
    abstract = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}

    def forward(params: Mapping[str, Any], *inputs: Any, **options: Any) -> Output:
        flat = _checked(_flatten(params), abstract)
        if compute_dtype is not None:
            flat = {path: leaf.astype(compute_dtype) for path, leaf in flat.items()}
        return nnx.merge(graphdef, _nest(flat))(*inputs, **options)

    return forward, _nest({tuple(map(str, path)): leaf for path, leaf in abstract.items()})


def _flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    if not isinstance(params, Mapping):
        raise ModelError(f"params must be a nested mapping as `pure` describes it; found {type(params).__name__}")
    flat: dict[str, Any] = {}
    for key, value in params.items():
        path = f"{prefix}{key}"
        flat |= _flatten(value, f"{path}/") if isinstance(value, Mapping) else {path: value}
    return flat


def _checked(flat: Mapping[str, Any], abstract: Mapping[tuple, jax.ShapeDtypeStruct]) -> dict[tuple, Any]:
    """The leaves by the module's own paths (whose layer numbers are ints), each known to be there and to fit."""
    paths = {"/".join(map(str, path)): path for path in abstract}
    missing, unexpected = [path for path in paths if path not in flat], [path for path in flat if path not in paths]
    if missing or unexpected:
        raise ModelError(f"params do not fit the model: missing {_some(missing)}; unexpected {_some(unexpected)}")
    for path, key in paths.items():
        _check_leaf(path, flat[path], abstract[key].shape)
    return {key: flat[path] for path, key in paths.items()}


def _check_leaf(path: str, leaf: Any, shape: tuple[int, ...]) -> None:
    if not hasattr(leaf, "shape"):
        raise ModelError(f"params at {path!r}: expected an array of shape {shape}, found a {type(leaf).__name__}")
    if tuple(leaf.shape) != shape:
        raise ModelError(f"params at {path!r}: expected shape {shape}, found {tuple(leaf.shape)}")


def _some(paths: list[str]) -> str:
    return (", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")) or "none"


def _nest(flat: Mapping[tuple, Any]) -> dict[Any, Any]:
    nested: dict[Any, Any] = {}
    for path, leaf in flat.items():
        inner = nested
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = leaf
    return nested
