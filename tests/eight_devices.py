"""A frozen base on meshes of eight simulated devices: run by test_shardings.py in a process of its own."""

import os
import sys
from functools import partial

# After what the environment asks for: of two values of a flag, XLA takes the last.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jpeft
from jpeft.testing import assert_base_stays, collectives

# Seven tokens and rank five: no part of a weight has such sizes, so what moves is told apart by its shape.
D, FF, HEADS, LAYERS, ROWS, TOKENS, RANK = 104, 176, 8, 3, 16, 7, 5
MESHES = {"8x1": (8, 1), "1x8": (1, 8), "2x4": (2, 4)}
# Megatron's split along `tensor`, and the other axis along `fsdp`.
SPLIT = {
    "q": P(None, "fsdp", "tensor", None),
    "o": P(None, "tensor", None, "fsdp"),
    "up": P(None, "fsdp", "tensor"),
    "down": P(None, "tensor", "fsdp"),
}
SHAPES = {"q": (D, HEADS, 13), "o": (HEADS, 13, D), "up": (D, FF), "down": (FF, D)}
SPECS = {
    "lora": jpeft.LoRA(rank=RANK, alpha=7),
    "dora": jpeft.DoRA(rank=RANK, alpha=7),
    "adalora": jpeft.AdaLoRA(rank=RANK, target_rank=2),
    "ia3": jpeft.IA3(),
}


def block(x, w):
    x = x + jnp.einsum("btnh,nhd->btd", jnp.tanh(jnp.einsum("btd,dnh->btnh", x, w["q"]["kernel"])), w["o"]["kernel"])
    return x + jax.nn.gelu(x @ w["up"]["kernel"]) @ w["down"]["kernel"], None


def model(params, x):
    return jax.lax.scan(jax.checkpoint(block), x, params["layers"])[0]


def explicit_block(x, w):
    """The same where shardings are types: weights are gathered along `fsdp` by name, and results are told theirs."""
    kernel = lambda name, *spec: jax.sharding.reshard(w[name]["kernel"], P(*spec))
    there = {"out_sharding": P("fsdp", None, None)}
    y = jnp.tanh(jnp.einsum("btd,dnh->btnh", x, kernel("q", None, "tensor", None)))
    x = x + jnp.einsum("btnh,nhd->btd", y, kernel("o", "tensor", None, None), **there)
    return x + jnp.dot(jax.nn.gelu(x @ kernel("up", None, "tensor")), kernel("down", "tensor", None), **there), None


def explicit_model(params, x):
    return jax.lax.scan(jax.checkpoint(explicit_block), x, params["layers"])[0]


def base():
    draw = np.random.default_rng(0)
    new = lambda shape: jnp.asarray(draw.standard_normal((LAYERS, *shape), np.float32) / shape[0] ** 0.5)
    return {"layers": {name: {"kernel": new(shape)} for name, shape in SHAPES.items()}}


def placed(params, mesh):
    home = lambda name: NamedSharding(mesh, SPLIT[name])
    return {
        "layers": {name: {"kernel": jax.device_put(w["kernel"], home(name))} for name, w in params["layers"].items()}
    }


def adapter_of(spec, params, kernels):
    """Random where it starts at zero or one, by path: the same on any mesh."""
    adapter = jpeft.init(jax.random.key(0), spec, params, kernels=kernels)
    shaken = lambda leaf: leaf + 0.1 * jnp.sin(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape)
    return adapter.replace(trained=jax.tree.map(shaken, adapter.trained))


LIFTED = jpeft.lift(model)


def lifted_step(trained, adapter, params, x, run=LIFTED):
    loss = lambda trained, x: jnp.square(run(jpeft.attach(params, adapter.replace(trained=trained)), x)).mean()
    return jax.value_and_grad(loss, argnums=(0, 1))(trained, x)


def plain_step(params, x):
    return jax.value_and_grad(lambda x: jnp.square(model(params, x)).mean())(x)


