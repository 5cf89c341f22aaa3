"""A mixture as one folder that needs nothing else: `xlora.safetensors` and a file for each expert. Lossless.

`xlora.safetensors` holds the classifier, and in its metadata the spec and the experts' names in order; expert k is in
`expert-k.safetensors`, so that a name is never part of a path or key, and can be any string. The digest of each is in
the metadata, too, so that experts can't change places, or come from another mixture.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jpeft.adapter import Adapter
from jpeft.adapter_files import MOST, adapter_file, require_apart
from jpeft.atomic import write_folder
from jpeft.digest import digest
from jpeft.errors import AdapterError, SpecError
from jpeft.finite import is_finite
from jpeft.safetensors_header import ADAPTER_HEADER_BYTES, open_safetensors, tensor_at
from jpeft.save import check_tensor, content_of, write_tensors
from jpeft.save import parse as parse_adapter
from jpeft.shared import is_shared, values, write_once
from jpeft.strict_json import parse_json_object
from jpeft.typed import from_json, is_of
from jpeft.xlora.classifier import Classifier
from jpeft.xlora.mixture import Mixture, check_experts, outputs_of
from jpeft.xlora.spec import XLoRA

# the second has no digests of the experts, the third none at all
FORMAT, APART, UNSIGNED, MAIN = "jpeft-xlora-3", "jpeft-xlora-2", "jpeft-xlora-1", "xlora.safetensors"
EXPERT = re.compile(r"expert-\d+\.safetensors")
MOST_VALUES = 1_000  # of the JSON in the metadata; and tensors of a classifier
Tensors = Mapping[str, np.ndarray]
Stored = tuple[Tensors, Mapping[str, str]]  # of a file: its tensors and its metadata


class Described(NamedTuple):
    """What the metadata says; `digests` are those of the experts, each None in the forms that have none."""

    spec: XLoRA
    names: tuple[str, ...]
    digests: tuple[str | None, ...]


def save(folder: str | os.PathLike[str], mixture: Mixture) -> None:
    """Writes experts, classifier and spec to a folder, moved into place whole.

    Where several processes share arrays of the mixture, all of them call this, and process 0 writes.

    Args:
      folder: made if need be; an earlier mixture's is replaced, one with other things in it is refused.
      mixture: any mixture; its arrays are saved in their own dtypes.

    Raises:
      AdapterError: an array is not finite, or of a dtype that the format has no name for; there are more experts or
        layers than `load` takes, or a name that is no text.
      JpeftError: the folder holds other things.
      OSError: it can't be written; then what was there still is.
    """
    shared, mixture = is_shared(mixture), jax.tree.map(values, mixture)
    tensors: dict[str, Any] = {
        f"{i}/{n}": leaf for i, layer in enumerate(mixture.classifier) for n, leaf in layer.items()
    }
    for key, tensor in tensors.items():
        if not is_finite(tensor):
            raise AdapterError(f"{key!r} of the classifier holds values that are not finite; nothing was written")
    if len(tensors) > MOST_VALUES:
        raise AdapterError(f"a classifier's file holds at most {MOST_VALUES} tensors; found {len(tensors)}")
    experts = [content_of(mixture.experts[name]) for name in mixture.names]
    metadata = _metadata(mixture, [described["digest"] for _, described in experts])
    _described(metadata, Path(folder) / MAIN)  # nothing is written that would not be read again
    metadata["digest"] = digest(tensors, metadata)

    def fill(new: Path) -> None:
        write_tensors(new / MAIN, {key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}, metadata)
        for k, content in enumerate(experts):
            write_tensors(_expert(new, k), *content)

    write_once(shared, lambda: write_folder(folder, fill, lambda name: EXPERT.fullmatch(name) is not None))


def _metadata(mixture: Mixture, digests: list[str]) -> dict[str, str]:
    texts = {"spec": asdict(mixture.spec), "names": mixture.names, "experts": digests}
    return {"format": FORMAT} | {name: json.dumps(value) for name, value in texts.items()}


def load(folder: str | os.PathLike[str]) -> Mixture:
    """Reads a mixture that `save` wrote.

    Raises:
      AdapterError: a file is missing or broken, or they don't fit each other; names what was found.
    """
    folder = Path(folder)
    if not (folder / MAIN).is_file():
        raise AdapterError(f"{folder}: no {MAIN} there; expected a folder that jpeft.xlora.save wrote{_hint(folder)}")
    main = _stored(adapter_file(folder, MAIN), MOST_VALUES)
    names = _described(main[1], folder / MAIN).names
    require_apart(folder, {name: _expert(folder, k) for k, name in enumerate(names)})

    def expert(k: int) -> Stored:
        if not (place := _expert(folder, k)).is_file():
            raise AdapterError(f"{folder}: expert {names[k]!r:.100} is missing; expected it in {place.name}")
        return _stored(adapter_file(folder, place.name))

    return parse(folder, main, expert)


def parse(folder: Path, main: Stored, expert: Callable[[int], Stored]) -> Mixture:
    """The mixture that the files of a folder are, `expert` giving the one of each number; `folder` names it in errors.

    Raises:
      AdapterError: they are none.
    """
    (tensors, metadata), file = main, folder / MAIN
    spec, names, digests = _described(metadata, file)
    _check_tensors(tensors, metadata, file)
    _check_count(tensors, names, file)
    experts = {name: _adapter(_expert(folder, k), expert(k), digests[k]) for k, name in enumerate(names)}
    try:
        check_experts(spec, experts)
    except SpecError as error:
        raise AdapterError(f"{folder}: {error}") from error
    classifier = _classifier(tensors, spec, outputs_of(spec, experts), file)
    kept = tuple({leaf: jax.device_put(np.array(tensor)) for leaf, tensor in layer.items()} for layer in classifier)
    return Mixture(experts, kept, spec, names)


def _stored(file: Path, most: int | None = None) -> Stored:
    mapped, entries, metadata = open_safetensors(file, AdapterError, ADAPTER_HEADER_BYTES, most)
    return {key: tensor_at(mapped, entry) for key, entry in entries.items()}, metadata


def _adapter(file: Path, stored: Stored, expected: str | None) -> Adapter:
    tensors, metadata = stored
    adapter = parse_adapter(str(file), tensors, metadata)
    if expected is not None and (found := metadata.get("digest")) != expected:
        raise AdapterError(
            f"{file}: it is no expert of this mixture: expected the digest {expected!r:.100}, found {found!r:.100}"
        )
    return adapter


def _expert(folder: Path, k: int) -> Path:
    return folder / f"expert-{k}.safetensors"


def _hint(folder: Path) -> str:
    peft = (folder / "adapter_config.json").exists()
    return "; this is PEFT's: jpeft_interop.load_peft_xlora(folder, params)" if peft else ""


def _described(metadata: Mapping[str, str], file: Path) -> Described:
    if metadata.get("format") not in (FORMAT, APART, UNSIGNED):
        raise AdapterError(f"{file}: expected format {FORMAT!r}, found {metadata.get('format')!r:.100}")
    told = f"{file}: the metadata's 'spec'"
    found = parse_json_object(metadata.get("spec", "").encode(), told, AdapterError, 1, most=MOST_VALUES)
    try:
        spec = from_json(XLoRA, found, told)
    except SpecError as error:
        raise AdapterError(f"{told}: {error!s:.500}") from error
    names = _list(metadata, "names", file)
    if not 0 < len(names) <= MOST or len(set(names)) != len(names):
        raise AdapterError(
            f"{file}: the metadata's 'names': expected those of 1 to {MOST} experts, each once, found {names!s:.200}"
        )
    if metadata["format"] != FORMAT:
        return Described(spec, tuple(names), (None,) * len(names))
    digests = _list(metadata, "experts", file)
    if len(digests) != len(names):
        raise AdapterError(f"{file}: the metadata's 'experts': expected a digest of each of {len(names)}")
    return Described(spec, tuple(names), tuple(digests))


def _list(metadata: Mapping[str, str], name: str, file: Path) -> list[str]:
    """A list of strings in the metadata."""
    told = f"{file}: the metadata's {name!r}"
    text = f'{{"{name}": {metadata.get(name, "")}}}'
    found = parse_json_object(text.encode(), told, AdapterError, 2, most=MOST_VALUES)
    if set(found) != {name} or not is_of(found[name], list[str]):
        raise AdapterError(f"{told}: expected a list of strings, found {found.get(name)!r:.200}")
    return found[name]


def _check_tensors(tensors: Tensors, metadata: Mapping[str, str], file: Path) -> None:
    for key, tensor in tensors.items():
        check_tensor(key, tensor, str(file))
    described = {name: value for name, value in metadata.items() if name != "digest"}
    if metadata["format"] != UNSIGNED and digest(tensors, described) != metadata.get("digest"):
        raise AdapterError(f"{file}: the file has changed since it was written: its digest is another")


def _check_count(tensors: Tensors, names: tuple[str, ...], file: Path) -> None:
    """As many outputs as experts, before any of those is read."""
    widths = {tensor.shape[-1] for key, tensor in tensors.items() if key.endswith("/kernel") and tensor.ndim > 1}
    if len(names) not in widths:
        raise AdapterError(
            f"{file}: {len(names)} names of experts; the classifier has kernels of {sorted(widths)!s:.100}"
        )


def _classifier(tensors: Tensors, spec: XLoRA, outputs: tuple[int, ...], file: Path) -> Classifier:
    """The layers, with every leaf there, nothing left over, and shapes that follow from each other."""
    leaves = ("kernel", "bias") if spec.bias else ("kernel",)
    if spec.depth > len(tensors):  # of which nothing is made before
        raise AdapterError(f"{file}: the spec has the depth {spec.depth}, and there are {len(tensors)} tensors")
    keys = {f"{i}/{leaf}" for i in range(spec.depth) for leaf in leaves}
    if set(tensors) != keys:
        raise AdapterError(f"{file}: expected the tensors {sorted(keys)!s:.500}, found {sorted(tensors)!s:.500}")
    classifier: Any = tuple({leaf: tensors[f"{i}/{leaf}"] for leaf in leaves} for i in range(spec.depth))
    if classifier[0]["kernel"].ndim < 2:
        raise AdapterError(f"{file}: '0/kernel': expected (features, ...), found {classifier[0]['kernel'].shape}")
    fan_in = classifier[0]["kernel"].shape[:1]
    for i, layer in enumerate(classifier):
        out = outputs if i == spec.depth - 1 else (spec.hidden,)
        for leaf, wanted in zip(leaves, ((*fan_in, *out), out), strict=False):
            if layer[leaf].shape != wanted:
                raise AdapterError(f"{file}: '{i}/{leaf}': expected shape {wanted}, found {layer[leaf].shape}")
        fan_in = out
    return classifier
