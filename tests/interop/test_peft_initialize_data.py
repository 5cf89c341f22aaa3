"""The initialisers that read data, against the installed PEFT: the same model, the same batches."""

import copy
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.eva import get_eva_state_dict
from peft.tuners.lora.loraga import preprocess_loraga
from transformers import LlamaConfig, LlamaForCausalLM

import jpeft
from jpeft.initialize import (
    Stream,
    corda,
    covariance,
    eva,
    lora_ga,
    moments,
    on_original_base,
    scaled_gram,
    tap,
    total,
    weight_gradients,
)
from jpeft.tree import flatten
from jpeft_interop import load_peft, save_peft
from jpeft_interop.models import build, pure
from nearness import assert_as_near_as, with_signs_of
from peft_twins import base, gpt2, llama, load
from test_peft_initialize import assert_as_peft, in_out, layers, logits, new_adapter, ours_logits, trained

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def forward_of(module):
    forward, _ = pure(build(module.config.to_dict(), architecture=type(module).__name__))
    return lambda params, tokens: forward(params, tokens).logits


def batches(n, rows, length=16, seed=0):
    return np.random.default_rng(seed).integers(0, 50, (n, rows, length))


def quietly(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


# ---- CorDA ----


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_corda(make, mode, rslora):
    module = base(make)
    targets = ["q_proj", "down_proj"] if make is llama else ["c_attn"]
    config = {"r": 5, "lora_alpha": 12, "use_rslora": rslora, "target_modules": targets}
    data = batches(6, 1, 24)
    peft_config = LoraConfig(
        init_lora_weights="corda", corda_config=CordaConfig(corda_method=mode), fan_in_fan_out=make is gpt2, **config
    )
    torch_model = copy.deepcopy(module)

    def run():
        for batch in data:
            torch_model(torch.tensor(batch))

    quietly(preprocess_corda, torch_model, peft_config, run_model=run)
    peft_model = quietly(get_peft_model, torch_model, peft_config)

    adapter, params = new_adapter(module, config)
    found = measured_covariance(module, adapter, params, data)
    new, residual = corda(adapter, params, found, mode=mode)
    change_of = lambda path, weight, rank, scaling: oriented_change(weight, damped(found[path]), rank, mode)
    assert_as_peft(new, residual, peft_model, params, change_of)


def damped(covariance):
    """C in float64 with PEFT's damping."""
    c = np.asarray(covariance, np.float64)
    return c + 0.01 * np.diag(c).mean() * np.eye(len(c))


def oriented_change(weight, c, rank, mode):
    """CorDA's s A B in float64: C⁻¹ times the first or the last directions of C W."""
    v, s, uh = np.linalg.svd(c @ weight, full_matrices=False)
    kept = slice(0, rank) if mode == "ipm" else slice(len(s) - rank, None)
    return np.linalg.solve(c, v[:, kept] * s[kept]) @ uh[kept]


def measured_covariance(module, adapter, params, data):
    tapped = jax.jit(tap(forward_of(module), scaled_gram))
    return covariance(total(Stream(tapped, jpeft.attach(params, adapter), [(batch,) for batch in data])))


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_where_the_inputs_are_nearly_dependent(mode):
    """Against float64: PEFT itself is off by 6e-5 on these weights, from inverting a covariance of condition 8000."""
    module = base(gpt2)
    adapter, params = new_adapter(module, {"r": 5, "lora_alpha": 12, "target_modules": ["mlp.c_proj"]})
    found = measured_covariance(module, adapter, params, batches(6, 1, 24))
    _, residual = corda(adapter, params, found, mode=mode)
    for path, c in found.items():
        w, c = np.asarray(flatten(params)[path], np.float64), damped(c)
        assert np.linalg.cond(c) > 1000
        expected = w - oriented_change(w, c, 5, mode)
        assert np.abs(expected - w).max() > 1e-3
        np.testing.assert_allclose(flatten(residual)[path], expected, atol=1e-5)


# ---- LoRA-GA ----


def loss_of(module):
    forward = forward_of(module)

    def loss(params, tokens):
        log_p = jax.nn.log_softmax(forward(params, tokens)[:, :-1])
        return -jnp.take_along_axis(log_p, tokens[:, 1:, None], -1).mean()

    return loss


def mean_gradients(module, adapter, params, data):
    gradient = jax.jit(lambda params, batch: weight_gradients(loss_of(module), adapter, params, batch))
    found = [gradient(params, batch) for batch in data]
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *found)


