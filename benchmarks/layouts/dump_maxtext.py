"""Writes small models as MaxText's decoder holds them, layers scanned and not.

    python benchmarks/layouts/environments.py maxtext dump_maxtext.py OUT

MaxText's converters want whole models by name (and its Llama and Mistral ones Meta's files): the weights are placed by
``placed`` below, and the logits show that they are placed right. One folder a family under OUT: see dumps.py.
"""

import importlib
import sys
import tempfile
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from bare import without_its_init
from dumps import SIZES, randomized, save
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

# What MaxText imports and a dense forward pass on CPU does not use: quantisation, TPU kernels, data, clouds.
UNUSED = ("aqt", "qwix", "tokamax", "pathwaysutils", "tensorboardX", "tensorflow", "grain", "google.cloud", "tunix")
UNUSED += ("drjax", "maxtext.trainers", "maxtext.kernels", "maxtext.common.checkpointing")
UNUSED += ("maxtext.multimodal", "maxtext.input_pipeline")


class Unused:
    """Finds a mock for each module of UNUSED."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The spec of a mock, or None for modules that are used."""
        if any(name == each or name.startswith(f"{each}.") for each in UNUSED):
            return ModuleSpec(name, Unused(), is_package=True)  # pyright: ignore[reportArgumentType] a loader by shape
        return None

    def create_module(self, spec: ModuleSpec) -> Any:
        """A mock that passes for a package."""
        module = mock.MagicMock(name=spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: Any) -> None:
        """Nothing to run."""


sys.meta_path.insert(0, Unused)
without_its_init("maxtext")
attention_op: Any = importlib.import_module("maxtext.layers.attention_op")
initializers: Any = importlib.import_module("maxtext.layers.initializers")
pyconfig: Any = importlib.import_module("maxtext.configs.pyconfig")
models: Any = importlib.import_module("maxtext.models.models")
maxtext_utils: Any = importlib.import_module("maxtext.utils.maxtext_utils")
initializers.aqt_tensor.QTensor = attention_op.KVTensor = type("Quantised", (), {})  # asked of each leaf by isinstance
attention_op.tokamax_ring_attention.is_context_parallel_ring_requested.return_value = False
attention_op.ulysses_attention.is_context_parallel_ulysses_requested.return_value = False
attention_op.usp_attention.is_context_parallel_usp_requested.return_value = False

SILU = {"mlp_activations": ["silu", "linear"], "normalization_layer_epsilon": 1e-6}
GELU = SILU | {"mlp_activations": ["gelu", "linear"], "logits_via_embedding": True}
AFTER = {"use_post_attn_norm": True, "use_post_ffw_norm": True}
GEMMA2 = GELU | AFTER | {"final_logits_soft_cap": 30.0, "attn_logits_soft_cap": 50.0, "sliding_window_size": 4}
GEMMA3 = GELU | AFTER | {"sliding_window_size": 4, "local_rope_max_timescale": 10_000, "rope_max_timescale": 1_000_000}
GEMMA3 |= {"model_name": "gemma3-4b", "override_model_config": True, "rope_linear_scaling_factor": 1.0}
INTERLEAVED = {"rope_type": "llama3.1", "rope_use_scale": False}

# family: (the torch class, MaxText's decoder block, its number of layers, MaxText's own options)
FAMILIES = {
    "llama2": ("LlamaForCausalLM", "llama2", 5, SILU),
    "llama31": ("LlamaForCausalLM", "llama2", 5, SILU | INTERLEAVED),
    "mistral": ("MistralForCausalLM", "mistral", 5, SILU),
    "qwen2": ("Qwen2ForCausalLM", "qwen2", 5, SILU | {"attention_bias": True}),
    "qwen3": ("Qwen3ForCausalLM", "qwen3", 5, SILU | {"use_qk_norm": True}),
    "gemma": ("GemmaForCausalLM", "gemma", 5, GELU),
    "gemma2": ("Gemma2ForCausalLM", "gemma2", 8, GEMMA2),
    "gemma3": ("Gemma3ForCausalLM", "gemma3", 13, GEMMA3),
}


