"""How fast are models and adapters read and written, against `cp -r` of the same folder?

    python benchmarks/files.py [--rounds 2] [--layers 9] [--dtype bfloat16] [--rank 160]

A Llama of random weights (d = 2048, 9 layers: 1 GB in bf16) and SmolLM2 (0.5 GB in fp32) are copied, and merged with an
adapter of rank 8 on every kernel; SmolLM2 is loaded and exported, and an adapter of some 200 MB saved and loaded. All
on one disk, everything read is in the page cache, what was written is synced before the next row begins: `cp` leaves
that to the system, all of jpeft's writing brings it to the disk before it returns. Rows of a folder take turns.

Memory is what the process holds for itself (anonymous pages), at most, over what it held before: in a run of its own,
and on Linux alone.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tables import publish, table
from timing import ratios

import jpeft
from jpeft.tree import flatten
from jpeft_interop import export_model, load_model, load_peft, save_model, save_peft
from jpeft_interop.layout import default_layout
from jpeft_interop.merge_folder import merge_folder
from jpeft_interop.models import build, pure
from jpeft_interop.packaged import smollm2_folder

Rows = Mapping[str, tuple[Path, Callable[[Path], Any]]]


def llama(folder: Path, layers: int, dtype: Any) -> Any:
    """A folder with a Llama of random weights; returns its params' shapes."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    }
    _, shapes = pure(nnx.eval_shape(lambda: build(config, dtype)))
    rng = np.random.default_rng(0)
    draw = lambda leaf: (0.02 * rng.standard_normal(leaf.shape, np.float32)).astype(leaf.dtype)
    save_model(folder, jax.tree.map(draw, shapes), config)
    return shapes


def adapter(folder: Path, spec: Any, params: Any) -> Path:
    """A PEFT folder with a random adapter for these params."""
    made = jpeft.init(jax.random.key(0), spec, params)
    save_peft(folder, made.replace(trained=jax.tree.map(lambda leaf: leaf + 0.01, made.trained)), params=params)
    return folder


def copied(source: Path) -> Callable[[Path], Any]:
    """`cp -r`."""
    return lambda out: subprocess.run(["cp", "-r", source, out], check=True)


def copied_and_synced(source: Path) -> Callable[[Path], Any]:
    """`cp -r`, and every file brought to the disk."""

    def copy(out: Path) -> None:
        copied(source)(out)
        for file in out.iterdir():
            with open(file, "r+b") as opened:
                os.fsync(opened.fileno())

    return copy


def merged(base: Path, with_adapter: Path) -> Callable[[Path], Any]:
    """`merge_folder`."""
    return lambda out: merge_folder(base, with_adapter, out)


def weights(folder: Path) -> int:
    """The bytes of a folder's tensors."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def timed(rows: Rows, rounds: int, out: Path) -> dict[str, list[float]]:
    """Seconds of each row, in turns; the first round is for the page cache and compilers."""
    times: dict[str, list[float]] = {name: [] for name in rows}
    for i in range(rounds + 1):
        for name, (_, write) in rows.items():
            shutil.rmtree(out, ignore_errors=True)
            os.sync()
            start = time.perf_counter()
            jax.block_until_ready(write(out))
            if i:
                times[name].append(time.perf_counter() - start)
    shutil.rmtree(out, ignore_errors=True)
    return times


def growth(write: Callable[[Path], Any], out: Path) -> str:
    """MiB of anonymous memory that a call takes at its peak."""
    if not os.path.exists("/proc/self/status"):
        return ""
    give_back()
    peak, before, done = [0.0], held(), threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], held())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        write(out)
    finally:
        done.set()
        thread.join()
        shutil.rmtree(out, ignore_errors=True)
    return f"{max(0, peak[0] - before):.0f}"


def give_back() -> None:
    """Let the C library return what is free, or a row would find it there and seem to need nothing."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def held() -> float:
    """MiB of anonymous memory now."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


def measured(rows: Rows, rounds: int, out: Path) -> list[list[str]]:
    """A line for each row; the first is what the others are compared with."""
    memory = {name: growth(write, out) for name, (_, write) in rows.items()}
    times = timed(rows, rounds, out)
    first = next(iter(rows))
    lines = []
    for name, (folder, _) in rows.items():
        median = float(np.median(times[name]))
        size = weights(folder)
        speed = ratios({first: times[first], name: times[name]}, name)[first]
        spread = f"{speed.low:.2f} to {speed.high:.2f}" if name != first else ""
        lines.append([name, f"{median:.2f}", f"{size / median / 1e6:.0f}", f"{speed.median:.2f}", spread, memory[name]])
        print(*lines[-1], flush=True)
    return lines


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--layers", type=int, default=9, help="of the Llama; 88 MB each in bf16, and 262 MB for the rest"
    )
    parser.add_argument("--dtype", default="bfloat16", help="of the Llama")
    parser.add_argument("--rank", type=int, default=160, help="of the adapter that is saved and loaded")
    parser.add_argument("--folder", help="where to work; a temporary folder if not given")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as work:
        lines = [*of_llama(Path(work), options), *of_smollm2(Path(work), options)]
    header = ["", "s", "MB/s", "of `cp`'s speed", "10th to 90th percentile", "memory, MiB"]
    publish("files", table(header, lines))


def of_llama(work: Path, options: argparse.Namespace) -> list[list[str]]:
    """The rows of the large folder."""
    base, out = work / "llama", work / "out"
    shapes = llama(base, options.layers, jnp.dtype(options.dtype))
    lora = adapter(work / "lora", jpeft.LoRA(8, 16, exclude=["lm_head"]), shapes)
    _, params = load_model(base)
    dora = adapter(work / "dora", jpeft.DoRA(8, 16, exclude=["lm_head"]), params)
    del params
    name = f"Llama, {weights(base) / 1e9:.2f} GB {options.dtype}"
    rows: Rows = {
        f"{name}: `cp -r`": (base, copied(base)),
        "`cp -r`, synced": (base, copied_and_synced(base)),
        "merge, LoRA": (base, merged(base, lora)),
        "merge, DoRA": (base, merged(base, dora)),
    }
    return measured(rows, options.rounds, out)


def of_smollm2(work: Path, options: argparse.Namespace) -> list[list[str]]:
    """The rows of a real model, and those of an adapter."""
    base, out = smollm2_folder(), work / "out"
    _, params = load_model(base)
    layout = default_layout(flatten(params))
    small = jpeft.init(jax.random.key(0), jpeft.LoRA(8, 16), params)
    large = jpeft.init(jax.random.key(0), jpeft.LoRA(options.rank), params)
    lora, big = work / "lora-smollm2", work / "large"
    save_peft(lora, small, params=params)
    save_peft(big, large, params=params)
    model: Rows = {
        f"SmolLM2, {weights(base) / 1e9:.2f} GB float32: `cp -r`": (base, copied(base)),
        "merge, LoRA, SmolLM2": (base, merged(base, lora)),
        "load_model": (base, lambda out: load_model(base)[1]),
        "export_model": (base, lambda out: export_model(out, params, layout=layout, base=base)),
        "export_model, LoRA": (base, lambda out: export_model(out, params, layout=layout, base=base, adapter=small)),
    }
    files: Rows = {
        f"adapter, {weights(big) / 1e6:.0f} MB: `cp -r`": (big, copied(big)),
        "save_peft": (big, lambda out: save_peft(out, large, params=params)),
        "load_peft": (big, lambda out: load_peft(big, params).trained),
    }
    return [*measured(model, options.rounds, out), *measured(files, options.rounds, out)]


if __name__ == "__main__":
    main()
