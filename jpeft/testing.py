"""What a compiled program moves between devices, and whether any of it is as large as a weight of the base.

A frozen base that is split over devices stays where it is: the lifted step may move activations, as the plain step
does, and the adapter's own small arrays. Here that is read off the program that XLA made, and not believed:

    lifted = jax.jit(lifted_step).lower(...).compile()
    plain  = jax.jit(plain_step).lower(...).compile()
    jpeft.testing.assert_base_stays(lifted, plain, params)
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jax.sharding import NamedSharding
from jax.stages import Compiled

from jpeft.tree import flatten

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
BITS = {"pred": 8, "bf16": 16, "s4": 4, "u4": 4, "c64": 64, "c128": 128}
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Collective:
    """One operation that moves data between devices.

    Attributes:
      kind: of `KINDS`.
      shapes: of its results on one device (an asynchronous one's operands among them), with their dtypes, as XLA has
        them.
      bytes: of the largest of these, on one device, each time.
      times: how often a call of the program does it: the trips of the loops around it; 1 where they are not known.
      name: the operation of the traced program that it is for.
    """

    kind: str
    shapes: tuple[tuple[str, Shape], ...]
    bytes: int
    times: int
    name: str

    def __str__(self) -> str:
        shapes = ", ".join(f"{dtype}{list(shape)}" for dtype, shape in self.shapes)
        often = f", {self.times} times" if self.times > 1 else ""
        return (
            f"{self.kind} of {shapes} ({self.bytes:,} bytes a device{often}) for {self.name or 'an unnamed operation'}"
        )


def collectives(compiled: Compiled | str) -> tuple[Collective, ...]:
    """The collectives of a compiled program, or of its text, in the order of the text.

    Example:
      >>> import jax
      >>> collectives(jax.jit(lambda x: x + 1).lower(1.0).compile())
      ()
    """
    text = compiled if isinstance(compiled, str) else (compiled.as_text() or "")
    bodies = dict(_computations(text))
    times = _times(bodies)
    once: dict[Any, Collective] = {}  # an asynchronous one stands in several functions, under one number
    for name, lines in bodies.items():
        for number, found in _found(lines, times.get(name, 1)):
            once.setdefault(number or len(once), found)
    return tuple(once.values())


def assert_base_stays(lifted: Compiled | str, plain: Compiled | str, params: Any) -> None:
    """No collective of the lifted program moves anything shaped like a weight of the base that the plain one does not.

    Like a weight: its sizes, in any order, each whole or split along some of the mesh, some beside one another joined,
    of one layer or of the stack.
    What has such sizes by chance counts too; give the example other numbers of rows and another rank than the weights'.

    Args:
      lifted: the step with an adapter, compiled on a mesh.
      plain: the frozen model's own step, forward and backward through the activations, compiled on the same mesh.
      params: the base; arrays or `jax.ShapeDtypeStruct`, with their shardings.

    Raises:
      AssertionError: there are some; names each, with its bytes.
    """
    allowed, found = _moved(plain, params), _moved(lifted, params)
    extra = [one for alike, (times, one) in found.items() if times > allowed.get(alike, (0, one))[0]]
    assert not extra, "the lifted program moves what is shaped like a weight of the base:\n" + "\n".join(
        map(str, extra)
    )


def base_bytes(program: Compiled | str, params: Any) -> int:
    """The bytes that a call of a program moves on each device in what is shaped like a weight of the base.

    A compiler may gather a weight at once, or send its parts around while it multiplies: shapes and numbers of
    collectives then differ where the bytes say the same.
    """
    return sum(times * one.bytes for times, one in _moved(program, params).values())


def _moved(program: Compiled | str, params: Any) -> dict[Any, tuple[int, Collective]]:
    """What the program moves that looks like the base: how often, and the first of each."""
    parts, found = _parts_of_axes(params), {}
    shapes = _base_shapes(params, parts)
    for one in collectives(program):
        if any(_is_base(_sizes(shape), shapes, parts) for _, shape in one.shapes):
            alike = one.kind, tuple(sorted((dtype, _sizes(shape)) for dtype, shape in one.shapes))
            times, first = found.get(alike, (0, one))
            found[alike] = times + one.times, first
    return found


def _is_base(sizes: Shape, shapes: set[Shape], parts: set[int]) -> bool:
    """Whether these are sizes of a weight; there may be an axis for the devices that its parts came from."""
    without = [sizes[:i] + sizes[i + 1 :] for i, size in enumerate(sizes) if size in parts]
    return any(some in shapes for some in (sizes, *without))


def _parts_of_axes(params: Any) -> set[int]:
    """Into how many parts an axis may be split: along some of the mesh's axes."""
    homes = [getattr(leaf, "sharding", None) for leaf in flatten(params).values()]
    meshes = {home.mesh for home in homes if isinstance(home, NamedSharding)}
    sizes = [size for mesh in meshes for size in mesh.shape.values()]
    return {math.prod(some) for n in range(len(sizes) + 1) for some in itertools.combinations(sizes, n)}


def _base_shapes(params: Any, parts: set[int]) -> set[Shape]:
    """The sizes that a weight of two axes or more may have on one device, sorted, those of 1 left out."""
    shapes = {tuple(leaf.shape) for leaf in flatten(params).values() if len(getattr(leaf, "shape", ())) > 1}
    one_layer = {kept for shape in shapes for n in range(2, len(shape)) for kept in itertools.combinations(shape, n)}
    joined = {one for shape in shapes | one_layer for one in _joined(shape)}
    # Parts laid side by side in memory, which XLA may take for one longer axis, are the last.
    sizes_of = lambda size: {size // n for n in parts if size % n == 0} | {size * n for n in parts}
    split = lambda shape: itertools.product(*map(sizes_of, shape))
    found = {_sizes(part) for shape in joined for part in split(shape)}
    return {sizes for sizes in found if len(sizes) > 1}


def _joined(shape: Shape) -> set[Shape]:
    """With axes beside one another taken as one, as a model does that reshapes a kernel before its product."""
    if len(shape) < 2:
        return {shape}
    first, rest = shape[0], _joined(shape[1:])
    return {(first, *one) for one in rest} | {(first * one[0], *one[1:]) for one in rest}


def _sizes(shape: Shape) -> Shape:
    return tuple(sorted(size for size in shape if size != 1))


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    """The functions of a program in XLA's text: names and lines; the one that is called first is named `ENTRY`."""
    name, lines = "", []
    for line in text.splitlines():
        if line.endswith("{") and (head := re.match(r"(ENTRY )?%?([\w.\-]+) ", line)):
            name, lines = "ENTRY" if head[1] else head[2], []
        elif line == "}":
            yield name, lines
        else:
            lines.append(line)


def _times(bodies: Mapping[str, list[str]]) -> dict[str, int]:
    """How often each function runs in a call of the program; what a loop runs counts as often as its known trips."""
    calls = {name: list(_calls(lines, bodies)) for name, lines in bodies.items()}
    times: Counter[str] = Counter()

    def visit(name: str, often: int) -> None:
        times[name] += often
        for callee, trips in calls[name]:
            visit(callee, often * trips)

    visit("ENTRY", 1)
    return times


def _calls(lines: Iterable[str], known: Mapping[str, list[str]]) -> Iterator[tuple[str, int]]:
    for line in lines:
        trips = _trips(line, known)
        for role, group, one in re.findall(r"(\w+)=(?:\{(%[^}]*)\}|%([\w.\-]+))", line):
            if role in ("calls", "to_apply", "body", "branch_computations", "called_computations"):
                for callee in re.findall(r"[\w.\-]+", group or one):
                    if callee in known:
                        yield callee, trips if role == "body" else 1


def _trips(line: str, known: Mapping[str, list[str]]) -> int:
    """Of a loop: as XLA has counted them, or by the number that its condition compares with; else 1."""
    if counted := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
        return int(counted[1])
    condition = re.search(r"condition=%([\w.\-]+)", line)
    text = "\n".join(known.get(condition[1], [])) if condition else ""
    limits = re.findall(r" = s\d+\[\]\S* constant\((\d+)\)", text)
    return int(limits[0]) if len(limits) == 1 and "direction=LT" in text else 1


def _found(lines: Iterable[str], times: int) -> Iterator[tuple[str, Collective]]:
    """The collectives in these lines, with the numbers of their channels ("" where they have none)."""
    kinds = "|".join(KINDS)
    for line in lines:
        if match := re.search(rf" = (.*?) ({kinds})(?:-start)?\(", line):
            shapes = tuple((d, _shape(sizes)) for d, sizes in re.findall(r"(\w+)\[([\d,]*)\]", match[1]))
            name, channel = re.search(r'op_name="([^"]*)"', line), re.search(r"channel_id=(\d+)", line)
            largest = max((_bytes(dtype, shape) for dtype, shape in shapes), default=0)
            yield channel[1] if channel else "", Collective(match[2], shapes, largest, times, name[1] if name else "")


def _shape(sizes: str) -> Shape:
    return tuple(int(size) for size in sizes.split(",") if size)


def _bytes(dtype: str, shape: Shape) -> int:
    bits = BITS.get(dtype) or int(re.sub(r"\D*(\d+).*", r"\1", dtype) or 0)
    return math.prod(shape) * bits // 8
