"""An adapter written as a PEFT folder: PEFT, transformers and vLLM read it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jpeft.adapter import Adapter
from jpeft.atomic import write_folder
from jpeft.errors import AdapterError
from jpeft.kernel import Kernel
from jpeft.shared import gathered, is_shared, write_once
from jpeft.site import Site
from jpeft.targets import ALL_LINEAR, Targets, frozen_mapping, is_kept, names_module, saves_module
from jpeft.tree import dotted, flatten
from jpeft_interop.ia3_keys import is_feedforward
from jpeft_interop.layout import Layout, default_layout
from jpeft_interop.load_peft import CONFIG, WEIGHTS
from jpeft_interop.peft_config import PeftConfig, write_config
from jpeft_interop.peft_keys import KEYS, PREFIX, keys_of
from jpeft_interop.provenance import adapted_keys, base_fingerprint, stating
from jpeft_interop.safetensors_file import write_safetensors
from jpeft_interop.serving import Target, plain_lora, uniform
from jpeft_interop.split import Matrix, matrices
from jpeft_interop.target_parameters import shortest

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
    target: Target = "peft",
) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`, moved into place whole.

    The latter's metadata holds a digest of both and a fingerprint of the weights in `params` that are adapted, which
    `load_peft` checks. Where several processes share arrays of the adapter or the base, all of them call this, and
    process 0 writes.

    Args:
      folder: made if need be; one that holds other things than an adapter is refused.
      adapter: a LoRA or DoRA with any of its options, an AdaLoRA, or an IA³. Kernels of rank 0, which PEFT's LoRA
        refuses, are left out of the targets; an AdaLoRA's stay. An AdaLoRA is written as it is: `jpeft.prune` it first
        to leave out the directions that are zero.
      params: the base it is for.
      layout: where each path of the params lies in torch, for params with other names or shapes.
      base_model: the name or path of the base that PEFT is to know it by.
      task_type: `CAUSAL_LM`, `SEQ_CLS`, … as PEFT has them.
      target: who is to read it. `vllm` takes plain LoRA alone, of one rank and one scaling: those of single modules are
        folded into B, and what has no such form is refused with the reason. PEFT reads that too.

    Raises:
      AdapterError: a value that is not finite, a path without a place in torch, or what PEFT's format cannot say.
      OSError: it can't be written; then what was there still is.
    """
    options: Any = {"layout": layout, "base_model": base_model, "task_type": task_type, "target": target}
    files = peft_files(adapter, params=params, **options)
    write = lambda: write_folder(folder, files.fill, replaceable=lambda name: name in OTHERS)
    write_once(is_shared((adapter, params)), write)


@dataclass(frozen=True)
class PeftFiles:
    """What the two files of a folder are to hold."""

    config: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]
    metadata: Mapping[str, str]

    def fill(self, folder: Path) -> None:
        """Writes them into an empty folder."""
        (folder / CONFIG).write_text(json.dumps(self.config, indent=2, sort_keys=True))
        write_safetensors(folder / WEIGHTS, self.tensors, self.metadata)


def peft_files(
    adapter: Adapter,
    *,
    params: Any,
    layout: Layout | None = None,
    base_model: str | None = None,
    task_type: str | None = None,
    target: Target = "peft",
) -> PeftFiles:
    """What `save_peft` writes, and nothing written; of what several processes share, in each of them."""
    flat = flatten(params)
    layout = default_layout(flat) if layout is None else layout
    layout.check(flat)
    keys_of(adapter.spec)  # or there is no such method in PEFT
    adapter = adapter.replace(trained=gathered(adapter.trained), constant=gathered(adapter.constant))
    adapter = plain_lora(adapter) if target == "vllm" else adapter
    found = matrices(adapter, layout)
    if target == "vllm":
        found, spec = uniform(found, adapter.spec)
        adapter = adapter.replace(meta=replace(adapter.meta, spec=spec))
    tensors = dict(_tensors(adapter, found, flat, layout, with_base=target == "peft"))
    for key, tensor in tensors.items():
        if not np.isfinite(tensor.astype(np.float32)).all():
            raise AdapterError(f"{key!r} holds values that are not finite; nothing was written")
    spec = _exported_spec(adapter, found, layout)
    weights = [f"{one.spot.module}.weight" for one in found]
    fan_in_fan_out = any(layout.by_key[key][0].kind == "conv1d" for key in weights if key in layout.by_key)
    parameters = {one.spot.module for one in found if one.spot.is_parameter}
    _check_parameters(spec, parameters)
    named = tuple(shortest(parameters, layout.parameters))
    config = write_config(PeftConfig(spec, base_model, task_type, fan_in_fan_out, named))
    base = base_fingerprint(adapted_keys(tensors, layout), layout, flat)
    return PeftFiles(config, tensors, stating(tensors, config, {"format": "pt"}, base))


def _check_parameters(spec: Any, parameters: set[str]) -> None:
    """What PEFT's adapters of parameters can't have."""
    if parameters and (spec.dropout or spec.factor_bias):
        found = f"dropout={spec.dropout}" if spec.dropout else "factor_bias=True"
        raise AdapterError(
            f"PEFT has no {found} on {sorted(parameters)[0]!r} (target_parameters): "
            "adapter.replace(meta=dataclasses.replace(adapter.meta, spec=dataclasses.replace(spec, dropout=0.0)))"
        )