def check(name, spec):
    params = base()
    x = jnp.asarray(np.random.default_rng(1).standard_normal((ROWS, TOKENS, D), np.float32))
    kernels = jpeft.kernels(model, params, x)
    first = jax.tree.map(np.asarray, adapter_of(spec, params, kernels))
    expected = jax.tree.map(np.asarray, jax.jit(lifted_step)(first.trained, first, params, x))
    merged = jax.tree.map(np.asarray, jpeft.merge(params, first))
    for label, mesh in meshes(AxisType.Auto):
        there, rows = placed(params, mesh), jax.device_put(x, NamedSharding(mesh, P("fsdp")))
        adapter = adapter_of(spec, there, kernels)
        jax.tree.map(close if name == "dora" else np.testing.assert_array_equal, adapter, first)
        jax.tree.map(lives_at, adapter, jpeft.shardings(there, adapter))
        lifted, plain = compiled(adapter, there, rows)
        report(name, label, lifted, plain)
        assert_base_stays(lifted, plain, there)
        jax.tree.map(close, lifted(adapter.trained, adapter, there, rows), expected)
        folded = jpeft.merge(there, adapter)
        jax.tree.map(lambda new, old: lives_at(new, old.sharding), folded, there)
        jax.tree.map(close, folded, merged)
        print(f"{name}:{label}", flush=True)


def compiled(adapter, params, x):
    """The lifted step and the plain one."""
    whole = NamedSharding(x.sharding.mesh, P())
    out = (whole, (jpeft.shardings(params, adapter).trained, x.sharding))
    lifted = jax.jit(lifted_step, out_shardings=out).lower(adapter.trained, adapter, params, x)
    plain = jax.jit(plain_step, out_shardings=(whole, x.sharding)).lower(params, x)
    return lifted.compile(), plain.compile()


def report(name, label, lifted, plain):
    if "-v" in sys.argv:
        for title, program in (("lifted", lifted), ("plain", plain)):
            print(f"== {name} {label} {title}", *collectives(program), sep="\n")


def check_explicit():
    """Where shardings are part of types."""
    params, spec = base(), SPECS["lora"]
    x = jnp.asarray(np.random.default_rng(1).standard_normal((ROWS, TOKENS, D), np.float32))
    first = adapter_of(spec, params, jpeft.kernels(model, params, x))
    expected = jax.jit(lambda p, x: jpeft.lift(model)(p, x))(jpeft.attach(params, first), x)
    for label, mesh in meshes(AxisType.Explicit):
        with jax.set_mesh(mesh):
            there, rows = placed(params, mesh), jax.device_put(x, P("fsdp"))
            kernels = jpeft.kernels(explicit_model, there, rows)
            adapter = adapter_of(spec, there, kernels)
            run = jpeft.lift(explicit_model)
            close(jax.jit(run)(jpeft.attach(there, adapter), rows), expected)
            gradient = jax.jit(lifted_step, static_argnames="run")(adapter.trained, adapter, there, rows, run=run)[1][0]
            jax.tree.map(lambda g, t: lives_at(g, t.sharding), gradient, adapter.trained)
        print(f"explicit:{label}", flush=True)


def meshes(kind):
    for label, sizes in MESHES.items():
        yield label, jax.make_mesh(sizes, ("fsdp", "tensor"), axis_types=(kind,) * 2)


def check_the_check():
    """A base that is gathered, or changed where it lives, does not pass."""
    params = base()
    for label, mesh in meshes(AxisType.Auto):
        there, x = placed(params, mesh), jax.device_put(jnp.ones((ROWS, TOKENS, D)), NamedSharding(mesh, P("fsdp")))
        adapter = adapter_of(SPECS["lora"], there, jpeft.kernels(model, params, x))
        _, plain = compiled(adapter, there, x)
        whole = NamedSharding(mesh, P())
        gathered = lambda whole, params, x: plain_step(jax.lax.with_sharding_constraint(params, whole), x)
        gathers = jax.jit(partial(gathered, whole)).lower(there, x).compile()
        try:
            assert_base_stays(gathers, plain, there)
        except AssertionError as error:
            assert "all-" in str(error)
        else:
            raise AssertionError("a base that was gathered passed")
        print(f"gathers:{label}", flush=True)


def lives_at(leaf, home):
    assert leaf.sharding.is_equivalent_to(home, leaf.ndim), (leaf.shape, leaf.sharding, home)


def close(found, expected):
    expected = np.asarray(expected)
    assert np.abs(np.asarray(found) - expected).max(initial=0) <= 1e-5 * np.abs(expected).max(initial=1e-30)


if __name__ == "__main__":
    others = {"gathers": check_the_check, "explicit": check_explicit}
    others[sys.argv[1]]() if sys.argv[1] in others else check(sys.argv[1], SPECS[sys.argv[1]])
