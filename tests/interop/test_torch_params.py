import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from jpeft.errors import WeightsError
from jpeft.tree import flatten
from jpeft_interop.torch_params import params_from_torch, params_to_torch, tensor_to_numpy, torch_table
from jpeft_interop.torch_table import TorchKey, by_key, nest, to_jax, to_jax_axes, to_torch, to_torch_axes


class Zoo(nn.Module):
    """One of everything, a tie, buffers of both kinds, and a module used twice."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.square = nn.Linear(6, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 5, bias=False), Conv1D(7, 6)])
        self.conv = nn.ModuleList([nn.Conv1d(4, 6, 3), nn.Conv2d(4, 8, (2, 3), groups=2), nn.Conv3d(2, 3, 2)])
        self.up = nn.ConvTranspose2d(4, 6, 3)
        self.norm = nn.LayerNorm(6)
        self.attn = nn.MultiheadAttention(6, 2)
        self.gru = nn.GRU(6, 4)
        self.batch = nn.BatchNorm1d(6)
        self.scale = nn.Parameter(torch.randn(()))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.again = self.square
        self.register_buffer("kept", torch.randn(3))
        self.register_buffer("not_kept", torch.randn(3), persistent=False)
        self.to(dtype)


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def reseeded(make, seed):
    torch.manual_seed(seed)
    module = make()
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.is_floating_point():
            tensor.data.copy_(torch.randn(tensor.shape))
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_round_trip_is_exact(dtype):
    module = reseeded(lambda: Zoo(dtype), 0)
    params = params_from_torch(module)
    other = reseeded(lambda: Zoo(dtype), 1)
    state = params_to_torch(params, other)
    own_buffers = {
        name: bits(value) for name, value in other.state_dict().items() if name in dict(other.named_buffers())
    }
    other.load_state_dict(state, strict=True)
    for (name, left), (_, right) in zip(module.named_parameters(), other.named_parameters(), strict=True):
        assert left.dtype == right.dtype and bits(left) == bits(right), name
    assert own_buffers and all(bits(state[name]) == value for name, value in own_buffers.items())
    assert "not_kept" not in state


def test_kinds_are_told_by_type_not_shape():
    table = torch_table(Zoo())
    assert table["square/kernel"] == TorchKey("square.weight", "linear", ("again.weight",))
    assert table["layers/1/kernel"] == TorchKey("layers.1.weight", "conv1d")
    assert table["embed/embedding"] == TorchKey("embed.weight", "embedding", ("head.weight",))
    assert [table[f"conv/{i}/kernel"].kind for i in range(3)] == ["conv"] * 3
    assert {"up/weight", "norm/weight", "attn/in_proj_weight", "attn/out_proj/kernel", "gru/weight_ih_l0"} <= set(table)
    assert "head/kernel" not in table and not any(path.startswith("again") for path in table)


def test_leaves_have_jax_orientation():
    module = reseeded(Zoo, 2)
    flat = flatten(params_from_torch(module))
    np.testing.assert_array_equal(flat["square/kernel"], module.square.weight.detach().numpy().T)
    np.testing.assert_array_equal(flat["layers/1/kernel"], module.layers[1].weight.detach().numpy())
    np.testing.assert_array_equal(flat["embed/embedding"], module.embed.weight.detach().numpy())
    np.testing.assert_array_equal(flat["up/weight"], module.up.weight.detach().numpy())
    assert flat["conv/1/kernel"].shape == (2, 3, 2, 8)


@pytest.mark.parametrize(("index", "dims"), [(0, "NCH"), (1, "NCHW"), (2, "NCHWD")])
def test_conv_kernels_convolve_as_torch_does(index, dims):
    module = reseeded(Zoo, 3).conv[index]
    x = torch.randn(2, module.in_channels, *range(5, 5 + len(dims) - 2))
    params = params_from_torch(module)
    spatial = dims[2:]
    out = jax.lax.conv_general_dilated(
        jnp.asarray(x.numpy()),
        params["kernel"],
        (1,) * len(spatial),
        "VALID",
        dimension_numbers=(dims, spatial + "IO", dims),
        feature_group_count=module.groups,
    )
    out = out + params["bias"].reshape(-1, *[1] * len(spatial))
    np.testing.assert_allclose(out, module(x).detach().numpy(), atol=1e-5)


def test_the_table_is_invertible():
    table = torch_table(Zoo())
    paths = by_key(table)
    assert set(paths) == {name for name, _ in Zoo().named_parameters(remove_duplicate=False)}
    assert all(table[path].path == path for path in paths.values())
    for kind in ("linear", "conv", "conv1d", "embedding", "other"):
        array = np.arange(24).reshape(2, 3, 4) if kind != "linear" else np.arange(6).reshape(2, 3)
        row = TorchKey("w.weight", kind)
        np.testing.assert_array_equal(to_torch(to_jax(array, row), row), array)
        assert [to_jax_axes(kind, array.ndim)[i] for i in to_torch_axes(kind, array.ndim)] == list(range(array.ndim))


def test_integers_and_special_values_survive():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.i64 = nn.Parameter(torch.tensor([2**62, -1]), requires_grad=False)
            self.u8 = nn.Parameter(torch.tensor([255, 0], dtype=torch.uint8), requires_grad=False)
            self.flag = nn.Parameter(torch.tensor([True, False]), requires_grad=False)
            self.nan = nn.Parameter(torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]))
            self.bf = nn.Parameter(torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16))
            self.f8 = nn.Parameter(torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn), requires_grad=False)

    module = Odd()
    params = params_from_torch(module)
    assert params["bf"].dtype == jnp.bfloat16 and params["i64"].dtype == np.int64
    state = params_to_torch(params, module)
    for name, tensor in module.named_parameters():
        assert state[name].dtype == tensor.dtype and bits(state[name]) == bits(tensor), name


def test_params_do_not_share_torch_memory():
    module = reseeded(Zoo, 4)
    params = params_from_torch(module)
    before = jax.tree.map(lambda x: np.array(x), params)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(7)
    jax.tree.map(np.testing.assert_array_equal, before, params)
    state = params_to_torch(params, module)
    state["kept"].fill_(0)
    assert module.kept.abs().sum() > 0


def test_tied_parameters_are_written_under_every_name():
    module = reseeded(Zoo, 5)
    state = params_to_torch(params_from_torch(module), module)
    assert state["head.weight"] is state["embed.weight"] and state["again.bias"] is state["square.bias"]


def test_ties_by_memory_are_ties():
    module = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    module["b"].weight.data = module["a"].weight.data
    assert torch_table(module)["a/kernel"].ties == ("b.weight",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p["square"].pop("kernel"), r"lack 'square/kernel'"),
        (
            lambda p: p["square"].update(kernal=p["square"].pop("kernel")),
            r"lack 'square/kernel'.*nearest.*'square/kernal'",
        ),
        (lambda p: p.update(extra=jnp.ones(3)), r"hold 'extra'"),
        (
            lambda p: p["layers"]["0"].update(kernel=p["layers"]["0"]["kernel"].T),
            r"'layers/0/kernel'.*\(6, 5\).*\(5, 6\)",
        ),
        (
            lambda p: p["norm"].update(bias=p["norm"]["bias"].astype(jnp.bfloat16)),
            r"'norm/bias'.*float32.*bfloat16.*cast",
        ),
    ],
)
def test_params_that_do_not_fit_are_refused(change, message):
    module = Zoo()
    params = params_from_torch(module)
    change(params)
    with pytest.raises(WeightsError, match=message):
        params_to_torch(params, module)


def test_peft_modules_are_refused():
    import peft

    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"]))
    with pytest.raises(WeightsError, match=r"unload\(\).*merge_and_unload\(\).*load_peft"):
        params_from_torch(model)
    with pytest.raises(WeightsError, match="unload"):
        params_from_torch(model.base_model.model)
    assert set(flatten(params_from_torch(model.unload()))) == {"0/kernel", "0/bias"}


def packed():
    linear = nn.Linear(8, 4)
    linear.weight = nn.Parameter(torch.zeros(16, 1, dtype=torch.uint8), requires_grad=False)
    return linear


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (lambda: nn.Linear(3, 3, device="meta"), "meta"),
        (lambda: nn.LazyLinear(3), "lazy|shape"),
        (packed, "dequantise"),
        (lambda: nn.ModuleDict({"a/b": nn.Linear(2, 2)}), "'/'"),
    ],
)
def test_what_can_not_be_read_is_refused(module, message):
    with pytest.raises(WeightsError, match=message):
        params_from_torch(module())


def test_two_parameters_with_one_path_are_refused():
    linear = nn.Linear(2, 2)
    linear.register_parameter("kernel", nn.Parameter(torch.zeros(2, 2)))
    with pytest.raises(WeightsError, match="'kernel'"):
        params_from_torch(linear)


def test_nest_refuses_a_leaf_above_a_leaf():
    with pytest.raises(WeightsError, match="below"):
        nest({"a": 1, "a/b": 2})
    with pytest.raises(WeightsError, match="below"):
        nest({"a/b": 2, "a": 1})


def test_tensor_values_of_views_are_read_right():
    base = torch.randn(6, 4, dtype=torch.bfloat16)
    view = base[::2].T
    expected = view.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(tensor_to_numpy(view, "view").view(np.int16), expected.view(np.int16))


def test_importing_imports_no_torch():
    code = "import sys, jpeft_interop.torch_params; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
