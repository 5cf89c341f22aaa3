"""What a method is, its record says: the name of a leaf counts for nothing. The methods here are made up."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from agreement import QUICK, assert_close, outputs_and_gradients, perturbed
from jpeft.method import Method, for_rows
from jpeft.methods import METHODS
from jpeft.spec import Spec

# W' = W (1 + diag(gain)),   y = x W' + b + shift: reads the weight, and adds to the result.


@dataclass(frozen=True, repr=False)
class Bent(Spec):
    method = "bent"


@dataclass(frozen=True, repr=False)
class BentAndShifted(Spec):
    method = "bent-and-shifted"


@dataclass(frozen=True, repr=False)
class DenseAndShifted(Spec):
    method = "dense-and-shifted"


def _matrices(leaves, kernel):
    return {name: leaf.reshape(*kernel.batch_shape, kernel.fan_out) for name, leaf in leaves.items()}


def _transform(w, leaves):
    return w * (1 + leaves["gain"])[..., None, :] if "gain" in leaves else w * (1 + leaves["gain_in"])[..., None]


def _product(x, y, w, leaves, *, forward_mode):
    if "gain_in" in leaves:
        return y + (x * for_rows(leaves["gain_in"], x)) @ w()
    return y + (x @ w()) * for_rows(leaves["gain"], y)


def _lookup(meeting, y, w, leaves):
    return y + meeting.take(w() * leaves["gain"][..., None, :])


def _shapes(*names):
    return lambda spec, site: {n: (*site.kernel.batch_shape, *site.kernel.sizes(site.kernel.output)) for n in names}


def _method(*names, **more):
    shapes = _shapes(*names)
    init = lambda key, site, spec, weight, dtype: {n: jnp.zeros(s, dtype) for n, s in shapes(spec, site).items()}
    axes = lambda kernel: {name: (*kernel.batch, *kernel.output) for name in names}
    return Method(_transform, _matrices, init, shapes, axes, **more)


def _shift(leaves):
    return leaves.get("shift")


FAST = {"product": _product, "lookup": _lookup, "transposed": lambda leaves: {"gain_in": leaves["gain"]}}
MADE_UP = {
    Bent: _method("gain", **FAST),
    BentAndShifted: _method("gain", "shift", bias=_shift, **FAST),
    DenseAndShifted: _method("gain", "shift", bias=_shift),
}


@pytest.fixture(autouse=True)
def made_up(monkeypatch):
    for spec, method in MADE_UP.items():
        monkeypatch.setitem(METHODS, spec.method, method)


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed + sum(shape)).standard_normal(shape), jnp.float32)


def scanned(params, x):
    return jax.lax.scan(lambda x, p: (jnp.tanh(x @ p["kernel"] + p["bias"]), None), x, params)[0]


def convolution(params, x):
    numbers = ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(x, params["kernel"], (1,), "SAME", dimension_numbers=numbers) + params["bias"]


def heads(params, x):
    return jnp.einsum("bte,ehd->bhtd", x, params["kernel"]) + params["bias"][:, None]


def of_each_expert(params, x):
    return jnp.einsum("ebi,eio->ebo", x, params["kernel"]) + params["bias"][:, None]


def sorted_by_expert(params, x):
    sizes = jnp.array([1, 3])
    return jax.lax.ragged_dot(x, params["kernel"], sizes) + params["bias"][jnp.array([0, 1, 1, 1])]


kernel = jpeft.Kernel
USES = {  # a function of params and x, the kernel, the shape of x
    "product": (lambda p, x: x @ p["kernel"] + p["bias"], kernel((5, 4), (0,), (1,)), (3, 5)),
    "square": (lambda p, x: x @ p["kernel"] + p["bias"], kernel((4, 4), (0,), (1,)), (3, 4)),
    "stored transposed": (lambda p, x: x @ p["kernel"].T + p["bias"], kernel((4, 5), (1,), (0,)), (3, 5)),
    "weight first": (
        lambda p, x: jnp.einsum("io,bi->ob", p["kernel"], x) + p["bias"][:, None],
        kernel((5, 4), (0,), (1,)),
        (3, 5),
    ),
    "heads": (heads, kernel((5, 2, 3), (0,), (1, 2)), (3, 2, 5)),
    "scan": (scanned, kernel((2, 4, 4), (1,), (2,), (0,)), (3, 4)),
    "experts": (of_each_expert, kernel((2, 5, 4), (1,), (2,), (0,), experts=(0,)), (2, 3, 5)),
    "ragged": (sorted_by_expert, kernel((2, 5, 4), (1,), (2,), (0,), experts=(0,)), (4, 5)),
    "lookup": (
        lambda p, x: p["kernel"][jnp.array([3, 0, 3])] + p["bias"] + x,
        kernel((7, 4), (0,), (1,), kind="embedding"),
        (4,),
    ),
    "convolution": (convolution, kernel((3, 2, 4), (0, 1), (2,), kind="conv"), (2, 6, 2)),
}
FACTORED_ALONE = ("ragged", "lookup", "convolution")  # where a dense weight's bias has no product to be added to


def made(spec, geometry):
    bias = draw(*geometry.batch_shape, *geometry.sizes(geometry.output), seed=1)
    params = {"kernel": draw(*geometry.shape), "bias": bias}
    adapter = jpeft.init(jax.random.key(0), spec(targets=".*"), params, kernels=jpeft.Kernels((("kernel", geometry),)))
    return params, perturbed(adapter)


def agree(function, params, adapter, x):
    attached = lambda params, trained: jpeft.attach(params, adapter.replace(trained=trained))
    applied = lambda params, trained: jpeft.apply(params, adapter.replace(trained=trained))
    fast = lambda trained, params, x: jpeft.lift(function)(attached(params, trained), x)
    slow = lambda trained, params, x: function(applied(params, trained), x)
    found = outputs_and_gradients(fast, adapter.trained, params, x, options=QUICK)
    assert_close(found, outputs_and_gradients(slow, adapter.trained, params, x, options=QUICK))


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("spec", MADE_UP, ids=lambda spec: spec.method)
def test_lift_is_apply(spec, use):
    function, geometry, shape = USES[use]
    params, adapter = made(spec, geometry)
    if spec is DenseAndShifted and use in FACTORED_ALONE:
        with pytest.raises(jpeft.LiftError, match="'kernel': its 'dense-and-shifted' adapter adds a bias"):
            jpeft.lift(function)(jpeft.attach(params, adapter), draw(*shape, seed=2))
    else:
        agree(function, params, adapter, draw(*shape, seed=2))


@pytest.mark.parametrize("spec", [BentAndShifted, DenseAndShifted], ids=lambda spec: spec.method)
def test_a_scaled_result_scales_the_bias(spec):
    """One adapter adds to the result, another scales what came of it."""
    function, geometry, shape = USES["product"]
    params, adapter = made(spec, geometry)
    scaling = perturbed(made(jpeft.IA3, geometry)[1], seed=4)
    x = draw(*shape, seed=2)
    both = [adapter, scaling]
    assert_close(
        jpeft.lift(function)(jpeft.attach(params, both), x), function(jpeft.apply(params, both), x), tolerance=1e-5
    )


DENSE = {
    "another operation": lambda p, x: x @ jnp.tanh(p["kernel"]) + p["bias"],
    "a sum": lambda p, x: p["kernel"].sum() + x.sum() + p["bias"],
    "transposed": lambda p, x: x[:, :4] @ p["kernel"].T + p["bias"].sum(),
}


@pytest.mark.parametrize("use", DENSE)
@pytest.mark.parametrize("spec", [BentAndShifted, DenseAndShifted], ids=lambda spec: spec.method)
def test_a_bias_is_never_lost_in_a_dense_use(spec, use):
    """Not a layer's result, so there is nothing to add the bias to: an error, whatever the leaf is called."""
    params, adapter = made(spec, USES["product"][1])
    with pytest.raises(jpeft.LiftError, match=r"adds a bias to the layer's result, and this use is dense.*jpeft.apply"):
        jpeft.lift(DENSE[use])(jpeft.attach(params, adapter), draw(3, 5, seed=2))


