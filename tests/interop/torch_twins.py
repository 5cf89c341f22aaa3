"""A torch model with nothing constant in it, and its twin here with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx

from jpeft_interop.models import build, pure
from jpeft_interop.torch_params import params_from_torch


def randomise(model: Any, seed: int = 0) -> Any:
    """Noise on every parameter: biases and norms start out constant."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def twin(model: Any) -> tuple[Callable[..., Any], dict]:
    """`(forward, params)` of a torch model, the forward jitted."""
    forward, _ = pure(module_of(model))
    return jax.jit(forward, static_argnames="output_hidden_states"), params_from_torch(model)


def module_of(model: Any) -> nnx.Module:
    """The same model here, without weights."""
    return nnx.eval_shape(lambda: build(model.config.to_dict(), architecture=type(model).__name__))


def run_torch(model: Any, **inputs: Any) -> Any:
    """The torch model's output on numpy inputs; flags stay flags."""
    tensors = {key: value if isinstance(value, bool) else torch.as_tensor(value) for key, value in inputs.items()}
    with torch.no_grad():
        return model(**tensors)


def difference(ours: Any, theirs: Any, where: Any = None) -> float:
    """The largest difference, over the tokens that `where` keeps."""
    theirs = theirs.detach().float().numpy() if isinstance(theirs, torch.Tensor) else np.asarray(theirs)
    gap = np.abs(np.asarray(ours, np.float32) - theirs)
    return float(gap.max() if where is None else gap[np.asarray(where, bool)].max())
