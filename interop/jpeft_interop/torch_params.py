"""The weights of any torch module as params, and back, exactly.

    params = params_from_torch(module)          # model.layers.0.self_attn.q_proj.weight, (out, in), becomes
    state  = params_to_torch(params, module)    # model/layers/0/self_attn/q_proj/kernel, (in, out); and back
    module.load_state_dict(state)

What a weight is, is told by its module's own type and never by its shape; `torch_table` says for each parameter what
was found. Values are moved bit for bit, bfloat16 and the float8 types through integer views. Buffers are no params: on
the way back the module's own are carried over.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from jpeft.errors import WeightsError
from jpeft.tree import flatten
from jpeft_interop.arrays import host, own
from jpeft_interop.fit import ArraySpec, require_same_dtypes, require_same_paths, require_same_shapes, some
from jpeft_interop.torch_table import Kind, TorchKey, make_table, nest, to_jax, to_jax_shape, to_torch

if TYPE_CHECKING:
    import torch

# dtypes that NumPy lacks, with the integers that carry their bits between torch and ml_dtypes
BIT_CARRIERS = {
    "bfloat16": np.dtype(np.int16),
    "float8_e4m3fn": np.dtype(np.uint8),
    "float8_e4m3fnuz": np.dtype(np.uint8),
    "float8_e5m2": np.dtype(np.uint8),
    "float8_e5m2fnuz": np.dtype(np.uint8),
    "float8_e8m0fnu": np.dtype(np.uint8),
}
NUMPY_DTYPES = ("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64") + (
    "float16",
    "float32",
    "float64",
    "complex64",
    "complex128",
)


def params_from_torch(module: torch.nn.Module) -> dict[str, Any]:
    """The parameters of `module` as a nested dict with string keys.

    Args:
      module: any torch module; its values are copied, and it is left as it is.

    Returns:
      Leaves by path, of the parameters' dtypes. Tied parameters are one leaf, at the first of their names. 64-bit
      leaves are NumPy arrays where JAX runs without x64.

    Raises:
      WeightsError: the module holds PEFT's layers, or a parameter has no values to read (meta, lazy, sharded, packed).

    Example:
      >>> import jax, torch
      >>> jax.tree.map(lambda x: x.shape, params_from_torch(torch.nn.Sequential(torch.nn.Linear(3, 5))))
      {'0': {'bias': (5,), 'kernel': (3, 5)}}
    """
    table = torch_table(module)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return nest({path: own(to_jax(tensor_to_numpy(parameters[row.key], row.key), row)) for path, row in table.items()})


def params_to_torch(params: Mapping[str, Any], module: torch.nn.Module) -> dict[str, Any]:
    """A state dict of `module` with the values of `params`; `module.load_state_dict(state)` takes it strictly.

    Args:
      params: what `params_from_torch(module)` gives, or the same paths, shapes and dtypes from elsewhere.
      module: says what belongs where. Its persistent buffers are copied into the state dict; it is not changed.

    Returns:
      Tensors on the CPU by torch name, tied parameters under all their names.

    Raises:
      WeightsError: a path is missing or unexpected, or a shape or dtype differs. Names path, expected and found.
    """
    table = torch_table(module)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    flat, where = flatten(params), f"this {type(module).__name__}"
    expected = {path: _expected(parameters[row.key], row) for path, row in table.items()}
    require_same_paths(flat, expected, where)
    require_same_shapes(flat, expected, where)
    fix = "cast the params (jax.tree.map(lambda x: x.astype(...), params)) or the module (module.to(...))"
    require_same_dtypes(flat, expected, where, fix)
    leaves = {name: path for path, row in table.items() for name in row.names}
    tensors = {path: numpy_to_tensor(to_torch(host(flat[path]), row)) for path, row in table.items()}
    state = module.state_dict()
    if renamed := [name for name in leaves if name not in state]:
        raise WeightsError(
            f"{where} saves {some(renamed)} under another name; pass the submodules that do not, one by one"
        )
    return {key: tensors[leaves[key]] if key in leaves else _copy(value) for key, value in state.items()}


def torch_table(module: torch.nn.Module) -> dict[str, TorchKey]:
    """Each parameter of `module` by the path of its leaf: its torch name or names, and what kind of weight it is.

    Raises:
      WeightsError: the module holds PEFT's layers, packed weights, or names that no path can hold.
    """
    refuse_peft(module)
    names: dict[Any, list[str]] = {}
    kinds: dict[Any, Kind] = {}
    for name, owner, parameter in _owned(module):
        _refuse_lazy(parameter, name)
        identity = _identity(parameter)
        kinds.setdefault(identity, _kind(owner, parameter, name))
        names.setdefault(identity, []).append(name)
    return make_table([TorchKey(first, kinds[identity], tuple(ties)) for identity, (first, *ties) in names.items()])


def parameter_kinds(module: torch.nn.Module) -> dict[str, Kind]:
    """Tell by its module's type what kind of weight each parameter is, under every name that it has.

    A tied parameter may be of another kind under each: an embedding, and the weight of a linear head.
    """
    return {name: _kind(owner, parameter, name) for name, owner, parameter in _owned(module)}


def refuse_peft(module: torch.nn.Module) -> None:
    """Refuse a PeftModel, or a module that PEFT has put its layers into: its weights are not a base model's.

    Raises:
      WeightsError: names the first such module and the calls that give a base and an adapter.
    """
    for name, child in module.named_modules():
        if any(cls.__module__.partition(".")[0] == "peft" for cls in type(child).__mro__):
            raise WeightsError(
                f"{name or 'the module'!r} is PEFT's {type(child).__name__}: an adapter is no params. The base is "
                "model.unload(), or model.merge_and_unload() to fold the adapter in; for the adapter, "
                "model.save_pretrained(folder) and jpeft_interop.load_peft(folder, params)"
            )


def _owned(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, torch.nn.Parameter]]:
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            yield f"{prefix}.{name}" if prefix else name, owner, parameter


def _identity(parameter: torch.nn.Parameter) -> Any:
    """The same for two parameters that are tied: one object, or one piece of memory seen alike."""
    if _unreadable(parameter) or parameter.numel() == 0:
        return id(parameter)
    return parameter.data_ptr(), tuple(parameter.shape), parameter.stride(), parameter.dtype


def _kind(owner: torch.nn.Module, parameter: torch.nn.Parameter, name: str) -> Kind:
    from torch import nn

    if name.rpartition(".")[2] != "weight":
        return "other"
    if isinstance(owner, nn.Linear):
        return _whole("linear", owner, parameter, name, (owner.out_features, owner.in_features))
    if isinstance(owner, nn.Embedding):
        return _whole("embedding", owner, parameter, name, (owner.num_embeddings, owner.embedding_dim))
    if isinstance(owner, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        per_group = owner.in_channels // owner.groups
        return _whole("conv", owner, parameter, name, (owner.out_channels, per_group, *owner.kernel_size))
    return "conv1d" if _is_transformers_conv1d(owner) else "other"


def _whole(
    kind: Kind, owner: torch.nn.Module, parameter: torch.nn.Parameter, name: str, shape: tuple[int, ...]
) -> Kind:
    """`kind`, unless the weight is not the matrix that its module computes with (packed to 4 bits, say)."""
    if tuple(parameter.shape) == shape and (parameter.is_floating_point() or parameter.is_complex()):
        return kind
    raise WeightsError(
        f"{name!r} of a {type(owner).__name__}: expected floats of shape {shape}, found "
        f"{parameter.dtype} {tuple(parameter.shape)}; a quantised model must be loaded without quantisation, or "
        "dequantised (model.dequantize()), first"
    )


def _is_transformers_conv1d(owner: torch.nn.Module) -> bool:
    """Asked of a module that is not loaded, the answer is no: then nothing can be an instance of its class."""
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    return pytorch_utils is not None and isinstance(owner, pytorch_utils.Conv1D)


def _refuse_lazy(parameter: torch.nn.Parameter, name: str) -> None:
    from torch.nn.parameter import is_lazy

    if is_lazy(parameter):
        raise WeightsError(f"{name!r} is lazy and has no shape yet; run the module once on an example first")


def _unreadable(tensor: torch.Tensor) -> str | None:
    """Why a tensor's values can't be read here, if they can't."""
    import torch

    if tensor.is_meta:
        return "it is on the meta device: load the module with values first"
    if type(tensor.data) is not torch.Tensor:
        return f"it is a {type(tensor.data).__name__}: gather or dequantise it to a plain tensor first"
    return None if tensor.layout == torch.strided else f"it is {tensor.layout}: call .to_dense() first"


