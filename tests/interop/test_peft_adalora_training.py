"""A whole AdaLoRA run beside PEFT's: the same data, factors at the start and schedule."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch

import jpeft
from jpeft.adalora import budgets

NAMES, WIDTHS, STEPS = ("one", "two", "three"), (8, 12, 10, 6), 24


class Mlp(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name, i, o in zip(NAMES, WIDTHS, WIDTHS[1:], strict=False):
            setattr(self, name, torch.nn.Linear(i, o))

    def forward(self, x, y):
        for name in NAMES:
            x = torch.tanh(getattr(self, name)(x))
        return SimpleNamespace(loss=((x - y) ** 2).mean())


def data(step):
    rng = np.random.default_rng(step)
    return rng.standard_normal((16, 8), np.float32), rng.standard_normal((16, 6), np.float32)


def loss(params, x, y):
    for name in NAMES:
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"])
    return ((x - y) ** 2).mean()


@pytest.mark.parametrize(
    "schedule",
    [
        {"tinit": 3, "tfinal": 5, "deltaT": 2},
        {"tinit": 0, "tfinal": 0, "deltaT": 1},
        {"tinit": 5, "tfinal": 9, "deltaT": 4},
    ],
)
def test_the_same_budget_masks_and_factors_at_every_step(schedule):
    torch.manual_seed(0)
    base = Mlp()
    params = {
        name: {
            "kernel": jnp.asarray(getattr(base, name).weight.detach().numpy().T),
            "bias": jnp.asarray(getattr(base, name).bias.detach().numpy()),
        }
        for name in NAMES
    }
    config = peft.AdaLoraConfig(
        init_r=4,
        target_r=1,
        lora_alpha=8,
        total_step=STEPS,
        target_modules=list(NAMES),
        orth_reg_weight=0.3,
        **schedule,
    )
    theirs = peft.get_peft_model(base, config)
    spec = jpeft.AdaLoRA(
        rank=4,
        target_rank=1,
        alpha=8,
        total_steps=STEPS,
        initial_steps=schedule["tinit"],
        final_steps=schedule["tfinal"],
        every=schedule["deltaT"],
        orthogonality=0.3,
        targets=list(NAMES),
    )
    ours = jpeft.init(jax.random.key(0), spec, params)
    with torch.no_grad():  # E starts at zero: let it move at once, so that no scores are equal
        for name in NAMES:
            layer = getattr(theirs.base_model.model, name)
            layer.lora_E["default"].normal_(std=0.5)
    ours = ours.replace(trained=factors(theirs))

    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.5)
    budget = jpeft.adalora(optax.sgd(0.5), ours)
    state, table = budget.init(ours.trained), budgets(spec, len(NAMES))

    def total(trained, x, y):
        adapter = ours.replace(trained=trained)
        return jpeft.lift(loss)(jpeft.attach(params, adapter), x, y) + jpeft.penalty(adapter)

    @jax.jit
    def step(trained, state, x, y):
        updates, state = budget.update(jax.grad(total)(trained, x, y), state, trained)
        return optax.apply_updates(trained, updates), state

    trained, allocator = ours.trained, theirs.base_model.rankallocator
    for i in range(1, STEPS + 1):
        x, y = data(i)
        # Not theirs(...): without a task type PEFT calls the model past AdaLoraModel.forward, and drops the penalty.
        theirs.base_model(torch.from_numpy(x), torch.from_numpy(y)).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(i)
        optimizer.zero_grad()
        trained, state = step(trained, state, x, y)
        assert table[i] == allocator.budget_schedule(i)[0]
        for path, leaves in factors(theirs).items():
            np.testing.assert_array_equal(np.asarray(trained[path]["e"]) == 0, leaves["e"] == 0, err_msg=f"step {i}")
            for name, leaf in leaves.items():
                np.testing.assert_allclose(trained[path][name], leaf, atol=1e-5, err_msg=f"step {i} {path} {name}")
    pattern = theirs.base_model.peft_config["default"].rank_pattern
    found = {f"{name}.lora_E": np.asarray(state.masks[f"{name}/kernel"]).tolist() for name in NAMES}
    assert found == {key.removeprefix("model.").removesuffix(".default"): kept for key, kept in pattern.items()}
    assert sum(int(r) for r in jpeft.ranks(ours.replace(trained=trained)).values()) == 3


def factors(model):
    """PEFT's factors as ours, here its tensors are (r, in), (out, r) and (r, 1)."""
    found = {}
    for name in NAMES:
        layer = getattr(model.base_model.model, name)
        get = lambda part, layer=layer: getattr(layer, part)["default"].detach().numpy().copy()
        found[f"{name}/kernel"] = {"a": get("lora_A").T, "b": get("lora_B").T, "e": get("lora_E")[:, 0]}
    return jax.tree.map(jnp.asarray, found)