def lora_ga_of_peft(module, config, data, **options):
    """PEFT's model, and the gradients that it started from, as (in, out)."""
    torch_model = copy.deepcopy(module)
    peft_config = LoraConfig(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(**options), **config)

    def train_step():
        for batch in data:
            tokens = torch.tensor(batch)
            torch_model(tokens, labels=tokens).loss.backward()

    quietly(preprocess_loraga, torch_model, peft_config, train_step)
    gradients = {
        name.replace(".", "/") + "/kernel": jnp.asarray(layer._peft_loraga_grad.numpy().T)
        for name, layer in torch_model.named_modules()
        if hasattr(layer, "_peft_loraga_grad")
    }
    return quietly(get_peft_model, torch_model, peft_config), gradients


def test_the_gradients_that_lora_ga_starts_from():
    module = base(llama)
    config = {"r": 8, "target_modules": ["q_proj", "down_proj"]}
    data = batches(3, 2)
    _, theirs = lora_ga_of_peft(module, config, data)
    adapter, params = new_adapter(module, config)
    ours = mean_gradients(module, adapter, params, data)
    assert theirs.keys() == ours.keys()
    for path, gradient in theirs.items():
        np.testing.assert_allclose(ours[path], gradient, atol=2e-6 * float(jnp.abs(gradient).max()))


def directions(gradient, rank, direction):
    """A and B of LoRA-GA in float64, before B is scaled."""
    u, s, vh = np.linalg.svd(np.asarray(gradient, np.float64), full_matrices=False)
    first, second = slice(0, rank), slice(rank, 2 * rank)
    odd, even = slice(1, 2 * rank, 2), slice(0, 2 * rank, 2)
    of_a, of_b = {"ArB2r": (first, second), "A2rBr": (second, first), "ArBr": (odd, even)}[direction]
    return u[:, of_a], s[of_b, None] * vh[of_b]


def factors_of(layer):
    """PEFT's A (in, r) and B (r, out)."""
    return [getattr(layer, name)["default"].weight.detach().numpy().T for name in ("lora_A", "lora_B")]


@pytest.mark.parametrize("scale", ["stable", "gd_scale", "unit"])
@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
def test_lora_ga(direction, scale):
    """From the same gradients, at ranks where PEFT's randomised decomposition is exact: 4 r is all there is.

    The data are ones whose gradients have singular values apart: where they are close, PEFT's own vectors are off by
    0.7 of the tolerance on one processor, and by more on another.

    A and B take different singular vectors, so that the signs, which are arbitrary, do not cancel in A B.
    """
    module = base(llama)
    config = {"r": 8, "lora_alpha": 12, "use_rslora": scale == "unit", "target_modules": ["q_proj", "down_proj"]}
    peft_model, gradients = lora_ga_of_peft(
        module, config, batches(5, 2), direction=direction, scale=scale, stable_gamma=9
    )
    adapter, params = new_adapter(module, config)
    new, residual = lora_ga(adapter, params, gradients, direction=direction, scale=scale, stable_gamma=9)
    before, after, unchanged = flatten(params), flatten(residual), flatten(jpeft.apply(residual, new))
    for path, layer in layers(peft_model).items():
        s = float(new.constant[path]["scaling"])
        fan_out = before[path].shape[1]
        scale_a, scale_b = {"stable": (1, fan_out**0.25 / 3), "gd_scale": (1 / s, 1 / s), "unit": (1, 1)}[scale]
        true_a, true_b = directions(gradients[path], 8, direction)
        true_a, true_b = true_a * scale_a, true_b * scale_b
        a, b = (np.asarray(new.trained[path][name]) for name in ("a", "b"))
        their_a, their_b = factors_of(layer)
        signed_a, signed_b = with_signs_of(a, true_a, 0), with_signs_of(b, true_b, 1)
        assert_as_near_as(signed_a, with_signs_of(their_a, true_a, 0), true_a, 1e-5, path)
        assert_as_near_as(signed_b, with_signs_of(their_b, true_b, 1), true_b, 1e-5, path)
        assert np.abs(s * a @ b).max() > 1e-3
        np.testing.assert_allclose(after[path], before[path] - s * a @ b, atol=1e-6)
        signs = np.sign((their_a * true_a).sum(0)) * np.sign((their_b * true_b).sum(1))
        true_base = np.asarray(before[path], np.float64) - s * (true_a * signs) @ true_b
        as_signed_there = before[path] - s * (signed_a * np.float32(signs)) @ signed_b
        assert_as_near_as(as_signed_there, in_out(layer, layer.base_layer.weight), true_base, 1e-5, path)
        np.testing.assert_allclose(unchanged[path], before[path], atol=1e-6)


