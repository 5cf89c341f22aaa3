"""How the benchmarks print: a table in Markdown, and what it was measured with, into the README where one is named."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

README = "JPEFT_TABLES"  # an environment variable: the file whose tables are rewritten


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A GitHub table; a column whose cells are all numbers, or what stands around them, is aligned to the right.

    Example:
      >>> print(table(["row", "s"], [["floor", 1.5], ["LoRA", 12]]))
      | row   |   s |
      |:------|----:|
      | floor | 1.5 |
      | LoRA  |  12 |
    """
    cells = [[str(cell) for cell in row] for row in rows]
    columns = list(zip(header, *cells, strict=True))
    widths = [max(3, *map(len, column)) for column in columns]
    right = [all(map(_number, column[1:])) for column in columns]
    lay = lambda row: [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)]
    rule = ["-" * (w + 1) + ":" if r else ":" + "-" * (w + 1) for w, r in zip(widths, right, strict=True)]
    return "\n".join([_line(lay(header)), f"|{'|'.join(rule)}|", *(_line(lay(row)) for row in cells)])


def publish(name: str, text: str, peers: Sequence[str] = ()) -> None:
    """Print a benchmark's text with what it was measured on; put it into the README that is named by the environment.

    Args:
      name: what stands in the README's `<!-- begin NAME -->` and `<!-- end NAME -->`.
      text: tables, and sentences computed from the measurement.
      peers: packages whose versions belong to it, beside jax and flax; one that is not there is left out.

    Raises:
      ValueError: the README has no such markers.
    """
    signed = f"{text.strip()}\n\n{_signature(peers)}"
    print(f"\n{signed}\n", flush=True)
    if path := os.environ.get(README):
        _replace(Path(path), name, signed)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(cell: str) -> bool:
    return not cell or cell.lstrip("+-−~<").startswith(tuple("0123456789"))


def _signature(peers: Sequence[str]) -> str:
    import jax  # here, so that a benchmark of imports may print a table too

    device = jax.devices()[0].device_kind
    place = platform.machine() if device == "cpu" else device
    versions = ", ".join(filter(None, map(_version, ("jax", "flax", *peers))))
    command = " ".join(["python", *sys.orig_argv[1:]])
    return f"`{command}`, {date.today()}: {os.cpu_count()} CPU cores, {place}, {versions}."


def _version(package: str) -> str | None:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return None


def _replace(path: Path, name: str, text: str) -> None:
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    before, found, rest = path.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{path} has no {begin} ... {end}: write both where the table of {name!r} belongs")
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")
