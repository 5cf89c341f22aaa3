"""Hostile adapter folders and files: each is refused with one typed error, in bounded time and memory.

A valid folder is spoiled in one way after another, and loaded; so are the files of `hostile_files.py`. Prints a table
of the costliest, and exits with 1 if one was loaded, raised anything but AdapterError, or took more than is promised.

    python -m reliability.hostile
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.progress import track

import jpeft
from benchmarks.tables import publish, table
from jpeft_interop import load_peft, save_peft
from reliability.hostile_files import FILES, LOADS

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SECONDS, MEBIBYTES = 1.0, 256
STATUS = Path("/proc/self/status")
LAYERS, MODULES = 32, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KEY = "base_model.model.model.layers.{}.q_proj.lora_A.weight"
Spoil = Callable[[Path], Any]


def params() -> dict[str, Any]:
    """A base with the modules of a model of 7 billion weights, and few of the weights."""
    module = lambda at: {"kernel": jax.random.normal(jax.random.key(at), (8, 8))}
    names = [(layer, name) for layer in range(LAYERS) for name in MODULES]
    layers: dict[str, dict[str, Any]] = {str(layer): {} for layer in range(LAYERS)}
    for at, (layer, name) in enumerate(names):
        layers[str(layer)][name] = module(at)
    return {"model": {"layers": layers}}


def valid(folder: Path, base: Any) -> None:
    """A folder that loads; without a digest, as strangers' are, so that each check is met and not that one."""
    adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=2, targets=["q_proj", "v_proj"]), base)
    save_peft(folder, adapter, params=base)
    header, data = read(folder)
    header.pop("__metadata__")
    write(folder, header, data)


