"""Writes small Gemma models as google/gemma's Linen ``Transformer`` holds them.

    python benchmarks/layouts/environments.py gemma dump_gemma.py OUT

The package has no loader of Hugging Face folders: the weights are placed by ``placed`` below, and the logits show that
they are placed right. One folder a family under OUT: see dumps.py.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from bare import stand_in, without_its_init
from dumps import SIZES, randomized, save
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

without_its_init("gemma", "gemma.gm", "gemma.gm.nn", "gemma.gm.text", "gemma.gm.utils", "gemma.gm.math")
without_its_init("gemma.gm.vision", "gemma.multimodal")
# Kauldron (a trainer; with it come clu and TensorFlow) gives the model files types and an identity layer to watch.
stand_in("kauldron", "kauldron.kd", "kauldron.typing", "kauldron.kontext", "kauldron.utils")
stand_in("gemma.gm.text._tokenizer", "gemma.gm.data", "gemma.gm.data._functional")


class Identity(nn.Module):
    """What Kauldron's identity layer is to the forward pass."""

    def __call__(self, x):
        """x."""
        return x


def array_type(name: str) -> type:
    """Kauldron's ``Float["*B L"]``, which the model reads to tell batch axes from others."""

    class Typed:
        def __class_getitem__(cls, dims: str):
            return getattr(import_module("jaxtyping"), name)[jax.Array, dims]

    return Typed


kauldron = sys.modules["kauldron"]
kauldron.kd.nn.Identity = Identity
kauldron.kontext.Key, kauldron.kontext.REQUIRED = str, "required"
kauldron.typing.typechecked = lambda function: function
for each in ("Int", "Float", "Bool", "UInt8"):
    setattr(kauldron.typing, each, array_type(each))

_config, _modules, _transformer = (import_module(f"gemma.gm.nn.{n}") for n in ("_config", "_modules", "_transformer"))

GLOBAL, LOCAL = _modules.AttentionType.GLOBAL, _modules.AttentionType.LOCAL_SLIDING
FIRST = {"use_post_attn_norm": False, "use_post_ffw_norm": False, "attention_types": (GLOBAL,) * SIZES.layers}
SECOND = {
    "use_post_attn_norm": True,
    "use_post_ffw_norm": True,
    "attention_types": (LOCAL, GLOBAL, LOCAL, GLOBAL, LOCAL),
    "final_logit_softcap": 30.0,
    "attn_logits_soft_cap": 50.0,
    "sliding_window_size": 4,
}
THIRD = {
    **SECOND,
    "attention_types": (LOCAL,) * 5 + (GLOBAL, LOCAL),
    "final_logit_softcap": None,
    "attn_logits_soft_cap": None,
    "use_qk_norm": True,
    "transpose_gating_einsum": True,
    "local_base_frequency": 10_000,
    "global_base_frequency": 1_000_000,
}

# family: (the torch class, google/gemma's config)
FAMILIES = {
    "gemma1": ("GemmaForCausalLM", FIRST),
    "gemma1_fused": ("GemmaForCausalLM", FIRST | {"num_kv_heads": SIZES.heads}),
    "gemma2": ("Gemma2ForCausalLM", SECOND),
    "gemma2_transposed": ("Gemma2ForCausalLM", SECOND | {"transpose_gating_einsum": True}),
    "gemma3": ("Gemma3ForCausalLM", THIRD),
}


def config_of(own: dict) -> Any:
    """google/gemma's config with the sizes of every dump."""
    shared = {
        "num_embed": SIZES.vocab,
        "embed_dim": SIZES.hidden,
        "hidden_dim": SIZES.ffn,
        "num_heads": SIZES.heads,
        "num_kv_heads": SIZES.kv_heads,
        "head_dim": SIZES.wide_head,
        "final_logit_softcap": None,
    }
    return _config.TransformerConfig(**(shared | own))


