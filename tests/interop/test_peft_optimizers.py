"""LoRA+ and LoRA-FA against PEFT's optimisers, step by step on the same random gradients."""

import warnings

import jax
import jax.numpy as jnp
import optax
import pytest
import torch
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, lorafa

from jpeft.optimizers import lora_fa, lora_plus
from jpeft_interop import load_peft, params_from_torch
from peft_twins import adapted, base, bert, llama, save

STEPS = 6


def twins(tmp_path, make=llama, **config):
    """PEFT's model, and its adapter here."""
    options = {"tie_word_embeddings": False} if make is llama else {}
    module = base(make, **options)
    model = adapted(module, **config)
    params = params_from_torch(module)
    return model, params, load_peft(save(model, tmp_path / "start"), params)


def folder_leaves(model, params, folder):
    return load_peft(save(model, folder), params).trained


def give_gradients(model, seed):
    """Random gradients for all that is trained, A's too where it is frozen."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or "lora_" in name:
            parameter.grad = torch.randn(parameter.shape, generator=generator)


def gradients_here(model, params, folder):
    """The gradients in our layout: saved by PEFT in the place of the weights."""
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.copy_(parameter.grad)
        found = folder_leaves(model, params, folder)
        for name, parameter in model.named_parameters():
            parameter.copy_(kept[name])
    return found


def run(tmp_path, model, params, adapter, theirs, ours):
    """Both for some steps on the same gradients; how far each leaf moved at most."""
    trained, state = adapter.trained, ours.init(adapter.trained)
    update = jax.jit(ours.update)
    start = trained
    for step in range(STEPS):
        give_gradients(model, step)
        gradients = gradients_here(model, params, tmp_path / f"g{step}")
        theirs.step()
        updates, state = update(gradients, state, trained)
        trained = optax.apply_updates(trained, updates)
        expected = folder_leaves(model, params, tmp_path / f"p{step}")
        differences = jax.tree.map(lambda one, other: float(jnp.abs(one - other).max()), trained, expected)
        assert max(jax.tree.leaves(differences)) <= 1e-6, differences
        trained = expected  # each step is judged, not the rounding of a leaf of N(0, 1) added up over the steps
    return jax.tree.map(lambda one, other: float(jnp.abs(one - other).max()), trained, start)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lora_plus(weight_decay, tmp_path):
    config = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "embed_tokens"], "rank_pattern": {"q_proj": 2}}
    model, params, adapter = twins(tmp_path, **config)
    # At these rates: optax has Adam's 1 - b2^t in fp32, 3e-5 off in the first step, torch in fp64.
    options = {"lr": 2e-3, "loraplus_lr_ratio": 4.0, "loraplus_weight_decay": weight_decay}
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, loraplus_lr_embedding=5e-3, **options)
    ours = lora_plus(adapter, 2e-3, 4.0, embedding_learning_rate=5e-3, weight_decay=weight_decay)
    moved = run(tmp_path, model, params, adapter, theirs, ours)
    assert min(jax.tree.leaves(moved)) > 1e-3


def test_lora_plus_with_biases_and_a_head(tmp_path):
    config = {"r": 3, "target_modules": ["query"], "bias": "all", "modules_to_save": ["classifier"]}
    model, params, adapter = twins(tmp_path, bert, task_type="SEQ_CLS", **config)
    theirs = create_loraplus_optimizer(
        model, torch.optim.SGD, lr=1e-2, loraplus_lr_ratio=4.0, loraplus_weight_decay=0.1
    )
    ours = lora_plus(adapter, 1e-2, 4.0, inner=optax.identity(), weight_decay=0.1)
    moved = run(tmp_path, model, params, adapter, theirs, ours)
    assert min(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lora_fa(weight_decay, tmp_path, monkeypatch):
    # PEFT rounds the corrected gradient to bf16 where the machine can; the formula has nothing of that.
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
    config = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj"], "alpha_pattern": {"up_proj": 7}}
    model, params, adapter = twins(tmp_path, **config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = create_lorafa_optimizer(model, r=3, lora_alpha=5, lr=1e-2, weight_decay=weight_decay)
    ours = lora_fa(adapter, 1e-2, weight_decay=weight_decay)
    moved = run(tmp_path, model, params, adapter, theirs, ours)
    assert all(one["a"] == 0 and one["b"] > 1e-2 for one in moved.values())
