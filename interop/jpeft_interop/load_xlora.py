"""A folder of PEFT's X-LoRA, read into a mixture: where it is whole, which PEFT 0.21.2 does not leave it.

    adapter_config.json, adapter_model.safetensors       the classifier: base_model.internal_xlora_classifier.layers.<i>
    0/, 1/, …                                            the experts, each an ordinary LoRA folder

`save_pretrained` of PEFT 0.21.2 takes the number of a classifier's layer for the name of an adapter, and leaves those
layers out; and it writes parts of the base model where the experts belong.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jpeft.adapter import Adapter
from jpeft.errors import AdapterError, SpecError
from jpeft.safetensors_header import ADAPTER_HEADER_BYTES
from jpeft.save import check_tensor
from jpeft.site import Site
from jpeft.tree import flatten
from jpeft.xlora import Mixture, layers_of
from jpeft.xlora.classifier import Dense
from jpeft.xlora.mixture import check_experts
from jpeft_interop.adapter_files import MOST, adapter_file, require_apart
from jpeft_interop.layout import Layout, default_layout
from jpeft_interop.layout.factors import batch_index, is_adapted
from jpeft_interop.load_peft import CONFIG, WEIGHTS, load_peft
from jpeft_interop.provenance import read_config_object
from jpeft_interop.safetensors_file import read_safetensors
from jpeft_interop.xlora_config import XLoraConfig, read_xlora_config

DEEPEST = 100  # layers of a classifier
LONGEST = 500  # characters of what an error shows of a file
PREFIX = "base_model.internal_xlora_classifier.layers."
REPAIR = (
    "Where the PEFT model still lives, write them beside it: safetensors.torch.save_file({k: v for k, v in "
    "model.state_dict().items() if 'internal_xlora_classifier' in k}, 'adapter_model.safetensors')"
)


def load_peft_xlora(
    folder: str | os.PathLike[str],
    params: Any,
    *,
    experts: Mapping[str, str | os.PathLike[str]] | None = None,
    order: Sequence[str] | None = None,
    layout: Layout | None = None,
) -> Mixture:
    """A mixture from a folder of PEFT's X-LoRA.

    Args:
      folder: holds `adapter_config.json`, `adapter_model.safetensors` with every layer of the classifier, and a folder
        for each expert, unless `experts` says where they are.
      params: the base that the experts are for, as for `load_peft`.
      experts: LoRA folders by name, in the order in which PEFT was given them. The names may be new.
      order: of layer-wise scalings, torch's modules in PEFT's order: `[name for name, _ in base.named_modules()]`.
      layout: where each path of the params lies in torch, for params with other names or shapes.

    Raises:
      AdapterError: PEFT lost a part of it; a file is missing, broken or foreign; an expert that PEFT and a mixture here
        would not treat alike; an order that can't be known.
    """
    folder = Path(folder)
    if not (folder / CONFIG).exists():
        raise AdapterError(f"{folder}: no {CONFIG} there; is it an X-LoRA's folder?")
    config = read_xlora_config(read_config_object(folder), str(folder / CONFIG))
    layers = _classifier(adapter_file(folder, WEIGHTS), config)
    folders = _folders(folder, config.names) if experts is None else dict(experts)
    _check_count(layers[-1]["bias"].size, len(folders), config, folder / WEIGHTS)
    layout = default_layout(flatten(params)) if layout is None else layout
    loaded = {name: _expert(name, path, params, layout) for name, path in folders.items()}
    try:
        check_experts(config.spec, loaded)
    except SpecError as error:
        raise AdapterError(f"{folder}: {error}") from error
    last = _last(layers[-1], config, loaded, order, layout, str(folder / WEIGHTS))
    return Mixture(loaded, (*map(_turned, layers[:-1]), last), config.spec, tuple(loaded))


def _classifier(file: Path, config: XLoraConfig) -> list[dict[str, np.ndarray]]:
    """Its layers as torch has them, `weight` (out, in) and `bias`; the last one's outputs are not checked yet."""
    if not file.exists():
        raise AdapterError(f"{file.parent}: no {WEIGHTS} there; it should hold the classifier")
    tensors, _ = read_safetensors(file, AdapterError, ADAPTER_HEADER_BYTES, 10 * DEEPEST)
    return parse_classifier(file, tensors, config)