def tensor_to_numpy(tensor: torch.Tensor, name: str) -> np.ndarray:
    """The values of a tensor, bit for bit; memory is shared where the tensor is on the CPU.

    Raises:
      WeightsError: the values can't be read, or their dtype has no counterpart in NumPy or ml_dtypes.
    """
    import torch

    if why := _unreadable(tensor):
        raise WeightsError(f"the values of {name!r} can't be read; {why}")
    tensor, dtype = tensor.detach().cpu().resolve_conj().resolve_neg(), str(tensor.dtype).removeprefix("torch.")
    if dtype in BIT_CARRIERS:
        carrier = getattr(torch, BIT_CARRIERS[dtype].name)
        return tensor.contiguous().view(carrier).numpy().view(getattr(ml_dtypes, dtype))
    if dtype in NUMPY_DTYPES:
        return tensor.numpy()
    raise WeightsError(f"{name!r} has the dtype {dtype}, which neither NumPy nor ml_dtypes has; convert it first")


def numpy_to_tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor with a copy of the values, bit for bit.

    Raises:
      WeightsError: torch has no such dtype.
    """
    import torch

    private = np.array(array, order="C", copy=True)
    if (name := private.dtype.name) in BIT_CARRIERS:
        return torch.from_numpy(private.view(BIT_CARRIERS[name])).view(getattr(torch, name))
    if name in NUMPY_DTYPES:
        return torch.from_numpy(private)
    raise WeightsError(f"an array has the dtype {name}, which torch lacks; convert it first")


def _expected(parameter: torch.nn.Parameter, row: TorchKey) -> ArraySpec:
    name = str(parameter.dtype).removeprefix("torch.")
    dtype = np.dtype(getattr(ml_dtypes, name) if name in BIT_CARRIERS else name)
    return ArraySpec(to_jax_shape(tuple(parameter.shape), row), dtype)


def _copy(value: Any) -> Any:
    """A buffer's values apart from the module's; what `get_extra_state` gave is no tensor and stays."""
    return value.detach().clone() if hasattr(value, "detach") else value
