"""A torch model with nothing constant in it, and its twin here with the same weights."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import torch
from jpeft_interop.models import build, family, pure
from flax import nnx


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Noise on every parameter: biases and norms start out constant."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def params_of(model: torch.nn.Module) -> dict:
    known = family(model.config.model_type)
    params: dict = {}
    for name, parameter in model.named_parameters():
        *modules, leaf = name.split(".")
        array, owner = jnp.asarray(parameter.detach().float().numpy()), model.get_submodule(".".join(modules))
        if isinstance(owner, torch.nn.Embedding):
            leaf = "embedding"
        elif isinstance(owner, torch.nn.Linear) and leaf == "weight":
            leaf, array = "kernel", array.T
        elif leaf == "weight" and modules[-1] in known.conv1d:
            leaf = "kernel"
        inner = params
        for key in modules:
            inner = inner.setdefault(key, {})
        inner[leaf] = array.astype(str(parameter.dtype).removeprefix("torch."))
    return params


def twin(model: torch.nn.Module):
    """`(forward, params)` of a torch model."""
    name = type(model).__name__
    module = nnx.eval_shape(lambda: build(model.config.to_dict(), architecture=name))
    return pure(module)[0], params_of(model)


def run_torch(model: torch.nn.Module, **inputs):
    with torch.no_grad():
        return model(**{key: torch.as_tensor(np.asarray(value)) if not isinstance(value, bool) else value for key, value in inputs.items()})


def difference(ours, theirs, where=None) -> float:
    """The largest difference, over the tokens that `where` keeps."""
    gap = np.abs(np.asarray(ours, np.float32) - theirs.detach().float().numpy())
    return float(gap.max() if where is None else gap[np.asarray(where, bool)].max())
