"""Proves the ready layouts on the dumps of the real packages, weights and adapters.

    export PYTHONPATH=.:interop
    python benchmarks/layouts/environments.py tunix prove.py DUMPS tunix    # and transformers4, gemma, maxtext

Of every family: the layout's torch tensors are the dump's, and back (bit for bit, but for those that are scaled); a
random LoRA that PEFT made for the torch model gives the same logits applied to the JAX package's own model; and one
drawn on its params gives the same in PEFT. Prints a row of a table for each.
"""

import importlib
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peft
import torch
import transformers
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file

import jpeft
from jpeft.tree import flatten
from jpeft_interop import load_peft, save_peft
from jpeft_interop.ready import ready_layout

NAMES = {
    "gemma1": "gemma",
    "gemma1_fused": "gemma",
    "gemma2_transposed": "gemma2",
    "gemma_fused": "gemma",
    "llama31": "llama3.1",
    "llama3_tied": "llama3",
    "qwen2_tied": "qwen2",
    "qwen3_tied": "qwen3",
    "bert_mlm": "bert",
    "roberta_mlm": "roberta",
    "t5_gated": "t5",
    "vit": "vit_files",  # the names of transformers 4, in which the dump is made
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TOLERANCE = 1e-4


def prove(package: str, folder: Path) -> str:
    """A family's row of the table.

    Raises:
        ValueError: Weights differ, or logits by more than TOLERANCE.
    """
    name = folder.name.removesuffix("_unscanned")
    module = torch_module(folder)
    params = unflatten_dict({tuple(k.split("/")): v for k, v in load_file(folder / "params.safetensors").items()})
    layout = ready_layout(f"{package}/{NAMES.get(name, name)}", params, folder / "config.json")
    weights = _weights_apart(layout, params, module)
    forward = importlib.import_module(f"dump_{package}").forward(folder.name, module)
    found = load_file(folder / "logits.safetensors")
    inputs = {key: array for key, array in found.items() if not key.endswith("logits")}
    apart, moved = _from_peft(module, params, layout, forward, inputs)
    back, moved_back = _to_peft(module, params, layout, forward, inputs)
    if max(apart, back) > TOLERANCE or weights > 1e-6 or min(moved, moved_back) < 1e-2:
        raise ValueError(f"{folder}: weights {weights}, logits {apart}, {back} apart, moved by {moved}, {moved_back}")
    return f"| {package}/{folder.name} | {weights:.1g} | {moved:.2g} | {apart:.1g} | {moved_back:.2g} | {back:.1g} |"


def torch_module(folder: Path) -> Any:
    """The dump's torch model."""
    about = json.loads((folder / "dump.json").read_text())
    module_class = getattr(transformers, about["torch_class"])
    config = module_class.config_class.from_dict(
        json.loads((folder / "config.json").read_text()), attn_implementation="eager"
    )
    module = module_class(config).eval()
    state = {key: torch.from_numpy(tensor) for key, tensor in load_file(folder / "torch.safetensors").items()}
    untied = module.get_output_embeddings()
    if "lm_head.weight" in state and untied is not None:  # transformers 5 ties every T5's on its own
        untied.weight = torch.nn.Parameter(state["lm_head.weight"].clone())
    module.load_state_dict(state | {other: state[key] for other, key in about["tied"].items()})
    return module


def arrays_of(module: Any) -> dict[str, np.ndarray]:
    """Its state dict."""
    return {key: tensor.detach().numpy() for key, tensor in module.state_dict().items()}


def _weights_apart(layout: Any, params: Any, module: Any) -> float:
    state = arrays_of(module)
    ours, flat = layout.arrays(params), flatten(params)
    if ours.keys() != state.keys():
        raise ValueError(f"the layout has {ours.keys() ^ state.keys()} in one alone")
    back = flatten(layout.from_torch(state))
    pairs = [(ours[key], state[key]) for key in state] + [(np.asarray(back[path]), flat[path]) for path in flat]
    return max(float(np.abs(one - other).max() / max(np.abs(other).max(), 1)) for one, other in pairs)


def _from_peft(module: Any, params: Any, layout: Any, forward: Any, inputs: Any) -> tuple[float, float]:
    """How far logits are apart with an adapter that PEFT made, and how far it moves them."""
    plain = _torch_logits(module, inputs)
    with tempfile.TemporaryDirectory() as out:
        adapted = _peft_model(module)
        adapted.save_pretrained(out)
        theirs = _torch_logits(adapted, inputs)
        adapted.unload()
        adapter = load_peft(out, params, layout=layout)
    ours = np.asarray(forward(jpeft.apply(params, adapter), inputs))
    return float(np.abs(ours - theirs).max()), float(np.abs(theirs - plain).max())


def _to_peft(module: Any, params: Any, layout: Any, forward: Any, inputs: Any) -> tuple[float, float]:
    """The same with an adapter drawn on the params."""
    plain = _torch_logits(module, inputs)
    adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=2, alpha=3), params, layout=layout)
    rng = np.random.default_rng(0)
    noise = lambda leaf: leaf + (0.05 * rng.standard_normal(leaf.shape)).astype(leaf.dtype)
    adapter = adapter.replace(trained=jax.tree.map(noise, adapter.trained))
    ours = np.asarray(forward(jpeft.apply(params, adapter), inputs))
    with tempfile.TemporaryDirectory() as out:
        save_peft(Path(out) / "adapter", adapter, params=params, layout=layout)
        theirs = _torch_logits(peft.PeftModel.from_pretrained(module, f"{out}/adapter").eval(), inputs)
    return float(np.abs(ours - theirs).max()), float(np.abs(theirs - plain).max())


def _peft_model(module: Any) -> Any:
    """A LoRA on all linear maps, of two ranks, every factor random."""
    names = [name for name, child in module.named_modules() if type(child).__name__ in ("Linear", "Conv1D")]
    targets: dict[str, Any] = {"target_modules": "all-linear"}
    if "Moe" in type(module).__name__:  # all-linear has the router too, which jpeft has no adapters for
        targets = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "target_parameters": EXPERTS}
    pattern = {names[1]: 4, names[8]: 1}
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=3, rank_pattern=pattern, **targets)
    adapted: Any = peft.get_peft_model(module, config).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    return adapted


def _torch_logits(module: Any, inputs: dict[str, np.ndarray]) -> np.ndarray:
    with torch.no_grad():
        return module(**{key: torch.from_numpy(array) for key, array in inputs.items()}).logits.numpy()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    dumps, package_name, *only = sys.argv[1:]
    for each in sorted(Path(dumps, package_name).iterdir()):
        if not only or each.name in only:
            print(prove(package_name, each), flush=True)
