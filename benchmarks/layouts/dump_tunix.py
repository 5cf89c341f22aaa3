"""Writes small models of Tunix as its own loader makes NNX params of a Hugging Face folder.

    python benchmarks/layouts/environments.py tunix dump_tunix.py OUT

One folder a family under OUT: see dumps.py. The torch logits are those of the transformers of the calling interpreter.
"""

import importlib
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from bare import without_its_init
from dumps import SIZES, randomized, save
from flax import nnx
from safetensors.numpy import load_file, save_file

from jpeft.tree import flatten, replace

without_its_init("tunix")  # its __init__ imports every trainer there is

# Tunix's Llama 3 and Qwen 3 turn by this whatever their config says (apply_rope is never given rope_theta).
THETA = 1_000_000
LLAMA = {
    "hidden_size": SIZES.hidden,
    "num_attention_heads": SIZES.heads,
    "num_key_value_heads": SIZES.kv_heads,
    "head_dim": SIZES.wide_head,
    "intermediate_size": SIZES.ffn,
    "num_hidden_layers": SIZES.layers,
    "vocab_size": SIZES.vocab,
    "max_position_embeddings": SIZES.positions,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "rope_theta": THETA,
    "rms_norm_eps": 1e-5,
    "use_sliding_window": False,
}
TIED = {"tie_word_embeddings": True}
GEMMA = LLAMA | TIED | {"rope_theta": 10_000, "rms_norm_eps": 1e-6, "hidden_activation": "gelu_pytorch_tanh"}
GEMMA2 = GEMMA | {"query_pre_attn_scalar": SIZES.wide_head, "sliding_window": 4}
GEMMA3 = GEMMA2 | {"num_hidden_layers": 7, "rope_theta": THETA, "rope_local_base_freq": 10_000}
MOE = {
    "num_experts": 7,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": SIZES.ffn,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
}
FUSED = {"num_key_value_heads": SIZES.heads}

# family: (Tunix's package, the torch class, its config)
FAMILIES = {
    "llama3": ("llama3", "LlamaForCausalLM", LLAMA),
    "llama3_tied": ("llama3", "LlamaForCausalLM", LLAMA | TIED),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", LLAMA | {"head_dim": SIZES.head}),
    "qwen2_tied": ("qwen2", "Qwen2ForCausalLM", LLAMA | TIED | {"head_dim": SIZES.head}),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", LLAMA),
    "qwen3_tied": ("qwen3", "Qwen3ForCausalLM", LLAMA | TIED),
    "qwen3_moe": ("qwen3", "Qwen3MoeForCausalLM", LLAMA | MOE),
    "gemma": ("gemma", "GemmaForCausalLM", GEMMA),
    "gemma_fused": ("gemma", "GemmaForCausalLM", GEMMA | FUSED),
    "gemma2": ("gemma", "Gemma2ForCausalLM", GEMMA2),
    "gemma3": ("gemma3", "Gemma3ForCausalLM", GEMMA3),
}


def tunix_config(family: str, model_lib: types.ModuleType, config: dict):
    """Tunix's config that means the same as the torch one."""
    shared = {
        "num_layers": config["num_hidden_layers"],
        "embed_dim": config["hidden_size"],
        "hidden_dim": config["intermediate_size"],
        "num_heads": config["num_attention_heads"],
        "head_dim": config["head_dim"],
        "num_kv_heads": config["num_key_value_heads"],
    }
    if family.startswith("gemma3"):
        local, everywhere = config["rope_local_base_freq"], config["rope_theta"]
        own = {"num_embed": config["vocab_size"], "sliding_window_size": config["sliding_window"]}
        own |= {"local_base_frequency": local, "global_base_frequency": everywhere, "param_dtype": jnp.float32}
        return model_lib.ModelConfig(**shared, **own)
    if family.startswith("gemma"):
        return model_lib.ModelConfig(**shared, **_gemma(family == "gemma2", model_lib.AttentionType, config))
    own = {"vocab_size": config["vocab_size"], "rope_theta": config["rope_theta"], "norm_eps": config["rms_norm_eps"]}
    own["weight_tying" if family.startswith("llama3") else "use_tied_embedding"] = config["tie_word_embeddings"]
    if family.endswith("moe"):
        own |= {"num_experts": config["num_experts"], "num_experts_per_tok": config["num_experts_per_tok"]}
    return model_lib.ModelConfig(**shared, **own)