def test_lora_ga_scaled_by_the_weight():
    """PEFT estimates the largest singular value: compared on weights where one stands out.

    B takes the leading directions, which PEFT's decomposition has best.
    """
    module = base(llama)
    with torch.no_grad():
        for layer in module.model.layers:
            weight = layer.self_attn.q_proj.weight
            weight += torch.outer(torch.ones(weight.shape[0]), torch.ones(weight.shape[1]))
    config = {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj"]}
    options = {"direction": "A2rBr", "scale": "weight_svd"}
    peft_model, gradients = lora_ga_of_peft(module, config, batches(3, 2), **options)
    adapter, params = new_adapter(module, config)
    new, _ = lora_ga(adapter, params, gradients, **options)
    for path, layer in layers(peft_model).items():
        _, rows = directions(gradients[path], 8, options["direction"])
        largest = np.linalg.svd(np.asarray(flatten(params)[path], np.float64), compute_uv=False)[0]
        truth = rows * largest / np.linalg.norm(rows[0])
        ours, theirs = (with_signs_of(b, truth, 1) for b in (new.trained[path]["b"], factors_of(layer)[1]))
        assert_as_near_as(ours, theirs, truth, 1e-5 * np.abs(truth).max(), path)


def test_the_export_of_a_start_from_data_runs_in_peft_on_the_original_base(tmp_path):
    module = base(llama)
    config = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]}
    adapter, params = new_adapter(module, config)
    data = batches(3, 2)
    initial, residual = lora_ga(adapter, params, mean_gradients(module, adapter, params, data))
    after = trained(initial)
    save_peft(tmp_path, on_original_base(after, initial), params=params)
    theirs = logits(load(module, tmp_path)[0], data[0])
    assert np.abs(theirs - logits(module, data[0])).max() > 1e-2
    np.testing.assert_allclose(ours_logits(module, residual, after, data[0]), theirs, atol=1e-5)


# ---- EVA ----


