"""The layout of params whose paths are torch's names, as `load_model` and `params_from_torch` give them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from jpeft.tree import dotted
from jpeft_interop.layout.layout import Layout
from jpeft_interop.layout.link import Kind
from jpeft_interop.layout.place import Place, Tensor
from jpeft_interop.models.families import FAMILIES

# transformers' Conv1D holds (in, out)
CONV1D = re.compile(r"(?:^|/)h/\d+/(?:(?:cross)?attn|crossattention|mlp)/(?:c_attn|q_attn|c_proj|c_fc)/kernel$")
# transformers' stacked kernels of experts, (experts, out, in)
EXPERTS = re.compile(r"(?:^|/)experts/(?:gate_up_proj|down_proj)$")
# The leaf that an embedding and a head share, and the torch module of the head that then has no leaf of its own.
TIED = {
    (first, dotted(head.removesuffix("/kernel")))
    for family in FAMILIES
    for first, head in family.tied
    if head.endswith("/kernel")
}


def default_layout(flat: Mapping[str, Any]) -> Layout:
    """The places of leaves by path, where the paths are torch's names."""
    return Layout({path: _place(path, tuple(leaf.shape), flat) for path, leaf in flat.items()})


def _place(path: str, shape: tuple[int, ...], flat: Mapping[str, Any]) -> Place:
    axes, tensor = _tensor(path, len(shape))
    heads = (Tensor(f"{head}.weight", "v d", "linear") for head in _heads(path, flat))
    return Place(axes, (tensor, *heads)).fit(shape, path)


def _tensor(path: str, ndim: int) -> tuple[str, Tensor]:
    module, _, leaf = path.rpartition("/")
    weight = f"{dotted(module)}.weight" if module else "weight"
    if leaf == "embedding" and ndim == 2:
        return "v d", Tensor(weight, "v d", "embedding")
    if leaf == "kernel" and ndim == 2:
        kind: Kind = "conv1d" if CONV1D.search(path) else "linear"
        return "i o", Tensor(weight, "i o" if kind == "conv1d" else "o i", kind)
    if leaf == "kernel" and ndim > 2:
        taps = " ".join(f"k{n}" for n in range(ndim - 2))
        return f"{taps} i o", Tensor(weight, f"o i {taps}", "conv")
    if EXPERTS.search(path) and ndim == 3:
        return "e o i", Tensor(dotted(path), "e o i", "experts")
    axes = " ".join(f"a{n}" for n in range(ndim))
    return axes, Tensor(dotted(path), axes, "plain")


def _heads(path: str, flat: Mapping[str, Any]) -> Iterator[str]:
    """The torch modules of the heads that share a leaf: where they have none of their own."""
    return (head for first, head in TIED if first == path and _is_tied(first, head, flat))


def _is_tied(first: str, head: str, flat: Mapping[str, Any]) -> bool:
    """Whether the model has that head: other leaves of it are there, or the base model's are all that there is."""
    module = head.replace(".", "/")
    if f"{module}/kernel" in flat or f"{module}/weight" in flat:
        return False
    beside = module.rpartition("/")[0]
    if beside:
        return any(path.startswith(f"{beside}/") for path in flat)
    return all(path.startswith(first.partition("/")[0] + "/") for path in flat)