def _gemma(second: bool, kind, config: dict) -> dict:
    every_other = [kind.LOCAL_SLIDING if second and not i % 2 else kind.GLOBAL for i in range(SIZES.layers)]
    return {
        "num_embed": config["vocab_size"],
        "attention_types": tuple(every_other),
        "final_logit_softcap": 30.0 if second else None,
        "attn_logits_soft_cap": 50.0 if second else None,
        "sliding_window_size": config["sliding_window"] if second else None,
        "use_post_attn_norm": second,
        "use_post_ffw_norm": second,
    }


def loader_of(package: str):
    """Tunix's ``create_model_from_safe_tensors`` for a family."""
    name = "params_safetensors" if package.startswith("gemma") else "params"
    return importlib.import_module(f"tunix.models.{package}.{name}").create_model_from_safe_tensors


def flattened(model: nnx.Module) -> dict[str, np.ndarray]:
    """The module's params by path, ``layers/0/attn/q_proj/w``."""
    leaves = nnx.state(model, nnx.Param).flat_state()
    return {"/".join(map(str, path)): np.asarray(leaf.get_value()) for path, leaf in leaves}


def as_gemma_2_names_its_norms(file: Path) -> None:
    """Tunix 0.1.7 knows Gemma 2's norms only: Gemma 1's norm before the MLP has the name of 2's after the attention."""
    before_mlp = ("post_attention_layernorm", "pre_feedforward_layernorm")
    save_file({name.replace(*before_mlp): array for name, array in load_file(file).items()}, file)


def loaded(family: str, model: Any) -> nnx.Module:
    """Tunix's model of a torch one, as its loader makes it."""
    package, _, config = FAMILIES[family]
    model_lib = importlib.import_module(f"tunix.models.{package}.model")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        if family in ("gemma", "gemma_fused"):
            as_gemma_2_names_its_norms(Path(folder) / "model.safetensors")
        return loader_of(package)(folder, tunix_config(family, model_lib, config))


def logits_of(jax_model: Any, tokens: np.ndarray) -> jax.Array:
    """Its logits."""
    length = tokens.shape[1]
    positions = np.broadcast_to(np.arange(length), tokens.shape)
    causal = np.broadcast_to(np.tri(length, dtype=bool), (*tokens.shape, length))
    logits, _ = jax_model(jnp.asarray(tokens), jnp.asarray(positions), None, jnp.asarray(causal))
    return logits


def forward(family: str, model: Any) -> Callable[[Any, dict[str, np.ndarray]], jax.Array]:
    """Tunix's logits of params (nested dicts) and inputs."""
    jax_model = loaded(family, model)

    def run(params: Any, inputs: dict[str, np.ndarray]) -> jax.Array:
        state = nnx.state(jax_model, nnx.Param)
        nnx.update(jax_model, replace(state, flatten(params)))
        return logits_of(jax_model, inputs["input_ids"])

    return run


def dump(family: str, out: Path) -> None:
    """Draws the torch model, has Tunix load what it saves, and saves both with their logits."""
    package, name, config = FAMILIES[family]
    torch_class = getattr(transformers, name)
    model = randomized(torch_class(torch_class.config_class(**config, attn_implementation="eager")))
    tokens = np.random.default_rng(1).integers(3, SIZES.vocab, (2, 9))
    jax_model = loaded(family, model)
    params, logits = flattened(jax_model), logits_of(jax_model, tokens)
    with torch.no_grad():
        torch_logits = model(input_ids=torch.from_numpy(tokens)).logits.numpy()
    save(
        out / family,
        params=params,
        model=model,
        inputs={"input_ids": tokens},
        logits=np.asarray(logits),
        torch_logits=torch_logits,
        made_by=f"google-tunix 0.1.7: tunix.models.{package} create_model_from_safe_tensors",
    )


if __name__ == "__main__":
    for each in sys.argv[2:] or FAMILIES:
        dump(each, Path(sys.argv[1]))