def eva_model(seed=0):
    """Every weight has 32 inputs, so that PEFT's randomised decomposition of twice 16 components is exact."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=50, num_key_value_heads=2, bos_token_id=1, eos_token_id=2)
    return base(lambda: LlamaForCausalLM(config), seed)


class Loader:
    """What PEFT goes through again and again."""

    def __init__(self, data, masks):
        self.batches = [
            {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
            for ids, mask in zip(data, masks, strict=True)
        ]

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


EVA = {"r": 8, "lora_alpha": 12, "target_modules": TARGETS}


def eva_data():
    """Batches of 5 texts of 16 tokens, some of them short."""
    data, masks = batches(4, 5), np.ones((4, 5, 16), int)
    masks[:, 1, 10:] = 0
    masks[:, 3, 13:] = 0
    return data, masks


def eva_of_peft(module, config, **options):
    peft_config = LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(**options), **config)
    peft_model = quietly(get_peft_model, copy.deepcopy(module), peft_config)
    state = quietly(get_eva_state_dict, peft_model, Loader(*eva_data()), show_progress_bar=False)
    state = {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}
    return peft_model, state


def eva_of_ours(module, config, **options):
    adapter, params = new_adapter(module, config)
    forward, _ = pure(build(module.config.to_dict(), architecture=type(module).__name__))
    fn = lambda params, tokens, mask: forward(params, tokens, attention_mask=mask).logits
    tapped = jax.jit(tap(fn, moments, rows=lambda params, tokens, mask: mask))
    stream = Stream(tapped, jpeft.attach(params, adapter), list(zip(*eva_data(), strict=True)))
    order = [name.replace(".", "/") + "/kernel" for name, _ in module.named_modules()]
    return eva(adapter, list(stream), order=order, **options), params


WHITENED = {"target_modules": ["o_proj", "down_proj", "up_proj"]}  # PEFT whitens once for each that shares an input


@pytest.mark.parametrize(
    "options, config",
    [({}, {}), ({"whiten": True}, WHITENED), ({"tau": 0.9}, {}), ({"rho": 1.0}, {"r": 16})],
    ids=["default", "whiten", "tau", "rho"],
)
def test_eva(options, config):
    config = EVA | config
    module = eva_model()
    _, theirs = eva_of_peft(module, config, **options)
    ours, _ = eva_of_ours(module, config, **options)
    assert theirs.keys() == {site.path.removesuffix("/kernel").replace("/", ".") for site in ours.sites}
    ranks = {}
    for site in ours.sites:
        expected = theirs[site.path.removesuffix("/kernel").replace("/", ".")].numpy()
        a = np.asarray(ours.trained[site.path]["a"])
        ranks[site.path] = a.shape[1]
        assert a.shape[1] == site.rank == expected.shape[0]
        np.testing.assert_allclose(a @ a.T, expected.T @ expected, atol=1e-5)
        assert not ours.trained[site.path]["b"].any()
    assert sum(ranks.values()) == config["r"] * len(ranks)
    assert options.get("rho") == 1.0 or len(set(ranks.values())) > 2


@pytest.mark.parametrize("adjust, rslora", [(True, True), (False, False)])
def test_eva_s_ranks_and_scalings_go_to_peft_and_come_from_it(adjust, rslora, tmp_path):
    module = eva_model()
    config = EVA | {"use_rslora": rslora}
    peft_model, _ = eva_of_peft(module, config, adjust_scaling_factors=adjust)
    quietly(initialize_lora_eva_weights, peft_model, Loader(*eva_data()), show_progress_bar=False)
    ours, params = eva_of_ours(module, config, adjust_alpha=adjust)
    found = layers(peft_model)
    assert found.keys() == {site.path for site in ours.sites if site.rank > 0}
    for site in ours.sites:
        if site.rank > 0:
            layer = found[site.path]
            np.testing.assert_allclose(ours.constant[site.path]["scaling"], layer.scaling["default"], rtol=1e-6)
            theirs = layer.lora_A["default"].weight.detach().numpy()
            a = np.asarray(ours.trained[site.path]["a"])
            np.testing.assert_allclose(a @ a.T, theirs.T @ theirs, atol=1e-5)

    after = trained(ours)
    save_peft(tmp_path / "ours", after, params=params)
    tokens = batches(1, 3)[0]
    expected = ours_logits(module, params, after, tokens)
    assert np.abs(expected - logits(module, tokens)).max() > 1e-2
    np.testing.assert_allclose(logits(load(module, tmp_path / "ours")[0], tokens), expected, atol=1e-5)
    quietly(peft_model.save_pretrained, tmp_path / "theirs")
    loaded = load_peft(tmp_path / "theirs", params)
    assert {s.path: s.rank for s in loaded.sites} == {s.path: s.rank for s in ours.sites if s.rank > 0}
