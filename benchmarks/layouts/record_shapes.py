"""Records the trees of the dumps, shapes and torch configs alone, for the tests that have none of the packages.

python benchmarks/layouts/record_shapes.py DUMPS   # writes tests/interop/data/ready_layouts.json
"""

import json
import re
import sys
from collections import defaultdict
from pathlib import Path

from safetensors import safe_open
from transformers import AutoConfig

OUT = Path(__file__).parents[2] / "tests" / "interop" / "data" / "ready_layouts.json"
NUMBER = re.compile(r"(?<=[/_])\d+(?=/)")


def recorded(folder: Path) -> dict:
    """A dump's torch class and config, and its shapes: `{i}` for the layers, with how many of them there are."""
    config = json.loads((folder / "config.json").read_text())
    about = json.loads((folder / "dump.json").read_text())
    own = AutoConfig.for_model(**config).to_diff_dict()
    with safe_open(folder / "params.safetensors", "np") as file:
        shapes = {path: tuple(file.get_slice(path).get_shape()) for path in file.keys()}  # noqa: SIM118 not a dict
    return {"class": about["torch_class"], "config": own, "shapes": _rows(shapes)}


def _rows(shapes: dict[str, tuple[int, ...]]) -> dict[str, list]:
    found: dict[tuple[str, tuple[int, ...]], list[int]] = defaultdict(list)
    for path, shape in shapes.items():
        number = NUMBER.search(path)
        found[path if number is None else path[: number.start()] + "{i}" + path[number.end() :], shape].append(
            int(number[0]) if number else 0
        )
    rows: dict[str, list] = {}
    for (path, shape), layers in found.items():
        if "{i}" in path and sorted(layers) == list(range(len(layers))) and path not in rows:
            rows[path] = [*shape, f"x{len(layers)}"]
        else:
            rows |= {path.replace("{i}", str(layer)): list(shape) for layer in layers}
    return rows


if __name__ == "__main__":
    dumps = Path(sys.argv[1])
    families = {f"{folder.parent.name}/{folder.name}": recorded(folder) for folder in sorted(dumps.glob("*/*"))}
    lines = (f" {json.dumps(name)}: {json.dumps(family)}" for name, family in families.items())
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text("{\n" + ",\n".join(lines) + "\n}\n")