def config_of(block: str, layers: int, options: dict, scanned: bool) -> Any:
    """MaxText's config with the sizes of every dump."""
    shared = {
        "run_name": "dump",
        "base_output_directory": tempfile.gettempdir(),  # where nothing is written
        "decoder_block": block,
        "base_emb_dim": SIZES.hidden,
        "base_num_query_heads": SIZES.heads,
        "base_num_kv_heads": SIZES.kv_heads,
        "head_dim": SIZES.wide_head,
        "base_mlp_dim": SIZES.ffn,
        "base_num_decoder_layers": layers,
        "vocab_size": SIZES.vocab,
        "scan_layers": scanned,
        "attention": "dot_product",
        "per_device_batch_size": 2,
        "max_target_length": 9,
        "dtype": "float32",
        "weight_dtype": "float32",
        "matmul_precision": "highest",
        "enable_dropout": False,
        "enable_checkpointing": False,
        "use_multimodal": False,
        "skip_jax_distributed_system": True,
        "log_config": False,
    }
    base = next(iter(sys.modules["maxtext"].__path__))
    return pyconfig.initialize_pydantic(["dump", f"{base}/configs/base.yml"], **(shared | options))


def torch_model(name: str, layers: int) -> Any:
    """The torch model that means the same."""
    torch_class = getattr(transformers, name)
    shared = {
        "hidden_size": SIZES.hidden,
        "num_attention_heads": SIZES.heads,
        "num_key_value_heads": SIZES.kv_heads,
        "head_dim": SIZES.wide_head,
        "intermediate_size": SIZES.ffn,
        "num_hidden_layers": layers,
        "vocab_size": SIZES.vocab,
        "max_position_embeddings": SIZES.positions,
        "rms_norm_eps": 1e-6,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    gemma = {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": SIZES.wide_head, "sliding_window": 4}
    third = {"rope_theta": 1_000_000, "rope_local_base_freq": 10_000}
    own = gemma if name.startswith("Gemma") else {"tie_word_embeddings": False, "sliding_window": None}
    own |= third if name.startswith("Gemma3") else {"rope_theta": 10_000}
    model = randomized(torch_class(torch_class.config_class(**shared, **own, attn_implementation="eager")))
    return _of_short_embedding(model) if name.startswith("Gemma") else model


def _of_short_embedding(model: Any) -> Any:
    """MaxText rounds a tied head to bfloat16, whatever its dtype: here that rounding loses nothing."""
    weight, times = model.model.embed_tokens.weight, SIZES.hidden**0.5
    weight.data = (weight.data * times).bfloat16().float() / times
    return model


def placed(family: str, weights: dict[str, np.ndarray], layers: int, scanned: bool) -> dict[str, np.ndarray]:
    """The torch weights as MaxText's leaves, by path below ``params``."""
    plus = 1 if family.startswith("gemma") else 0  # MaxText multiplies by the scale itself, Gemma of torch by 1 + scale
    embedding = weights["model.embed_tokens.weight"]
    embedding = embedding * np.float32(SIZES.hidden**0.5) if plus else embedding
    leaves = {"token_embedder/embedding": embedding, "decoder/decoder_norm/scale": weights["model.norm.weight"] + plus}
    if not plus:
        leaves["decoder/logits_dense/kernel"] = weights["lm_head.weight"].T
    each = [_layer(family, weights, i) for i in range(layers)]
    return leaves | {f"decoder/{path}": leaf for path, leaf in _stacks(family, each, scanned).items()}


def _layer(family: str, weights: dict[str, np.ndarray], i: int) -> dict[str, np.ndarray]:
    layer = {k.removeprefix(f"model.layers.{i}."): v for k, v in weights.items() if f".layers.{i}." in k}
    return _attention(family, layer) | _mlp(layer) | _norms(family, layer)


def _attention(family: str, layer: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    # Llama, Mistral, Gemma 1 and 2 do not divide the scores by sqrt(head): the query kernel is divided.
    divided = family in ("llama2", "llama31", "mistral", "gemma", "gemma2")
    turn = _interleaved if family == "llama31" else lambda kernel: kernel
    heads = lambda name: layer[f"self_attn.{name}_proj.weight"].T.reshape(SIZES.hidden, -1, SIZES.wide_head)
    leaves = {
        "query/kernel": turn(heads("q")) * np.float32(SIZES.wide_head**-0.5 if divided else 1),
        "key/kernel": turn(heads("k")),
        "value/kernel": heads("v"),
        "out/kernel": layer["self_attn.o_proj.weight"].T.reshape(SIZES.heads, SIZES.wide_head, SIZES.hidden),
    }
    biases = {"query/bias": "q", "key/bias": "k", "value/bias": "v"} if family == "qwen2" else {}
    leaves |= {ours: layer[f"self_attn.{n}_proj.bias"].reshape(-1, SIZES.wide_head) for ours, n in biases.items()}
    return {f"self_attention/{path}": leaf for path, leaf in leaves.items()}


def _interleaved(kernel: np.ndarray) -> np.ndarray:
    """The two halves of each head's outputs, (a0 a1 … b0 b1 …), as pairs, (a0 b0 a1 b1 …)."""
    return kernel.reshape(*kernel.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(kernel.shape)


def _mlp(layer: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = {"wi_0": "gate_proj", "wi_1": "up_proj", "wo": "down_proj"}
    return {f"mlp/{ours}/kernel": layer[f"mlp.{theirs}.weight"].T for ours, theirs in names.items()}


def _norms(family: str, layer: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    qk = {"self_attention/query_norm": "self_attn.q_norm", "self_attention/key_norm": "self_attn.k_norm"}
    if not family.startswith("gemma"):
        names = {"pre_self_attention_layer_norm": "input_layernorm"}
        names |= {"post_self_attention_layer_norm": "post_attention_layernorm"} | (qk if family == "qwen3" else {})
        return {f"{ours}/scale": layer[f"{theirs}.weight"] for ours, theirs in names.items()}
    names = {"pre_self_attention_norm": "input_layernorm", "pre_ffw_norm": "post_attention_layernorm"}
    if family != "gemma":
        names |= {"pre_ffw_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
        names |= {"post_self_attention_norm": "post_attention_layernorm"} | (qk if family == "gemma3" else {})
    return {f"{ours}/scale": layer[f"{theirs}.weight"] + 1 for ours, theirs in names.items()}


def _stacks(family: str, layers: list[dict[str, np.ndarray]], scanned: bool) -> dict[str, np.ndarray]:
    """The layers under the names that MaxText gives them, stacked on axis 1 where it scans."""
    if family == "gemma2":  # one block of MaxText is two layers, local then global
        pairs = zip(layers[::2], layers[1::2], strict=True)
        blocks = [_suffixed(a, "local") | _suffixed(b, "global") for a, b in pairs]
        return _stacked("layers", blocks) if scanned else _numbered("layers", blocks)
    if family == "gemma3" and scanned:  # one block is six layers; what is left over is not scanned
        full = len(layers) // 6 * 6
        blocks = [_numbered("layers", layers[i : i + 6]) for i in range(0, full, 6)]
        return _stacked("layers", blocks) | _numbered("layers_remainder/layers", layers[full:])
    return _stacked("layers", layers) if scanned else _numbered("layers", layers)


def _suffixed(layer: dict[str, np.ndarray], suffix: str) -> dict[str, np.ndarray]:
    return {f"{path.split('/')[0]}_{suffix}/{path.split('/', 1)[1]}": leaf for path, leaf in layer.items()}


def _numbered(name: str, layers: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {f"{name}_{i}/{path}": leaf for i, layer in enumerate(layers) for path, leaf in layer.items()}


def _stacked(name: str, layers: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {f"{name}/{path}": np.stack([layer[path] for layer in layers], axis=1) for path in layers[0]}


class Maxtext:
    """MaxText's model of a family."""

    def __init__(self, family: str, scanned: bool) -> None:
        _, block, layers, options = FAMILIES[family]
        blocks = layers // 2 if family == "gemma2" else layers  # its blocks are pairs, and its config counts blocks
        config = config_of(block, blocks, options, scanned)
        self.mesh = jax.sharding.Mesh(maxtext_utils.create_device_mesh(config), config.mesh_axes)
        self.model = models.transformer_as_linen(config, self.mesh, quant=None)
        self.rngs = {name: jax.random.key(0) for name in ("params", "dropout", "aqt")}

    def inputs(self, tokens: np.ndarray) -> dict[str, Any]:
        """Its arguments for these tokens."""
        inputs = {"decoder_input_tokens": jnp.asarray(tokens), "decoder_positions": jnp.tile(jnp.arange(9), (2, 1))}
        return inputs | {"decoder_segment_ids": jnp.ones((2, 9), jnp.int32), "enable_dropout": False}

    def tree(self, tokens: np.ndarray) -> Any:
        """The shapes of its own params."""
        with jax.set_mesh(self.mesh):
            own = jax.eval_shape(lambda: self.model.init(self.rngs, **self.inputs(tokens)))
        return nn.unbox(own)["params"]

    def logits(self, params: Any, tokens: np.ndarray) -> jax.Array:
        """Its logits of `{"params": …}`."""
        with jax.set_mesh(self.mesh):
            return self.model.apply(params, rngs=self.rngs, **self.inputs(tokens))


def forward(family: str, model: Any) -> Callable[[Any, dict[str, np.ndarray]], jax.Array]:
    """MaxText's logits of params (nested dicts) and inputs."""
    maxtext = Maxtext(family.removesuffix("_unscanned"), not family.endswith("_unscanned"))
    return lambda params, inputs: maxtext.logits(params, inputs["input_ids"])


def dump(family: str, scanned: bool, out: Path) -> None:
    """Draws the torch model, places its weights in MaxText's tree, and saves both with their logits."""
    name, _, layers, _ = FAMILIES[family]
    model = torch_model(name, layers)
    leaves = placed(family, {k: v.numpy() for k, v in model.state_dict().items()}, layers, scanned)
    tokens = np.random.default_rng(1).integers(3, SIZES.vocab, (2, 9))
    maxtext = Maxtext(family, scanned)
    _same_shapes(family, flatten_dict(maxtext.tree(tokens), sep="/"), leaves)
    params = unflatten_dict({tuple(path.split("/")): jnp.asarray(leaf) for path, leaf in leaves.items()})
    logits = maxtext.logits({"params": params}, tokens)
    with torch.no_grad():
        torch_logits = model(input_ids=torch.from_numpy(tokens)).logits.numpy()
    save(
        out / (family if scanned else f"{family}_unscanned"),
        params={f"params/{path}": leaf for path, leaf in leaves.items()},
        model=model,
        inputs={"input_ids": tokens},
        logits=np.asarray(logits),
        torch_logits=torch_logits,
        made_by="maxtext 0.2.5: transformer_as_linen, weights placed by dump_maxtext.py",
    )


def _same_shapes(family: str, own: dict[str, Any], leaves: dict[str, np.ndarray]) -> None:
    expected, found = ({path: tuple(leaf.shape) for path, leaf in tree.items()} for tree in (own, leaves))
    if expected != found:
        differ = {path: (expected.get(path), found.get(path)) for path in expected | found}
        differ = {path: pair for path, pair in differ.items() if pair[0] != pair[1]}
        raise ValueError(f"{family}: the model's own tree differs (its shape, ours): {differ}")


if __name__ == "__main__":
    for each in sys.argv[2:] or FAMILIES:
        for scan in (True, False):
            dump(each, scan, Path(sys.argv[1]))