def read(folder: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a folder's tensors, and the data."""
    found = (folder / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(found[:8], "little")
    return json.loads(found[8:end]), found[end:]


def write(folder: Path, header: Any, data: bytes) -> None:
    """The inverse, of any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + data)


def fields(**changed: Any) -> Spoil:
    """Other values in the config."""

    def spoil(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | changed))

    return spoil


def raw(text: str | bytes) -> Spoil:
    """Another text as the config; `%` stands for what was there, without the braces."""

    def spoil(folder: Path) -> None:
        before = (folder / CONFIG).read_bytes().strip()[1:-1]
        data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        (folder / CONFIG).write_bytes(data.replace(b"%", before))

    return spoil


def header(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    """Another header."""

    def spoil(folder: Path) -> None:
        found, data = read(folder)
        new = change(found)
        write(folder, found if new is None else new, data)

    return spoil


def values(value: float) -> Spoil:
    """One value that is another."""

    def spoil(folder: Path) -> None:
        found, data = read(folder)
        numbers = np.frombuffer(data, np.float32).copy()
        numbers[-1] = value
        write(folder, found, numbers.tobytes())

    return spoil


def instead(name: str, make: Callable[[Path], Any]) -> Spoil:
    """Something else where a file was."""

    def spoil(folder: Path) -> None:
        (folder / name).rename(folder.parent / "elsewhere")
        make(folder / name)

    return spoil


def sparse(name: str, size: int, start: bytes = b"") -> Spoil:
    """A file that is longer than the disk."""

    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(start)
        os.truncate(folder / name, size)

    return spoil


def huge(shape: list[int], size: int) -> Spoil:
    """One factor of a size that the file claims, and that it has, as holes."""
    text = json.dumps({KEY.format(0): {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    return sparse(WEIGHTS, 8 + len(text) + size, len(text).to_bytes(8, "little") + text)


def bind(path: Path) -> None:
    """A socket; its name is relative, for they must be short."""
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    finally:
        os.chdir(before)


def renamed(key: str) -> Spoil:
    """The first factor under another key."""
    return header(lambda found: found.update({key: found.pop(KEY.format(0))}))


def many(count: int, key: str = "base_model.model.{}.lora_A.weight") -> Spoil:
    """Keys without data, as many as that."""
    entry = {"dtype": "F32", "shape": [0, 8], "data_offsets": [0, 0]}
    return header(lambda found: {**{key.format(n): entry for n in range(count)}, **found})


def saved_and_the_base(folder: Path) -> None:
    """The base's own weights, each of which may be meant by one of many names in the config."""
    found, data = read(folder)
    for layer, modules in params()["model"]["layers"].items():
        for name, module in modules.items():
            kernel = np.asarray(module["kernel"]).T.tobytes()
            key = f"base_model.model.model.layers.{layer}.{name}.base_layer.weight"
            key = key if name in ("q_proj", "v_proj") else key.replace(".base_layer", "")
            found[key] = {"dtype": "F32", "shape": [8, 8], "data_offsets": [len(data), len(data) + len(kernel)]}
            data += kernel
    write(folder, found, data)
    fields(modules_to_save=[f"m{n}" for n in range(10_000)])(folder)


def ia3(feedforward: list[str]) -> Spoil:
    """An IA³ of all modules, whose inputs are scaled where one of many names in the config is a module's end."""

    def spoil(folder: Path) -> None:
        names = [f"base_model.model.model.layers.{n}.{name}.ia3_l" for n in range(LAYERS) for name in MODULES]
        entry = lambda n: {"dtype": "F32", "shape": [8, 1], "data_offsets": [32 * n, 32 * n + 32]}
        write(folder, {name: entry(n) for n, name in enumerate(names)}, bytes(32 * len(names)))
        config = {"peft_type": "IA3", "target_modules": list(MODULES), "feedforward_modules": feedforward}
        (folder / CONFIG).write_text(json.dumps(config))

    return spoil


def in_float64(folder: Path) -> None:
    """Values that float64 has, and float32 has not."""
    found, data = read(folder)
    numbers = np.frombuffer(data, np.float32).astype(np.float64)
    numbers[-1] = 1e300
    for entry in found.values():
        entry |= {"dtype": "F64", "data_offsets": [2 * place for place in entry["data_offsets"]]}
    write(folder, found, numbers.tobytes())


COSTLY = [
    "(.*a){25}",
    "(a|a)*$",
    "((a*)*)*b",
    r"(\w|\d|_|\.)*(\w|\.)*(\w|\.)*x",
    r"(.?){0,1000}(.?){0,1000}y",
    "(a+)+$",
]
LONG = "|".join(f"(.?.?){{0,{n}}}z" for n in range(1, 22))  # just below what is refused
HARMLESS = (  # what is named there is nowhere, and they load
    "all costly fields at once",
    "10,000 saved modules, and the base",
    "10,000 feed-forward modules",
)
FOLDERS: dict[str, Spoil] = {
    # the files
    "a link out of the folder, for the tensors": instead(WEIGHTS, lambda path: path.symlink_to("../elsewhere")),
    "a link out of the folder, for the config": instead(CONFIG, lambda path: path.symlink_to("../elsewhere")),
    "a link to /dev/zero": instead(CONFIG, lambda path: path.symlink_to("/dev/zero")),
    "a link to itself": instead(WEIGHTS, lambda path: path.symlink_to(path.name)),
    "a link to nothing": instead(WEIGHTS, lambda path: path.symlink_to("nothing")),
    "a pipe, for the config": instead(CONFIG, os.mkfifo),
    "a pipe, for the tensors": instead(WEIGHTS, os.mkfifo),
    "a socket": instead(WEIGHTS, bind),
    "a folder, for the config": instead(CONFIG, Path.mkdir),
    "a folder, for the tensors": instead(WEIGHTS, Path.mkdir),
    "a pickle alone": lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"),
    "a pickle by another name": lambda folder: (folder / WEIGHTS).write_bytes(b"PK\3\4" + b"0" * 99),
    "a config of a terabyte, of holes": sparse(CONFIG, 1 << 40),
    "tensors of a terabyte, of holes": huge([1 << 19, 1 << 19], 1 << 40),
    "tensors of 60 MB, of holes": huge([15_000_000, 1], 60_000_000),
    # the header
    "a header of 2^60 bytes": lambda folder: (folder / WEIGHTS).write_bytes((1 << 60).to_bytes(8, "little")),
    "a header of 9 MB": header(lambda found: json.dumps(found).encode() + b" " * 9_000_000),
    "a header of 2 million lists": header(lambda found: b'{"a":[[]' + b",[]" * 2_000_000 + b"]}"),
    "a header of 3 million numbers": header(lambda found: b'{"a":[1' + b",1" * 3_000_000 + b"]}"),
    "a header of 500,000 objects": header(lambda found: json.dumps({f"{n:x}": {} for n in range(500_000)}).encode()),
    "metadata of 500,000 words": header(
        lambda found: {"__metadata__": {f"{n:x}": "" for n in range(500_000)}, **found}
    ),
    "a header that is nested": header(lambda found: b'{"a":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}"),
    "a key twice": header(lambda found: json.dumps(found).replace("layers.1.", "layers.0.").encode()),
    "49,000 keys of nothing": many(49_000),
    "49,000 keys that are nearly right": many(40_000, KEY.replace("q_proj", "q_porj")),
    "a key of 4 million characters": header(lambda found: {**found, "x" * 4_000_000: found.pop(KEY.format(0))}),
    "a key of 2 million dots": renamed("base_model.model." + "." * 2_000_000 + ".lora_A.weight"),
    "a shape that overflows": header(lambda found: found[KEY.format(0)].update(shape=[1 << 62, 1 << 62])),
    "a dtype of none": header(lambda found: found[KEY.format(0)].update(dtype="F128")),
    "a bias that is an embedding": renamed("base_model.model.model.embed_tokens.weight"),
    "a factor missing, and a hole where it was": header(lambda found: found.pop(KEY.format(0)) and None),
    # the config's text
    "a config of 2 MB": raw('{%,"x":"' + "y" * 2_000_000 + '"}'),
    "a config that is nested": raw('{%,"x":' + "[" * 400_000 + "]" * 400_000 + "}"),
    "a config nested 25 deep": raw('{%,"x":' + "[" * 25 + "]" * 25 + "}"),
    "a field twice": raw('{%,"r":2}'),
    "NaN": raw('{%,"x":NaN}'),
    "1e999": raw('{%,"x":1e999}'),
    "an integer of 900,000 digits": raw('{%,"x":' + "9" * 900_000 + "}"),
    "a byte order mark": raw(b"\xef\xbb\xbf{%}"),
    "half a surrogate pair": raw(b'{%,"\\ud800":null}'),
    "no UTF-8": raw(b'{%,"\xff":null}'),
    "a million quotes": raw('{%,"x":"' + '\\"' * 490_000),
    "100,000 unknown fields": raw("{%" + "".join(f',"x{n}":1' for n in range(80_000)) + "}"),
    "an unknown field of 900,000 letters": raw('{%,"' + "x" * 900_000 + '":1}'),
    # its fields
    "a rank that is a string": fields(r="2"),
    "a rank that is true": fields(r=True),
    "a rank of 2^53": fields(r=1 << 53),
    "a rank of 10^300": fields(r=10**300),
    "an alpha of 1e300": fields(lora_alpha=1e300),
    '"false" for a boolean': fields(use_dora="false"),
    "a method of tomorrow": fields(peft_type="HYPERLORA"),
    "a field of tomorrow, in use": fields(use_hyper=True),
    "code": fields(auto_mapping={"parent_library": "os"}, peft_type={"__import__": "os"}),
    "an initialisation that changes the base": fields(init_lora_weights="pissa"),
    "a backreference": fields(target_modules=r"(.*)\1"),
    **{f"the regex {regex}": fields(target_modules=regex) for regex in COSTLY},
    "50 costly regexes": fields(rank_pattern={f"(.?.?.?){{0,{n}}}z": 1 for n in range(2, 52)}),
    "a long costly regex": fields(target_modules=LONG),
    "all costly fields at once": fields(
        exclude_modules=LONG,
        rank_pattern={f"(.?){{0,4}}z{n}": 1 for n in range(25)},
        alpha_pattern={f"(.?){{0,4}}y{n}": 1 for n in range(25)},
        layers_to_transform=list(range(LAYERS)),
        layers_pattern=[f"(.?){{0,9}}x{n}" for n in range(9)] + ["layers"],
    ),
    "a regex of 900,000 characters": fields(target_modules="a?" * 450_000),
    "a regex of 16,000 words": fields(target_modules="|".join(f"q{n}" for n in range(16_000))),
    "a regex of 3,500 words": fields(target_modules="|".join(f"q{n}" for n in range(3_500))),
    "90,000 targets": fields(target_modules=[f"layers.{n}.q_proj" for n in range(50, 40_000)]),
    "40,000 ranks": fields(rank_pattern={f"layers.{n}.q_proj": 3 for n in range(35_000)}),
    "30,000 ranks of many forms": fields(rank_pattern={"a" * (n % 90) + "." * (n // 90): 3 for n in range(9_000)}),
    "100,000 layers": fields(layers_to_transform=list(range(1, 100_000))),
    "10,000 layers' patterns": fields(layers_to_transform=[0], layers_pattern=[f"(x{n}+)+" for n in range(40_000)]),
    "80,000 saved modules": fields(modules_to_save=[f"m{n}" for n in range(80_000)]),
    "80,000 feed-forward modules": ia3([f"m{n}" for n in range(80_000)]),
    "10,000 feed-forward modules": ia3([f"m{n}" for n in range(10_000)]),
    "10,000 feed-forward modules, one a part of a name": ia3([*(f"m{n}" for n in range(9_999)), "proj"]),
    "10,000 saved modules, and the base": saved_and_the_base,
    # the values
    "factors in float64": in_float64,
    "NaN among the values": values(float("nan")),
    "an infinity among the values": values(float("inf")),
}


def measured(act: Callable[[], Any]) -> tuple[str, float, float]:
    """How it ended, in how many seconds of the CPU, and with how many MiB above what was there before."""
    before, start = reset_peak(), time.process_time()
    try:
        with warnings.catch_warnings():  # of what a config says without effect
            warnings.simplefilter("ignore", UserWarning)
            act()
        ended = "loaded"
    except jpeft.AdapterError as error:
        ended = f"AdapterError: {error}"
    except Exception as error:  # any other is what this is about
        ended = f"{type(error).__name__}: {error}"
    return ended, time.process_time() - start, memory("VmHWM") - before


def reset_peak() -> float:
    """Forgets the peak, as Linux lets a process do for itself; what there is now, in MiB."""
    if STATUS.exists():
        (STATUS.parent / "clear_refs").write_text("5")
    return memory("VmRSS")


def memory(name: str) -> float:
    """A line of the process's status, in MiB; elsewhere than on Linux nothing is measured."""
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:")), 0.0)


def tried(names: list[str], folder: Path) -> dict[str, tuple[str, float, float]]:
    """Each of the folders, loaded."""
    base = params()
    valid(folder / "valid", base)
    load_peft(folder / "valid", base)
    found = {"a valid folder": measured(lambda: load_peft(folder / "valid", base))}
    for at, name in enumerate(track(names, description="hostile folders")):
        place = folder / str(at) / "adapter"
        shutil.copytree(folder / "valid", place)
        FOLDERS[name](place)
        found[name] = measured(lambda place=place: load_peft(place, base))
        shutil.rmtree(place.parent)
    return found


def tried_files(names: list[str], folder: Path) -> dict[str, tuple[str, float, float]]:
    """Each of the other files, loaded."""
    found = {}
    for name in track(names, description="hostile files"):
        place = folder / "files" / "adapter"
        place.mkdir(parents=True)
        found[name] = measured(FILES[name](place))
        shutil.rmtree(place.parent)
    return found


def main() -> None:
    """Tries all of them, and prints what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="those with this in their name", default="")
    parser.add_argument("--all", action="store_true", help="print each folder, and not only the costliest ten")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = tried([name for name in FOLDERS if options.only in name], Path(folder))
        found |= tried_files([name for name in FILES if options.only in name], Path(folder))
    _, seconds, peak = found.pop("a valid folder")
    broken = [
        name
        for name, (ended, took, above) in found.items()
        if not ended.startswith("loaded" if name in (*HARMLESS, *LOADS) else "AdapterError")
        or took > SECONDS
        or above - peak > MEBIBYTES
        or len(ended) > 3000
    ]
    costly = sorted(found, key=lambda name: -found[name][1])
    rows = [
        [name, f"{found[name][1] * 1e3:.0f}", f"{max(0, found[name][2] - peak):.0f}", _short(found[name][0])]
        for name in (costly if options.all else costly[:10])
    ]
    shown = table(["folder or file", "CPU ms", "MiB above a valid load", "how it ends"], rows)
    told = f"{len(found)} folders and files, {len(found) - len(broken)} end as promised"
    told += f"; a valid folder takes {seconds * 1e3:.0f} ms"
    publish("hostile", f"{shown}\n\n{told}.")
    for name in broken:
        print(f"BROKEN: {name}: {_short(found[name][0])}", file=sys.stderr)
    sys.exit(bool(broken))


def _short(text: str) -> str:
    text = text.replace("\n", " ").replace("|", "¦")
    text = text.partition("/adapter/")[2] if "/adapter/" in text else text
    return text if len(text) <= 90 else f"{text[:89]}…"


if __name__ == "__main__":
    main()
