"""The geometry that `jpeft.kernels` reads off a program, and what it takes for the head."""

import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jpeft
import zoo

D, HEADS, HEAD, FF, LAYERS = zoo.D, zoo.HEADS, zoo.HEAD, zoo.FF, zoo.LAYERS


@pytest.mark.parametrize("name", zoo.CASES)
def test_finds_every_weight_and_the_head(name):
    case = zoo.get(name)
    assert sorted(case.found) == sorted(case.kernels)
    assert {path for path, kernel in case.found.items() if kernel.head} == set(case.heads)


@pytest.mark.parametrize("name", zoo.CASES)
def test_all_linear_is_every_product_but_the_head(name):
    case = zoo.get(name)
    products = {path for path, kernel in case.found.items() if kernel.kind == "product" and not kernel.head}
    if not products:
        with pytest.raises(jpeft.SpecError, match="all-linear"):
            jpeft.init(jax.random.key(0), jpeft.LoRA(), case.params, kernels=case.found)
    else:
        adapter = jax.eval_shape(lambda: jpeft.init(jax.random.key(0), jpeft.LoRA(), case.params, kernels=case.found))
        assert {site.path for site in adapter.sites} == products


# contracted, output, batch
AXES = {
    ("linen_dense", "up/kernel"): ((0,), (1,), ()),
    ("linen_scan", "layers/mlp/up/kernel"): ((1,), (2,), (0,)),
    ("linen_scan_axis_1", "layers/mlp/up/kernel"): ((0,), (2,), (1,)),
    ("linen_scan_axis_1_heads", "layers/query/kernel"): ((0,), (2, 3), (1,)),
    ("linen_scan_axis_1_heads", "layers/out/kernel"): ((0, 2), (3,), (1,)),
    ("linen_shared_in_scan", "layer/mlp/dense/kernel"): ((0,), (1,), ()),
    ("linen_tied", "embed/embedding"): ((0,), (1,), ()),
    ("linen_attention", "query/kernel"): ((0,), (1, 2), ()),
    ("linen_attention", "out/kernel"): ((0, 1), (2,), ()),
    ("linen_dense_general", "middle/kernel"): ((0,), (1, 2), ()),
    ("linen_dense_general", "batched/kernel"): ((1,), (2,), (0,)),
    ("linen_conv_2d", "strided/kernel"): ((0, 1, 2), (3,), ()),
    ("linen_conv_grouped", "kernel"): ((0, 1), (2,), ()),
    ("linen_experts", "down/kernel"): ((1,), (2,), (0,)),
    ("nnx_scan", "layers/up/kernel"): ((1,), (2,), (0,)),
    ("nnx_scan_axis_1", "layers/up/kernel"): ((0,), (2,), (1,)),
    ("nnx_shared", "first/kernel"): ((0,), (1,), ()),
    ("nnx_shared", "layers/down/kernel"): ((1,), (2,), (0,)),
    ("einsum_attention", "o"): ((0, 1), (2,), ()),
    ("gemma_attention", "kv"): ((2,), (0, 1, 3), ()),
    ("gemma_attention", "q"): ((1,), (0, 2), ()),
    ("gemma_gating", "gating"): ((1,), (0, 2), ()),
    ("gemma_gating", "transposed"): ((2,), (0, 1), ()),
    ("gemma_gating", "sliced"): ((1,), (2,), (0,)),
    ("grouped_attention", "q"): ((0,), (1, 2, 3), ()),
    ("grouped_attention", "attn_vec"): ((0, 1, 2), (3,), ()),
    ("fused_kv_by_slices", "kv"): ((2,), (1, 3), (0,)),
    ("experts_batched", "up"): ((1,), (2,), (0,)),
    ("experts_all", "up"): ((1,), (0, 2), ()),
    ("experts_transposed", "up"): ((0,), (2,), (1,)),
    ("batches_joined", "up"): ((2,), (3,), (0, 1)),
    ("experts_ragged", "up"): ((1,), (2,), (0,)),
    ("experts_ragged", "router"): ((0,), (1,), ()),
    ("experts_ragged_swapped", "up"): ((2,), (1,), (0,)),
    ("experts_ragged_swapped", "down"): ((2,), (1,), (0,)),
    ("experts_ragged_moved", "w"): ((0,), (2, 3), (1,)),
    ("experts_ragged_scanned", "up"): ((2,), (3,), (0, 1)),
    ("experts_ragged_vmapped", "w"): ((2,), (3,), (0, 1)),
    ("experts_ragged_rows", "down"): ((1,), (2,), (0,)),
    ("transposed", "w"): ((1,), (0,), ()),
    ("transposed", "square"): ((1,), (0,), ()),
    ("square", "w"): ((0,), (1,), ()),
    ("reshaped", "split"): ((0,), (1,), ()),
    ("weight_first", "up"): ((1,), (0,), ()),
    ("size_one_axes", "one_head"): ((0,), (1, 2), ()),
    ("size_one_axes", "joined"): ((0,), (1, 2), ()),
    ("size_one_axes", "out_1"): ((0,), (1,), ()),
    ("size_one_axes", "in_1"): ((0,), (1,), ()),
    ("stacks_of_one", "scanned"): ((1,), (2,), (0,)),
    ("stacks_of_one", "indexed"): ((1,), (2,), (0,)),
    ("stacks_of_one", "joined"): ((2,), (3,), (0, 1)),
    ("stacked_by_hand", "v"): ((0,), (2,), (1,)),
    ("stacked_in_fori", "w"): ((1,), (2,), (0,)),
    ("scan_of_scan", "w"): ((2,), (3,), (0, 1)),
    ("lookups", "a"): ((0,), (1,), ()),
    ("custom_vjp", "odd"): ((0,), (1,), ()),
}


