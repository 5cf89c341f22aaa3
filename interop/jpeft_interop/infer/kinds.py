"""What a torch tensor is to its module: by the leaf's geometry where that is given, or by its name."""

from __future__ import annotations

import re

from jpeft.kernel import Kernel, Kernels
from jpeft_interop.infer.piece import Piece
from jpeft_interop.layout.link import Kind

EMBEDDING = re.compile(r"(?:^|[._])(?:embed\w*|wte|wpe|shared|\w*embeddings?|relative_attention_bias)\.weight$")
CONV1D = re.compile(r"(?:^|\.)h\.\d+\.(?:(?:cross)?attn|crossattention|mlp)\.(?:c_attn|q_attn|c_proj|c_fc)\.weight$")
EXPERTS = re.compile(r"(?:^|\.)experts\.(?:gate_up_proj|down_proj)$")


def kind_of_piece(piece: Piece, kernels: Kernels | None) -> Kind:
    """The kind of the piece's tensor."""
    kernel = dict(kernels.items()).get(piece.path) if kernels is not None else None
    told = _told(piece, kernel) if kernel is not None else None
    return told or _named(piece.key, len(piece.box))


def _told(piece: Piece, kernel: Kernel) -> Kind | None:
    """By which of the tensor's axes are the kernel's contracted ones."""
    of = lambda role: {digit.torch_axis for digit in piece.digits if digit.leaf_axis in role}
    contracted, output = of(kernel.contracted), of(kernel.output)
    if kernel.kind == "conv":
        return "conv"
    if len(piece.box) == 3 and of(kernel.batch) == {0}:
        return "experts" if output == {1} else "experts_io"
    if len(piece.box) != 2 or not contracted or contracted & output:
        return None
    if kernel.kind == "embedding":
        return "embedding"
    return "linear" if contracted == {1} else "conv1d"


def _named(key: str, ndim: int) -> Kind:
    if ndim == 3 and EXPERTS.search(key):
        return "experts"
    if not key.endswith("weight") or ndim < 2:
        return "plain"
    if ndim > 2:
        return "conv"
    if CONV1D.search(key):
        return "conv1d"
    return "embedding" if EMBEDDING.search(key) else "linear"
