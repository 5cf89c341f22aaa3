"""A dump: one model's weights as torch names them and as a JAX package holds them, proven to mean the same.

A folder of

- ``params.safetensors``: the JAX leaves by path, ``a/b/kernel``, as the package's own loader made them;
- ``torch.safetensors``: the same weights by their names in the torch module, a tied one (the head) left out;
- ``config.json``: of the torch model;
- ``logits.safetensors``: the inputs, and ``logits`` of the JAX model and ``torch_logits`` of the torch one on them;
- ``dump.json``: who made it, the torch names tied to others, and how far the two logits are apart.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.numpy import save_file


class Sizes(NamedTuple):
    """The sizes of every family: pairwise different, so are the products of heads and their size."""

    layers: int = 5
    hidden: int = 24
    heads: int = 6
    kv_heads: int = 3
    head: int = 4
    wide_head: int = 10  # where the head's size need not be hidden / heads: q has 60 outputs, k and v 30
    ffn: int = 44
    vocab: int = 61
    positions: int = 32


SIZES = Sizes()


def randomized(model: Any, seed: int = 0) -> Any:  # of a torch Module pyright holds every attribute for a Tensor
    """The torch model in evaluation, each parameter redrawn: no norm of ones and no bias of zeros hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tied(model: torch.nn.Module) -> dict[str, str]:
    """The names whose parameter has another name too, to that first name."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first.setdefault(id(parameter), name)
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in every if first[id(parameter)] != name}


def save(
    folder: Path,
    *,
    params: dict[str, np.ndarray],
    model: Any,
    inputs: dict[str, np.ndarray],
    logits: np.ndarray,
    torch_logits: np.ndarray,
    made_by: str,
) -> None:
    """Writes a dump and says how far the two logits are apart.

    Raises:
        ValueError: They are further apart than fp32 explains: the params do not mean the same.
    """
    apart = float(np.abs(logits - torch_logits).max())
    print(f"{folder.name}: {len(params)} leaves, logits up to {np.abs(torch_logits).max():.3g}, {apart:.2g} apart")
    if not apart < 1e-4:
        raise ValueError(f"{folder.name}: the logits of the JAX and the torch model are {apart} apart")
    folder.mkdir(parents=True, exist_ok=True)
    names = tied(model)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items() if name not in names}
    save_file({k: np.ascontiguousarray(v) for k, v in params.items()}, folder / "params.safetensors")
    save_file({k: np.ascontiguousarray(v) for k, v in state.items()}, folder / "torch.safetensors")
    both = {**inputs, "logits": logits, "torch_logits": torch_logits}
    save_file({k: np.ascontiguousarray(v) for k, v in both.items()}, folder / "logits.safetensors")
    (folder / "config.json").write_text(model.config.to_json_string())
    about = {"made_by": made_by, "torch_class": type(model).__name__, "tied": names, "logits_apart": apart}
    (folder / "dump.json").write_text(json.dumps(about, indent=1) + "\n")
