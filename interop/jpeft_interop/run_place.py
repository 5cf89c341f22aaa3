"""Where a run lives: a mesh over all devices of all processes, with the axes `data` and `fsdp`.

Rows of a batch are split over both axes; weights, along `fsdp`, each by its largest axis that divides, and are the same
along `data`. The adapter follows its weights, by `jpeft.shardings`; the optimizer's state follows the adapter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jpeft
from jpeft.errors import JpeftError
from jpeft.tree import map_leaves
from jpeft_interop.train import Batch, State

DATA, FSDP = "data", "fsdp"


class PlaceError(JpeftError):
    """A mesh that the devices can't make, or a batch that it can't split."""


@dataclass(frozen=True)
class RunPlace:
    """A mesh, and where on it what lives.

    Attributes:
      mesh: with the axes `data` and `fsdp`.
    """

    mesh: Mesh

    @property
    def whole(self) -> NamedSharding:
        """On every device, whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    @property
    def rows(self) -> NamedSharding:
        """Split along the first axis, over all devices."""
        return NamedSharding(self.mesh, PartitionSpec((DATA, FSDP)))

    @property
    def parts(self) -> NamedSharding:
        """The same for a batch in parts, `(parts, rows, ...)`."""
        return NamedSharding(self.mesh, PartitionSpec(None, (DATA, FSDP)))

    def weight(self, shape: Sequence[int]) -> NamedSharding:
        """Of a weight of the base: along `fsdp` by the largest axis that divides, the first of several."""
        count = self.mesh.shape[FSDP]
        divides = [axis for axis, size in enumerate(shape) if size % count == 0 and size > 1]
        if count == 1 or not divides:
            return self.whole
        longest = max(divides, key=lambda axis: shape[axis])
        return NamedSharding(
            self.mesh, PartitionSpec(*(FSDP if axis == longest else None for axis in range(longest + 1)))
        )

    def check_batch(self, size: int, accumulate: int = 1) -> None:
        """Refuse batches that can't be split.

        Raises:
          PlaceError: says which can.
        """
        if size // accumulate % self.mesh.size:
            parts = f" in {accumulate} parts" if accumulate > 1 else ""
            wanted = -(-size // (self.mesh.size * accumulate)) * self.mesh.size * accumulate
            raise PlaceError(
                f"a batch of {size} rows{parts} can't be split over {self.mesh.size} devices: --batch-size {wanted}"
            )

    def base(self, params: Any) -> Any:
        """The params, each leaf where a weight of its shape lives; those that are there already stay."""
        return map_leaves(lambda _, leaf: self._put(leaf, self.weight(leaf.shape)), params)

    def _put(self, leaf: Any, home: NamedSharding) -> Any:
        if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding):
            return leaf
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, home, lambda index: host[index])

    def batch(self, rows: Batch) -> dict[str, jax.Array]:
        """A batch that every process has whole, each device taking its rows."""
        return {
            name: jax.make_array_from_callback(array.shape, self.rows, array.__getitem__)
            for name, array in rows.items()
        }

    def rows_here(self, size: int) -> np.ndarray:
        """The numbers of the rows of a batch that this process' devices hold, rising."""
        pieces = self.rows.addressable_devices_indices_map((size,)).values()
        return np.unique(np.concatenate([np.arange(size)[piece] for piece in pieces if piece is not None]))

    def batches(self, here: Any, size: int) -> Batches:
        """The batches of which `here` gives this process' rows."""
        return Batches(self.rows, here, size)

    def state(self, params: Any, state: State) -> State:
        """The home of each array of a state."""
        whole: Any = self.whole
        adapter = jpeft.shardings(params, state.adapter)
        optimizer = jpeft.optimizer_shardings(state.optimizer, adapter)
        return State(adapter, optimizer, whole, whole)

    def everywhere(self, tree: Any) -> Any:
        """Arrays of this process alone, with the values of those that live on the mesh. All processes have to ask."""
        whole = jax.jit(lambda tree: tree, out_shardings=self.whole)(tree)
        return jax.tree.map(lambda leaf: jax.numpy.asarray(np.asarray(leaf)), whole)


class Batches:
    """Batches that live on a mesh, made of the rows that each process loads; the position is that of the loading."""

    def __init__(self, home: NamedSharding, here: Any, size: int) -> None:
        self._home, self._here, self._size = home, here, size

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        rows = next(self._here)
        return {
            name: jax.make_array_from_process_local_data(self._home, array, (self._size, *array.shape[1:]))
            for name, array in rows.items()
        }

    def get_state(self) -> Any:
        """The position, the same in all processes."""
        return self._here.get_state()

    def set_state(self, state: Any) -> None:
        """Go there."""
        self._here.set_state(state)


def make_run_place(mesh: str | None = None) -> RunPlace | None:
    """The mesh that a text such as `data=2,fsdp=4` means; None for one device, which needs none.

    Args:
      mesh: sizes by axis; an axis left out has size 1. All devices on `data` if None.

    Raises:
      PlaceError: no such axis, no such size, or not as many devices as there are.

    Example:
      >>> make_run_place("data=1") is None
      True
    """
    sizes = {DATA: jax.device_count(), FSDP: 1} if mesh is None else {DATA: 1, FSDP: 1} | _sizes(mesh)
    wanted, there = math.prod(sizes.values()), jax.device_count()
    if wanted != there and (jax.process_count() > 1 or wanted > there):
        raise PlaceError(
            f"--mesh {mesh} takes {wanted} devices; there are {there}, of {jax.process_count()} processes: "
            f"--mesh data={there}, or --mesh data=1,fsdp={there}"
        )
    if wanted == 1:
        return None
    devices = arranged(jax.devices()[:wanted], sizes[DATA], sizes[FSDP])
    return RunPlace(Mesh(devices, (DATA, FSDP), axis_types=(AxisType.Auto,) * 2))


def arranged(devices: Sequence[Any], data: int, fsdp: int) -> np.ndarray:
    """Devices in the shape (data, fsdp), by what connects them.

    Of several slices (of TPUs; a host's GPUs are one), as far as it goes, each has whole rows: weights are then
    gathered within a slice, and only gradients cross between slices.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    between = math.gcd(data, slices), slices // math.gcd(data, slices)
    within = data // between[0], fsdp // between[1]
    may_split = devices[0].device_kind in ("TPU v5 lite", "TPU v5e")  # as jax.make_mesh has it, for one slice alone
    if slices == 1:
        return mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=may_split)
    return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=may_split)


def _sizes(mesh: str) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for part in mesh.split(","):
        name, _, size = part.strip().partition("=")
        if name not in (DATA, FSDP) or name in sizes or not size.isdecimal() or int(size) < 1:
            raise PlaceError(f"--mesh: expected sizes by axis such as data=2,fsdp=4, found {mesh!r:.100}")
        sizes[name] = int(size)
    return sizes
