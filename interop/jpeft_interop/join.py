"""The factors of the torch matrices that one weight holds, joined into one adapter of the weight.

A stacked weight holds a matrix for each layer; a fused one (q, k and v; gate and up) several side by side. Beside one
another the matrices are parts of the weight's outputs, so their changes together are

    ΔW = Σ_p s_p A_p B_p P_p,        P_p placing the outputs of part p

which is s [A_1 A_2 …] times the B_p as blocks: one LoRA, whose B is held to the blocks by a constant mask of s_p / s.
Parts with the same A share its directions, as the parts of one LoRA on the fused weight do; then there is no mask.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from jpeft.errors import AdapterError
from jpeft.kernel import Kernel
from jpeft_interop.layout import Link
from jpeft_interop.layout.factors import at_batch, axes_of, batch_index, matrix_of, put_matrix
from jpeft_interop.layout.link import Side
from jpeft_interop.lora_keys import Leaves
from jpeft_interop.parts import why_not_parts
from jpeft_interop.peft_keys import Keys, Spot

Index = tuple[int, ...]
MOST_PADDED, ROOM = 8, 1 << 24  # times what the file has, and as many numbers more, of all its weights


@dataclass(frozen=True)
class Piece:
    """What a file has of one matrix.

    Attributes:
      spot: the torch module.
      leaves: as the file has them.
      link: the part of the weight that it is.
      both: the weight is tied, and the file has the same change for either use.
    """

    spot: Spot
    leaves: Leaves
    link: Link
    both: bool = False

    @property
    def rank(self) -> int:
        """r; 0 where the method has none."""
        experts = math.prod(self.spot.kernel.batch_shape)
        return self.leaves["a"].shape[0] // experts if "a" in self.leaves else 0

    @property
    def region(self) -> tuple[Side, tuple[tuple[str, int], ...]]:
        """The part of the weight."""
        return self.link.leaf, self.link.index


@dataclass(frozen=True)
class Joined:
    """One weight's pieces, each with its scaling `scales[i]`, against all that the weight holds, `links`."""

    file: str
    spec: Any
    kernel: Kernel
    pieces: Sequence[Piece]
    scales: Sequence[float]
    links: Sequence[Link]
    keys: Keys

    @cached_property
    def starts(self) -> list[int]:
        """Where each piece's directions start: a matrix's parts one after another, equal ones together."""
        starts: list[int] = []
        for i, piece in enumerate(self.pieces):
            before = [j for j in range(i) if self._index(j) == self._index(i)]
            same = next((j for j in before if _same_directions(self.pieces[j].leaves, piece.leaves)), None)
            after = max((starts[j] + self.pieces[j].rank for j in before), default=0)
            starts.append(after if same is None else starts[same])
        return starts

    @cached_property
    def rank(self) -> int:
        """Of the whole."""
        return max(start + piece.rank for start, piece in zip(self.starts, self.pieces, strict=True))

    def _index(self, i: int) -> Index:
        return batch_index(self.pieces[i].link, self.kernel)

    @cached_property
    def by_index(self) -> Mapping[Index, list[int]]:
        """The pieces of each matrix."""
        found: dict[Index, list[int]] = defaultdict(list)
        for i in range(len(self.pieces)):
            found[self._index(i)].append(i)
        return found

    @cached_property
    def _adapted(self) -> np.ndarray:
        """(*batch,): which matrices have factors."""
        adapted = np.zeros(self.kernel.batch_shape, bool)
        for piece in self.pieces:
            at_batch(adapted, piece.link, self.kernel)[...] = True
        return adapted

    @property
    def layers(self) -> tuple[int, ...] | None:
        """Of a stacked weight, the slices that the file has; None for all."""
        batch, adapted = self.kernel.batch_shape, self._adapted
        if adapted.all():
            return None
        stack = self.kernel.stack
        found = [] if stack is None else sorted({index[stack] for index in self.by_index})
        if np.count_nonzero(adapted) != len(found) * (math.prod(batch) // self.kernel.depth):
            raise AdapterError(
                f"{self.file}: of the weights stacked in {self.pieces[0].link.path!r} only some have factors: "
                f"{sorted(self.by_index)}"
            )
        return tuple(found)

    @property
    def padding(self) -> int:
        """How many numbers there are in A and B of the whole beyond `MOST_PADDED` times those in the file's."""
        kernel = self.kernel
        made = math.prod(kernel.batch_shape) * self.rank * (kernel.fan_in + kernel.fan_out)
        stored = sum(leaf.size for piece in self.pieces for name, leaf in piece.leaves.items() if name in ("a", "b"))
        return max(0, made - MOST_PADDED * stored)

    @cached_property
    def trained(self) -> Leaves:
        """The leaves of the whole weight.

        Raises:
          AdapterError: the method's adapters of the parts are not one of the weight.
        """
        self._check_parts()
        made: Leaves = {}
        for piece, start in zip(self.pieces, self.starts, strict=True):
            for name, leaf in self.keys.from_file(self.spec, piece.leaves, piece.spot).items():
                leaf = leaf * np.asarray(piece.link.scale, leaf.dtype) if name == "m" else leaf
                if name not in made:
                    neutral = 0.0 if self.keys.parts is None else self.keys.parts.neutral
                    made[name] = np.full(self._shape(name, leaf), neutral, leaf.dtype)
                if leaf.dtype != made[name].dtype:
                    self._refuse(
                        f"one array holds them, and {name!r} is {made[name].dtype} of one, {leaf.dtype} of another"
                    )
                put_matrix(made[name], name, leaf, piece.link, self.kernel, start)
        self._check_inputs(made)
        return made

    def _shape(self, name: str, leaf: np.ndarray) -> tuple[int, ...]:
        kernel = self.kernel
        own = {
            "contracted": leaf.shape if kernel.kind == "conv" and name == "l_in" else kernel.sizes(kernel.contracted),
            "rank": (self.rank,),
            "output": kernel.sizes(kernel.output),
        }
        return (*kernel.batch_shape, *(size for group in axes_of(name) for size in own[group]))

    def constant(self) -> Leaves:
        """The scaling of each matrix, and the mask where there is need of one."""
        mask = {} if (found := self._mask()) is None else {"mask": found}
        if self.keys.scaling is None:
            return mask
        scaling = np.zeros(self.kernel.batch_shape, np.float32)
        for found in self.by_index.values():
            at_batch(scaling, self.pieces[found[0]].link, self.kernel)[...] = self._scale(found)
        return mask | {"scaling": scaling}

    def _scale(self, found: list[int]) -> float:
        return max((self.scales[i] for i in found), key=abs)

    def _mask(self) -> np.ndarray | None:
        kernel, output = self.kernel, self.kernel.sizes(self.kernel.output)
        parts = self.keys.parts
        if parts is None or parts.mask is None:
            return None
        if not parts.are_blocks:
            mask = np.zeros((*kernel.batch_shape, *output), np.float32)
            for piece in self.pieces:
                put_matrix(mask, parts.mask, self._ones(piece, parts.mask), piece.link, kernel)
            return None if self._are_whole else mask
        mask = np.zeros((*kernel.batch_shape, self.rank, *output), np.float32)
        for found in self.by_index.values():
            whole = self._scale(found)
            for i in found:
                part = self._ones(self.pieces[i], "b") * np.float32(self.scales[i] / whole if whole else 1.0)
                put_matrix(mask, "b", part, self.pieces[i].link, kernel, self.starts[i])
        mask[~self._adapted] = 1  # the scaling is zero there
        if (mask == 1).all() or mask.size == 0:
            return None
        first = mask.reshape(*mask.shape[: len(kernel.batch) + 1], -1)[..., :1]
        alike = (mask.reshape(*first.shape[:-1], -1) == first).all()
        return first.reshape(*first.shape[:-1], *[1] * len(output)) if alike else mask

    def _ones(self, piece: Piece, name: str) -> np.ndarray:
        spot = piece.spot.kernel
        output = spot.sizes(spot.output)
        return np.ones((*spot.batch_shape, *((piece.rank,) if name == "b" else ()), *output), np.float32)

    @property
    def _are_whole(self) -> bool:
        """Whether every matrix that has any part has all."""
        regions = defaultdict(set)
        for link in self.links:
            if link.kind != "plain":
                regions[batch_index(link, self.kernel)].add((link.leaf, link.index))
        return all(len(found) == len(regions[index]) for index, found in self.by_index.items())

    def _check_parts(self) -> None:
        """Adapters of parts are one of the whole only where the method says so."""
        parts, ranks = self.keys.parts, {piece.rank for piece in self.pieces}
        for piece in self.pieces:
            if (why := why_not_parts(parts, self.spec.method, piece.link, self.links, self.kernel)) is not None:
                self._refuse(why)
        if any(axis.length(p.link.sizes) != axis.size for p in self.pieces for axis in self._contracted(p.link)):
            self._refuse("they share its inputs, which no low-rank change of the whole can keep apart")
        if parts is not None and parts.whole is not None and not self._are_whole:
            self._refuse(parts.whole)
        if parts is not None and parts.mask is None and self.rank != max(ranks):
            self._refuse(parts.whole or "they have directions of their own, which nothing would keep apart")
        if any(0 in (scales := [self.scales[i] for i in found]) and any(scales) for found in self.by_index.values()):
            self._refuse("some have alpha 0: as blocks of one adapter they would be lost")
        if getattr(self.spec, "factor_bias", False) and self._mask() is not None:
            self._refuse("each has a bias of B (lora_bias), and they differ in rank or scaling")

    def _check_inputs(self, made: Leaves) -> None:
        """IA³ scales a weight's inputs once, whichever of its parts they go to."""
        if {"l", "l_in"} <= made.keys():
            self._refuse("some are scaled at the input, some not")
        if "l_in" not in made:
            return
        for piece in self.pieces:
            mine = self.keys.from_file(self.spec, piece.leaves, piece.spot)["l_in"]
            if not self._are_whole or not np.array_equal(
                matrix_of(made["l_in"], "l_in", piece.link, self.kernel), mine
            ):
                self._refuse("they share its inputs, which are scaled differently")

    def _contracted(self, link: Link) -> Side:
        """The inputs that it takes part in; of an embedding they are rows, which may be more than torch has."""
        return () if self.kernel.kind == "embedding" else tuple(link.leaf[axis] for axis in self.kernel.contracted)

    def _refuse(self, why: str) -> None:
        modules = ", ".join(repr(piece.spot.module) for piece in self.pieces[:3])
        path = self.pieces[0].link.path
        raise AdapterError(f"{self.file}: {modules} lie in one weight, {path!r}, and can't be adapted as one: {why}")


def _same_directions(one: Leaves, other: Leaves) -> bool:
    """Whether two parts of a matrix share A (and E)."""
    return all(
        name in one and name in other and np.array_equal(one[name], other[name])
        for name in ("a", "e")
        if name in one or name in other
    )