TIED = {
    "x @ E.T": lambda p, x: p["kernel"][jnp.array([1, 1, 0])] + x @ p["kernel"].T @ p["kernel"],
    "einsum bd,vd": lambda p, x: jnp.einsum("bd,vd->bv", x, p["kernel"]),
    "einsum vd,bd": lambda p, x: jnp.einsum("vd,bd->vb", p["kernel"], x),
    "einsum bd,vd->vb": lambda p, x: jnp.einsum("bd,vd->vb", x, p["kernel"]),
    "reshaped": lambda p, x: jnp.einsum("bhd,vhd->bv", x.reshape(-1, 2, 2), p["kernel"].reshape(-1, 2, 2)),
    "other heads first": lambda p, x: jnp.einsum("bdh,vhd->bv", x.reshape(-1, 2, 2), p["kernel"].reshape(-1, 2, 2)),
}


@pytest.mark.parametrize("use", TIED)
@pytest.mark.parametrize("rows", [7, 4])
def test_w_is_the_weight_of_the_product_at_hand(use, rows):
    """A tied head reads the table transposed: `w()` is so, too, where the table is square as well."""
    params, adapter = made(Bent, kernel((rows, 4), (0,), (1,), kind="embedding"))
    agree(TIED[use], params, adapter, draw(3, 4, seed=2))


