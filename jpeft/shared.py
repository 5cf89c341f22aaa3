"""Arrays that several processes share, each holding a part: their values, and files that one process writes of them.

Whatever is asked of such an array, all processes have to ask, as with any computation on it: `jpeft.save(...)` stands
in no `if jax.process_index() == 0`. Arrays that a process has by itself concern nobody else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_shared(tree: Any) -> bool:
    """Whether some array of a tree lies on devices of other processes, too."""
    return any(isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in jax.tree.leaves(tree))


def values(leaf: Any) -> np.ndarray:
    """The whole array, in every process."""
    if is_shared(leaf) and not leaf.is_fully_replicated:
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)


def entries(leaf: Any, at: tuple[np.ndarray, ...]) -> np.ndarray:
    """Some entries of an array, by their places, in every process; where it is shared, as float32.

    No more than these moves, from a device or from another process.

    Example:
      >>> entries(np.eye(3), (np.array([0, 1]), np.array([0, 2])))
      array([1., 0.])
    """
    if isinstance(leaf, np.ndarray):
        return leaf[at]
    found = np.zeros(len(at[0]) if at else 1, leaf.dtype)
    known = np.zeros(len(found), bool)
    for shard in leaf.addressable_shards:
        starts = [part.start or 0 for part in shard.index]
        local = [one - start for one, start in zip(at, starts, strict=True)]
        here = ~known
        for place, size in zip(local, shard.data.shape, strict=True):
            here &= (place >= 0) & (place < size)
        if here.any():
            found[here] = _read(shard.data, tuple(place[here] for place in local))
            known |= here
    return found if leaf.is_fully_addressable else _joined(found.astype(np.float32), known)


def _read(data: jax.Array, at: tuple[np.ndarray, ...]) -> Any:
    on_cpu = all(device.platform == "cpu" for device in data.devices())  # where a view costs nothing
    return (np.asarray(data) if on_cpu else data)[at]


def _joined(found: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Each entry from the first process that knows it."""
    all_found, all_known = multihost_utils.process_allgather((found, known))
    return np.asarray(all_found)[np.asarray(all_known).argmax(0), np.arange(len(found))]


def write_once(shared: bool, write: Callable[[], None]) -> None:
    """Calls `write` in process 0 alone, and waits for it in all, where what is written is shared; else just calls it.

    Raises:
      OSError: in the others, where process 0 could not write; there, what `write` raised.
    """
    if not shared:
        write()
        return
    error = None
    if jax.process_index() == 0:
        try:
            write()
        except BaseException as raised:  # an interrupt, too: the others are waiting
            error = raised
    failed = multihost_utils.broadcast_one_to_all(np.asarray(error is not None))
    if error is not None:
        raise error
    if failed:
        raise OSError("process 0 could not write it; its own error says why")


def has_values(leaf: Any) -> bool:
    """Whether a leaf is an array, and no mere shape."""
    return isinstance(leaf, np.ndarray | jax.Array)


def gathered(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, np.ndarray]]:
    """Leaves by path and name, each whole in every process."""
    return {path: {name: values(leaf) for name, leaf in leaves.items()} for path, leaves in parts.items()}