def parse_classifier(file: Path, tensors: Mapping[str, np.ndarray], config: XLoraConfig) -> list[dict[str, np.ndarray]]:
    """The layers that a file's tensors are; `file` names it in errors.

    Raises:
      AdapterError: they are not those that the config tells of.
    """
    spec = config.spec
    if spec.depth > DEEPEST:
        raise AdapterError(f"{file.parent / CONFIG}: 'xlora_depth' is {spec.depth!s:.50}; expected at most {DEEPEST}")
    between = 3 if spec.dropout > 0 else 2  # torch counts the ReLU and the dropout, too
    wanted = [f"{PREFIX}{i * between}.{leaf}" for i in range(spec.depth) for leaf in ("weight", "bias")]
    if lost := [key for key in wanted if key not in tensors]:
        raise AdapterError(
            f"{file}: the classifier is not whole: {', '.join(map(repr, lost)):.{LONGEST}} "
            f"{'is' if len(lost) == 1 else 'are'} missing. PEFT 0.21.2 loses them when it saves, and they are not made "
            f"up here. {REPAIR}"
        )
    if foreign := [key for key in tensors if key not in wanted]:
        raise AdapterError(f"{file}: key {foreign[0]!r:.200} is none of the classifier's, {wanted!s:.{LONGEST}}")
    layers = [
        {leaf: tensors[f"{PREFIX}{i * between}.{leaf}"] for leaf in ("weight", "bias")} for i in range(spec.depth)
    ]
    _check_layers(layers, config, str(file))
    return layers


def _check_layers(layers: list[dict[str, np.ndarray]], config: XLoraConfig, file: str) -> None:
    fan_in = config.features
    for number, layer in enumerate(layers):
        fan_out = config.spec.hidden if number < len(layers) - 1 else layer["bias"].size
        for leaf, shape in (("weight", (fan_out, fan_in)), ("bias", (fan_out,))):
            found = layer[leaf]
            if found.shape != shape:
                told = f"expected {shape!s:.100}, found {found.shape}"
                raise AdapterError(f"{file}: {leaf} of dense layer {number}: {told}")
            check_tensor(f"{leaf} of dense layer {number}", found, file)
        if len({found.dtype for found in layer.values()}) > 1:
            raise AdapterError(f"{file}: weight and bias of dense layer {number}: expected one dtype")
        fan_in = fan_out


def _check_count(outputs: int, count: int, config: XLoraConfig, file: Path) -> None:
    """As many outputs as experts, or as experts for each module, before any of those is read."""
    fits = outputs % max(count, 1) == 0 if config.spec.layerwise else outputs == count
    if not fits:
        each = ", or so many for each module" if config.spec.layerwise else ""
        raise AdapterError(f"{file}: the classifier has {outputs} outputs; {count} experts need {count}{each}")


def _folders(folder: Path, names: tuple[str, ...]) -> dict[str, Path]:
    """The experts' folders, in the classifier's order: PEFT numbers them, and sorts the names in its config."""
    numbers = [str(k) for k in range(len(names))]
    call = "load_peft_xlora(folder, params, experts={name: folder, ...})"
    if len(names) > MOST:
        raise AdapterError(f"{folder / CONFIG}: 'adapters': expected at most {MOST}, found {len(names)}")
    if sorted(names) != sorted(numbers):
        raise AdapterError(
            f"{folder / CONFIG}: the experts are called {', '.join(map(repr, names)):.{LONGEST}}, sorted, so that "
            f"their order in the classifier can't be told; give them in that order: {call}"
        )
    for name in numbers:
        if not (folder / name / CONFIG).exists():
            raise AdapterError(f"{folder}: expert {name!r} is not there, in a folder of that name; say where: {call}")
    places = {name: adapter_file(folder, name) for name in numbers}
    require_apart(folder, places)
    return places


