"""A layout as JSON that a person can read, and edit: one row for all layers where they are alike.

    {"format": "jpeft-layout-1", "places": {
      "layers_{#}/attn/q/kernel": {"count": 30, "axes": "d n h", "sizes": {"d": 576, "h": 64, "n": 9},
        "torch": [["model.layers.{#}.self_attn.q_proj.weight", "(n h) d", "linear"]]}}}

`{#}` is the number of the layer, from 0 up to `count`, in the path and in torch's names alike.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from jpeft.atomic import write_text
from jpeft.errors import WeightsError
from jpeft.strict_json import read_json_object
from jpeft_interop.layout.layout import Layout
from jpeft_interop.layout.link import Kind
from jpeft_interop.layout.place import Place, Tensor

FORMAT = "jpeft-layout-1"
MARK = "{#}"
NUMBER = re.compile(r"(?<![0-9A-Za-z])\d+(?![0-9A-Za-z])")
KINDS = get_args(Kind)

Rows = dict[str, dict[str, Any]]


def save_layout(path: str | os.PathLike[str], layout: Layout) -> None:
    """Writes a layout as JSON, moved into place whole."""
    text = json.dumps({"format": FORMAT, "places": rows(layout)}, indent=1, ensure_ascii=False)
    write_text(path, text + "\n")


def load_layout(path: str | os.PathLike[str]) -> Layout:
    """The layout in a file of `save_layout`.

    Raises:
      WeightsError: the file is missing, no layout, or one that contradicts itself.
    """
    found = read_json_object(path, WeightsError)
    if found.get("format") != FORMAT or not isinstance(found.get("places"), dict):
        raise WeightsError(f"{path}: expected a layout, 'format': {FORMAT!r} with 'places'; found {sorted(found)}")
    places: dict[str, Place] = {}
    for name, row in found["places"].items():
        for path_here, place in _expanded(name, row, str(path)):
            if path_here in places:
                raise WeightsError(f"{path}: two rows have a place for {path_here!r}")
            places[path_here] = place.fit(place.shape, path_here)
    layout = Layout(places)
    layout.check_keys()
    return layout


def rows(layout: Layout) -> Rows:
    """The rows of the file: places that differ in one number alone are one."""
    groups: dict[str, list[str]] = defaultdict(list)
    for path, place in layout.items():
        groups[json.dumps(_marked(path, _row(place)))].append(path)
    made: Rows = {}
    for key, found in groups.items():
        name, row = json.loads(key)
        joined = {"count": len(found), **row}
        if MARK in name and dict(_expanded(name, joined, "")) == {path: layout[path] for path in found}:
            made[name] = joined
        else:
            made |= {path: _row(layout[path]) for path in found}
    return made


def _row(place: Place) -> dict[str, Any]:
    plain = {"scale": 1.0, "offset": 0.0}
    changed = {name: getattr(place, name) for name in plain if getattr(place, name) != plain[name]}
    return {
        "axes": place.axes,
        "torch": [list(tensor) for tensor in place.torch],
        "sizes": dict(place.sizes),
        **changed,
    }


def _marked(path: str, row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The path and the row with the first number of the path that all of torch's names have, marked."""
    for found in NUMBER.finditer(path):
        number = found[0]
        keys = [re.sub(rf"(?<!\d){number}(?!\d)", MARK, key, count=1) for key, _, _ in row["torch"]]
        if str(int(number)) == number and all(MARK in key for key in keys):
            torch = [[key, *rest] for key, (_, *rest) in zip(keys, row["torch"], strict=True)]
            return path[: found.start()] + MARK + path[found.end() :], row | {"torch": torch}
    return path, row


def _expanded(name: str, row: Any, file: str) -> Iterator[tuple[str, Place]]:
    count = row.get("count") if isinstance(row, Mapping) else None
    if MARK not in name:
        yield name, _place(name, row, "", file)
        return
    if not isinstance(count, int) or count < 1:
        raise WeightsError(f"{file}: {name!r}: expected a 'count' of layers, found {count!r}")
    for number in range(count):
        yield name.replace(MARK, str(number)), _place(name, row, str(number), file)


def _place(name: str, row: Any, number: str, file: str) -> Place:
    try:
        tensors = tuple(Tensor(key.replace(MARK, number), axes, kind) for key, axes, kind in row["torch"])
        sizes = tuple(sorted((str(axis), int(size)) for axis, size in row["sizes"].items()))
        place = Place(str(row["axes"]), tensors, sizes, float(row.get("scale", 1.0)), float(row.get("offset", 0.0)))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(f"{file}: {name!r}: expected 'axes', 'torch' and 'sizes', found {row!r}: {error}") from error
    if unknown := [tensor.kind for tensor in tensors if tensor.kind not in KINDS]:
        raise WeightsError(f"{file}: {name!r}: {unknown[0]!r} is no kind of tensor; they are {', '.join(KINDS)}")
    return place
