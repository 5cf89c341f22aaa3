"""The Llama family against torch: random weights, logits and hidden states, fp32."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from jpeft_interop.models import ModelError, build, family, init_cache, pure
from jpeft_interop.torch_params import params_from_torch
from torch_twins import difference, module_of, randomise, run_torch, twin

SIZES = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
TOLERANCE = 1e-5


def model_of(name: str, **options) -> Any:
    kind = next(kind for kind in ("Llama", "Mistral", "Qwen2") if name.startswith(kind))
    config = getattr(transformers, f"{kind}Config")(**(SIZES | {"num_key_value_heads": 2} | options))
    torch.manual_seed(0)
    return randomise(getattr(transformers, name)(config))


def ids_of(batch: int = 2, time: int = 9) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 61, (batch, time))


MODELS = {
    "tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "untied, every bias": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "no grouping": ("LlamaForCausalLM", {"num_key_value_heads": 4}),
    "head_dim": ("LlamaForCausalLM", {"head_dim": 12}),
    "other numbers": ("LlamaForCausalLM", {"rms_norm_eps": 1e-2, "hidden_act": "gelu"}),
    "base": ("LlamaModel", {}),
    "mistral": ("MistralForCausalLM", {"sliding_window": None, "head_dim": 16}),
    "mistral window": ("MistralForCausalLM", {"sliding_window": 3}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2 windows": ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
}


@pytest.mark.parametrize("row", MODELS)
def test_hidden_states_and_logits_equal_torch(row):
    name, options = MODELS[row]
    model = model_of(name, **options)
    forward, params = twin(model)
    ours = forward(params, ids_of(), output_hidden_states=True)
    theirs = run_torch(model, input_ids=ids_of(), output_hidden_states=True)
    assert len(ours.hidden_states) == len(theirs.hidden_states) == 3
    for mine, torchs in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert difference(mine, torchs) < TOLERANCE
    if name != "LlamaModel":
        assert difference(ours.logits, theirs.logits) < TOLERANCE
    assert difference(ours.last_hidden_state, theirs.hidden_states[-1]) < TOLERANCE


ROPES = {
    "theta": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32, "rope_theta": 500.0,
    },
    "yarn": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 100.0,
        "beta_fast": 4.0,
    },
    "yarn, every option": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 100.0,
        "beta_fast": 2.0, "beta_slow": 0.5, "mscale": 0.7, "mscale_all_dim": 0.3, "truncate": False,
    },
}  # fmt: skip


@pytest.mark.parametrize("row", ROPES)
def test_rope_scalings(row):
    model = model_of("LlamaForCausalLM", rope_parameters=ROPES[row], max_position_embeddings=64, head_dim=32)
    ids = ids_of(1, 90 if row == "dynamic" else 60)
    theirs = run_torch(model, input_ids=ids).logits
    forward, params = twin(model)
    assert difference(forward(params, ids).logits, theirs) < TOLERANCE
    plain = run_torch(model_of("LlamaForCausalLM", max_position_embeddings=64, head_dim=32), input_ids=ids).logits
    assert difference(plain, theirs) > 1e-3


def test_the_rope_fields_of_transformers_4_read_the_same():
    model = model_of("LlamaForCausalLM", rope_parameters=ROPES["llama3"])
    config = model.config.to_dict()
    options = dict(config.pop("rope_parameters"))
    config["rope_theta"] = options.pop("rope_theta")
    config["rope_scaling"] = {"type": options.pop("rope_type"), **options}
    forward, _ = pure(nnx.eval_shape(lambda: build(config, architecture="LlamaForCausalLM")))
    ours, theirs = forward(params_from_torch(model), ids_of()).logits, run_torch(model, input_ids=ids_of()).logits
    assert difference(ours, theirs) < TOLERANCE


def padded(side: str) -> tuple[np.ndarray, np.ndarray]:
    ids = ids_of(3)
    mask = np.ones_like(ids)
    mask[0, slice(0, 4) if side == "left" else slice(5, None)] = 0
    mask[1, slice(0, 1) if side == "left" else slice(8, None)] = 0
    return ids, mask


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side, name):
    model = model_of(name, **({"sliding_window": 3} if name.startswith("Mistral") else {}))
    forward, params = twin(model)
    ids, mask = padded(side)
    for more in ({}, {"position_ids": np.maximum(mask.cumsum(-1) - 1, 0)}):
        inputs = dict(input_ids=ids, attention_mask=mask, **more)
        theirs = run_torch(model, **inputs).logits
        ours = forward(params, **inputs).logits
        assert difference(ours, theirs, mask) < TOLERANCE
        assert np.isfinite(ours).all()
    if side == "left":
        assert difference(forward(params, ids).logits, theirs, mask) > 1e-3


def test_positions_that_start_over_pack_sequences():
    model = model_of("LlamaForCausalLM")
    forward, params = twin(model)
    ids = ids_of(2)
    positions = np.array([[0, 1, 2, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6, 0, 1]])
    ours = forward(params, ids, position_ids=positions).logits
    theirs = run_torch(model, input_ids=ids, position_ids=positions, use_cache=False).logits
    assert difference(ours, theirs) < TOLERANCE
    alone = forward(params, ids[:1, 3:]).logits
    np.testing.assert_allclose(ours[:1, 3:], alone, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "Qwen2ForSequenceClassification"])
def test_classification_reads_the_last_token_that_is_not_padding(name):
    model = model_of(name, num_labels=3, pad_token_id=0)
    forward, params = twin(model)
    ids = ids_of(3)
    ids[0, 5:], ids[1, :3] = 0, 0
    inputs = dict(input_ids=ids, attention_mask=(ids != 0).astype(int))
    ours, theirs = forward(params, **inputs).logits, run_torch(model, **inputs).logits
    assert ours.shape == (3, 3)
    assert difference(ours, theirs) < TOLERANCE


def test_classification_of_a_batch_needs_a_padding_token():
    model = model_of("LlamaForSequenceClassification", num_labels=3)
    forward, params = twin(model)
    ours, theirs = forward(params, ids_of(1)).logits, run_torch(model, input_ids=ids_of(1)).logits
    assert difference(ours, theirs) < TOLERANCE
    with pytest.raises(ModelError, match="a batch of 2 needs the config's pad_token_id"):
        forward(params, ids_of(2))


@pytest.mark.parametrize("row", ["tied", "mistral window", "qwen2 windows"])
def test_cached_forward_equals_the_whole_one(row):
    name, options = MODELS[row]
    forward, params = twin(model_of(name, **options))
    ids, mask = padded("left")
    positions = np.maximum(mask.cumsum(-1) - 1, 0)
    whole = forward(params, ids, mask, position_ids=positions).logits
    cache, parts = init_cache(12), []
    for start, stop in ((0, 3), (3, 6), (6, 7), (7, 8), (8, 9)):
        output = forward(params, ids[:, start:stop], mask, position_ids=positions[:, start:stop], cache=cache)
        cache = output.cache
        parts.append(output.logits)
    assert difference(np.concatenate(parts, axis=1), whole, mask) < TOLERANCE
    assert int(cache.length) == 9


def test_a_cache_may_be_kept_in_bf16():
    forward, params = twin(model_of("LlamaForCausalLM"))
    whole = forward(params, ids_of()).logits
    cache = forward(params, ids_of()[:, :8], cache=init_cache(9, jnp.bfloat16)).cache
    assert {leaf.dtype for leaf in (*cache.keys, *cache.values)} == {jnp.dtype(jnp.bfloat16)}
    last = forward(params, ids_of()[:, 8:], cache=cache).logits
    assert last.dtype == jnp.float32
    assert 1e-6 < difference(last, whole[:, 8:]) < 0.05


def test_a_cache_that_is_full_says_so():
    forward, params = twin(model_of("LlamaForCausalLM"))
    with pytest.raises(ModelError, match="9 tokens do not fit a cache of 8 slots"):
        forward(params, ids_of(), cache=init_cache(8))
    full = forward(params, ids_of(), cache=init_cache(10)).cache
    assert np.isfinite(forward(params, ids_of(time=1), cache=full).logits).all()
    assert np.isnan(forward(params, ids_of(time=2), cache=full).logits).any(axis=-1).all()


def test_logits_of_some_tokens_only():
    model = model_of("LlamaForCausalLM")
    forward, params = twin(model)
    whole = forward(params, ids_of()).logits
    some = forward(params, ids_of(), logits_to_keep=jnp.array([1, 4])).logits
    np.testing.assert_allclose(some, whole[:, np.array([1, 4])], atol=1e-6)
    for number, first in ((2, -2), (0, 0)):
        plain, _ = pure(module_of(model))
        last = jax.jit(functools.partial(plain, logits_to_keep=number))(params, ids_of()).logits
        np.testing.assert_allclose(last, whole[:, first:], atol=1e-6)


def test_embeddings_given():
    forward, params = twin(model_of("LlamaForCausalLM"))
    embeds = params["model"]["embed_tokens"]["embedding"][ids_of()]
    given = forward(params, inputs_embeds=embeds).logits
    np.testing.assert_allclose(given, forward(params, ids_of()).logits, atol=1e-6)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_bf16_is_as_near_to_fp32_as_torch_is(name):
    model = model_of(name)
    half = model.to(torch.bfloat16)
    forward, params = twin(half)
    ours = forward(params, ids_of()).logits
    assert ours.dtype == jnp.bfloat16
    theirs = run_torch(half, input_ids=ids_of()).logits
    exact = run_torch(half.float(), input_ids=ids_of()).logits
    assert difference(ours, exact) < 1.5 * difference(theirs.float(), exact)
    assert difference(ours, theirs) < 0.02 * float(exact.abs().max())


def test_compute_dtype_casts_the_params_of_a_forward():
    model = model_of("LlamaForCausalLM")
    forward, params = twin(model)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    cast = jax.jit(pure(module_of(model), compute_dtype=jnp.bfloat16)[0])(params, ids_of()).logits
    assert cast.dtype == jnp.bfloat16
    assert difference(cast, forward(half, ids_of()).logits) < 1e-2
    assert 1e-4 < difference(cast, forward(params, ids_of()).logits) < 0.1


def test_jit_grad_vmap_and_remat_of_a_forward():
    forward, params = twin(model_of("LlamaForCausalLM", tie_word_embeddings=True))

    def loss(params, ids):
        return jnp.mean(jnp.square(forward(params, ids).logits))

    direct = jax.jit(jax.grad(loss))(params, ids_of())
    remat = jax.jit(jax.grad(jax.checkpoint(loss)))(params, ids_of())
    for one, other in zip(jax.tree.leaves(direct), jax.tree.leaves(remat), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(direct))
    several = jax.tree.map(lambda x: jnp.stack((x, 2 * x)), params)
    both = jax.jit(jax.vmap(forward, in_axes=(0, None)))(several, ids_of()).logits
    np.testing.assert_allclose(both[0], forward(params, ids_of()).logits, atol=1e-5)
    assert np.abs(both[1] - both[0]).max() > 1e-2


def test_a_gradient_equals_torchs():
    model = model_of("LlamaForCausalLM")
    forward, params = twin(model)
    ids = torch.as_tensor(ids_of())
    model(input_ids=ids, labels=ids).loss.backward()

    def loss(params):
        logits = jax.nn.log_softmax(forward(params, ids_of()).logits[:, :-1])
        return -jnp.mean(jnp.take_along_axis(logits, ids_of()[:, 1:, None], axis=-1))

    ours = jax.jit(jax.grad(loss))(params)["model"]["layers"]["0"]
    theirs = model.model.layers[0]
    assert difference(ours["self_attn"]["k_proj"]["kernel"].T, theirs.self_attn.k_proj.weight.grad) < TOLERANCE
    assert difference(ours["input_layernorm"]["weight"], theirs.input_layernorm.weight.grad) < TOLERANCE


def test_paths_are_torchs_names():
    model = model_of("LlamaForCausalLM")
    shapes = jax.tree.map(lambda x: x.shape, pure(module_of(model))[1])
    assert shapes == jax.tree.map(lambda x: x.shape, params_from_torch(model))
    assert shapes["model"]["layers"]["1"]["self_attn"]["k_proj"]["kernel"] == (32, 16)
    assert shapes["model"]["norm"]["weight"] == (32,)


def test_more_layers_than_ten_keep_their_order():
    model = model_of("LlamaForCausalLM", num_hidden_layers=12)
    forward, params = twin(model)
    ours, theirs = forward(params, ids_of()).logits, run_torch(model, input_ids=ids_of()).logits
    assert difference(ours, theirs) < 1e-4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p.pop("lm_head"), "missing lm_head/kernel; unexpected none"),
        (lambda p: p.update(extra=jnp.ones(2)), "missing none; unexpected extra"),
        (lambda p: p["lm_head"].update(kernel=jnp.ones((61, 32))), r"expected shape \(32, 61\), found \(61, 32\)"),
        (lambda p: p["lm_head"].update(kernel="here"), "expected an array of shape .* found a str"),
    ],
)
def test_params_that_do_not_fit_are_named(change, words):
    model = model_of("LlamaForCausalLM")
    forward, params = pure(module_of(model))[0], params_from_torch(model)
    change(params)
    with pytest.raises(ModelError, match=words):
        forward(params, ids_of())


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({}, "exactly one of input_ids"),
        ({"input_ids": np.ones((4,), int)}, "input_ids must have 2 axes"),
        ({"input_ids": np.ones((2, 4), int), "attention_mask": np.ones((2, 5))}, "attention_mask has shape"),
        ({"input_ids": np.ones((2, 4), int), "logits_to_keep": np.array(1)}, "logits_to_keep must be"),
    ],
)
def test_inputs_that_do_not_fit_are_named(inputs, words):
    forward, params = twin(model_of("LlamaForCausalLM"))
    with pytest.raises(ModelError, match=words):
        forward(params, **inputs)


@pytest.mark.parametrize(
    ("config", "architecture", "words"),
    [
        ({"model_type": "nothing"}, "T5Model", "'nothing' is not supported; supported: llama, mistral, qwen2, "),
        ({}, "LlamaForTokenClassification", "'LlamaForTokenClassification' is not supported .* LlamaForCausalLM"),
        ({}, None, "the config names no architecture"),
        ({"hidden_act": "mish"}, "LlamaModel", "activation 'mish' is not supported"),
        ({"rope_scaling": {"type": "proportional"}}, "LlamaModel", "'proportional' is not supported; supported: defa"),
        ({"rope_scaling": {"type": "linear"}}, "LlamaModel", "needs 'factor'"),
        ({"partial_rotary_factor": 0.5}, "LlamaModel", "partial_rotary_factor 0.5"),
        ({"rope_parameters": {"full_attention": {}}}, "LlamaModel", "differ by layer"),
        ({"hidden_size": None}, "LlamaModel", "needs 'hidden_size'"),
        ({"num_key_value_heads": 3}, "LlamaModel", "can't share 3"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "Qwen2Model", "layer_types must be 2 of"),
    ],
)
def test_a_config_that_asks_for_more_is_refused(config, architecture, words):
    with pytest.raises(ModelError, match=words):
        nnx.eval_shape(lambda: build({"model_type": "llama"} | SIZES | config, architecture=architecture))


def is_kernel(path: tuple, value: Any) -> bool:
    return path[-1] in ("kernel", "embedding")


def test_a_built_model_is_random_and_of_the_dtype_asked_for():
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]} | SIZES
    one, other = (build(config, jnp.bfloat16, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(one))} == {jnp.dtype(jnp.bfloat16)}
    for mine, others in zip(*(jax.tree.leaves(nnx.state(model, is_kernel)) for model in (one, other)), strict=True):
        assert bool((mine != others).any())
    assert nnx.jit(lambda module, ids: module(ids).logits)(one, ids_of()).shape == (2, 9, 61)


def test_families_say_what_their_torch_names_mean():
    assert family("qwen2").tied == (("model/embed_tokens/embedding", "lm_head/kernel"),)
    assert family("gpt2").conv1d == ("c_attn", "c_proj", "c_fc")
