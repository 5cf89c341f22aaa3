"""What each key of a PEFT file is: a factor of a module, or a param of the base under one of PEFT's names for it.

A param that is trained whole has up to four names in PEFT's files: its own, `X.base_layer.bias` beside the factors of
X, `X.modules_to_save.…` in a saved module, and `X.original_module.…` for the base's copy of it, which is never used. A
base may have modules of these names, too: a name that the base itself has is that.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from jpeft.errors import AdapterError
from jpeft.kernel import Kernel
from jpeft.targets import Targets
from jpeft.tree import nearest
from jpeft_interop.layout import Layout
from jpeft_interop.lora_keys import Leaves
from jpeft_interop.peft_config import PeftConfig
from jpeft_interop.peft_keys import Keys, keys_of
from jpeft_interop.peft_resolution import excluded_heads
from jpeft_interop.provenance import CONFIG
from jpeft_interop.target_parameters import is_targeted, stored_names


@dataclass(frozen=True)
class Source:
    """One file against one base: what every step of the reading looks at.

    Attributes:
      file: its name, for errors.
      config: of the folder.
      flat: the base, by path.
      layout: where its leaves lie in torch.
      kernels: the leaves' geometry.
      tensors: the file's, by key.
      blocks: whether parts of a fused weight may be held apart by a mask.
      copies: the torch names of what the file holds of the base's own.
    """

    file: str
    config: PeftConfig
    flat: Mapping[str, Any]
    layout: Layout
    kernels: Mapping[str, Kernel]
    tensors: Mapping[str, np.ndarray]
    blocks: bool
    copies: frozenset[str]

    @property
    def spec(self) -> Any:
        """The config's, in torch's names."""
        return self.config.spec

    @property
    def keys(self) -> Keys:
        """How the method's leaves lie in a file."""
        return keys_of(self.spec)

    @cached_property
    def where(self) -> Targets:
        """The targets, as PEFT has them for the task: heads that it trains whole are none of them."""
        where = self.spec.where
        return replace(where, saved=(*where.saved, *excluded_heads(self.config.task_type)))

    @cached_property
    def parameters(self) -> list[str]:
        """The parameters that the config targets as such."""
        for name in self.config.parameters:
            if not any(is_targeted(known, (name,)) for known in self.layout.parameters):
                raise AdapterError(
                    f"{self.file}: {name!r}, in 'target_parameters' in {CONFIG}, is no stacked kernel or router here; "
                    f"the nearest are {nearest(name, self.layout.parameters)}"
                )
        return [name for name in self.layout.parameters if is_targeted(name, self.config.parameters)]

    @cached_property
    def stored(self) -> dict[str, str]:
        """The module's name under which PEFT stores each of these parameters."""
        return stored_names(self.parameters)

    @cached_property
    def tied_names(self) -> Mapping[str, Collection[str]]:
        """The torch names of each tied tensor, by each of them."""
        found: dict[str, Collection[str]] = {}
        for links in self.layout.links.values():
            regions: dict[Any, list[str]] = {}
            for link in links:
                regions.setdefault((link.leaf, link.index), []).append(link.key)
            found |= {key: keys for keys in regions.values() if len(keys) > 1 for key in keys}
        return found


@dataclass(frozen=True)
class Named:
    """A file's keys, sorted and grouped.

    Attributes:
      factors: by torch module (or parameter), the method's leaves.
      others: every other key, by what stands behind the prefix.
    """

    factors: Mapping[str, Leaves]
    others: Mapping[str, str]


def named(source: Source) -> Named:
    """Sort the keys of a file.

    Raises:
      AdapterError: one lacks PEFT's prefix, or two are the same factor.
    """
    factors: dict[str, Leaves] = {}
    others: dict[str, str] = {}
    owned = {stored: parameter for parameter, stored in source.stored.items()}
    for key, tensor in source.tensors.items():
        name, leaf = source.keys.split(key, source.file)
        if leaf is None:
            others[name] = key
            continue
        leaves = factors.setdefault(owned.get(name, name), {})
        if leaf in leaves:
            raise AdapterError(f"{source.file}: key {key!r}: the file has another for the same factor")
        leaves[leaf] = tensor
    return Named(factors, others)


def is_original(source: Source, name: str) -> bool:
    """Whether a name is of the base's copy of a saved module, which PEFT leaves in the file and never uses."""
    return ".original_module." in name and name not in source.layout.by_key


def torch_name(source: Source, name: str, known: Container[str]) -> str:
    """Give the param that a key which is no factor is for.

    Args:
      source: whose base has the param.
      name: what stands behind the key's prefix.
      known: the names of all such keys.
    """
    if name in source.layout.by_key:
        return name
    module, leaf = beside_factors(without_wrapper(name.replace(".original_module.", "."), known))
    return f"{module}.{leaf}" if module else leaf


def without_wrapper(name: str, known: Container[str]) -> str:
    """Give a param of a saved module its own name; of a layer inside it, PEFT's other name has the adapter's in it."""
    outer, wrapper, inner = name.partition(".modules_to_save.")
    kept = f"{outer}.{inner}" if wrapper else name
    shorter = f"{outer}.{inner.partition('.')[2]}"
    return shorter if wrapper and kept not in known and shorter in known else kept


def beside_factors(name: str) -> tuple[str, str]:
    """Part the name of a param beside factors into its module and the leaf; without one, the name is all leaf.

    Example:
      >>> beside_factors("q_proj.base_layer.bias"), beside_factors("norm.weight")
      (('q_proj', 'bias'), ('', 'norm.weight'))
    """
    module, _, leaf = name.rpartition(".base_layer.")
    return module, leaf