def _tensors(
    adapter: Adapter, found: Sequence[Matrix], flat: Mapping[str, Any], layout: Layout, with_base: bool
) -> Iterator[tuple[str, np.ndarray]]:
    for site in adapter.sites:
        if site.method == "replacement":
            yield from _whole(adapter, site, flat, layout, {matrix.spot.module for matrix in found})
        elif site.method != adapter.spec.method:
            raise AdapterError(f"{site.path!r}: {site.method!r} has no place in a PEFT file of {adapter.spec.method!r}")
    for matrix in found:
        yield from _factors(matrix, flat, layout, with_base)


def _factors(
    matrix: Matrix, flat: Mapping[str, Any], layout: Layout, with_base: bool
) -> Iterator[tuple[str, np.ndarray]]:
    keys, spot = KEYS[matrix.site.method], matrix.spot
    names = keys.names(spot)
    for name, tensor in keys.to_file(matrix.leaves, spot).items():
        if name not in names:
            raise AdapterError(f"{spot.module!r}: PEFT has no bias on an embedding's factors")
        yield names[name], np.ascontiguousarray(tensor)
    if with_base and spot.module.rpartition(".")[2] in EMBEDDING_NAMES:
        yield f"{PREFIX}{spot.module}.base_layer.weight", layout.tensor(f"{spot.module}.weight", flat)


def _whole(
    adapter: Adapter, site: Site, flat: Mapping[str, Any], layout: Layout, adapted: set[str]
) -> Iterator[tuple[str, np.ndarray]]:
    for key in _own_keys(site, layout):
        module, _, leaf = key.rpartition(".")
        value = layout.tensor(key, {site.path: adapter.trained[site.path]["value"]})
        yield PREFIX + (f"{module}.base_layer.{leaf}" if module in adapted else key), value
        saved = saves_module(adapter.spec.modules_to_save, module)
        if saved and leaf == "bias" and adapter.spec.bias == "all":  # PEFT's two other names for it
            base = layout.tensor(key, flat).astype(value.dtype)
            outer = _saved_module(adapter.spec.modules_to_save, module)
            inner = key.removeprefix(f"{outer}.")
            yield f"{PREFIX}{outer}.modules_to_save.{'default.' if outer != module else ''}{inner}", value
            yield f"{PREFIX}{outer}.original_module.{inner}", base


def _own_keys(site: Site, layout: Layout) -> Iterator[str]:
    """The torch tensors that a leaf replaced whole lies in; a tied one is written once.

    Raises:
      AdapterError: it has no place, or shares a tensor with other leaves.
    """
    if site.path not in layout:
        raise AdapterError(f"the layout has no place for {site.path!r}, which is trained whole")
    regions = set()
    for link in layout.links[site.path]:
        if others := [other.path for other in layout.by_key[link.key] if other.path != site.path]:
            raise AdapterError(f"{site.path!r} is trained whole, and in torch {link.key!r} holds {others[0]!r} too")
        if (region := (link.leaf, link.index)) not in regions:
            yield link.key
        regions.add(region)


def _saved_module(saved: Sequence[str], module: str) -> str:
    """The outermost of a module and those around it that is saved whole."""
    parts = module.split(".")
    around = (".".join(parts[: i + 1]) for i in range(len(parts)))
    return next(path for path in around if names_module(tuple(saved), path))


def _exported_spec(adapter: Adapter, matrices: list[Matrix], layout: Layout) -> Any:
    """The spec in torch's names: the same where PEFT resolves it the same, else spelt out."""
    if not matrices:
        raise AdapterError("no kernel is adapted (or every one with rank 0): PEFT has no adapter without a factor")
    if adapter.spec.method == "adalora":
        return _exported_adalora(adapter, matrices, layout)
    if adapter.spec.method == "ia3":
        return _exported_ia3(adapter, matrices, layout)
    return _exported_lora(adapter, matrices, layout)


def _exported_lora(adapter: Adapter, matrices: list[Matrix], layout: Layout) -> Any:
    rank = {matrix.spot.module: matrix.rank for matrix in matrices}
    alpha = {matrix.spot.module: _alpha(adapter.spec, matrix) for matrix in matrices}
    spec: Any = _with_targets(adapter.spec, set(rank), layout)
    if spec.rank == 0:
        spec = replace(spec, rank=max(rank.values()), alpha=spec.alpha_of(""))
    if any(spec.rank_of(name) != r for name, r in rank.items()):
        spec = replace(spec, rank_pattern={_escaped(name): r for name, r in rank.items() if r != spec.rank})
    if any(_differs(spec, name, rank[name], alpha[name]) for name in rank):
        base = float(spec.rank if spec.alpha is None else spec.alpha)
        spec = replace(spec, alpha_pattern={_escaped(name): a for name, a in alpha.items() if a != base})
    return replace(spec, rank_pattern={name: r for name, r in frozen_mapping(spec.rank_pattern) if r > 0})