def torch_model(name: str, config: Any) -> Any:
    """The torch model that means the same."""
    torch_class = getattr(transformers, name)
    own = {
        "query_pre_attn_scalar": config.head_dim,
        "sliding_window": config.sliding_window_size,
        "rope_theta": config.global_base_frequency,
        "rope_local_base_freq": config.local_base_frequency,
    }
    shared = {
        "hidden_size": config.embed_dim,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.num_layers,
        "vocab_size": config.num_embed,
        "max_position_embeddings": SIZES.positions,
        "hidden_activation": "gelu_pytorch_tanh",
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    own = {} if name == "GemmaForCausalLM" else own
    return randomized(torch_class(torch_class.config_class(**shared, **own, attn_implementation="eager")))


def placed(torch_weights: dict[str, np.ndarray], config: Any) -> dict[str, np.ndarray]:
    """The torch weights as google/gemma's leaves, by path."""
    leaves = {"embedder/input_embedding": torch_weights["model.embed_tokens.weight"]}
    leaves["final_norm/scale"] = torch_weights["model.norm.weight"]
    for i in range(config.num_layers):
        layer = {k.removeprefix(f"model.layers.{i}."): v for k, v in torch_weights.items() if f".layers.{i}." in k}
        parts = _attention(layer, config) | _mlp(layer, config) | _norms(layer, config)
        leaves |= {f"layer_{i}/{path}": leaf for path, leaf in parts.items()}
    return leaves


def _attention(layer: dict[str, np.ndarray], config: Any) -> dict[str, np.ndarray]:
    by_head = lambda name: _heads(layer[f"self_attn.{name}_proj.weight"], config.head_dim)
    q, k, v = by_head("q"), by_head("k"), by_head("v")
    out = layer["self_attn.o_proj.weight"].T.reshape(config.num_heads, config.head_dim, config.embed_dim)
    if config.num_heads == config.num_kv_heads:
        return {"attn/qkv_einsum/w": np.stack([q, k, v]), "attn/attn_vec_einsum/w": out}
    return {"attn/q_einsum/w": q, "attn/kv_einsum/w": np.stack([k, v]), "attn/attn_vec_einsum/w": out}


def _heads(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """(heads * head_dim, d) -> (heads, d, head_dim)."""
    return weight.reshape(-1, head_dim, weight.shape[1]).swapaxes(1, 2)


def _mlp(layer: dict[str, np.ndarray], config: Any) -> dict[str, np.ndarray]:
    gate_up = np.stack([layer["mlp.gate_proj.weight"], layer["mlp.up_proj.weight"]])
    gating = gate_up if config.transpose_gating_einsum else gate_up.swapaxes(1, 2)
    return {"mlp/gating_einsum": gating, "mlp/linear": layer["mlp.down_proj.weight"].T}


def _norms(layer: dict[str, np.ndarray], config: Any) -> dict[str, np.ndarray]:
    after = "pre_feedforward_layernorm" if config.use_post_attn_norm else "post_attention_layernorm"
    names = {"pre_attention_norm": "input_layernorm", "pre_ffw_norm": after}
    if config.use_post_attn_norm:
        names |= {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
    if config.use_qk_norm:
        names |= {"attn/_query_norm": "self_attn.q_norm", "attn/_key_norm": "self_attn.k_norm"}
    return {f"{ours}/scale": layer[f"{theirs}.weight"] for ours, theirs in names.items()}


def forward(family: str, model: Any) -> Callable[[Any, dict[str, np.ndarray]], jax.Array]:
    """The Linen model's logits of params (nested dicts) and inputs."""
    linen = _transformer.Transformer(config=config_of(FAMILIES[family][1]), dtype=jnp.float32)
    return lambda params, inputs: linen.apply({"params": params}, jnp.asarray(inputs["input_ids"])).logits


def dump(family: str, out: Path) -> None:
    """Draws the torch model, places its weights in the Linen tree, and saves both with their logits."""
    name, own = FAMILIES[family]
    config = config_of(own)
    model = torch_model(name, config)
    leaves = placed({k: v.numpy() for k, v in model.state_dict().items()}, config)
    tokens = np.random.default_rng(1).integers(3, SIZES.vocab, (2, 9))
    linen = _transformer.Transformer(config=config, dtype=jnp.float32)
    own_tree = jax.eval_shape(lambda: linen.init(jax.random.key(0), jnp.asarray(tokens)))["params"]
    expected = jax.tree.map(jnp.shape, flatten_dict(own_tree, sep="/"))
    if expected != {path: leaf.shape for path, leaf in leaves.items()}:
        raise ValueError(f"{family}: the model's own tree is {expected}")
    params = {"params": unflatten_dict({tuple(path.split("/")): leaf for path, leaf in leaves.items()})}
    logits = linen.apply(params, jnp.asarray(tokens)).logits
    with torch.no_grad():
        torch_logits = model(input_ids=torch.from_numpy(tokens)).logits.numpy()
    save(
        out / family,
        params=leaves,
        model=model,
        inputs={"input_ids": tokens},
        logits=np.asarray(logits),
        torch_logits=torch_logits,
        made_by="gemma 3.3.0: gemma.gm.nn Transformer, weights placed by dump_gemma.py",
    )


if __name__ == "__main__":
    for each in sys.argv[2:] or FAMILIES:
        dump(each, Path(sys.argv[1]))
