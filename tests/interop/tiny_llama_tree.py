"""A tiny Llama's weights as torch has them, all its vectors dull, and as a Flax model of another build might."""

from typing import Any

import jax
import ml_dtypes
import numpy as np

LAYERS, WIDTH, HEADS, KV, HEAD, FFN, VOCAB = 3, 24, 6, 2, 4, 40, 61
BF16 = ml_dtypes.bfloat16
SHAPES = {
    "self_attn.q_proj": (HEADS * HEAD, WIDTH),
    "self_attn.k_proj": (KV * HEAD, WIDTH),
    "self_attn.v_proj": (KV * HEAD, WIDTH),
    "self_attn.o_proj": (WIDTH, HEADS * HEAD),
    "mlp.gate_proj": (FFN, WIDTH),
    "mlp.up_proj": (FFN, WIDTH),
    "mlp.down_proj": (WIDTH, FFN),
}


def state_dict(dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Random kernels; norms of ones and biases of zeros, as an untrained model has."""
    generator = np.random.default_rng(0)
    draw = lambda *shape: generator.standard_normal(shape).astype(dtype)
    state = {"model.embed_tokens.weight": draw(VOCAB, WIDTH), "model.norm.weight": np.ones(WIDTH, dtype)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        state |= {f"{at}{name}.weight": draw(*shape) for name, shape in SHAPES.items()}
        state |= {
            f"{at}self_attn.{name}_proj.bias": np.zeros(SHAPES[f"self_attn.{name}_proj"][0], dtype) for name in "qkv"
        }
        state |= {
            f"{at}{name}.weight": np.ones(WIDTH, dtype) for name in ("input_layernorm", "post_attention_layernorm")
        }
    return state


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """(heads * head, ...) as (heads, head, ...), the rotary halves one by one in turn."""
    halves = rows.reshape(heads, 2, HEAD // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(heads, HEAD, *rows.shape[1:])


def stacked(state: dict[str, np.ndarray], axis: int = 0, norms: tuple[str, str] | None = None) -> dict[str, Any]:
    """Stacked layers, heads split, rotary halves interleaved, keys and values as one, gate and up as one."""
    first, second = norms or ("input_layernorm", "post_attention_layernorm")
    at = [{key.split(".", 3)[3]: w for key, w in state.items() if f"layers.{i}." in key} for i in range(LAYERS)]
    stack = lambda make: np.stack([make(layer) for layer in at], axis)
    kernel = lambda rows: np.moveaxis(rows, -1, 0)
    heads = lambda rows: rows.reshape(KV, HEAD, *rows.shape[1:])
    q = {
        "kernel": stack(lambda w: kernel(interleaved(w["self_attn.q_proj.weight"], HEADS))),
        "bias": stack(lambda w: interleaved(w["self_attn.q_proj.bias"], HEADS)),
    }
    pair = lambda w, end, turn: np.stack(
        [turn(interleaved(w[f"self_attn.k_proj.{end}"], KV)), turn(heads(w[f"self_attn.v_proj.{end}"]))]
    )
    kv = {
        "kernel": stack(lambda w: pair(w, "weight", kernel)),
        "bias": stack(lambda w: pair(w, "bias", lambda rows: rows)),
    }
    return {
        "embed": {"embedding": state["model.embed_tokens.weight"]},
        "layers": {
            "attn": {
                "q": q,
                "kv": kv,
                "o": {"kernel": stack(lambda w: w["self_attn.o_proj.weight"].T.reshape(HEADS, HEAD, WIDTH))},
            },
            "mlp": {
                "gate_up": stack(lambda w: np.concatenate([w["mlp.gate_proj.weight"], w["mlp.up_proj.weight"]]).T),
                "down": stack(lambda w: w["mlp.down_proj.weight"].T),
            },
            first: {"scale": stack(lambda w: w["input_layernorm.weight"])},
            second: {"scale": stack(lambda w: w["post_attention_layernorm.weight"])},
        },
        "norm": {"scale": state["model.norm.weight"]},
    }


def cast(tree: Any, dtype: Any = BF16) -> Any:
    """Every array as another dtype."""
    return jax.tree.map(lambda array: array.astype(dtype), tree)
