"""A run on disk, to go on from after an interruption: bit for bit as if there had been none.

Orbax writes the adapter, the optimizer's state, the step, the PRNG key and the position in the data, in the background;
of several processes each writes what it has, and any number of them reads it again, on any mesh. The base is never
written. What the run is made of (spec, base, data, settings) is kept beside it, and a run made of something else is
refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from jpeft.errors import JpeftError
from jpeft.tree import flatten
from jpeft_interop.arrays import host
from jpeft_interop.train import State

SAMPLE = 256  # entries looked at, or a few more, of each array of the base


class ResumeError(JpeftError):
    """A run can't go on from what is in the folder: it was made of other things, or it is broken."""


class Positioned(Protocol):
    """Batches whose position can be told and set, as grain's iterators."""

    def get_state(self) -> Any:
        """The position, as JSON knows it."""
        ...

    def set_state(self, state: Any) -> None:
        """Go there."""
        ...


class Snapshots:
    """Snapshots of one run in a folder, the latest few; a context, at whose end all is written.

    Args:
      folder: made if need be.
      run: what the run is made of, by name, as JSON knows it; the same at every resumption.
      keep: how many to keep.
    """

    def __init__(self, folder: str | Path, run: Mapping[str, Any], *, keep: int = 2) -> None:
        self.folder, self.run = Path(folder).absolute(), json.loads(json.dumps(run))
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> Snapshots:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def save(self, state: State, batches: Positioned) -> None:
        """Begins to write a state and a position. The state may be given away at once: this holds a copy."""
        arrays = {name: jnp.copy(leaf) for name, leaf in _filled(_arrays(state)).items()}
        beside = {"run": self.run, "batches": batches.get_state()}
        args = ocp.args.Composite(state=ocp.args.StandardSave(arrays), beside=ocp.args.JsonSave(beside))
        self._manager.save(int(state.step), args=args)

    def restore(self, start: State, batches: Positioned) -> State:
        """The latest state, `batches` set to where it was; `start` where there is none.

        Args:
          start: the state before the first step; tells the shapes, the spec and where arrays live.
          batches: at their beginning.

        Raises:
          ResumeError: the run there was made of other things, or is broken.
        """
        step = self._manager.latest_step()
        if step is None:
            return start
        beside = self._read(step, beside=ocp.args.JsonRestore()).beside
        _check_run(self.run, beside["run"], self.folder)
        wanted = {name: _abstract(leaf) for name, leaf in _filled(_arrays(start)).items()}
        found = self._read(step, state=ocp.args.StandardRestore(wanted)).state
        batches.set_state(beside["batches"])
        return _with_arrays(start, found)

    def _read(self, step: int, **args: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**args))
        except Exception as error:  # of many kinds, Orbax's and TensorStore's
            raise ResumeError(
                f"{self.folder / str(step)} is broken: {str(error).splitlines()[0]:.200}; remove that folder to go on "
                "from an earlier one, or begin anew with --no-resume"
            ) from error


def discard(folder: str | Path) -> None:
    """Removes the snapshots of a run; an OSError where they can't be, since a new run would go on from them."""
    if Path(folder).exists():
        shutil.rmtree(folder)


def _arrays(state: State) -> dict[str, jax.Array]:
    """What changes, by name: plain arrays, the key as its data."""
    changing = {
        "trained": state.adapter.trained,
        "constant": state.adapter.constant,
        "optimizer": state.optimizer,
        "step": state.step,
        "key": jax.random.key_data(state.key),
    }
    pairs = jax.tree_util.tree_flatten_with_path(changing)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}


def _filled(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Those with something in them: Orbax refuses arrays of size 0, which rank 0 has, and which any state has again."""
    return {name: leaf for name, leaf in arrays.items() if leaf.size}


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _with_arrays(start: State, found: Mapping[str, jax.Array]) -> State:
    """The state with the arrays of a snapshot; those that it leaves out are as at the start."""
    leaves = {name: found.get(name, leaf) for name, leaf in _arrays(start).items()}
    key = jax.random.wrap_key_data(leaves.pop("key"), impl=jax.random.key_impl(start.key))
    adapter = start.adapter
    parts = {"trained": adapter.trained, "constant": adapter.constant, "optimizer": start.optimizer, "step": start.step}
    structure = jax.tree.structure(parts)
    ordered = [leaves[name] for name in _arrays(start) if name != "key"]
    parts = jax.tree.unflatten(structure, ordered)
    adapter = adapter.replace(trained=parts["trained"], constant=parts["constant"])
    return State(adapter, parts["optimizer"], parts["step"], key)


def _check_run(now: Mapping[str, Any], then: Mapping[str, Any], folder: Path) -> None:
    for name in sorted({*now, *then}):
        if now.get(name) != then.get(name):
            raise ResumeError(
                f"{folder} holds a run with another {name}: expected {now.get(name)!r}, found {then.get(name)!r}; go "
                "on with what it was begun with, choose another --out, or begin anew with --no-resume"
            )


def fingerprint(params: Any) -> str:
    """A short name for a base: of its paths, shapes and dtypes, and of some entries of each array.

    Example:
      >>> fingerprint({"kernel": jnp.ones((3, 2))}) == fingerprint({"kernel": jnp.zeros((3, 2))})
      False
    """
    flat = flatten(params)
    spread = {path: leaf for path, leaf in flat.items() if isinstance(leaf, jax.Array) and len(leaf.devices()) > 1}
    samples = _sampled(spread) if spread else {}
    digest = hashlib.sha256()
    for path, leaf in flat.items():
        sample = samples[path] if path in samples else host(leaf).reshape(-1)[:: _stride(leaf)]
        digest.update(f"{path} {leaf.shape} {leaf.dtype}".encode())
        digest.update(np.asarray(sample).tobytes())
    return digest.hexdigest()[:16]


def _stride(leaf: Any) -> int:
    return max(1, math.prod(leaf.shape) // SAMPLE)


def _sampled(spread: Mapping[str, jax.Array]) -> Mapping[str, jax.Array]:
    """The same entries of arrays on a mesh, as bits, on every device: they move, and nothing else does."""
    meshes = {leaf.sharding.mesh for leaf in spread.values() if isinstance(leaf.sharding, NamedSharding)}
    whole = NamedSharding(meshes.pop(), PartitionSpec())

    @partial(jax.jit, out_shardings=whole)  # bits, since what is summed over devices loses the sign of a zero
    def sample(leaves: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        bits = {
            path: jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}") for path, leaf in leaves.items()
        }
        return {path: leaf[_places(leaf)] for path, leaf in bits.items()}

    return sample(spread)


def _places(leaf: Any) -> tuple[np.ndarray, ...]:
    places = np.arange(0, math.prod(leaf.shape), _stride(leaf))
    return tuple(axis.astype(np.int32) for axis in np.unravel_index(places, leaf.shape))


def fingerprint_of_rows(rows: Mapping[str, np.ndarray]) -> str:
    """A short name for rows of data: of all of them."""
    digest = hashlib.sha256()
    for name, array in sorted(rows.items()):
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()[:16]
