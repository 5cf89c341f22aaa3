"""Hostile files for the other readers: native files, mixtures, summaries, folders of several, bases that are stacked.

Each trial writes what an enemy would into a folder, and gives the call that is to refuse it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

import jpeft
from jpeft.safetensors_header import DTYPES
from jpeft_interop import Layout, Place, load_adapters, load_peft
from jpeft_interop.adapter_summary import summarise

Act = Callable[[], Any]
Trial = Callable[[Path], Act]
Tensors = Mapping[str, np.ndarray]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KINDS = {dtype: name for name, dtype in DTYPES.items()}
SPEC = {"rank": 1}
MANY = 2_000_000


def put(file: Path, tensors: Tensors, metadata: Mapping[str, str]) -> None:
    """A safetensors file, whatever the names and the dtypes are."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for key, tensor in tensors.items():
        place = [at, at + tensor.nbytes]
        header[key] = {"dtype": KINDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        at += tensor.nbytes
    text = json.dumps(header).encode()
    data = b"".join(tensor.tobytes() for tensor in tensors.values())
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def site(path: str, shape: tuple[int, ...] = (1, 1), **more: Any) -> Any:
    """A LoRA's site in the metadata; three axes are a stack's."""
    *batch, contracted, output = range(len(shape))
    kernel = {"shape": list(shape), "batch": batch, "contracted": [contracted], "output": [output]}
    return {"path": path, "method": "lora", "rank": 1, "kernel": kernel} | more


def leaves(path: str, shape: tuple[int, ...] = (1, 1), dtype: Any = np.float32, rank: int = 1) -> Tensors:
    """A site's tensors."""
    *batch, rows, columns = shape
    ones = lambda *sizes: np.ones((*batch, *sizes), dtype)
    both = {f"trained|{path}|a": ones(rows, rank), f"trained|{path}|b": ones(rank, columns)}
    return both | {f"constant|{path}|scaling": ones()}


def meta(spec: Any = SPEC, sites: Any = ()) -> str:
    """The metadata of a native file."""
    return json.dumps({"method": "lora", "spec": spec, "sites": list(sites)})


def native(text: str | Callable[[], str], tensors: Callable[[], Tensors] = dict) -> Trial:
    """A native file without a digest, by which each of them would be refused at once."""

    def write(folder: Path) -> Act:
        file = folder / "adapter.safetensors"
        put(file, tensors(), {"format": "jpeft-1", "meta": text if isinstance(text, str) else text()})
        return lambda: jpeft.load(file)

    return write


def one(path: str = "l/kernel", spec: Any = SPEC, dtype: Any = np.float32, **more: Any) -> Trial:
    """One weight."""
    return native(lambda: meta(spec, [site(path, **more)]), lambda: leaves(path, dtype=dtype))


def several(shapes: list[tuple[int, ...]], rank: int = 1, **more: Any) -> Trial:
    """Weights of such shapes."""
    named = {f"l/{n}/kernel": shape for n, shape in enumerate(shapes)}
    text = lambda: meta(sites=[site(path, shape, rank=rank, **more) for path, shape in named.items()])
    parts = lambda: (leaves(path, shape, rank=rank).items() for path, shape in named.items())
    return native(text, lambda: dict(pair for part in parts() for pair in part))


def stacked(ranks: list[int], size: int = 1024) -> Trial:
    """A folder of PEFT's with a module for each layer, for a base that stacks them; float8, so that it is small."""
    base = {"q": jax.ShapeDtypeStruct((len(ranks), size, size), np.float32)}
    layout = Layout({"q": Place.of("l i o", {"layers.{l}.q.weight": "o i"}).fit((len(ranks), size, size), "q")})

    def write(folder: Path) -> Act:
        key = "base_model.model.layers.{}.q.lora_{}.weight"
        pattern = {f"layers.{n}.q": rank for n, rank in enumerate(ranks) if rank > 1}
        config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q"], "rank_pattern": pattern}
        shapes = {"A": lambda rank: (rank, size), "B": lambda rank: (size, rank)}
        zeros = lambda shape: np.zeros(shape, ml_dtypes.float8_e4m3fn)
        tensors = {key.format(n, ab): zeros(of(rank)) for n, rank in enumerate(ranks) for ab, of in shapes.items()}
        (folder / CONFIG).write_text(json.dumps(config))
        put(folder / WEIGHTS, tensors, {})
        return lambda: load_peft(folder, base, layout=layout)

    return write


def pair(folder: Path, module: str, rank: int, wide: int = 1) -> None:
    """A folder of PEFT's with one pair of factors, float8."""
    folder.mkdir(exist_ok=True)
    ones = lambda *shape: np.ones(shape, ml_dtypes.float8_e4m3fn)
    key = f"base_model.model.{module}.lora_{{}}.weight"
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": rank, "target_modules": ["q"]}))
    put(folder / WEIGHTS, {key.format("A"): ones(rank, wide), key.format("B"): ones(wide, rank)}, {})


def told(module: str, rank: int = 1) -> Trial:
    """The summary of one pair, which is all that looks at it without a base."""

    def write(folder: Path) -> Act:
        pair(folder, module, rank)
        return lambda: summarise(folder)

    return write


def links(count: int) -> Trial:
    """One adapter under many names."""

    def write(folder: Path) -> Act:
        base = {"q": {"kernel": np.ones((1, 1), np.float32)}}
        pair(folder / "a", "q", 1)
        for n in range(count):
            (folder / f"l{n}").symlink_to("a")
        return lambda: load_adapters(folder, base)

    return write


def mixture(spec: str = "{}", names: list[str] | None = None, count: int = 2) -> Trial:
    """A mixture of one expert, by so many links."""

    def write(folder: Path) -> Act:
        path = "l/kernel"
        told = {"format": "jpeft-1", "meta": meta(sites=[site(path)])}
        put(folder / "expert-0.safetensors", leaves(path), told)
        for n in range(1, count):
            (folder / f"expert-{n}.safetensors").symlink_to("expert-0.safetensors")
        called = [f"e{n}" for n in range(count)] if names is None else names
        classifier = {"0/kernel": np.ones((4, count), np.float32), "0/bias": np.ones(count, np.float32)}
        described = {"format": "jpeft-xlora-1", "spec": spec, "names": json.dumps(called)}
        put(folder / "xlora.safetensors", classifier, described)
        return lambda: jpeft.xlora.load(folder)

    return write


LOADS = (  # there is nothing wrong with those
    "400 shapes",
    "a rank in each layer of a stack",
    "10 stacks of a million",
    "49,000 patterns",
    "a path of 900 dots",
    "a summary of a rank of 9,000",
    "a summary of a rank of 3 million",
    "a summary of a rank of 20 million",
    "a summary of a superscript",
)
FILES: dict[str, Trial] = {
    "400 shapes": several([(n + 1, 1) for n in range(400)]),
    "a rank in each layer of a stack": stacked([16] * 64),
    "one layer's rank for all of a stack": stacked([1024, *[1] * 63]),
    "10 stacks of a million": several([(1 << 20, n + 1, 1) for n in range(10)], rank=0, layers=[*range(0, 90_000, 3)]),
    "metadata of 2 million lists": native('{"method":"lora","spec":{},"sites":[[]' + ",[]" * MANY + "]}"),
    "metadata of 2 million objects": native('{"method":"lora","spec":{},"sites":[{}' + ",{}" * MANY + "]}"),
    "metadata of 130,000 objects": native(lambda: meta(sites=[{}] * 130_000)),
    "metadata nested 90 deep": native('{"sites":' + "[" * 90 + "[]" + ",[]" * MANY + "]" * 90 + "}"),
    "metadata of 2 million numbers": native('{"method":"lora","spec":{"rank":[1' + ",1" * MANY + ']},"sites":[]}'),
    "49,000 patterns": one(spec=SPEC | {"rank_pattern": [[f"l{n}", 1] for n in range(49_000)]}),
    "130,000 patterns": one(spec=SPEC | {"rank_pattern": [["l", 1]] * 130_000}),
    "390,000 targets": one(spec=SPEC | {"targets": ["l"] * 390_000}),
    "a layer 300,000 times": one(layers=[0] * 300_000),
    "a path of 400,000 parts": one("a/" * 400_000 + "kernel"),
    "a path of 400,000 letters": one("ab" * 200_000, SPEC | {"alpha_pattern": [["(.?){0,9}x", 1.0]]}),
    "a path of 900 dots": one("a/" * 450 + "kernel", SPEC | {"alpha_pattern": [["(.?){0,9}x", 1.0]] * 20}),
    "factors in float64, natively": one(dtype=np.float64),
    "complex factors": one(dtype=np.complex64),
    "boolean factors": one(dtype=np.bool_),
    "a summary of a rank of 9,000": told("q", 9_000),
    "a summary of a rank of 3 million": told("q", 3_000_000),
    "a summary of a rank of 20 million": told("q", 20_000_000),
    "a summary of a superscript": told("layers.²"),
    "a summary of 5,000 digits": told("layers." + "1" * 5_000),
    "a summary of 500,000 dots": told("." * 500_000),
    "2,000 links to one adapter": links(2_000),
    "two links to one adapter": links(2),
    "a mixture of 400 links": mixture(count=400),
    "a mixture of 200 links": mixture(count=200),
    "a mixture of many names": mixture(names=[f"e{n}" for n in range(400_000)]),
    "a mixture's number of 400 digits": mixture('{"temperature":1' + "0" * 400 + "}"),
    "a mixture's nested spec": mixture('{"depth":' + "[" * 900_000 + "]" * 900_000 + "}"),
    "a mixture's spec of 2 million numbers": mixture('{"depth":[1' + ",1" * MANY + "]}"),
}
