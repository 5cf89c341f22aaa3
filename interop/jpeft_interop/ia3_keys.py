"""The names and shapes of IA³'s vectors in PEFT's files, read in both directions.

| leaf here                               | key in the file | shape in the file         |
|-----------------------------------------|-----------------|---------------------------|
| `l` (out), on the result                | `ia3_l`         | (out, 1); conv (1, out, 1...) |
| `l_in` (in), on the input (feed-forward) | `ia3_l`         | (1, in); conv (1, in, 1...)   |

Which of the two it is, `feedforward_modules` in the config says.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import jpeft
from jpeft.kernel import Kernel
from jpeft.regex import matches
from jpeft.targets import names_module
from jpeft.tree import dotted, module_of
from jpeft_interop.lora_keys import Leaves
from jpeft_interop.models.families import FAMILIES

IA3: Mapping[str, str] = {"l": ".ia3_l"}

# The bias of a head that has another name for it, by the head's torch module.
HEAD_BIASES = {
    dotted(module_of(second)): dotted(first)
    for family in FAMILIES
    for first, second in family.tied
    if second.endswith("/bias")
}


def is_feedforward(feedforward: str | tuple[str, ...], module: str) -> bool:
    """Whether PEFT scales the input of a module: names match the end of its path, at a dot or not."""
    if isinstance(feedforward, str):
        return matches(feedforward, module)
    return module.endswith(_dotted(feedforward))


@lru_cache(64)
def _dotted(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(dotted, names))


def shape(kernel: Kernel, as_head: bool, on_input: bool) -> tuple[int, ...]:
    """The file's shape of the vector of one matrix of `kernel`."""
    if kernel.kind == "conv":
        *window, channels = kernel.sizes(kernel.contracted)
        return (1, channels if on_input else kernel.fan_out, *[1] * len(window))
    size = kernel.fan_in if on_input != as_head else kernel.fan_out
    return (1, size) if on_input else (size, 1)


def to_file(leaves: Leaves, kernel: Kernel, as_head: bool) -> Leaves:
    """The vector of one matrix as the file has it. A head's result is what its embedding's kernel contracts."""
    on_input = ("l_in" in leaves) != as_head
    vector = leaves["l_in" if "l_in" in leaves else "l"]
    if kernel.kind == "conv" and on_input:  # the same for each tap
        vector = vector.reshape(-1, kernel.sizes(kernel.contracted)[-1])[0]
    return {"l": vector.reshape(shape(kernel, as_head, on_input))}


def from_file(leaves: Leaves, kernel: Kernel, as_head: bool, on_input: bool) -> Leaves:
    """The inverse: `l` `(*output)`, or `l_in` `(*contracted)`, of a convolution the channels alone."""
    if on_input == as_head:
        return {"l": leaves["l"].reshape(kernel.sizes(kernel.output))}
    axes = kernel.contracted[-1:] if kernel.kind == "conv" else kernel.contracted
    return {"l_in": leaves["l"].reshape(kernel.sizes(axes))}


def bias_of_head(module: str, keys: Container[str]) -> str | None:
    """The torch name of a tied head's bias; None if it has none.

    It is not beside the weight, which is the embedding's, so an adapter of that weight does not reach it.
    """
    names = (f"{module}.bias", HEAD_BIASES.get(module))
    return next((name for name in names if name is not None and name in keys), None)


def as_peft_reads(spec: Any, modules: Iterable[str]) -> Any:
    """The spec with `feedforward` meaning the modules that PEFT takes it to mean: names, or else a regex.

    PEFT compares the ends of names as letters: `proj` means `k_proj` there, and nothing here.
    """
    if not isinstance(spec, jpeft.IA3) or isinstance(spec.feedforward, str):
        return spec
    feedforward = tuple(spec.feedforward)
    if all(is_feedforward(feedforward, name) == names_module(feedforward, name) for name in modules):
        return spec
    return replace(spec, feedforward=f".*({'|'.join(re.escape(name) for name in feedforward)})")
