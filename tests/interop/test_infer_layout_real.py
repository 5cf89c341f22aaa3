"""infer_layout on real weights: as they are loaded, and as a stacked model of other axes would hold them."""

import numpy as np

from jpeft.tree import flatten
from jpeft_interop.infer import infer_layout
from jpeft_interop.packaged import minilm_folder, smollm2_folder
from jpeft_interop.weights import read_weights

HEADS, KV, HEAD, LAYERS = 9, 3, 64, 30


def stacked_smollm2(weights) -> dict[str, np.ndarray]:
    """Layers on axis 1, heads split, rotary halves of queries and keys interleaved, gate and up as one, in bfloat16."""
    import ml_dtypes

    get = lambda key: weights[key].astype(ml_dtypes.bfloat16)
    stack = lambda name, turn: np.stack([turn(get(f"model.layers.{i}.{name}.weight")) for i in range(LAYERS)], 1)
    rope = lambda heads: lambda w: w.reshape(heads, 2, HEAD // 2, -1).transpose(3, 0, 2, 1).reshape(-1, heads, HEAD)
    pair = lambda name, other: np.concatenate([stack(name, np.transpose), stack(other, np.transpose)], -1)
    padding = np.zeros((64, 576), ml_dtypes.bfloat16)
    return {
        "embed": np.concatenate([get("model.embed_tokens.weight"), padding]),
        "norm": get("model.norm.weight"),
        "layers/q": stack("self_attn.q_proj", rope(HEADS)),
        "layers/k": stack("self_attn.k_proj", rope(KV)),
        "layers/v": stack("self_attn.v_proj", lambda w: w.reshape(KV, HEAD, -1).transpose(2, 0, 1)),
        "layers/o": stack("self_attn.o_proj", lambda w: w.T.reshape(HEADS, HEAD, -1)),
        "layers/gate_up": pair("mlp.gate_proj", "mlp.up_proj"),
        "layers/down": stack("mlp.down_proj", np.transpose),
        "layers/norm_1": stack("input_layernorm", lambda w: w),
        "layers/norm_2": stack("post_attention_layernorm", lambda w: w),
    }


def test_smollm2_stacked_fused_padded_and_rounded():
    weights = read_weights(smollm2_folder())
    params = stacked_smollm2(weights)
    layout = infer_layout(params, smollm2_folder(), progress=False)
    assert layout["layers/q"].axes == "d l n (half two)" and layout["layers/q"].torch[0].axes == "(n two half) d"
    assert layout["layers/gate_up"].axes == "d l (gate + up)" and layout["embed"].axes.endswith("+ 64) d")
    for key in ("model.layers.7.self_attn.k_proj.weight", "model.layers.29.mlp.up_proj.weight"):
        assert np.array_equal(layout.tensor(key, params), weights[key].astype(params["embed"].dtype))


def test_minilm_as_loaded():
    from jpeft_interop import load_model

    _, params = load_model(minilm_folder())
    layout = infer_layout(params, minilm_folder(), progress=False)
    weights = read_weights(minilm_folder())
    assert set(layout) == set(flatten(params)) and len(layout) > 100
    key = "encoder.layer.3.attention.self.query.weight"
    assert np.array_equal(layout.tensor(key, flatten(params)), weights[key])
