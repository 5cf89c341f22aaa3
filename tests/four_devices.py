"""The fast path under `shard_map`, on four simulated devices: run by test_shard_map.py in a process of its own."""

import os

# After what the environment asks for: of two values of a flag, XLA takes the last.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jpeft
import zoo
from agreement import assert_close, perturbed

SPECS = (jpeft.LoRA(rank=2, targets=".*"), jpeft.DoRA(rank=2, targets=".*"), jpeft.IA3(targets=".*"))
PARAMS = {"a": {"kernel": zoo.normal(8, 6)}, "b": {"kernel": zoo.normal(6, 4, seed=1)}}
SPLIT = {"a": {"kernel": P(None, "model")}, "b": {"kernel": P("model", None)}}


def model(params, x):
    return jnp.tanh(x @ params["a"]["kernel"]) @ params["b"]["kernel"]


def main() -> None:
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    on_mesh = lambda fn, specs: jax.shard_map(fn, mesh=mesh, in_specs=(specs, P("data")), out_specs=P("data"))
    whole = on_mesh(model, P())
    split = on_mesh(lambda params, x: jax.lax.psum(model(params, x), "model"), SPLIT)
    for name, fn, how in (("whole", whole, "factored"), ("split", split, "dense")):
        for spec in SPECS:
            check(fn, spec, how)
            print(name, spec.method, how)


def check(fn, spec, how) -> None:
    x = zoo.normal(8, 8, seed=2)
    found = jpeft.kernels(fn, PARAMS, x)
    adapter = perturbed(jpeft.init(jax.random.key(0), spec, PARAMS, kernels=found))
    rows = jpeft.coverage(fn, jpeft.attach(PARAMS, adapter), x).rows
    assert [row.how for row in rows] == [how, how], rows
    loss = lambda run: lambda trained, x: jnp.sin(run(adapter.replace(trained=trained), x)).sum()
    both = lambda run: jax.jit(jax.value_and_grad(loss(run), argnums=(0, 1)))(adapter.trained, x)
    by_definition = both(lambda adapter, x: fn(jpeft.apply(PARAMS, adapter), x))
    assert_close(both(lambda adapter, x: jpeft.lift(fn)(jpeft.attach(PARAMS, adapter), x)), by_definition)


if __name__ == "__main__":
    main()