@pytest.mark.parametrize(("name", "path"), AXES)
def test_axes(name, path):
    kernel = zoo.get(name).found[path]
    assert (kernel.contracted, kernel.output, kernel.batch) == AXES[name, path]


@pytest.mark.parametrize(
    ("name", "path", "experts"),
    [
        ("linen_experts", "down/kernel", (0,)),
        ("experts_transposed", "up", (1,)),
        ("experts_ragged_moved", "w", (1,)),
        ("experts_ragged_scanned", "up", (0,)),
        ("experts_all", "up", ()),
        ("scan_of_scan", "w", ()),
        ("nnx_scan", "layers/up/kernel", ()),
        ("stacked_by_hand", "v", ()),
    ],
)
def test_experts_are_told_from_layers(name, path, experts):
    """A product goes over experts; layers are scanned, or taken one by one."""
    assert zoo.get(name).found[path].experts == experts


def test_experts_are_batch_axes():
    with pytest.raises(jpeft.KernelError, match=r"experts \(1,\) must be some of the batch axes; found \(0,\)"):
        jpeft.Kernel((2, 3, 4), (1,), (2,), (0,), experts=(1,))


@pytest.mark.parametrize(
    ("name", "kind"), [("linen_dense", "product"), ("linen_tied", "embedding"), ("linen_conv_1d", "conv")]
)
def test_kinds(name, kind):
    case = zoo.get(name)
    assert case.found[case.kernels[0]].kind == kind


def test_groups_of_a_convolution():
    assert zoo.get("linen_conv_grouped").found["kernel"].groups == 2


def test_uses_in_the_order_met():
    assert zoo.get("linen_tied").found["embed/embedding"].uses == ("lookup", "product")
    assert zoo.get("linen_shared").found["dense/kernel"].uses == ("product", "product")
    assert zoo.get("both_ways").found["w"].uses == ("product", "abs")


def test_leaves_that_meet_no_product_say_why():
    assert (
        dict(zoo.get("carried").found.unknown)["changed"] == "is read, but by no product, lookup or convolution: scan"
    )
    assert "add" in dict(zoo.get("lookups").found.unknown)["d"]
    biases = [why for path, why in zoo.get("linen_scan").found.unknown if path.endswith("bias")]
    assert biases == ["is read, but by no product, lookup or convolution: add"] * 2
    unread = jpeft.kernels(lambda p, x: x @ p["w"], {"w": zoo.normal(8, 8), "spare": zoo.normal(8, 8)}, zoo.X)
    assert dict(unread.unknown) == {"spare": "is never read"}


def test_uses_that_disagree():
    fn = lambda p, x: (
        x @ p["w"],
        jnp.einsum("btd,def->btef", x, p["w"].reshape(8, 2, 4)),
        x[..., :4] @ p["w"].reshape(4, 16),
    )
    found = jpeft.kernels(lambda p, x: (fn(p, x), x @ p["v"]), {"w": zoo.normal(8, 8), "v": zoo.normal(8, 8)}, zoo.X)
    assert "part" in dict(found.unknown)["w"] or "different geometry" in dict(found.unknown)["w"]
    with pytest.raises(jpeft.KernelError, match=r"target 'w': 'w' (is used in part|has uses)"):
        jpeft.init(
            jax.random.key(0), jpeft.LoRA(targets=["w"]), {"w": zoo.normal(8, 8), "v": zoo.normal(8, 8)}, kernels=found
        )