def test_w_of_transposed_experts():
    """A batch axis that comes out of the product, and one that is scanned, both transposed."""
    geometry = kernel((2, 5, 4), (1,), (2,), (0,), experts=(0,))
    params, adapter = made(Bent, geometry)
    agree(lambda p, x: jnp.einsum("ebo,eio->ebi", x, p["kernel"]), params, adapter, draw(2, 3, 4, seed=2))
    agree(lambda p, x: jnp.einsum("bo,eio->bei", x, p["kernel"]), params, adapter, draw(3, 4, seed=2))
    agree(lambda p, x: jax.lax.map(lambda w: x @ w.T, p["kernel"]), params, adapter, draw(3, 4, seed=2))


def test_scaled_results_of_all_experts_transposed():
    """IA³'s vector scales the input of the transposed product, which is not repeated for each expert then."""
    geometry = kernel((2, 5, 4), (1,), (2,), (0,), experts=(0,))
    params, adapter = made(jpeft.IA3, geometry)
    agree(lambda p, x: jnp.einsum("bo,eio->bei", x, p["kernel"]), params, adapter, draw(3, 4, seed=2))


PERMUTED = {  # a weight that meets the input with its axes in another order than its own
    "rows of a table": (
        lambda p, x: p["kernel"].reshape(2, 3, 4).transpose(1, 0, 2).reshape(6, 4)[jnp.array([0, 3, 5])] + x,
        kernel((6, 4), (0,), (1,), kind="embedding"),
        (4,),
    ),
    "features of a table": (
        lambda p, x: p["kernel"].transpose(0, 2, 1).reshape(6, 6)[jnp.array([[0, 3, 5]])] + x,
        kernel((6, 2, 3), (0,), (1, 2), kind="embedding"),
        (6,),
    ),
    "a convolution's channels out": (
        lambda p, x: convolution(
            {"kernel": p["kernel"].transpose(0, 1, 3, 2).reshape(3, 2, 6), "bias": p["bias"].T.reshape(6)}, x
        ),
        kernel((3, 2, 2, 3), (0, 1), (2, 3), kind="conv"),
        (2, 6, 2),
    ),
    "a convolution's channels in": (
        lambda p, x: convolution(p | {"kernel": p["kernel"].transpose(0, 2, 1, 3).reshape(3, 6, 4)}, x),
        kernel((3, 2, 3, 4), (0, 1, 2), (3,), kind="conv"),
        (2, 6, 6),
    ),
}


@pytest.mark.parametrize("use", PERMUTED)
@pytest.mark.parametrize("spec", [jpeft.LoRA, jpeft.IA3, Bent], ids=lambda spec: spec.method)
def test_axes_in_another_order(spec, use):
    function, geometry, shape = PERMUTED[use]
    params, adapter = made(spec, geometry)
    agree(function, params, adapter, draw(*shape, seed=2))
    report = str(jpeft.coverage(function, jpeft.attach(params, adapter), draw(*shape, seed=2)))
    assert "0 dense" in report
