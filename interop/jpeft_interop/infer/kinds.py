"""What a torch tensor is to its module, told by evidence: a name alone decides nothing.

The torch module's own class tells, where it is known; then the geometry of the leaf; then what is beside the tensor (a
bias is as long as a product's outputs, and no embedding has one), what the leaf is called (`kernel`, `embedding`), and
what a tied leaf must be. A weight whose name looks like an embedding's and that none of these tells is an error.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from jpeft.errors import WeightsError
from jpeft.kernel import Kernel, Kernels
from jpeft_interop import torch_table
from jpeft_interop.infer.names import last
from jpeft_interop.infer.piece import Piece
from jpeft_interop.infer.seen import Seen
from jpeft_interop.layout.experts import experts_kind
from jpeft_interop.layout.link import Kind

# Names that an embedding may have, and many a linear map beside one: to be told by something else.
LIKE_AN_EMBEDDING = re.compile(r"(?:^|[._])(?:\w*emb\w*|wte|wpe|shared|relative_attention_bias)\.weight$")
# Tensors that one leaf is in known models, each of them looked up.
LOOKUPS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# Modules that are transformers' Conv1D in some models and Linear in others.
CONV1D = re.compile(r"(?:^|\.)h\.\d+\.(?:(?:cross)?attn|crossattention|mlp)\.(?:c_attn|q_attn|c_proj|c_fc)\.weight$")
EXPERTS = re.compile(r"(?:^|\.)experts\.(?:gate_up_proj|down_proj)$")
ROUTER = re.compile(r"(?:^|\.)(?:gate|router)\.weight$")
LOOKED_UP = re.compile(r"(?:^|_)embeddings?$")
SHOWN = 6


@dataclass(frozen=True)
class Evidence:
    """All that is known when the kinds are told.

    Attributes:
      pieces: where each tensor lies in the leaves, by its name.
      tensors: by name.
      kernels: the leaves' geometry.
      classes: what kind of weight the torch modules say that tensors are.
    """

    pieces: Mapping[str, Sequence[Piece]]
    tensors: Mapping[str, Seen]
    kernels: Mapping[str, Kernel]
    classes: Mapping[str, torch_table.Kind]

    def tied(self, key: str) -> list[str]:
        """List all names of what the tensor's leaf holds there, the tensor's own among them."""
        first = self.pieces[key][0]
        place = lambda piece: (piece.path, piece.start, frozenset(piece.digits))
        return [other for other, pieces in self.pieces.items() if place(first) in map(place, pieces)]


def kinds_of(
    pieces: Sequence[Piece],
    tensors: Mapping[str, Seen],
    kernels: Kernels | None,
    classes: Mapping[str, torch_table.Kind],
) -> dict[str, Kind]:
    """Tell the kind of each tensor, by its name.

    Raises:
      WeightsError: nothing tells what some are.
    """
    of: dict[str, list[Piece]] = defaultdict(list)
    for piece in pieces:
        of[piece.key].append(piece)
    seen = Evidence(of, tensors, dict(kernels.items()) if kernels is not None else {}, classes)
    asked: dict[str, Kind | None] = {key: _kind(key, seen) for key in of}
    if open_keys := [key for key, kind in asked.items() if kind is None]:
        some = ", ".join(f"{key!r} in {of[key][0].path!r}" for key in open_keys[:SHOWN])
        more = f" and {len(open_keys) - SHOWN} more" if len(open_keys) > SHOWN else ""
        raise WeightsError(
            f"{some}{more}: nothing tells whether torch looks its rows up (an embedding) or which of its axes it "
            "contracts, and a name alone decides nothing. Say it with kernels=jpeft.kernels(forward, params, inputs), "
            "or give as state the torch module itself, or the whole folder of a model that transformers knows, with "
            "its config.json"
        )
    return {key: kind for key, kind in asked.items() if kind is not None}


def _kind(key: str, seen: Evidence) -> Kind | None:
    if key in seen.classes:
        return _by_class(key, seen)
    ndim = len(seen.pieces[key][0].box)
    if ndim == 2 and key.endswith("weight"):
        return _by_geometry(key, seen) or _by_surroundings(key, seen)
    if ndim == 3 and (kind := _stacked(key, seen)):
        return kind
    return "conv" if ndim > 2 and key.endswith("weight") else "plain"


def _by_class(key: str, seen: Evidence) -> Kind:
    """Tell the kind by the class of the torch module."""
    kind = seen.classes[key]
    if kind != "other":
        return kind
    if len(seen.pieces[key][0].box) == 3 and (stacked := _stacked(key, seen)):
        return stacked
    return "matrix" if len(seen.pieces[key][0].box) == 2 and ROUTER.search(key) else "plain"


def _stacked(key: str, seen: Evidence) -> Kind | None:
    """Tell which of its axes the experts of a stacked kernel contract."""
    for piece in seen.pieces[key]:
        kernel = seen.kernels.get(piece.path)
        if kernel is not None and _on(piece, kernel.batch) == {0}:
            return "experts" if _on(piece, kernel.output) == {1} else "experts_io"
    if not EXPERTS.search(key):
        return None
    return experts_kind(key, {name: tensor.full for name, tensor in seen.tensors.items()})


def _on(piece: Piece, axes: Sequence[int]) -> set[int]:
    """Find the tensor's axes that lie along some of the leaf's."""
    return {digit.torch_axis for digit in piece.digits if digit.leaf_axis in axes}


def _by_geometry(key: str, seen: Evidence) -> Kind | None:
    """Tell the kind by which of the tensor's axes the leaf contracts."""
    for piece in seen.pieces[key]:
        kernel = seen.kernels.get(piece.path)
        if kernel is None:
            continue
        if kernel.kind == "conv":
            return "conv"
        contracted, output = _on(piece, kernel.contracted), _on(piece, kernel.output)
        if kernel.kind == "embedding":
            return "embedding" if len(seen.tied(key)) == 1 else None
        if contracted and not contracted & output:
            by_rows = contracted == {0}
            return "linear" if not by_rows else "embedding" if LIKE_AN_EMBEDDING.search(key) else "conv1d"
    return None


