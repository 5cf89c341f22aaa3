"""An adapter written as a PEFT folder: PEFT, transformers and vLLM read it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

import jpeft
from jpeft.adapter import Adapter
from jpeft.site import Site
from jpeft.atomic import write_folder
from jpeft.errors import AdapterError
from jpeft.kernel import Kernel
from jpeft.methods import METHODS
from jpeft.targets import Targets, frozen_mapping, is_kept, names_module, saves_module
from jpeft.tree import flatten
from jpeft_interop.layout import Index, Layout, default_layout, invert, leaf_to_torch, tied_heads
from jpeft_interop.load_peft import CONFIG, WEIGHTS
from jpeft_interop.lora_keys import PREFIX, keys_of, to_file
from jpeft_interop.peft_config import PeftConfig, write_config

EMBEDDING_NAMES = ("embed_tokens", "lm_head")  # whose base weight PEFT stores beside its factors
OTHERS = ("README.md",)  # what PEFT leaves in a folder, and a new save may take away


def save_peft(
    folder: str | os.PathLike[str],
    adapter: Adapter,
    *,
    params: Any,
    layout: Layout | None = None,
    base_model: str | None = None,
    task_type: str | None = None,
) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`, moved into place whole.

    Args:
      folder: made if need be; one that holds other things than an adapter is refused.
      adapter: a LoRA with any of its options. Kernels of rank 0, which PEFT refuses, are left out of the targets.
      params: the base it is for.
      layout: where each path of the params lies in torch, for params with other names or shapes.
      base_model: the name or path of the base that PEFT is to know it by.
      task_type: `CAUSAL_LM`, `SEQ_CLS`, … as PEFT has them.

    Raises:
      AdapterError: a value that is not finite, a path without a place in torch, or what PEFT's format cannot say.
    """
    flat = flatten(params)
    layout = default_layout(flat) if layout is None else layout
    tensors = dict(_tensors(adapter, flat, layout))
    for key, tensor in tensors.items():
        if not np.isfinite(tensor.astype(np.float32)).all():
            raise AdapterError(f"{key!r} holds values that are not finite; nothing was written")
    spec = _exported_spec(adapter, layout)
    fan_in_fan_out = any(_is_conv1d(layout, site) for site in adapter.sites if site.method == "lora")
    config = write_config(PeftConfig(spec, base_model, task_type, fan_in_fan_out))

    def fill(new: Path) -> None:
        (new / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))
        save_file(tensors, new / WEIGHTS, {"format": "pt"})

    write_folder(folder, fill, replaceable=lambda name: name in OTHERS)


def _is_conv1d(layout: Layout, site: Site) -> bool:
    return layout[site.path].transposed and site.kernel.kind == "product"


def _tensors(adapter: Adapter, flat: Mapping[str, Any], layout: Layout) -> Iterator[tuple[str, np.ndarray]]:
    adapted = {matrix.module for matrix in _matrices(adapter, layout)}
    for site in adapter.sites:
        if site.method == "lora":
            yield from _factors(adapter, site, flat, layout)
        elif site.method == "replacement":
            yield from _whole(adapter, site, flat, layout, adapted)
        else:
            raise AdapterError(f"{site.path!r}: {site.method!r} has no place in a PEFT file")


class _Matrix(NamedTuple):
    """One matrix that a LoRA adapts, as torch has it."""

    site: Site
    module: str
    at: Index
    as_head: bool = False


def _matrices(adapter: Adapter, layout: Layout) -> Iterator[_Matrix]:
    tied = tied_heads(layout)
    for site in adapter.sites:
        if site.method != "lora" or site.rank == 0:
            continue
        if site.path not in layout:
            raise AdapterError(f"the layout has no place for {site.path!r}; add one: Place(torch_key, kernel)")
        for index, key in layout[site.path].torch_keys():
            chosen = site.layers is None or index[0] in site.layers
            if chosen and site.use != "product":
                yield _Matrix(site, _module(site, key), index)
            # Where a tied weight is adapted in all its uses, torch has a module for each.
            if chosen and site.use != "lookup" and site.path in tied:
                yield _Matrix(site, tied[site.path], index, as_head=True)


def _module(site: Site, key: str) -> str:
    if not key.endswith(".weight"):
        raise AdapterError(f"{site.path!r} lies in {key!r}; PEFT adapts modules, whose weight is called 'weight'")
    return key.removesuffix(".weight")