def _exported_adalora(adapter: Adapter, matrices: list[Matrix], layout: Layout) -> Any:
    """One scaling and one rank at the start for all, and what is left of it where something was pruned."""
    spec: Any = adapter.spec
    rank = {matrix.spot.module: matrix.rank for matrix in matrices}
    if spec.total_steps is None:
        raise AdapterError("PEFT has no AdaLoRA without a number of steps: replace(spec, total_steps=...) in its meta")
    if (alpha := spec.rank if spec.alpha is None else spec.alpha) <= 0:
        raise AdapterError(f"alpha is {alpha:g}: PEFT takes the rank for an AdaLoRA's alpha where that is not positive")
    if (most := max(rank.values())) > spec.rank:
        raise AdapterError(f"there is a rank of {most}, and the spec's rank at the start is {spec.rank}")
    for matrix in matrices:
        found = matrix.scaling
        if abs(found - spec.scaling) > 1e-6 * spec.scaling:
            raise AdapterError(
                f"{matrix.spot.module!r} is scaled by {found:g}; in PEFT an AdaLoRA has one scaling, which is "
                f"{spec.scaling:g} here: fold what is more into E"
            )
    pruned = frozen_mapping(spec.ranks) or any(r != spec.rank for r in rank.values())
    ranks = {_escaped(name): r for name, r in rank.items()} if pruned else ()
    return replace(_with_targets(spec, set(rank), layout), ranks=ranks)


def _exported_ia3(adapter: Adapter, matrices: list[Matrix], layout: Layout) -> Any:
    """The first way of saying the targets, and which of them are scaled at the input, that PEFT takes so."""
    if adapter.spec.bias != "none":
        raise AdapterError(f"bias={adapter.spec.bias!r}: PEFT's IA³ trains no biases; name them in modules_to_save")
    modules = {matrix.spot.module for matrix in matrices}
    on_input = {matrix.spot.module for matrix in matrices if ("l_in" in matrix.leaves) != matrix.spot.as_head}
    spec: Any = _with_targets(adapter.spec, modules, layout)
    whole = replace(spec, targets=tuple(sorted(modules)), exclude=())
    plain = _dotted(spec.feedforward)
    for base, names in ((spec, plain), (whole, tuple(sorted(on_input)))):
        listed = isinstance(base.targets, tuple) and isinstance(names, tuple)
        if listed and not set(names) <= set(base.targets):
            continue  # which PEFT refuses
        if {name for name in modules if is_feedforward(names, name)} == on_input:
            return replace(base, feedforward=names)
    return replace(spec, feedforward="|".join(_escaped(name) for name in sorted(on_input)))


def _escaped(module: str) -> str:
    return module.replace(".", r"\.")


def _alpha(spec: Any, matrix: Matrix) -> float:
    """Alpha as the scaling has it: the scaling is what acts."""
    return matrix.scaling * (matrix.rank**0.5 if spec.rank_stabilized else matrix.rank)


def _differs(spec: Any, name: str, rank: int, alpha: float) -> bool:
    stated = np.float32(spec.scaling(rank, spec.alpha_of(name)))
    actual = np.float32(spec.scaling(rank, alpha))
    return abs(float(stated) - float(actual)) > 1e-6 * abs(float(actual))


def _dotted(names: str | tuple[str, ...]) -> Any:
    return names if isinstance(names, str) else tuple(map(dotted, names))


def _with_targets(spec: Any, modules: set[str], layout: Layout) -> Any:
    """The first way of saying the targets that PEFT resolves to just these modules."""
    known, modules = layout.modules, modules - layout.parameters
    if layout.parameters and isinstance(spec.targets, tuple):  # the names of parameters are no modules'
        meant = tuple(name for name in spec.targets if any(names_module((name,), module) for module in known))
        spec = replace(spec, targets=meant)
    if not modules:
        return replace(spec, targets=(), exclude=())
    spec = replace(spec, targets=_dotted(spec.targets), exclude=_dotted(spec.exclude))
    explicit = replace(spec, exclude=(), layers_to_transform=None, layers_pattern=())
    ends = tuple(sorted({name.rpartition(".")[2] for name in modules}))
    for candidate in (spec, replace(explicit, targets=ends), replace(explicit, targets=tuple(sorted(modules)))):
        if _is_known_to_peft(candidate) and _resolved(candidate.where, known) == modules:
            return candidate
    raise AdapterError(f"PEFT can't be told to adapt just these modules: {sorted(modules)[:5]}")


def _is_known_to_peft(spec: Any) -> bool:
    """Whether PEFT's config can say the targets in this way."""
    if spec.targets == ALL_LINEAR:
        return False
    if spec.layers_to_transform is None:
        return not spec.layers_pattern
    return spec.method != "ia3" and not isinstance(spec.targets, str)


def _resolved(where: Targets, known: Mapping[str, Kernel]) -> set[str]:
    return {
        name
        for name, kernel in known.items()
        if names_module(where.targets, name) and is_kept(where, f"{name}.w".replace(".", "/"), kernel)
    }