def _expert(name: str, folder: str | os.PathLike[str], params: Any, layout: Layout) -> Adapter:
    try:
        adapter = load_peft(folder, params, layout=layout)
    except AdapterError as error:
        raise AdapterError(
            f"expert {name!r} does not load: {error}. (PEFT 0.21.2 writes parts of the base model into an X-LoRA's "
            "expert folders; give the folders that the experts came from: experts={name: folder, ...})"
        ) from error
    if getattr(adapter.spec, "factor_bias", False):
        raise AdapterError(
            f"expert {name!r} has biases on B (lora_bias), which PEFT's X-LoRA adds whole, whatever the scaling; here "
            "they would be scaled like the rest of the expert"
        )
    return adapter


def _turned(layer: Mapping[str, np.ndarray]) -> Dense:
    return {"kernel": jnp.array(layer["weight"].T), "bias": jnp.array(layer["bias"])}  # copies: the file is mapped


def _last(
    layer: Mapping[str, np.ndarray],
    config: XLoraConfig,
    experts: Mapping[str, Adapter],
    order: Sequence[str] | None,
    layout: Layout,
    file: str,
) -> Dense:
    """The last layer: outputs (K,), or (layers, K) in the order that layers have here."""
    if not config.spec.layerwise:
        return _turned(layer)
    ours, theirs = _places(experts, layout), _in_order(experts, order, layout)
    if (found := layer["bias"].size) != (outputs := len(experts) * len(theirs)):
        what = f"{len(experts)} experts on {len(theirs)} modules"
        raise AdapterError(f"{file}: the classifier has {found} outputs; {what} need {outputs}")
    source = np.array([theirs.index(module) if module in theirs else -1 for module in ours])
    matrix = np.concatenate([layer["weight"].T, layer["bias"][None]]).reshape(-1, len(theirs), len(experts))
    spread = np.where((source >= 0)[:, None], matrix[:, source], 0)  # nothing acts in a stack's slice without experts
    return {"kernel": jnp.asarray(spread[:-1]), "bias": jnp.asarray(spread[-1])}


def _places(experts: Mapping[str, Adapter], layout: Layout) -> list[str]:
    """The torch module of each layer that a mixture has scalings for."""
    return [link.key.removesuffix(".weight") for layer in layers_of(experts) for link in layout.links[layer.path]]


def _in_order(experts: Mapping[str, Adapter], order: Sequence[str] | None, layout: Layout) -> list[str]:
    """The modules that any expert adapts, as PEFT meets them."""
    sites = [site for expert in experts.values() for site in expert.sites]
    for site in sites:
        _check_alone(site, layout)
    adapted = {
        link.key.removesuffix(".weight") for site in sites for link in layout.links[site.path] if is_adapted(site, link)
    }
    if order is None:
        raise AdapterError(
            "the scalings are layer-wise, in the order of torch's modules, which no file tells; give it: "
            "load_peft_xlora(folder, params, order=[name for name, _ in base.named_modules()])"
        )
    found = [name for name in order if name in adapted]
    if len(found) != len(adapted):
        missing = f"{sorted(adapted - set(found)) or 'each of them once'!s:.{LONGEST}}"
        raise AdapterError(f"order: expected every module that an expert adapts, each once; missing: {missing}")
    return found


def _check_alone(site: Site, layout: Layout) -> None:
    """Each matrix of a weight is one torch module, and has its own scaling in both."""
    indices = [batch_index(link, site.kernel) for link in layout.links[site.path]]
    if len(set(indices)) != len(indices):
        raise AdapterError(
            f"{site.path!r} is tied or fused, several modules in torch: layer-wise scalings can differ between them"
        )
