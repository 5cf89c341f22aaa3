"""A mixture as one folder that needs nothing else: `xlora.safetensors` and a file for each expert. Lossless.

`xlora.safetensors` holds the classifier, and in its metadata the spec and the experts' names in order; expert k is in
`expert-k.safetensors`, so that a name is never part of a path or key, and can be any string.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from jpeft.adapter_files import adapter_file
from jpeft.atomic import write_folder
from jpeft.digest import digest
from jpeft.errors import AdapterError, SpecError
from jpeft.safetensors_header import ADAPTER_HEADER_BYTES, open_safetensors, tensor_at
from jpeft.save import is_finite
from jpeft.save import load as load_adapter
from jpeft.save import save as save_adapter
from jpeft.shared import is_shared, values, write_once
from jpeft.strict_json import parse_json_object
from jpeft.typed import from_json, is_of
from jpeft.xlora.classifier import Classifier
from jpeft.xlora.mixture import Mixture, check_experts, outputs_of
from jpeft.xlora.spec import XLoRA

FORMAT, UNSIGNED, MAIN = "jpeft-xlora-2", "jpeft-xlora-1", "xlora.safetensors"  # the second has no digest
EXPERT = re.compile(r"expert-\d+\.safetensors")


def save(folder: str | os.PathLike[str], mixture: Mixture) -> None:
    """Writes experts, classifier and spec to a folder, moved into place whole.

    Where several processes share arrays of the mixture, all of them call this, and process 0 writes.

    Args:
      folder: made if need be; an earlier mixture's is replaced, one with other things in it is refused.
      mixture: any mixture; its arrays are saved in their own dtypes.

    Raises:
      AdapterError: an array is not finite.
      JpeftError: the folder holds other things.
    """
    shared, mixture = is_shared(mixture), jax.tree.map(values, mixture)
    tensors: dict[str, Any] = {
        f"{i}/{n}": leaf for i, layer in enumerate(mixture.classifier) for n, leaf in layer.items()
    }
    for key, tensor in tensors.items():
        if not np.isfinite(tensor.astype(np.float32)).all():
            raise AdapterError(f"{key!r} of the classifier holds values that are not finite; nothing was written")
    metadata = {"format": FORMAT, "spec": json.dumps(asdict(mixture.spec)), "names": json.dumps(mixture.names)}
    metadata["digest"] = digest(tensors, metadata)

    def fill(new: Path) -> None:
        save_file({key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}, new / MAIN, metadata)
        for k, name in enumerate(mixture.names):
            save_adapter(_expert(new, k), mixture.experts[name])

    write_once(shared, lambda: write_folder(folder, fill, lambda name: EXPERT.fullmatch(name) is not None))


def load(folder: str | os.PathLike[str]) -> Mixture:
    """Reads a mixture that `save` wrote.

    Raises:
      AdapterError: a file is missing or broken, or they don't fit each other; names what was found.
    """
    folder = Path(folder)
    if not (folder / MAIN).is_file():
        raise AdapterError(f"{folder}: no {MAIN} there; expected a folder that jpeft.xlora.save wrote{_hint(folder)}")
    mapped, entries, metadata = open_safetensors(adapter_file(folder, MAIN), AdapterError, ADAPTER_HEADER_BYTES)
    spec, names = _described(metadata, folder / MAIN)
    found = {key: tensor_at(mapped, entry) for key, entry in entries.items()}
    _check_tensors(found, metadata, folder / MAIN)
    tensors = {key: jnp.array(tensor) for key, tensor in found.items()}
    for k, name in enumerate(names):
        if not _expert(folder, k).is_file():
            raise AdapterError(f"{folder}: expert {name!r} is missing; expected it in {_expert(folder, k).name}")
    experts = {name: load_adapter(adapter_file(folder, _expert(folder, k).name)) for k, name in enumerate(names)}
    check_experts(spec, experts)
    return Mixture(experts, _classifier(tensors, spec, outputs_of(spec, experts), folder / MAIN), spec, names)


def _expert(folder: Path, k: int) -> Path:
    return folder / f"expert-{k}.safetensors"


def _hint(folder: Path) -> str:
    peft = (folder / "adapter_config.json").exists()
    return "; this is PEFT's: jpeft_interop.load_peft_xlora(folder, params)" if peft else ""


def _described(metadata: dict[str, str], file: Path) -> tuple[XLoRA, tuple[str, ...]]:
    if metadata.get("format") not in (FORMAT, UNSIGNED):
        raise AdapterError(f"{file}: expected format {FORMAT!r}, found {metadata.get('format')!r:.100}")
    found = parse_json_object(metadata.get("spec", "").encode(), f"{file}: the metadata's 'spec'", AdapterError)
    text = metadata.get("names", "")
    names = parse_json_object(f'{{"names": {text}}}'.encode(), f"{file}: the metadata's 'names'", AdapterError)["names"]
    if not is_of(names, list[str]):
        raise AdapterError(f"{file}: the metadata's 'names': expected a list of strings, found {names!r:.200}")
    try:
        spec = from_json(XLoRA, found, f"{file}: the metadata's 'spec'")
    except SpecError as error:
        raise AdapterError(f"{file}: the metadata is not a spec with names: {error}") from error
    if len(set(names)) != len(names):
        raise AdapterError(f"{file}: an expert's name stands there twice: {names}")
    return spec, tuple(names)


def _check_tensors(tensors: dict[str, np.ndarray], metadata: dict[str, str], file: Path) -> None:
    for key, tensor in tensors.items():
        if not jnp.issubdtype(tensor.dtype, jnp.floating) or not is_finite(tensor):
            raise AdapterError(f"{file}: {key!r:.100}: expected floats, all of them finite")
    described = {name: value for name, value in metadata.items() if name != "digest"}
    if metadata["format"] == FORMAT and digest(tensors, described) != metadata.get("digest"):
        raise AdapterError(f"{file}: the file has changed since it was written: its digest is another")


def _classifier(tensors: dict[str, Any], spec: XLoRA, outputs: tuple[int, ...], file: Path) -> Classifier:
    """The layers, with every leaf there, nothing left over, and shapes that follow from each other."""
    leaves = ("kernel", "bias") if spec.bias else ("kernel",)
    if spec.depth > len(tensors):  # of which nothing is made before
        raise AdapterError(f"{file}: the spec has the depth {spec.depth}, and there are {len(tensors)} tensors")
    keys = {f"{i}/{leaf}" for i in range(spec.depth) for leaf in leaves}
    if set(tensors) != keys:
        raise AdapterError(f"{file}: expected the tensors {sorted(keys)}, found {sorted(tensors)}")
    classifier = tuple({leaf: tensors[f"{i}/{leaf}"] for leaf in leaves} for i in range(spec.depth))
    fan_in = classifier[0]["kernel"].shape[:1]
    for i, layer in enumerate(classifier):
        out = outputs if i == spec.depth - 1 else (spec.hidden,)
        for leaf, wanted in zip(leaves, ((*fan_in, *out), out), strict=False):
            if layer[leaf].shape != wanted:
                raise AdapterError(f"{file}: '{i}/{leaf}': expected shape {wanted}, found {layer[leaf].shape}")
        fan_in = out
    return classifier