def _factors(adapter: Adapter, site: Site, flat: Mapping[str, Any], layout: Layout) -> Iterator[tuple[str, np.ndarray]]:
    if site.kernel.groups != 1:
        raise AdapterError(
            f"{site.path!r}: PEFT's LoRA on a grouped convolution is no change of its kernel; it has no place there"
        )
    leaves = METHODS["lora"].matrices(adapter.leaves(site.path), site.kernel)
    for _, module, index, as_head in _matrices(adapter.replace(meta=replace(adapter.meta, sites=(site,))), layout):
        one = {name: np.asarray(leaf[index]) for name, leaf in leaves.items() if name != "scaling"}
        names = keys_of(module, site.kernel.kind == "embedding" and not as_head)
        for name, tensor in to_file(one, site.kernel, as_head).items():
            if name not in names:
                raise AdapterError(f"{module!r}: PEFT has no bias on an embedding's factors")
            yield names[name], np.ascontiguousarray(tensor)
        if module.rpartition(".")[2] in EMBEDDING_NAMES:
            base = leaf_to_torch(np.asarray(flat[site.path]), layout[site.path], index)
            yield f"{PREFIX}{module}.base_layer.weight", np.ascontiguousarray(base)


def _whole(
    adapter: Adapter, site: Site, flat: Mapping[str, Any], layout: Layout, adapted: set[str]
) -> Iterator[tuple[str, np.ndarray]]:
    place = layout[site.path]
    for index, key in place.torch_keys():
        module, _, leaf = key.rpartition(".")
        value = np.ascontiguousarray(leaf_to_torch(np.asarray(adapter.trained[site.path]["value"]), place, index))
        yield PREFIX + (f"{module}.base_layer.{leaf}" if module in adapted else key), value
        saved = saves_module(adapter.spec.modules_to_save, module)
        if saved and leaf == "bias" and adapter.spec.bias == "all":  # PEFT's two other names for it
            base = np.asarray(flat[site.path]).astype(value.dtype)
            yield f"{PREFIX}{module}.modules_to_save.bias", value
            yield f"{PREFIX}{module}.original_module.bias", base


def _exported_spec(adapter: Adapter, layout: Layout) -> jpeft.LoRA:
    """The spec in torch's names: the same where PEFT resolves it the same, else spelt out."""
    spec = adapter.spec
    matrices = list(_matrices(adapter, layout))
    if not matrices:
        raise AdapterError("every kernel has rank 0: PEFT has no LoRA without a factor")
    rank = {matrix.module: matrix.site.rank for matrix in matrices}
    alpha = {matrix.module: _alpha(adapter, matrix.site, matrix.at) for matrix in matrices}
    spec = _with_targets(spec, set(rank), layout)
    if spec.rank == 0:
        spec = replace(spec, rank=max(rank.values()), alpha=spec.alpha_of(""))
    if any(spec.rank_of(name) != r for name, r in rank.items()):
        spec = replace(spec, rank_pattern={_escaped(name): r for name, r in rank.items() if r != spec.rank})
    if any(_differs(spec, name, rank[name], alpha[name]) for name in rank):
        base = float(spec.rank if spec.alpha is None else spec.alpha)
        spec = replace(spec, alpha_pattern={_escaped(name): a for name, a in alpha.items() if a != base})
    return replace(spec, rank_pattern={name: r for name, r in frozen_mapping(spec.rank_pattern) if r > 0})


def _escaped(module: str) -> str:
    return module.replace(".", r"\.")


def _alpha(adapter: Adapter, site: Site, index: Index) -> float:
    """Alpha as the scaling has it: the scaling is what acts."""
    scaling = float(np.asarray(adapter.constant[site.path]["scaling"])[index])
    return scaling * (site.rank**0.5 if adapter.spec.rank_stabilized else site.rank)


def _differs(spec: jpeft.LoRA, name: str, rank: int, alpha: float) -> bool:
    stated = np.float32(spec.scaling(rank, spec.alpha_of(name)))
    actual = np.float32(spec.scaling(rank, alpha))
    return abs(float(stated) - float(actual)) > 1e-6 * abs(float(actual))


def _with_targets(spec: jpeft.LoRA, modules: set[str], layout: Layout) -> jpeft.LoRA:
    """The first way of saying the targets that PEFT resolves to just these modules."""
    known = {
        key.removesuffix(".weight"): layout[entry.path].kernel
        for key, entry in invert(layout).items()
        if key.endswith(".weight")
    }
    explicit = replace(spec, exclude=(), layers_to_transform=None, layers_pattern=())
    ends = tuple(sorted({name.rpartition(".")[2] for name in modules}))
    for candidate in (spec, replace(explicit, targets=ends), replace(explicit, targets=tuple(sorted(modules)))):
        if candidate.targets != "all-linear" and _resolved(candidate.where, known) == modules:
            return candidate
    raise AdapterError(f"PEFT can't be told to adapt just these modules: {sorted(modules)[:5]}")


def _resolved(where: Targets, known: Mapping[str, Kernel | None]) -> set[str]:
    return {
        name
        for name, kernel in known.items()
        if kernel is not None
        and names_module(where.targets, name)
        and is_kept(where, f"{name}.w".replace(".", "/"), kernel)
    }