def test_a_vector_is_no_kernel():
    """Frequencies times positions, a gate: dot_generals both, with nothing to factor."""
    params = {"frequencies": zoo.normal(4), "gate": zoo.normal(8), "gates": zoo.normal(3, 8), "w": zoo.normal(8, 8)}

    def fn(p, x):
        x = x + jnp.einsum("t,f->tf", jnp.arange(3.0), p["frequencies"]).sum() + (x @ p["gate"])[..., None]
        return jnp.tanh(jax.lax.scan(lambda x, g: (x + (x @ g)[..., None], None), x, p["gates"])[0] @ p["w"])

    found = jpeft.kernels(fn, params, zoo.X)
    assert list(found) == ["w"]
    assert dict(found.unknown) == {"gates": "is a vector to dot_general: contracted (1,), output ()"}


def test_only_parameters_of_a_state():
    """A buffer that meets a product, kept in another kind of variable, is no target."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(D, D, rngs=rngs)
            self.fixed = nnx.BatchStat(zoo.normal(D, D))

        def __call__(self, x):
            return jnp.tanh(self.linear(x) @ self.fixed[...])

    graph, state = nnx.split(Net(nnx.Rngs(0)))
    assert list(jpeft.kernels(lambda state, x: nnx.merge(graph, state)(x), state, zoo.X)) == ["linear/kernel"]


def test_leaves_that_are_no_arrays():
    fn = lambda p, x: jnp.tanh(p["scale"] * x @ p["w"])
    assert list(jpeft.kernels(fn, {"w": zoo.normal(8, 8), "scale": 2.0, "none": None}, zoo.X)) == ["w"]


def test_nothing_is_allocated():
    """A model of a terabyte, as shapes."""
    model = nn.Sequential([nn.Dense(2**19, use_bias=False), jnp.tanh, nn.Dense(2**19, use_bias=False), jnp.tanh])
    x = jax.ShapeDtypeStruct((1, 2**18), jnp.float32)
    start = time.perf_counter()
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    found = jpeft.kernels(model.apply, variables, x)
    assert found["layers_2/kernel"].shape == (2**19, 2**19)
    assert time.perf_counter() - start < 20
    adapter = jax.eval_shape(
        lambda: jpeft.init(jax.random.key(0), jpeft.LoRA(rank=1), variables["params"], kernels=found)
    )
    assert jpeft.count(variables["params"], adapter).trainable == 2**18 + 2**19 + 2 * 2**19


def test_variables_and_keywords():
    """`model.apply` takes all collections; paths start below `params`."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            return jnp.tanh(nn.Dense(4, name="dense")(nn.BatchNorm(use_running_average=not train, name="norm")(x)))

    variables = jax.eval_shape(lambda: Net().init(jax.random.key(0), zoo.X, train=True))
    found = jpeft.kernels(Net().apply, variables, zoo.X, train=True, mutable=["batch_stats"])
    assert list(found) == ["dense/kernel"]


def test_a_module_called_params_in_a_state():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.params = nnx.Linear(D, D, rngs=rngs)

        def __call__(self, x):
            return jnp.tanh(self.params(x))

    graph, state = nnx.split(Net(nnx.Rngs(0)))
    found = jpeft.kernels(lambda state, x: nnx.merge(graph, state)(x), state, zoo.X)
    assert list(found) == ["params/kernel"]
    jpeft.init(jax.random.key(0), jpeft.LoRA(), state, kernels=found)


def test_not_the_params():
    with pytest.raises(jpeft.KernelError, match="are these its params"):
        jpeft.kernels(lambda x, params: x["x"].sum() + params["w"], {"x": zoo.X}, {"w": zoo.X})


def test_prints_a_table():
    table = str(zoo.get("linen_lm").found)
    assert "lm_head/kernel   product (head) (8, 11) contracted=(0,) output=(1,)" in table.splitlines()
    assert "embed/embedding  embedding (11, 8) contracted=(0,) output=(1,)" in table.splitlines()


@pytest.mark.parametrize("axes", [((0,), (0, 1)), ((0,), ()), ((0, 1), (2,)), ((0,), (2,)), ((1, 0), ())])
def test_axes_by_hand_are_checked(axes):
    with pytest.raises(jpeft.KernelError, match="each must be contracted, output or batch, exactly once"):
        jpeft.Kernel((3, 2), *axes)
