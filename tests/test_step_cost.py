"""What a lifted step costs beside arithmetic: traces, and memory for its intermediate results."""

import jax
import jax.numpy as jnp

import jpeft

ROWS, D, WIDE = 512, 128, 384


def mlp(params, x):
    """Gated, as in Llama: what the products give is read several times, forward and backward."""
    for name in sorted(params):
        layer = params[name]
        x = x + (jax.nn.silu(x @ layer["gate"]) * (x @ layer["up"])) @ layer["down"]
    return x


def abstract(layers):
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
    layer = {"gate": shape(D, WIDE), "up": shape(D, WIDE), "down": shape(WIDE, D)}
    return {f"layer_{i}": layer for i in range(layers)}, shape(ROWS, D)


def adapted(layers):
    """The lifted loss of trained leaves, and their shapes."""
    params, x = abstract(layers)
    kernels = jpeft.kernels(lambda p, x: jnp.sin(mlp(p, x)), params, x)
    adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=4, targets=".*"), params, kernels=kernels)
    lifted = jpeft.lift(mlp)
    return lambda t, p, x: (lifted(jpeft.attach(p, adapter.replace(trained=t)), x) ** 2).sum(), adapter.trained


def programs(jaxpr):
    """The programs that a traced one calls by name, at any depth."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("jit", "pjit"):
            yield eqn.params["name"], eqn.params["jaxpr"].jaxpr
            yield from programs(eqn.params["jaxpr"].jaxpr)


def traced(layers):
    """How many programs of products a step calls, and how many of them differ."""
    loss, trained = adapted(layers)
    called = jax.make_jaxpr(jax.grad(loss))(trained, *abstract(layers))
    products = [program for name, program in programs(called.jaxpr) if name == "_adapted"]
    return len(products), len(set(map(id, products)))


def test_layers_that_are_alike_are_traced_once():
    (few, different), (many, as_different) = traced(3), traced(6)
    assert (few, many) == (2 * 3 * 3, 2 * 3 * 6), "forward and backward of each product"
    assert different == as_different


def temporaries(function, *args):
    return jax.jit(jax.grad(function)).lower(*args).compile().memory_analysis().temp_size_in_bytes


def test_the_backward_pass_keeps_one_array_of_each_sum():
    layers, array = 6, 4 * ROWS * WIDE
    loss, trained = adapted(layers)
    params, x = abstract(layers)
    shift = jax.ShapeDtypeStruct((1, D), jnp.float32)
    floor = temporaries(lambda shift, p, x: (mlp(p, x + shift) ** 2).sum(), shift, params, x)
    # Beside the frozen model's: the input of `down`, as large as one sum. Both terms of gate and up would be two more.
    assert temporaries(loss, trained, params, x) - floor < 2 * layers * array
