"""How long does `infer_layout` take, and how much memory?

For MiniLM and SmolLM2 as loaded, SmolLM2 in a form of one's own, and a synthetic Llama of any size on mapped files.

    python benchmarks/infer_layout.py                  # the real weights
    python benchmarks/infer_layout.py --billions 1.1   # and so many parameters in bf16, in two copies on disk
    python benchmarks/infer_layout.py --dumps OUT      # and every dump of benchmarks/layouts
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file
from tables import publish, table

from jpeft.tree import flatten
from jpeft_interop import infer_layout, load_model
from jpeft_interop.layout import default_layout
from jpeft_interop.packaged import minilm_folder, smollm2_folder

LAYERS, D, HEADS, KV, HEAD = 30, 576, 9, 3, 64


def own_form(flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """SmolLM2 as somebody's scanned model has it: heads split, rotary halves turned, k beside v, gate beside up."""
    stack = lambda name, axis=0: np.stack([flat[f"model/layers/{i}/{name}"] for i in range(LAYERS)], axis)
    kernel = lambda name, axis=0: stack(f"{name}/kernel", axis)
    q = kernel("self_attn/q_proj", 1).reshape(D, LAYERS, HEADS, 2, HEAD // 2)
    kv = np.stack([kernel("self_attn/k_proj"), kernel("self_attn/v_proj")], 1)
    return {
        "embed": flat["model/embed_tokens/embedding"],
        "norm": flat["model/norm/weight"],
        "norms/attn": stack("input_layernorm/weight"),
        "norms/mlp": stack("post_attention_layernorm/weight"),
        "q": q.swapaxes(3, 4).reshape(D, LAYERS, HEADS, HEAD),
        "kv": kv.reshape(LAYERS, 2, D, KV, HEAD),
        "o": kernel("self_attn/o_proj").reshape(LAYERS, HEADS, HEAD, D),
        "gate_up": np.concatenate([kernel("mlp/gate_proj"), kernel("mlp/up_proj")], -1),
        "down": kernel("mlp/down_proj"),
    }


def synthetic(folder: Path, billions: float) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Random bf16 weights of a stack of Llama's layers in both forms, on mapped files."""
    d, f, layers = 2048, 5632, max(1, round(billions * 1e9 / 44e6))
    rng = np.random.default_rng(0)
    params: dict[str, np.ndarray] = {}
    state: dict[str, np.ndarray] = {}
    for name, rows, columns in (("q", d, d), ("gate", d, f), ("up", d, f), ("down", f, d)):
        whole = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.uint16, (rows, layers, columns))
        for layer in range(layers):
            bits = rng.standard_normal((rows, columns), np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)
            whole[:, layer] = bits
            key = f"layers.{layer}.{name}_proj.weight"
            torch = np.lib.format.open_memmap(folder / f"{key}.npy", "w+", np.uint16, (columns, rows))
            torch[...] = bits.T
            torch.flush()
            state[key] = np.load(folder / f"{key}.npy", mmap_mode="r").view(ml_dtypes.bfloat16)
        whole.flush()
        params[name] = np.load(folder / f"{name}.npy", mmap_mode="r").view(ml_dtypes.bfloat16)
    return params, state


def cases(arguments: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Any, Any, tuple[str, ...]]]:
    """A name, both forms, and what to ignore."""
    _, params = load_model(minilm_folder())
    yield "MiniLM as loaded", params, str(minilm_folder()), ("*position_ids*",)
    _, params = load_model(smollm2_folder())
    flat = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
    state = default_layout(flat).arrays(params)
    yield "SmolLM2 as loaded", params, state, ()
    yield "SmolLM2, scanned, split, interleaved, fused", own_form(flat), state, ()
    if arguments.billions:
        params, state = synthetic(folder, arguments.billions)
        yield f"synthetic, {arguments.billions:g} billion, bf16", params, state, ()
    for dump in sorted(Path(arguments.dumps).glob("*/*")) if arguments.dumps else ():
        params, state = (load_file(dump / f"{name}.safetensors") for name in ("params", "torch"))
        yield f"{dump.parent.name}/{dump.name}", params, state, ()


def main() -> None:
    """Prints a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--billions", type=float, default=0, help="of parameters in a synthetic model")
    parser.add_argument("--dumps", help="a folder that benchmarks/layouts/dump_*.py wrote into")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, params, state, ignore in cases(arguments, Path(folder)):
            start = time.perf_counter()
            layout = infer_layout(params, state, ignore=ignore, progress=False)
            seconds = time.perf_counter() - start
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            rows.append([name, len(layout), len(layout.by_key), f"{seconds:.1f}", f"{peak:.1f}"])
    publish("infer_layout", table(["weights", "leaves", "tensors", "s", "peak memory so far, GB"], rows))


if __name__ == "__main__":
    main()
