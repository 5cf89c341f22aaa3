"""What an adapter trains whole, as PEFT's `modules_to_save`: names that PEFT takes for just these modules.

PEFT wraps every module whose path ends in one of the names, and its load asks the file for each of their tensors. So a
tensor of such a module that is not trained here is written beside the others with the base's value, and the file's
metadata says which those are, so that they come back as the base's. A tied weight is written under all its names.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jpeft.adapter import Adapter
from jpeft.errors import AdapterError
from jpeft.site import Site
from jpeft.spec import Spec
from jpeft.targets import FIXED
from jpeft.tree import dotted
from jpeft_interop.layout import Layout
from jpeft_interop.peft_resolution import Modules, excluding, heads_of, lies_in, wrapped
from jpeft_interop.peft_types import type_of

COPIES = "jpeft.copies"  # in the metadata: a JSON list of torch's names
TYING_NAMES = ("embed_tokens", "lm_head")  # one of which PEFT has to see for `ensure_weight_tying` to do anything


@dataclass(frozen=True)
class SavedModules:
    """The part of a PEFT folder that is trained whole.

    Attributes:
      names: `modules_to_save`.
      trained: the torch tensors that are trained, with their paths here.
      copies: those that PEFT asks for beside them, which hold the base's values.
      ties: `ensure_weight_tying`: PEFT gives the head the embedding's weight.
      wrapped: the modules that PEFT wraps.
    """

    names: tuple[str, ...]
    trained: Mapping[str, str]
    copies: tuple[str, ...]
    ties: bool
    wrapped: frozenset[str]

    def metadata(self) -> dict[str, str]:
        """What a file says of its copies."""
        return {COPIES: json.dumps(self.copies)} if self.copies else {}


def saved_modules(adapter: Adapter, adapted: Collection[str], layout: Layout, task_type: str | None) -> SavedModules:
    """Find the names for what an adapter trains whole.

    Args:
      adapter: sites of replacement are those trained whole.
      adapted: the torch modules that have factors.
      layout: where the leaves lie in torch.
      task_type: PEFT's, which may train a head whatever the names are.

    Raises:
      AdapterError: PEFT can't be told to train just that.
    """
    spec: Any = adapter.spec
    modules, heads = Modules(tuple(layout.by_key)), heads_of(task_type)
    trained: dict[str, str] = {}
    biases: dict[str, str] = {}
    tied: set[str] = set()
    for site in adapter.sites:
        uses = torch_keys(site, layout) if site.method == "replacement" else []
        if all(is_trained_bias(key, spec.bias, adapted) for names in uses for key in names):
            biases |= {names[0]: site.path for names in uses}  # a tied one keeps its other names in PEFT
        else:
            trained |= {key: site.path for names in uses for key in names}
            tied |= {key for names in uses if len(names) > 1 for key in names}
    names = _names(tuple(map(dotted, spec.modules_to_save)), set(trained), set(biases), adapted, modules, heads)
    found = frozenset(wrapped((*names, *heads), modules, adapted))
    copies = tuple(sorted(modules.below(found) - set(trained) - set(biases)))
    ties = _has_tying(spec) and _ties(names, tied, modules)
    return SavedModules(names, trained | biases, copies, ties, found)


def _has_tying(spec: Spec) -> bool:
    """Whether PEFT's config for the method has `ensure_weight_tying`."""
    kind = type_of(spec)
    return kind is not None and "ensure_weight_tying" in kind.defaults


def is_trained_bias(key: str, bias: str, adapted: Collection[str]) -> bool:
    """Whether a torch tensor is a bias that a spec's `bias` trains."""
    module, _, leaf = key.rpartition(".")
    return leaf == "bias" and (bias == "all" or (bias != "none" and module in adapted))


def _names(
    own: tuple[str, ...],
    trained: set[str],
    biases: set[str],
    adapted: Collection[str],
    modules: Modules,
    heads: Sequence[str],
) -> tuple[str, ...]:
    """The spec's names where PEFT takes them for just that, else the modules' whole names."""
    by_task = modules.below(wrapped(heads, modules, adapted))
    if own and all(FIXED.fullmatch(name) for name in own):
        means = modules.below(wrapped((*own, *heads), modules, adapted))
        exact = trained <= means and means <= trained | biases | by_task
        if exact and _why_not((*own, *heads), adapted, modules) is None:
            return own
    owners = {key.rpartition(".")[0] for key in trained}
    if "" in owners:
        raise AdapterError(f"PEFT can't train {sorted(trained)[0]!r} whole: it lies in no module of the model")
    whole = tuple(sorted(owner for owner in owners if not lies_in(owner.rpartition(".")[0], owners)))
    if (reason := _why_not((*whole, *heads), adapted, modules)) is not None:
        raise AdapterError(f"PEFT can't be told to train just {sorted(trained)[:3]} whole: {reason}")
    return whole


def _why_not(names: Sequence[str], adapted: Collection[str], modules: Modules) -> str | None:
    """Tell why PEFT refuses to wrap these names, or takes an adapter away for them; None where it does neither."""
    found = wrapped(names, modules, adapted)
    for module in sorted(found):
        if modules.is_row(module):
            return f"{module!r} is a list of modules, which it can't wrap"
        if lies_in(module.rpartition(".")[0], found):
            return f"{module!r} lies in another that it would wrap"
        if lies_in(module, adapted):
            return f"{module!r} has factors too, and would be wrapped: leave out one of the two, or the task_type"
    for module in adapted:
        if lies_in(module, found):
            return f"{module!r} has factors, and lies in a module that is trained whole"
        if (name := excluding(names, module)) is not None:
            return f"{module!r} has factors, and PEFT, which takes {name!r} for a regex, would leave it out"
    return None


def _ties(names: Sequence[str], tied: set[str], modules: Modules) -> bool:
    """Whether PEFT is to give the head the embedding's weight; where the head has a bias, it would drop that."""
    owners = {key.rpartition(".")[0] for key in tied}
    known = any(name.rpartition(".")[2] in TYING_NAMES for name in names)
    return bool(tied) and known and modules.below(owners) <= tied


def torch_keys(site: Site, layout: Layout) -> list[list[str]]:
    """Find the torch tensors that a leaf trained whole lies in: of each part of it, all its names where it is tied.

    Raises:
      AdapterError: it has no place, or shares a tensor with other leaves.
    """
    if site.path not in layout:
        raise AdapterError(f"the layout has no place for {site.path!r}, which is trained whole")
    uses: dict[Any, list[str]] = defaultdict(list)
    for link in layout.links[site.path]:
        if others := [other.path for other in layout.by_key[link.key] if other.path != site.path]:
            raise AdapterError(f"{site.path!r} is trained whole, and in torch {link.key!r} holds {others[0]!r} too")
        uses[link.leaf, link.index].append(link.key)
    return list(uses.values())


def copied_keys(metadata: Mapping[str, str], file: str) -> frozenset[str]:
    """The torch names of the tensors that a file holds as copies of the base's.

    Raises:
      AdapterError: the metadata is broken.
    """
    if COPIES not in metadata:
        return frozenset()
    try:
        found = json.loads(metadata[COPIES])
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(isinstance(key, str) for key in found):
        raise AdapterError(
            f"{file}: {COPIES!r} in the metadata must be a list of names; found {metadata[COPIES]!r:.200}"
        )
    return frozenset(found)
