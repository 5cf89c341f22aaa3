"""A model from its config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jpeft_interop.models.errors import ModelError
from jpeft_interop.models.families import family


def build(
    config: Mapping[str, Any],
    dtype: DTypeLike | None = None,
    architecture: str | None = None,
    *,
    rngs: nnx.Rngs | None = None,
) -> nnx.Module:
    """The model that `config` describes, with random weights; under `nnx.eval_shape`, without any.

    Args:
      config: `config.json` as a dict, or `PretrainedConfig.to_dict()`.
      dtype: the params' dtype, float32 by default. Products run in it; norms and softmax in fp32.
      architecture: torch's class name (`LlamaForCausalLM`); by default the first in the config's `architectures`.
      rngs: where the random weights come from, `nnx.Rngs(0)` by default.

    Raises:
      ModelError: a family, class or setting that is not here; the message lists those that are.

    Example:
      >>> sizes = dict(vocab_size=7, hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
      >>> model = nnx.eval_shape(lambda: build({"model_type": "llama", **sizes}, architecture="LlamaForCausalLM"))
      >>> model.lm_head.kernel.shape
      (4, 7)
    """
    known = family(config.get("model_type"))
    architecture = architecture or next(iter(config.get("architectures") or ()), None)
    if architecture is None:
        names = ", ".join(name for name, _ in known.architectures)
        raise ModelError(f"the config names no architecture; pass one: build(config, architecture=…) of {names}")
    return known.make(config, architecture, jnp.dtype(dtype or jnp.float32), rngs or nnx.Rngs(0))
