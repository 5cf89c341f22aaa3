"""The native file: one safetensors file for any adapter of any method, spec and geometry in its metadata. Lossless."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jpeft.adapter import Adapter, Meta, Part
from jpeft.atomic import write_file
from jpeft.errors import AdapterError, JpeftError
from jpeft.kernel import Kernel
from jpeft.methods import METHODS, SPECS, lora
from jpeft.site import Site
from jpeft.spec import Spec

FORMAT = "jpeft-1"


def save(path: str | os.PathLike[str], adapter: Adapter) -> None:
    """Writes an adapter to one file, moved into place whole.

    Args:
      path: the file, `*.safetensors` by custom.
      adapter: any adapter; its arrays are saved in their own dtypes, zero-sized ones too.

    Raises:
      AdapterError: an array is not finite.

    Example:
      >>> import jax, jpeft, tempfile
      >>> adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=1), {"kernel": jnp.ones((3, 2))})
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     jpeft.save(f"{folder}/adapter.safetensors", adapter)
      ...     jpeft.load(f"{folder}/adapter.safetensors").spec
      LoRA(rank=1, alpha=None, targets='all-linear')
    """
    tensors = {
        f"{part}|{where}|{leaf}": _finite(np.asarray(array), where, leaf)
        for part in ("trained", "constant")
        for where, leaves in getattr(adapter, part).items()
        for leaf, array in leaves.items()
    }
    metadata = {"format": FORMAT, "meta": json.dumps(_meta_to_json(adapter.meta))}
    write_file(path, lambda file: save_file(tensors, file, metadata))


def _finite(array: np.ndarray, where: str, leaf: str) -> np.ndarray:
    if jnp.issubdtype(array.dtype, jnp.inexact) and not np.isfinite(array.astype(np.float32)).all():
        raise AdapterError(f"{leaf!r} of {where!r} holds values that are not finite; nothing was written")
    return np.asarray(array, order="C")  # not ascontiguousarray, which makes a vector of a scalar


def load(path: str | os.PathLike[str]) -> Adapter:
    """Reads an adapter that `save` wrote.

    Raises:
      AdapterError: the file is not one of these, or is broken; names what was found.
      OSError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="flax") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                hint = "; a PEFT folder is read by jpeft_interop.load_peft(folder, params)"
                raise AdapterError(f"{path}: expected format {FORMAT!r}, found {metadata.get('format')!r}{hint}")
            meta = _meta_from_json(metadata.get("meta", ""), path)
            parts: dict[str, Part] = {"trained": {}, "constant": {}}
            for key in file.keys():  # noqa: SIM118  (a safe_open is not iterable)
                _put(parts, key, jnp.asarray(file.get_tensor(key)), path)
    except SafetensorError as error:
        raise AdapterError(f"{path}: not a whole safetensors file ({error})") from error
    adapter = Adapter(parts["trained"], parts["constant"], meta)
    _check(adapter, path)
    return adapter


def _put(parts: dict[str, Part], key: str, array: Any, path: Path) -> None:
    part, _, rest = key.partition("|")
    where, _, leaf = rest.rpartition("|")
    if part not in parts or not leaf:
        raise AdapterError(f"{path}: key {key!r} is not 'trained|path|leaf' or 'constant|path|leaf'")
    parts[part].setdefault(where, {})[leaf] = array


def _check(adapter: Adapter, path: Path) -> None:
    """Every site has the leaves that its method needs, in fitting shapes, and nothing is left over."""
    sites = {site.path: site for site in adapter.sites}
    for part in (adapter.trained, adapter.constant):
        for where in part:
            if where not in sites:
                raise AdapterError(f"{path}: {where!r} has arrays but no entry in the metadata")
    for where, site in sites.items():
        try:
            METHODS[site.method].matrices(adapter.leaves(where), site.kernel)
        except (KeyError, TypeError) as error:
            raise AdapterError(f"{path}: {where!r} does not hold what {site.method!r} needs: {error}") from error
        for leaf, shape in _shapes(adapter, site).items():
            found = adapter.leaves(where).get(leaf)
            if found is not None and found.shape != shape:
                raise AdapterError(f"{path}: {leaf!r} of {where!r}: expected shape {shape}, found {found.shape}")
        _check_mask(adapter, site, path)


def _check_mask(adapter: Adapter, site: Site, path: Path) -> None:
    leaves = adapter.leaves(site.path)
    if "mask" in leaves:
        allowed = lora.mask_shapes(site.kernel, site.rank) if "b" in leaves else [leaves["l"].shape]
        if (found := leaves["mask"].shape) not in allowed:
            raise AdapterError(f"{path}: 'mask' of {site.path!r}: expected a shape of {allowed}, found {found}")


def _shapes(adapter: Adapter, site: Site) -> dict[str, tuple[int, ...]]:
    """Of a new adapter's leaves at this site."""
    method, weight = METHODS[site.method], jax.ShapeDtypeStruct(site.kernel.shape, jnp.float32)
    new = lambda key, weight: method.init(key, site, adapter.spec, weight, jnp.dtype(jnp.float32))
    leaves = jax.eval_shape(new, jax.random.key(0), weight) | method.constant(adapter.spec, site)
    return {name: leaf.shape for name, leaf in leaves.items()}


def _meta_to_json(meta: Meta) -> dict[str, Any]:
    return {"method": meta.spec.method, "spec": asdict(meta.spec), "sites": [asdict(site) for site in meta.sites]}


def _meta_from_json(text: str, path: Path) -> Meta:
    try:
        found = json.loads(text)
        spec = _spec(found["method"], found["spec"])
        sites = tuple(_site(site) for site in found["sites"])
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, JpeftError):
            raise
        raise AdapterError(f"{path}: the metadata's 'meta' is not a spec with its sites: {error!r}") from error
    return Meta(spec, sites)


def _spec(method: str, found: dict[str, Any]) -> Spec:
    if method not in SPECS:
        raise AdapterError(f"unknown method {method!r}; this jpeft knows {', '.join(SPECS)}")
    kind = SPECS[method]
    return kind(**{field.name: _tuples(found[field.name]) for field in fields(kind) if field.name in found})


def _site(found: dict[str, Any]) -> Site:
    plain = {name: _tuples(value) for name, value in found.items() if name != "kernel"}
    return Site(kernel=Kernel(**{name: _tuples(value) for name, value in found["kernel"].items()}), **plain)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
