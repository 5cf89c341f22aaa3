"""Where an adapter lives follows from where its base does; tried on eight simulated devices, in other processes."""

import os
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jpeft
from jpeft.testing import assert_base_stays, collectives

HERE = Path(__file__).parent
Q = jpeft.Kernel((3, 8, 2, 5), (1,), (2, 3), (0,))
SPLIT = P("layers", "fsdp", "tensor")
SPECS = (jpeft.LoRA(rank=2, factor_bias=True), jpeft.DoRA(rank=2), jpeft.AdaLoRA(), jpeft.IA3())


def abstract(spec, kernel=Q, **options):
    params = {"q": {"kernel": jnp.ones(kernel.shape)}}
    kernels = jpeft.Kernels((("q/kernel", kernel),))
    return jax.eval_shape(
        lambda params: jpeft.init(jax.random.key(0), spec, params, kernels=kernels, **options), params
    )


def found(leaves, spec=SPLIT, **options):
    given = {"q": {"kernel": spec}}
    where = jpeft.shardings(given, leaves, **options)
    return where.constant.get("q/kernel", {}) | where.trained["q/kernel"]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.method)
def test_each_axis_is_split_as_in_the_weight(spec):
    expected = {
        "a": P("layers", "fsdp", None),
        "b": P("layers", None, "tensor", None),
        "bias": P("layers", "tensor", None),
        "m": P("layers", "tensor", None),
        "l": P("layers", "tensor", None),
        "e": P("layers", None),
        "scaling": P("layers"),
    }
    where = found(abstract(spec))
    assert where and where == {name: expected[name] for name in where}


def test_an_input_scaled_and_a_module_saved():
    assert found(abstract(jpeft.IA3(feedforward=["q"])))["l_in"] == P("layers", "fsdp")
    adapter = abstract(jpeft.LoRA(targets=[], modules_to_save=["q"]))
    assert found(adapter)["value"] == P("layers", "fsdp", "tensor", None)


def test_an_input_of_experts_in_common_is_not_split_over_them():
    experts = jpeft.Kernel((4, 8, 6), (1,), (2,), (0,), experts=(0,))
    where = found(abstract(jpeft.LoRA(rank=2, share_a=True), experts), P("expert", "fsdp", "tensor"))
    assert where["a"] == P(None, "fsdp", None) and where["b"] == P("expert", None, "tensor")


def test_stacked_adapters_are_not_split_over_the_stack():
    many = jax.eval_shape(lambda *all: jpeft.stack(all), *[abstract(jpeft.LoRA(rank=2))] * 2)
    assert found(many)["a"] == P(None, "layers", "fsdp", None)


def test_what_is_not_said_is_not_split():
    params = {"q": {"kernel": P("layers")}, "other": {"kernel": jnp.ones((2, 2))}}
    assert jpeft.shardings(params, abstract(jpeft.LoRA(rank=2))).trained["q/kernel"]["b"] == P(
        "layers", None, None, None
    )


@pytest.fixture
def mesh():
    return jax.make_mesh((1, 1), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_arrays_and_what_stands_for_them(kind):
    mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"), axis_types=(kind,) * 2)
    home, leaves = NamedSharding(mesh, P(None, "fsdp", "tensor")), abstract(jpeft.LoRA(rank=2))
    array = jax.device_put(jnp.ones(Q.shape), home)
    for leaf in (home, array, jax.ShapeDtypeStruct(Q.shape, jnp.float32, sharding=home)):
        where = found(leaves, leaf)
        assert where["a"] == NamedSharding(mesh, P(None, "fsdp", None))
        assert where["b"] == NamedSharding(mesh, P(None, None, "tensor", None))


def test_linens_names(mesh):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            partitioned = nn.with_logical_partitioning(nn.initializers.ones, ("embed", "mlp"))
            return nn.Dense(6, kernel_init=partitioned)(x)

    params = jax.eval_shape(Model().init, jax.random.key(0), jnp.ones((1, 4)))["params"]
    adapter = jax.eval_shape(lambda: jpeft.init(jax.random.key(0), jpeft.LoRA(rank=2), params))
    rules = [("embed", "fsdp"), ("mlp", "tensor")]
    for spec, more in ((P, {}), (lambda *axes: NamedSharding(mesh, P(*axes)), {"mesh": mesh})):
        where = jpeft.shardings(params, adapter, rules=rules, **more).trained["Dense_0/kernel"]
        assert where == {"a": spec("fsdp", None), "b": spec(None, "tensor")}
    with pytest.raises(
        jpeft.ShardingError, match=r"'embed', which is no axis of the mesh \('fsdp', 'tensor'\).*rules="
    ):
        jpeft.shardings(params, adapter, mesh=mesh)


def test_nnx_names():
    new = lambda: nnx.Linear(
        4, 6, rngs=nnx.Rngs(0), kernel_init=nnx.with_partitioning(nnx.initializers.ones, ("x", "y"))
    )
    with jax.set_mesh(jax.make_mesh((1, 1), ("x", "y"), axis_types=(AxisType.Auto,) * 2)):
        params = nnx.state(nnx.eval_shape(new))
    adapter = jax.eval_shape(lambda: jpeft.init(jax.random.key(0), jpeft.LoRA(rank=2), params))
    where = jpeft.shardings(params, adapter).trained["kernel"]
    spec = lambda home: home.spec if isinstance(home, NamedSharding) else home
    assert {name: spec(home) for name, home in where.items()} == {"a": P("x", None), "b": P(None, "y")}


def test_the_optimizers_state_follows():
    adapter = abstract(jpeft.LoRA(rank=2))
    where = jpeft.shardings({"q": {"kernel": SPLIT}}, adapter)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.masked(optax.adamw(1e-3), lambda t: jax.tree.map(lambda _: True, t))
    )
    state = jax.eval_shape(optimizer.init, adapter.trained)
    homes = jpeft.optimizer_shardings(state, where)
    assert jax.tree.structure(homes) == jax.tree.structure(state)
    adam = homes[1].inner_state[0]
    assert adam.mu == where.trained and adam.nu == where.trained and adam.count == P()


