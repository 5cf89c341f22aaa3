"""The layout of params whose paths are torch's names, as `load_model` and `params_from_torch` give them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from jpeft.tree import dotted
from jpeft_interop.layout.experts import Shapes, experts_kind
from jpeft_interop.layout.layout import Layout
from jpeft_interop.layout.link import Kind
from jpeft_interop.layout.place import Place, Tensor
from jpeft_interop.models.families import FAMILIES

# transformers' Conv1D holds (in, out); in GPT-Neo and GPTBigCode modules of these names are Linear's
CONV1D = re.compile(r"((?:^|.*/)h/\d+/)(?:(?:cross)?attn|crossattention|mlp)/(?:c_attn|q_attn|c_proj|c_fc)/kernel$")
# transformers' stacked kernels of experts, (experts, out, in)
EXPERTS = re.compile(r"(?:^|/)experts/(?:gate_up_proj|down_proj)$")
# and their routers, (experts, in)
ROUTER = re.compile(r"(?:^|/)mlp/(?:gate|router)/weight$")
# The paths that one leaf stands for where a config ties embeddings: the leaf's own, and another of torch's.
TIED = tuple(dict.fromkeys(pair for family in FAMILIES for pair in family.tied))


def default_layout(flat: Mapping[str, Any]) -> Layout:
    """The places of leaves by path, where the paths are torch's names."""
    ties, shapes = _ties(flat), {path: tuple(leaf.shape) for path, leaf in flat.items()}
    return Layout({path: _place(path, shapes, ties.get(path, ())) for path in flat})


def _place(path: str, shapes: Shapes, others: Sequence[str]) -> Place:
    axes, tensor = _tensor(path, shapes)
    return Place(axes, (tensor, *map(_other_name, others))).fit(shapes[path], path)


def _other_name(path: str) -> Tensor:
    """What a tied leaf, which is an embedding's, is under another of its names."""
    module, _, leaf = path.rpartition("/")
    return Tensor(f"{dotted(module)}.weight", "v d", "linear" if leaf == "kernel" else "embedding")


def _tensor(path: str, shapes: Shapes) -> tuple[str, Tensor]:
    (module, _, leaf), ndim = path.rpartition("/"), len(shapes[path])
    weight = f"{dotted(module)}.weight" if module else "weight"
    if leaf == "embedding" and ndim == 2:
        return "v d", Tensor(weight, "v d", "embedding")
    if leaf == "kernel" and ndim == 2:
        kind: Kind = "conv1d" if _is_conv1d(path, shapes) else "linear"
        return "i o", Tensor(weight, "i o" if kind == "conv1d" else "o i", kind)
    if leaf == "kernel" and ndim > 2:
        taps = " ".join(f"k{n}" for n in range(ndim - 2))
        return f"{taps} i o", Tensor(weight, f"o i {taps}", "conv")
    if EXPERTS.search(path) and ndim == 3:
        kind = experts_kind(path, shapes)
        axes = "e o i" if kind == "experts" else "e i o"
        return axes, Tensor(dotted(path), axes, kind)
    if ROUTER.search(path) and ndim == 2:
        return "o i", Tensor(dotted(path), "o i", "matrix")
    axes = " ".join(f"a{n}" for n in range(ndim))
    return axes, Tensor(dotted(path), axes, "plain")


def _is_conv1d(path: str, shapes: Shapes) -> bool:
    """Whether a kernel is of a block whose attention is GPT-2's: one kernel for queries, keys and values alike."""
    found = CONV1D.match(path)
    if found is None:
        return False
    inputs, outputs = shapes.get(f"{found[1]}attn/c_attn/kernel", (1, 3))
    has_others = any(other.startswith(f"{found[1]}attn/attention/") for other in shapes)
    return outputs == 3 * inputs and not has_others


def _ties(flat: Mapping[str, Any]) -> dict[str, list[str]]:
    """The other paths of each tied weight, by its leaf's: those on which all families that know the pair agree."""
    families = [(family, family.ties(flat)) for family in FAMILIES]
    found: dict[str, list[str]] = defaultdict(list)
    for first, second in TIED:
        told = [second in ties.get(first, ()) for family, ties in families if (first, second) in family.tied]
        if all(told) and first.endswith("/embedding"):
            found[first].append(second)
    return found
