"""An adapter written as a PEFT folder: PEFT, transformers and vLLM read it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpeft.adapter import Adapter
from jpeft.atomic import write_folder
from jpeft.errors import AdapterError
from jpeft.methods import METHODS
from jpeft.shared import gathered, has_values, is_shared, write_once
from jpeft.tree import flatten, nearest
from jpeft_interop.config_notes import other_tasks_head
from jpeft_interop.layout import Layout, default_layout
from jpeft_interop.load_peft import CONFIG, WEIGHTS
from jpeft_interop.peft_config import PeftConfig, write_config
from jpeft_interop.peft_keys import KEYS, PREFIX, keys_of
from jpeft_interop.peft_resolution import TASKS, around
from jpeft_interop.provenance import adapted_keys, base_fingerprint, stating
from jpeft_interop.read_back import check_reads_back, check_same_changes
from jpeft_interop.safetensors_file import write_safetensors
from jpeft_interop.saved_modules import SavedModules, saved_modules
from jpeft_interop.serving import Target, plain_lora, uniform
from jpeft_interop.spelling import exported_spec
from jpeft_interop.split import Matrix, matrices
from jpeft_interop.target_parameters import shortest
from jpeft_interop.uses import check_uses

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
    process 0 writes. Before, `load_peft` reads what is to be written, and it is spelt so that PEFT means the same by
    it, as far as the names of the base's tensors tell. They do not tell of buffers: PEFT asks the file for those of a
    module that is trained whole (BatchNorm's), and raises KeyError without them.

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
      AdapterError: a value that is not finite, a path without a place in torch, what PEFT's format cannot say, or what
        would read back as something else.
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
    is_told, layout = layout is not None, default_layout(flat) if layout is None else layout
    layout.check(flat)
    keys_of(adapter.spec)  # or there is no such method in PEFT
    if task_type is not None and task_type not in TASKS:
        raise AdapterError(f"PEFT has no task_type {task_type!r}; the nearest are {nearest(task_type, TASKS)}")
    adapter = adapter.replace(trained=gathered(adapter.trained), constant=gathered(adapter.constant))
    if (head := other_tasks_head(task_type, layout)) is not None:
        raise AdapterError(
            f"PEFT's model for task_type={task_type!r} refuses a base that ends in {head!r}: leave task_type out, or "
            "name the base's own"
        )
    _check_rank_zero(adapter, flat)
    if not is_told:
        check_uses(adapter, layout)
    given = adapter
    adapter = plain_lora(adapter) if target == "vllm" else adapter
    found = matrices(adapter, layout)
    if target == "vllm":
        found, spec = uniform(found, adapter.spec)
        adapter = adapter.replace(meta=replace(adapter.meta, spec=spec))
    modules = {matrix.spot.module for matrix in found}
    saved = saved_modules(adapter, modules, layout, task_type)
    if target == "vllm" and saved.wrapped:
        raise AdapterError(f"vLLM takes no saved heads, which task_type={task_type!r} asks for: leave it out")
    spec = exported_spec(adapter, found, layout, saved, task_type)
    tensors = dict(_factor_tensors(adapter, found, flat, layout, with_base=target == "peft"))
    tensors |= dict(_whole(adapter, saved, flat, layout, modules))
    for key, tensor in tensors.items():
        if not np.isfinite(tensor.astype(np.float32)).all():
            raise AdapterError(f"{key!r} holds values that are not finite; nothing was written")
    weights = [f"{one.spot.module}.weight" for one in found]
    fan_in_fan_out = any(layout.by_key[key][0].kind == "conv1d" for key in weights if key in layout.by_key)
    parameters = {one.spot.module for one in found if one.spot.is_parameter}
    _check_parameters(spec, parameters)
    named = tuple(shortest(parameters, layout.parameters))
    config = write_config(PeftConfig(spec, base_model, task_type, fan_in_fan_out, named, saved.ties))
    base = base_fingerprint(adapted_keys(tensors, layout), layout, flat)
    metadata = stating(tensors, config, {"format": "pt"} | saved.metadata(), base)
    read = check_reads_back(config, tensors, metadata, flat, layout, found, adapter)
    if target == "vllm":
        check_same_changes(read, given, layout)
    return PeftFiles(config, tensors, metadata)


def _check_rank_zero(adapter: Adapter, flat: Mapping[str, Any]) -> None:
    """Raise where a kernel of rank 0, which PEFT's LoRA can't hold, changes its weight all the same: by a magnitude."""
    for site in adapter.sites:
        if site.rank == 0 and "m" in adapter.trained[site.path]:
            start = METHODS[site.method].init(jax.random.key(0), site, adapter.spec, flat[site.path], jnp.float32)
            m = np.asarray(adapter.trained[site.path]["m"], np.float32)
            if not np.allclose(m, np.asarray(start["m"]), rtol=4 * float(jnp.finfo(flat[site.path].dtype).eps)):
                raise AdapterError(
                    f"{site.path!r} has rank 0, which PEFT's DoRA refuses, and its trained magnitude changes the "
                    "weight: fold it into the base (jpeft.merge), or train it with a rank of 1 or more"
                )


def _check_parameters(spec: Any, parameters: set[str]) -> None:
    """What PEFT's adapters of parameters can't have."""
    if parameters and (spec.dropout or spec.factor_bias):
        found = f"dropout={spec.dropout}" if spec.dropout else "factor_bias=True"
        raise AdapterError(
            f"PEFT has no {found} on {sorted(parameters)[0]!r} (target_parameters): "
            "adapter.replace(meta=dataclasses.replace(adapter.meta, spec=dataclasses.replace(spec, dropout=0.0)))"
        )


def _factor_tensors(
    adapter: Adapter, found: Sequence[Matrix], flat: Mapping[str, Any], layout: Layout, with_base: bool
) -> Iterator[tuple[str, np.ndarray]]:
    for site in adapter.sites:
        if site.method not in ("replacement", adapter.spec.method):
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
    adapter: Adapter, saved: SavedModules, flat: Mapping[str, Any], layout: Layout, adapted: set[str]
) -> Iterator[tuple[str, np.ndarray]]:
    for key, path in saved.trained.items():
        module, _, leaf = key.rpartition(".")
        value = layout.tensor(key, {path: adapter.trained[path]["value"]})
        yield PREFIX + (f"{module}.base_layer.{leaf}" if module in adapted else key), value
        outer = next((name for name in around(module) if name in saved.wrapped), None)
        if outer is not None and leaf == "bias" and adapter.spec.bias == "all":  # PEFT's two other names for it
            base = layout.tensor(key, flat).astype(value.dtype)
            inner = key.removeprefix(f"{outer}.")
            yield f"{PREFIX}{outer}.modules_to_save.{'default.' if outer != module else ''}{inner}", value
            yield f"{PREFIX}{outer}.original_module.{inner}", base
    for key in saved.copies:
        _check_has_values(key, flat, layout)
        yield PREFIX + key, layout.tensor(key, flat)


def _check_has_values(key: str, flat: Mapping[str, Any], layout: Layout) -> None:
    """Raise where the base's value of a tensor is to be written, and the params are only shapes."""
    for link in layout.by_key[key]:
        if not has_values(flat[link.path]):
            raise AdapterError(
                f"PEFT asks the file for {key!r} too, and {link.path!r} in the params is only a shape: give params "
                "with values"
            )