def _by_surroundings(key: str, seen: Evidence) -> Kind | None:
    """Tell the kind by the bias, the leaf and its other names; None where it may be an embedding or a product."""
    if kind := _by_bias(key, seen):
        return kind
    is_product = f"{key.removesuffix('weight')}bias" in seen.tensors
    if CONV1D.search(key):
        return _block_kind(key, seen)
    if is_product or not _may_be_lookup(key, seen):
        return "linear"
    group = seen.tied(key)
    if len(group) == 1:
        return "embedding" if _is_lookup_leaf(key, seen) else None
    return _one_of_tied(key, group, seen)


def _by_bias(key: str, seen: Evidence) -> Kind | None:
    """Tell the kind by the bias of the same module, which is as long as the outputs are."""
    bias = seen.tensors.get(f"{key.removesuffix('weight')}bias")
    rows, columns = seen.tensors[key].full
    if bias is None or rows == columns or len(bias.full) != 1:
        return None
    return "linear" if bias.full[0] == rows else "conv1d" if bias.full[0] == columns else None


def _block_kind(key: str, seen: Evidence) -> Kind | None:
    """Tell Conv1D from Linear by the biases of the modules of the same names, or else by the leaf's order of axes."""
    told = {_by_bias(other, seen) for other in seen.pieces if CONV1D.search(other)} - {None}
    if len(told) == 1:
        return "linear" if "linear" in told else "conv1d"
    return "conv1d" if all(_is_straight(piece) for piece in seen.pieces[key]) else None


def _is_straight(piece: Piece) -> bool:
    """Whether the leaf has the tensor's axes in the tensor's order."""
    rows, columns = ({d.leaf_axis for d in piece.digits if d.torch_axis == axis} for axis in (0, 1))
    return not rows or not columns or max(rows) < min(columns)


def _may_be_lookup(key: str, seen: Evidence) -> bool:
    """Whether a weight could be an embedding: its name, the leaf or the geometry says so, and no leaf denies it."""
    paths = [piece.path for piece in seen.pieces[key]]
    if any(last(path) == "kernel" for path in paths):
        return False
    is_read = any(path in seen.kernels and seen.kernels[path].kind == "embedding" for path in paths)
    return is_read or bool(LIKE_AN_EMBEDDING.search(key)) or any(LOOKED_UP.search(last(path)) for path in paths)


def _is_lookup_leaf(key: str, seen: Evidence) -> bool:
    return all(LOOKED_UP.search(last(piece.path)) for piece in seen.pieces[key])


def _one_of_tied(key: str, group: Sequence[str], seen: Evidence) -> Kind | None:
    """Tell the embedding from the head among the names of one leaf, of which one at least is looked up."""
    lookups = list(_lookups(group, seen))
    if len(lookups) == 1 or all(name.endswith(LOOKUPS) for name in lookups):
        return "embedding" if key in lookups else "linear" if lookups else None
    return None


def _lookups(group: Sequence[str], seen: Evidence) -> Iterator[str]:
    for key in group:
        if f"{key.removesuffix('weight')}bias" not in seen.tensors and LIKE_AN_EMBEDDING.search(key):
            yield key