def test_refused():
    adapter = abstract(jpeft.LoRA(rank=2))
    with pytest.raises(jpeft.ShardingError, match="nothing in the params says where it lives"):
        jpeft.shardings({"q": {"kernel": jnp.ones(Q.shape)}}, adapter)
    with pytest.raises(jpeft.ShardingError, match="'q/kernel', which the params do not; nearest: 'k/kernel'"):
        jpeft.shardings({"k": {"kernel": SPLIT}}, adapter)
    homes = [NamedSharding(jax.make_mesh((1,), (name,), axis_types=(AxisType.Auto,)), P()) for name in "ab"]
    with pytest.raises(jpeft.ShardingError, match="several meshes"):
        jpeft.shardings({"q": {"kernel": homes[0]}, "k": {"kernel": homes[1]}}, adapter)


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "ia3", "explicit", "gathers"])
def test_on_eight_devices(method):
    paths = os.pathsep.join(map(str, (HERE, HERE.parent, HERE.parent / "interop")))
    command = [sys.executable, "-W", "error", HERE / "eight_devices.py", method]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [f"{method}:{mesh}" for mesh in ("8x1", "1x8", "2x4")]


PROGRAM = """HloModule jit_step, num_partitions=4

%body (p: (f32[8,6], s32[])) -> (f32[8,6], s32[]) {
  %gathered = f32[1,8,24]{2,1,0} all-gather(f32[1,8,6]{2,1,0} %w), channel_id=1, dimensions={2}, OP
}

ENTRY %main.1 (x: f32[8,6]) -> f32[8,6] {
  %loop = (f32[8,6]{1,0}, s32[]) while((f32[8,6]{1,0}, s32[]) %t), condition=%c, body=%body, TRIPS
  %sum = (f32[5]{0}, bf16[2,7]{1,0:T(8,128)(2,1)}) all-reduce-start(f32[5]{0} %a, bf16[2,7]{1,0} %b), to_apply=%add
}
"""
PROGRAM = PROGRAM.replace("OP", 'metadata={op_name="jit(step)/dot"}')
PROGRAM = PROGRAM.replace("TRIPS", 'backend_config={"known_trip_count":{"n":"3"}}')


def test_the_programs_text_is_read():
    inside, outside = collectives(PROGRAM)
    assert (inside.kind, inside.times, inside.bytes, inside.name) == ("all-gather", 3, 4 * 8 * 24, "jit(step)/dot")
    assert (outside.kind, outside.times, outside.bytes) == ("all-reduce", 1, 28)
    assert outside.shapes == (("f32", (5,)), ("bf16", (2, 7)))
    assert "all-gather of f32[1, 8, 24] (768 bytes a device, 3 times) for jit(step)/dot" in str(inside)


def test_an_asynchronous_one_counts_once_and_a_loop_by_its_condition():
    condition = """
%c (p: (f32[8,6], s32[])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}
"""
    text = PROGRAM.replace('backend_config={"known_trip_count":{"n":"3"}}', "metadata={}").replace(
        "\nENTRY", condition + "\nENTRY"
    )
    done = text.replace("  %sum =", "  %again = f32[1,8,24] all-gather(%w), channel_id=1\n  %sum =")
    assert [one.times for one in collectives(done)] == [5, 1]


def test_a_base_that_moves_is_named():
    plain = PROGRAM.replace("all-gather(", "add(")
    home = NamedSharding(AbstractMesh((2, 2), ("x", "y")), P())
    base = lambda *shape: {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=home)}
    for shape in ((8, 24), (24, 8), (16, 24), (5, 8, 24), (8, 4, 24), (8, 2, 12), (2, 4, 24), (3, 8, 4, 6)):
        with pytest.raises(AssertionError, match=r"all-gather of f32\[1, 8, 24\]"):
            assert_base_stays(PROGRAM, plain, base(*shape))
    for shape in ((9, 24), (8, 120), (192,)):
        assert_base_stays(PROGRAM, plain, base(*shape))
    assert_base_stays(PROGRAM, PROGRAM, base(8, 24))
    with pytest.raises(AssertionError):  # oftener than before
        assert_base_stays(PROGRAM.replace('"n":"3"', '"n":"4"'), PROGRAM, base(8, 24))
