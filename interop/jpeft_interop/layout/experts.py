"""Which axes of experts' stacked kernels are inputs: most models keep (experts, out, in), some (experts, in, out)."""

from __future__ import annotations

from collections.abc import Mapping

from jpeft_interop.layout.link import Kind

GATE_UP, DOWN = "gate_up_proj", "down_proj"

Shapes = Mapping[str, tuple[int, ...]]


def experts_kind(key: str, shapes: Shapes) -> Kind:
    """Tell the kind of a stacked kernel by the lengths of its bias and of the kernel beside it.

    `gate_up_proj` puts out twice what `down_proj` takes. Where the lengths tell nothing, (experts, out, in) is meant.

    Args:
      key: `….gate_up_proj` or `….down_proj`.
      shapes: of the tensors by name.

    Example:
      >>> experts_kind("experts.down_proj", {"experts.gate_up_proj": (4, 8, 24), "experts.down_proj": (4, 12, 8)})
      'experts_io'
    """
    ending = GATE_UP if key.endswith(GATE_UP) else DOWN
    stem = key.removesuffix(ending)
    bias = shapes.get(f"{key}_bias", ())
    if len(bias) == 2 and shapes[key][1] != shapes[key][2]:
        return "experts" if bias[1] == shapes[key][1] else "experts_io"
    up, down = shapes.get(f"{stem}{GATE_UP}", ()), shapes.get(f"{stem}{DOWN}", ())
    if len(up) != 3 or len(down) != 3:
        return "experts"
    out_in = up[1] == 2 * down[2] and up[2] == down[1]
    in_out = up[2] == 2 * down[1] and up[1] == down[2]
    return "experts_io" if in_out and not out_in else "experts"
