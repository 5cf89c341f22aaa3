"""A leaf's place, of the pieces that were found in it: its axes as names, and torch's in the same names."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from jpeft.errors import WeightsError
from jpeft_interop.infer.digits import AxisDigit
from jpeft_interop.infer.names import NUMBER
from jpeft_interop.infer.naming import Naming
from jpeft_interop.infer.piece import Piece
from jpeft_interop.infer.seen import Seen
from jpeft_interop.infer.strands import Strand, strands
from jpeft_interop.layout.link import Kind
from jpeft_interop.layout.place import Place, Tensor

Block = tuple[int, int]  # from where, how long


@dataclass(frozen=True)
class Atom:
    """A part of a block of an axis that no digit parts further: `size` steps of `weight`."""

    axis: int
    block: Block
    weight: int
    size: int


def compose(leaf: Seen, pieces: Sequence[Piece], kinds: Mapping[str, Kind], width: int) -> Place:
    """The place.

    Args:
      leaf: the leaf.
      pieces: of it.
      kinds: of the tensors, by key.
      width: how wide the model is, to name that axis.

    Raises:
      WeightsError: the notation can't say how the pieces lie.
    """
    if len(terms := {(piece.scale, piece.offset) for piece in pieces}) > 1:
        raise WeightsError(f"{leaf.name!r}: its parts have different scales or offsets, {sorted(terms)}")
    found = list(strands(pieces))
    atoms = {(axis, block): _atoms(leaf, axis, block, found) for axis, block in _blocks(leaf, found)}
    naming = Naming(width)
    for strand in found:
        _name(strand, atoms, naming, kinds[strand.piece.key], leaf)
    axes = " ".join(_leaf_axis(leaf, axis, atoms, naming) for axis in range(len(leaf.full)))
    torch = tuple(
        Tensor(_key(strand, atoms, naming), _torch_axes(strand, atoms, naming), kinds[strand.piece.key])
        for strand in found
    )
    sizes = {naming.of(atom): atom.size for row in atoms.values() for atom in row}
    return Place(axes, torch, tuple(sorted(sizes.items())), pieces[0].scale, pieces[0].offset)


def _blocks(leaf: Seen, found: Sequence[Strand]) -> list[tuple[int, Block]]:
    made = {(axis, _block(leaf, strand, axis)) for strand in found for axis in range(len(leaf.full))}
    for (axis, (start, length)), (other, (again, _)) in itertools.pairwise(sorted(made)):
        if axis == other and again < start + length:
            raise _unsayable(leaf, f"parts of axis {axis} overlap")
    return sorted(made)


def _block(leaf: Seen, strand: Strand, axis: int) -> Block:
    """Of an axis, what a strand fills: its digits one within the other, without a gap."""
    length = 1
    for digit in sorted(_on(strand, axis), key=lambda digit: digit.leaf):
        if digit.leaf != length:
            raise _unsayable(leaf, f"{strand.piece.key!r} takes every {digit.leaf}th index of axis {axis}")
        length *= digit.size
    return strand.piece.start[axis], length


def _on(strand: Strand, axis: int) -> Iterator[AxisDigit]:
    return (digit for digit in strand.digits if digit.leaf_axis == axis)


def _unsayable(leaf: Seen, why: str) -> WeightsError:
    return WeightsError(f"{leaf.name!r} (shape {leaf.full}) holds torch's values in an order no layout can say: {why}")


def _atoms(leaf: Seen, axis: int, block: Block, found: Sequence[Strand]) -> list[Atom]:
    """The parts of a block, the slowest first: none where it has one index."""
    weights = {1, block[1]}
    for strand in found:
        if _block(leaf, strand, axis) == block:
            weights |= {digit.leaf for digit in _on(strand, axis)}
    ranked = sorted(weights)
    if any(high % low for low, high in itertools.pairwise(ranked)):
        raise _unsayable(leaf, f"axis {axis} would be split in two ways")
    made = [Atom(axis, block, low, high // low) for low, high in itertools.pairwise(ranked)]
    return made[::-1] or ([Atom(axis, block, 1, 1)] if block[1] != leaf.full[axis] else [])


def _within(digit: AxisDigit, row: Sequence[Atom]) -> list[Atom]:
    return [atom for atom in row if digit.leaf <= atom.weight < digit.leaf * digit.size]


def _row(strand: Strand, axis: int, atoms: Mapping[tuple[int, Block], list[Atom]]) -> list[Atom]:
    """The atoms of the block of an axis that a strand fills."""
    start = strand.piece.start[axis]
    return next(row for (of, block), row in atoms.items() if of == axis and block[0] == start)


def _leaf_axis(leaf: Seen, axis: int, atoms: Mapping[tuple[int, Block], list[Atom]], naming: Naming) -> str:
    parts, at = [], 0
    for (of, (start, length)), row in sorted(atoms.items()):
        if of == axis:
            parts += [str(start - at)] if start > at else []
            parts.append(" ".join(map(naming.of, row)) or "1")
            at = start + length
    return _text([*parts, str(leaf.full[axis] - at)] if at < leaf.full[axis] else parts)


def _text(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 and " " not in parts[0] else f"({' + '.join(parts)})"


def _on_torch(strand: Strand, axis: int, atoms: Mapping[tuple[int, Block], list[Atom]]) -> list[Atom]:
    """The atoms along one of torch's axes, the slowest first."""
    found = [
        (digit.torch * (atom.weight // digit.leaf), atom)
        for digit in strand.piece.digits
        if digit.torch_axis == axis
        for atom in _within(digit, _row(strand, digit.leaf_axis, atoms))
    ]
    ranked = sorted(found, key=lambda pair: pair[0])
    length = 1
    for weight, atom in ranked:
        if weight != length:
            raise WeightsError(f"{strand.piece.key!r}: axis {axis} is in an order no layout can say")
        length *= atom.size
    return [atom for _, atom in reversed(ranked)]


def _torch_axes(strand: Strand, atoms: Mapping[tuple[int, Block], list[Atom]], naming: Naming) -> str:
    single = [atom for axis in range(len(strand.piece.start)) for atom in _row(strand, axis, atoms) if atom.size == 1]
    made = []
    for axis, (begin, end) in enumerate(strand.piece.box):
        own = [*(single if axis == 0 else ()), *_on_torch(strand, axis, atoms)]
        full = strand.piece.full[axis]
        parts = [str(begin)] if begin else []
        parts.append(" ".join(map(naming.of, own)) or "1")
        made.append(_text([*parts, str(full - end)] if end < full else parts))
    return " ".join(made)


def _key(strand: Strand, atoms: Mapping[tuple[int, Block], list[Atom]], naming: Naming) -> str:
    """The name, with the axes in place of the numbers that count."""
    slots = {slot.position: slot for slot in strand.slots}
    positions = itertools.count()

    def fill(found) -> str:
        slot = slots.get(next(positions))
        if slot is None:
            return found[0]
        (atom, *more) = _within(slot.digit, _row(strand, slot.digit.leaf_axis, atoms))
        if more:
            raise WeightsError(f"{strand.piece.key!r}: the axis of its numbers would be split")
        times = f"*{slot.step}" if slot.step != 1 else ""
        return f"{{{naming.of(atom)}{times}{f'+{slot.first}' if slot.first else ''}}}"

    return NUMBER.sub(fill, strand.piece.key)


def _name(
    strand: Strand, atoms: Mapping[tuple[int, Block], list[Atom]], naming: Naming, kind: Kind, leaf: Seen
) -> None:
    """Names for the atoms that have none yet."""
    fused = lambda atom: len([0 for axis, _ in atoms if axis == atom.axis]) > 1
    for slot in strand.slots:
        for atom in _within(slot.digit, _row(strand, slot.digit.leaf_axis, atoms)):
            naming.number(atom, strand.piece.key, slot.position)
    for axis in range(len(strand.piece.box)):
        naming.along(_on_torch(strand, axis, atoms), strand.piece.key, kind, axis, fused)
    for axis in range(len(leaf.full)):
        naming.along([a for a in _row(strand, axis, atoms) if a.size == 1], strand.piece.key, kind, 0, fused)


def held(found: Sequence[Strand]) -> int:
    """How many values of the leaf the strands hold, each region once."""
    regions = {
        (strand.piece.start, frozenset((d.leaf_axis, d.leaf, d.size) for d in strand.digits)): strand.size
        for strand in found
    }
    return sum(regions.values())


def is_covered(leaf: Seen, pieces: Sequence[Piece]) -> bool:
    """Whether the pieces fill the leaf."""
    return held(list(strands(pieces))) == math.prod(leaf.full)
