"""A layout: where every leaf of some params lies in torch. Data, read in both directions.

Params that came from torch (`load_model`, `params_from_torch`) need none: their paths are the torch names. For any
others, `infer_layout` finds it from the weights in both forms, a ready one is named, or it is written down:

    layout = Layout.of(params, {
        "layers/attn/q/kernel": Place.of("l d n h", {"model.layers.{l}.self_attn.q_proj.weight": "(n h) d"}),
        "layers/mlp/gate_up": Place.of("l d (g + u)", {"model.layers.{l}.mlp.gate_proj.weight": "g d",
                                                       "model.layers.{l}.mlp.up_proj.weight": "u d"}, g=96),
    })
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from jpeft.errors import AdapterError, WeightsError
from jpeft.kernel import Kernel, Kernels
from jpeft.tree import flatten, nearest, replace
from jpeft_interop.arrays import host, own
from jpeft_interop.layout.geometry import BATCH, PARAMETERS, canonical_kernel, kernel_of
from jpeft_interop.layout.link import Link, assign, to_leaf, to_tensor, whole
from jpeft_interop.layout.place import Place
from jpeft_interop.torch_table import nest

# Names that PEFT 0.21 reads as those of experts, where transformers 5 has stacked them.
EXPERTS_OWN = re.compile(r"(?:^|\.)(?:gate|gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$")


@dataclass(frozen=True)
class Layout(Mapping[str, Place]):
    """Each leaf's place in torch, by path. A mapping; `Layout.of` makes one for params of known shapes.

    Attributes:
      places: by path, every size known.
    """

    places: Mapping[str, Place]

    @classmethod
    def of(cls, params: Any, places: Mapping[str, Place]) -> Layout:
        """A layout of these params.

        Args:
          params: arrays or anything with a shape; only shapes are looked at.
          places: by path. Leaves without one have no counterpart in torch.

        Raises:
          WeightsError: a path that the params do not have, or axes that do not fit.

        Example:
          >>> layout = Layout.of({"up": np.ones((2, 3))}, {"up": Place.of("d f", {"up.weight": "f d"})})
          >>> {key: tensor.shape for key, tensor in layout.arrays({"up": np.ones((2, 3))}).items()}
          {'up.weight': (3, 2)}
        """
        flat = flatten(params)
        if unknown := [path for path in places if path not in flat]:
            raise WeightsError(f"the params have no leaf {unknown[0]!r}; the nearest are {nearest(unknown[0], flat)}")
        made = cls({path: place.fit(tuple(flat[path].shape), path) for path, place in places.items()})
        made.check_keys()
        return made

    def __getitem__(self, path: str) -> Place:
        return self.places[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    @cached_property
    def links(self) -> Mapping[str, tuple[Link, ...]]:
        """The regions of each leaf, by path."""
        return {path: tuple(place.links(path)) for path, place in self.places.items()}

    @cached_property
    def by_key(self) -> Mapping[str, tuple[Link, ...]]:
        """What each torch tensor is made of, by its name."""
        found: dict[str, list[Link]] = defaultdict(list)
        for links in self.links.values():
            for link in links:
                found[link.key].append(link)
        return {key: tuple(links) for key, links in found.items()}

    def check_keys(self) -> None:
        """Every torch tensor has one shape and is filled once.

        Raises:
          WeightsError: two leaves give it different shapes, or the same part.
        """
        for key, links in self.by_key.items():
            if len({link.torch_shape for link in links}) > 1:
                shapes = {link.path: link.torch_shape for link in links}
                raise WeightsError(f"{key!r} would have different shapes: {shapes}")
            if len(links) > 1:
                _check_apart(key, links)

    def check(self, params: Any) -> dict[str, Any]:
        """The leaves of params that this is a layout of, by path.

        Raises:
          WeightsError: a leaf is not there, or has another shape: the layout is another model's.
        """
        flat = flatten(params)
        for path, place in self.places.items():
            if path not in flat:
                raise WeightsError(
                    f"the layout has a place for {path!r}, and the params have no such leaf; the nearest are "
                    f"{nearest(path, flat)}: is it another model's layout?"
                )
            if tuple(flat[path].shape) != place.shape:
                raise WeightsError(
                    f"{path!r}: the layout is for shape {place.shape} ({place.axes}), the params have "
                    f"{tuple(flat[path].shape)}: is it another model's layout?"
                )
        return flat

    @cached_property
    def modules(self) -> dict[str, Kernel]:
        """The torch modules that have a weight of a product, and its kernel, apart from where it lies here."""
        weights = {key: links[0] for key, links in self.by_key.items() if key.endswith(".weight")}
        return {
            key.removesuffix(".weight"): canonical_kernel(link)
            for key, link in weights.items()
            if link.kind != "plain" and key not in self.parameters
        }

    @cached_property
    def parameters(self) -> set[str]:
        """The torch parameters that PEFT adapts as such: experts' stacked kernels, routers.

        In a model with experts also the weights of other modules that are called as experts' once were: PEFT takes the
        names of such targets for the experts'.
        """
        kinds = {key: links[0].kind for key, links in self.by_key.items()}
        found = {key for key, kind in kinds.items() if kind in PARAMETERS}
        if BATCH.keys() & {kinds[key] for key in found}:
            found |= {key for key, kind in kinds.items() if kind == "linear" and EXPERTS_OWN.search(key)}
        return found

    @cached_property
    def kernels(self) -> Kernels:
        """The geometry of the weights, as `jpeft.init` takes it: torch's own, carried to the leaves' axes."""
        made = {path: kernel_of(self.places[path], self.links[path]) for path in self}
        return Kernels(tuple((path, kernel) for path, kernel in made.items() if kernel is not None))

    def tensor(self, key: str, flat: Mapping[str, Any]) -> np.ndarray:
        """The torch tensor called `key`, from the leaves by path."""
        links = self.by_key[key]
        made = np.zeros(links[0].torch_shape, host(flat[links[0].path]).dtype)
        for link in links:
            assign(made, link.torch, host(flat[link.path]), link.leaf, link.sizes, dict(link.index))
        return to_tensor(made, links[0].scale, links[0].offset)

    def arrays(self, params: Any) -> dict[str, np.ndarray]:
        """Every torch tensor, as NumPy arrays; what of one lies in no leaf is zero.

        Raises:
          WeightsError: the params are not those of the layout, or have a leaf that lies nowhere in torch.
        """
        flat = self.check(params)
        if left := [path for path in flat if path not in self.places]:
            raise WeightsError(f"the layout has no place for {left[0]!r}" + _and_more(left))
        return {key: self.tensor(key, flat) for key in self.by_key}

    def to_torch(self, params: Any) -> dict[str, Any]:
        """A state dict of torch tensors on the CPU; `module.load_state_dict` takes it.

        Raises:
          WeightsError: as `arrays`.
        """
        from jpeft_interop.torch_params import numpy_to_tensor

        return {key: numpy_to_tensor(array) for key, array in self.arrays(params).items()}

    def from_torch(self, state: Mapping[str, Any], *, like: Any = None) -> Any:
        """The params of a state dict.

        Args:
          state: torch tensors, or arrays, by torch's names.
          like: a tree of the kind wanted (an `nnx.State`); a nested dict without. What no tensor holds of a leaf is
            zero.

        Raises:
          WeightsError: a tensor is missing, unexpected, of another shape, or differs from one that it is tied to.
        """
        self._check_state(state)
        leaves = {path: own(self.leaf(path, state)) for path in self}
        return nest(leaves) if like is None else replace(like, leaves)

    def _check_state(self, state: Mapping[str, Any]) -> None:
        if unexpected := [key for key in state if key not in self.by_key]:
            near = nearest(unexpected[0], self.by_key)
            raise WeightsError(
                f"{unexpected[0]!r} lies in no leaf{_and_more(unexpected)}; the nearest known are {near}"
            )
        for key, links in self.by_key.items():
            if key not in state:
                if not all(_is_elsewhere(link, self.links[link.path], state) for link in links):
                    raise WeightsError(f"{key!r} is missing; the state has {nearest(key, state)}")
            elif tuple(state[key].shape) != links[0].torch_shape:
                raise WeightsError(f"{key!r}: expected shape {links[0].torch_shape}, found {tuple(state[key].shape)}")

    def leaf(self, path: str, state: Mapping[str, Any]) -> np.ndarray:
        """One leaf, of a state dict that has what it needs."""
        made: np.ndarray | None = None
        for link in self.links[path]:
            if link.key not in state:
                continue
            tensor = as_numpy(state[link.key], link.key)
            made = np.zeros(whole(link.leaf), tensor.dtype) if made is None else made
            if made.dtype != tensor.dtype:
                raise WeightsError(
                    f"{link.key!r}: expected {made.dtype}, as the others of {path!r}, found {tensor.dtype}"
                )
            self._check_tie(made, link, tensor, state)
            assign(made, link.leaf, tensor, link.torch, link.sizes, dict(link.index))
        if made is None:
            raise WeightsError(f"nothing of {path!r} is in the state")
        return to_leaf(made, self.places[path].scale, self.places[path].offset)

    def _check_tie(self, made: np.ndarray, link: Link, tensor: np.ndarray, state: Mapping[str, Any]) -> None:
        """What another name for the same region has put there is the same."""
        for other in self.links[link.path]:
            if other is link:
                return
            if other.key in state and _same_region(other, link):
                again = np.zeros(link.torch_shape, made.dtype)
                assign(again, link.torch, made, link.leaf, link.sizes, dict(link.index))
                if not np.array_equal(again, tensor):
                    raise WeightsError(f"{link.key!r} and {other.key!r} are tied in {link.path!r}, and differ")


def as_numpy(tensor: Any, key: str) -> np.ndarray:
    """A torch tensor or an array as a NumPy array, bit for bit."""
    if not hasattr(tensor, "is_meta"):
        return host(tensor)
    from jpeft_interop.torch_params import tensor_to_numpy

    return tensor_to_numpy(tensor, key)


def _same_region(one: Link, other: Link) -> bool:
    return one.leaf == other.leaf and one.index == other.index


def _is_elsewhere(link: Link, links: tuple[Link, ...], state: Mapping[str, Any]) -> bool:
    """Whether another of its names is in the state: a tied head is stored once."""
    return any(other.key in state and other.key != link.key and _same_region(other, link) for other in links)


def _check_apart(key: str, links: tuple[Link, ...]) -> None:
    filled = np.zeros(links[0].torch_shape, bool)
    for link in links:
        mine = np.zeros_like(filled)
        ones = np.ones(whole(link.leaf), bool)
        assign(mine, link.torch, ones, link.leaf, link.sizes, dict(link.index))
        if (filled & mine).any():
            raise WeightsError(f"two leaves lie in the same part of {key!r}: {links[0].path!r}, {link.path!r}")
        filled |= mine


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def find(layout: Layout, key: str, file: str, told: str) -> tuple[Link, ...]:
    """The regions that a torch tensor is made of; an error names the file, the key and the nearest known."""
    if key not in layout.by_key:
        raise AdapterError(
            f"{file}: key {told!r} fits no param ({key!r}); the nearest known are {nearest(key, layout.by_key)}"
        )
    return layout.by_key[key]
