"""Mixtral and Qwen3-MoE against torch: random weights, hidden states and logits, fp32; their experts in files."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file

import decoder_checks as checks
import jpeft
from jpeft.errors import WeightsError
from jpeft_interop import save_peft
from jpeft_interop.load_model import load_model, read_config
from jpeft_interop.merge_folder import merge_folder
from jpeft_interop.models import ModelError, build
from jpeft_interop.models.llama_config import read_llama
from jpeft_interop.models.moe import Router
from jpeft_interop.save_model import save_model
from jpeft_interop.torch_params import params_from_torch
from torch_twins import difference, run_torch, twin

QWEN = dict(num_experts=5, num_experts_per_tok=3, moe_intermediate_size=24)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": 4}),
    "mixtral, one each": ("MixtralForCausalLM", {"num_local_experts": 3, "num_experts_per_tok": 1}),
    "mixtral, all, window": (
        "MixtralForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 4, "sliding_window": 3, "head_dim": 12},
    ),
    "mixtral, base": ("MixtralModel", {"num_local_experts": 4, "hidden_act": "gelu"}),
    "qwen": ("Qwen3MoeForCausalLM", QWEN),
    "qwen, normalised, tied": ("Qwen3MoeForCausalLM", QWEN | {"norm_topk_prob": True, "tie_word_embeddings": True}),
    "qwen, some layers": ("Qwen3MoeForCausalLM", QWEN | {"mlp_only_layers": [2], "num_hidden_layers": 3}),
    "qwen, every other layer": ("Qwen3MoeForCausalLM", QWEN | {"decoder_sparse_step": 2, "num_hidden_layers": 3}),
    "qwen, window, biases": (
        "Qwen3MoeForCausalLM",
        QWEN | {"use_sliding_window": True, "sliding_window": 3, "attention_bias": True},
    ),
    "qwen, base": ("Qwen3MoeModel", QWEN),
}
EXPERTS = "model.layers.1.block_sparse_moe.experts"


def model_of(row: str) -> Any:
    name, options = MODELS[row]
    return checks.model_of(name, f"{name.removesuffix('ForCausalLM').removesuffix('Model')}Config", **options)


@pytest.mark.parametrize("row", MODELS)
def test_hidden_states_and_logits_equal_torch(row: str):
    checks.assert_torchs(model_of(row))


@pytest.mark.parametrize("row", ["mixtral, all, window", "qwen, some layers"])
def test_cached_forward_equals_the_whole_one(row: str):
    checks.assert_same_with_a_cache(model_of(row))


@pytest.mark.parametrize("row", ["mixtral", "qwen"])
def test_generation_equals_transformers(row: str):
    checks.assert_generates(model_of(row))


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
def test_classification(kind: str):
    model = checks.model_of(f"{kind}ForSequenceClassification", f"{kind}Config", num_labels=3, num_experts_per_tok=2)
    checks.assert_classifies(model)


@pytest.mark.parametrize("row", ["mixtral", "qwen, some layers"])
def test_folders_there_and_back(row: str, tmp_path: Path):
    checks.assert_there_and_back(model_of(row), tmp_path)


@pytest.mark.parametrize("row", ["mixtral", "qwen"])
def test_gradients_of_experts_and_router_equal_torchs(row: str):
    model = model_of(row)
    forward, params = twin(model)
    ids = torch.as_tensor(checks.ids_of())
    model(input_ids=ids, labels=ids).loss.backward()

    def loss(params: Any) -> Any:
        logits = jax.nn.log_softmax(forward(params, checks.ids_of()).logits[:, :-1])
        return -jnp.mean(jnp.take_along_axis(logits, checks.ids_of()[:, 1:, None], axis=-1))

    ours, theirs = jax.jit(jax.grad(loss))(params)["model"]["layers"]["0"]["mlp"], model.model.layers[0].mlp
    for mine, torchs in (
        (ours["experts"]["gate_up_proj"], theirs.experts.gate_up_proj.grad),
        (ours["experts"]["down_proj"], theirs.experts.down_proj.grad),
        (ours["gate"]["weight"], theirs.gate.weight.grad),
    ):
        assert difference(mine, torchs) < checks.TOLERANCE < float(torchs.abs().max())


def test_several_sets_of_params_at_once():
    forward, params = twin(model_of("mixtral"))
    several = jax.tree.map(lambda x: jnp.stack((x, 2 * x)), params)
    both = jax.jit(jax.vmap(forward, in_axes=(0, None)))(several, checks.ids_of()).logits
    for number, scale in enumerate((1, 2)):
        alone = forward(jax.tree.map(lambda x, scale=scale: scale * x, params), checks.ids_of()).logits
        np.testing.assert_allclose(both[number], alone, atol=1e-5 * scale**2)


def saved(folder: Path) -> Any:
    model = model_of("mixtral")
    model.save_pretrained(folder)
    return model


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors")


def test_a_file_that_holds_the_stacks_whole(tmp_path: Path):
    model = saved(tmp_path)
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, tmp_path / "model.safetensors")
    checks.assert_same_tree(load_model(tmp_path)[1], params_from_torch(model))


def test_parts_in_several_shards(tmp_path: Path):
    model = model_of("mixtral")
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    _, params = load_model(tmp_path / "theirs")
    checks.assert_same_tree(params, params_from_torch(model))
    save_model(tmp_path / "ours", params, read_config(tmp_path / "theirs"), max_shard_bytes=20_000)
    checks.assert_same_tree(load_model(tmp_path / "ours")[1], params)


def test_ten_experts_keep_their_order(tmp_path: Path):
    model = checks.model_of("MixtralModel", "MixtralConfig", num_local_experts=12, num_hidden_layers=1)
    model.save_pretrained(tmp_path)
    checks.assert_same_tree(load_model(tmp_path)[1], params_from_torch(model))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{EXPERTS}.2.w3.weight"), r"experts.gate_up_proj' lacks matrix 2 of 2 of expert 2; 7 of 8"),
        (lambda t: t.update({f"{EXPERTS}.1.w2.weight": torch.zeros(48, 32)}), r"expected float32 \(32, 48\) as "),
        (lambda t: t.update({f"{EXPERTS}.1.w2.weight": torch.zeros(32, 48).half()}), "found float16"),
        (lambda t: t.update({f"{EXPERTS}.down_proj": torch.zeros(4, 32, 48)}), "which is there, too"),
        (lambda t: [t.pop(f"{EXPERTS}.3.w{n}.weight") for n in (1, 2, 3)], r"makes it \(4, 32, 48\), found \(3, 32"),
        (lambda t: t.update({f"{EXPERTS}.1.w4.weight": torch.zeros(2)}), "w4.weight' found, for which"),
    ],
)
def test_parts_that_do_not_fit_are_named(tmp_path: Path, change: Any, words: str):
    saved(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(WeightsError, match=words):
        load_model(tmp_path, dtype=jnp.float32)


def test_a_merged_folder_keeps_its_experts_apart(tmp_path: Path, key: Any):
    model = saved(tmp_path / "base")
    params = params_from_torch(model)
    adapter = jpeft.init(key, jpeft.LoRA(rank=2, targets=["q_proj", "v_proj"]), params)
    adapter = adapter.replace(trained=jax.tree.map(lambda x: x + 0.1, adapter.trained))
    save_peft(tmp_path / "adapter", adapter, params=params)
    merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    before, after = (load_file(tmp_path / side / "model.safetensors") for side in ("base", "merged"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "q_proj" in name or "v_proj" in name}


def test_adapters_of_stacked_experts_run_factored(key: Any):
    model = model_of("mixtral")
    forward, params = twin(model)
    spec = jpeft.LoRA(rank=2, targets=["experts/gate_up_proj", "experts/down_proj"])
    adapter = jpeft.init(key, spec, params, kernels=jpeft.kernels(forward, params, checks.ids_of()))
    adapter = adapter.replace(trained=jax.tree.map(lambda x: x + 0.05, adapter.trained))
    ours = jax.jit(jpeft.lift(forward))(jpeft.attach(params, adapter), checks.ids_of()).logits
    merged = forward(jpeft.merge(params, adapter), checks.ids_of()).logits
    assert difference(ours, merged) < checks.TOLERANCE
    assert difference(ours, run_torch(model, input_ids=checks.ids_of()).logits) > 1e-3


@pytest.mark.parametrize(("row", "dtype"), [("mixtral", torch.float32), ("qwen", torch.bfloat16)])
def test_routers_weigh_in_torchs_dtype(row: str, dtype: torch.dtype):
    half = model_of(row).to(torch.bfloat16)
    gate = half.model.layers[0].mlp.gate
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    _, weights, experts = gate(x)
    config = read_llama(half.config.to_dict())
    assert config.mixture is not None
    router = Router(config, config.mixture, jnp.bfloat16, nnx.Rngs(0))
    router.weight[...] = jnp.asarray(gate.weight.detach().float().numpy(), jnp.bfloat16)
    ours, chosen = router(jnp.asarray(x.float().numpy(), jnp.bfloat16))
    assert weights.dtype == dtype
    assert str(ours.dtype) == str(dtype).removeprefix("torch.")
    assert np.array_equal(chosen, experts.numpy())
    assert difference(ours, weights) < 1e-2


def test_more_choices_than_experts_are_refused():
    config = {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 3} | checks.SIZES
    with pytest.raises(ModelError, match="from 1 to the 2 experts; found 3"):
        nnx.eval_shape(lambda: build(config, architecture="MixtralModel"))
