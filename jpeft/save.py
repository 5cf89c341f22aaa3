"""The native file: one safetensors file for any adapter of any method, spec and geometry in its metadata. Lossless."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jpeft.adapter import Adapter, Meta, Part
from jpeft.atomic import write_file
from jpeft.digest import digest, fingerprint, sampled
from jpeft.errors import AdapterError, JpeftError
from jpeft.finite import is_finite
from jpeft.kernel import Kernel
from jpeft.methods import METHODS, SPECS, lora
from jpeft.safetensors_header import ADAPTER_HEADER_BYTES, DTYPES, open_safetensors, tensor_at
from jpeft.shared import entries, has_values, is_shared, values, write_once
from jpeft.site import Site
from jpeft.strict_json import parse_json_object
from jpeft.tree import flatten, nearest
from jpeft.typed import from_json

FORMAT, UNSIGNED = "jpeft-2", "jpeft-1"  # the second has no digest
KINDS = ("product", "embedding", "conv", "replacement")
KNOWN = {FORMAT: {"format", "meta", "digest", "base"}, UNSIGNED: {"format", "meta"}}
MOST_MATRICES, MOST_ENTRIES, MOST_RANK = 1 << 20, 1 << 48, 1 << 20  # of one weight
MOST_LETTERS, META_DEPTH, META_VALUES, MOST_NAMES = 1_000, 6, 400_000, 50_000  # of a path, in the metadata, in a list


def save(path: str | os.PathLike[str], adapter: Adapter, *, params: Any = None) -> None:
    """Writes an adapter to one file, moved into place whole, with a digest of all that is in it.

    Where several processes share arrays of the adapter or the base, all of them call this, and process 0 writes.

    Args:
      path: the file, `*.safetensors` by custom.
      adapter: any adapter; its arrays are saved in their own dtypes, zero-sized ones too.
      params: the base it is for, to write down its fingerprint, too: `load` with other params is an error then.

    Raises:
      AdapterError: an array is not finite.
      OSError: it can't be written; then what was there still is.

    Example:
      >>> import jax, jpeft, tempfile
      >>> adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=1), {"kernel": jnp.ones((3, 2))})
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     jpeft.save(f"{folder}/adapter.safetensors", adapter)
      ...     jpeft.load(f"{folder}/adapter.safetensors").spec
      LoRA(rank=1, alpha=None, targets='all-linear')
    """
    base = None if params is None else base_fingerprint(str(path), params, adapter)
    content = content_of(adapter, base)
    write_once(is_shared((adapter, params)), lambda: write_file(path, lambda file: write_tensors(file, *content)))


def content_of(adapter: Adapter, base: str | None = None) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors and the metadata of an adapter's file; where processes share arrays of it, all have to ask.

    Raises:
      AdapterError: an array is not finite.
    """
    tensors = {
        f"{part}|{where}|{leaf}": _finite(values(array), where, leaf)
        for part in ("trained", "constant")
        for where, leaves in getattr(adapter, part).items()
        for leaf, array in leaves.items()
    }
    metadata = {"format": FORMAT, "meta": json.dumps(_meta_to_json(adapter.meta))}
    metadata |= {} if base is None else {"base": base}
    return tensors, metadata | {"digest": digest(tensors, metadata)}


def write_tensors(file: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """A safetensors file, for a place that is then put where it belongs whole.

    Raises:
      AdapterError: it has no name for the dtype of one of them.
      OSError: it can't be written.
    """
    for key, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise AdapterError(f"{key!r:.200}: a file has no name for {tensor.dtype}; nothing was written")
    try:
        save_file(dict(tensors), file, dict(metadata))
    except SafetensorError as error:  # which is what the library calls a full disk
        raise OSError(f"{file.name}: {error}; nothing was written") from error


def _finite(array: np.ndarray, where: str, leaf: str) -> np.ndarray:
    if not is_finite(array):
        raise AdapterError(f"{leaf!r} of {where!r} holds values that are not finite; nothing was written")
    return np.asarray(array, order="C")  # not ascontiguousarray, which makes a vector of a scalar


def load(path: str | os.PathLike[str], *, params: Any = None) -> Adapter:
    """Reads an adapter that `save` wrote. The file may be a stranger's: nothing in it is believed unseen.

    Args:
      path: the file.
      params: the base; where the file has a fingerprint of its own base, this one must have it, too.

    Raises:
      AdapterError: the file is not one of these, or is broken; names what was found. Or `params` are another base.
      OSError: there is no such file.
    """
    path = Path(path)
    if not os.path.lexists(path):
        raise FileNotFoundError(f"{path}: no such file")
    mapped, header, metadata = open_safetensors(path, AdapterError, ADAPTER_HEADER_BYTES)
    adapter = parse(str(path), {key: tensor_at(mapped, entry) for key, entry in header.items()}, metadata)
    if params is not None and "base" in metadata:
        check_base(str(path), metadata["base"], base_fingerprint(str(path), params, adapter), "leave out params=")
    return adapter


def parse(path: str, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> Adapter:
    """The adapter that a file's tensors and metadata are; `path` names it in errors.

    Raises:
      AdapterError: they are none.
    """
    form = metadata.get("format")
    if form not in KNOWN:
        hint = "; a PEFT folder is read by jpeft_interop.load_peft(folder, params)"
        raise AdapterError(f"{path}: expected format {FORMAT!r}, found {form!r:.100}{hint}")
    if unknown := set(metadata) - KNOWN[form]:
        raise AdapterError(f"{path}: the metadata of a {form!r} has no {min(unknown)!r:.100}")
    try:
        meta = _meta_from_json(metadata.get("meta", ""), path)
        parts: dict[str, Part] = {"trained": {}, "constant": {}}
        for key, tensor in tensors.items():
            _put(parts, key, tensor, path)
            check_tensor(key, tensor, path)
        if form == FORMAT:
            _check_digest(path, tensors, metadata)
        adapter = Adapter(parts["trained"], parts["constant"], meta)
        _check(adapter, path)
    except AdapterError:
        raise
    except (JpeftError, ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
        raise AdapterError(f"{path}: {error!s:.500}") from error
    # a copy, so that what happens to the file later can't reach it, and not jnp's, which compiles one for each shape
    return jax.tree.map(lambda leaf: jax.device_put(np.array(leaf)), adapter)


def check_tensor(key: str, tensor: np.ndarray, path: str) -> None:
    """Of a stranger's file: raises AdapterError for no floats, for what JAX would cast, and for values not finite."""
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise AdapterError(f"{path}: key {key!r:.200}: expected floats, found {tensor.dtype}")
    if (kept := jax.dtypes.canonicalize_dtype(tensor.dtype)) != tensor.dtype:
        raise AdapterError(
            f"{path}: key {key!r:.200} is {tensor.dtype}, which JAX would cast to {kept} here: turn it on "
            "(jax.config.update('jax_enable_x64', True)), or have the file written in another dtype"
        )
    if not is_finite(tensor):
        raise AdapterError(f"{path}: key {key!r:.200} holds values that are not finite")


def _check_digest(path: str, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    described = {name: value for name, value in metadata.items() if name != "digest"}
    if (found := digest(tensors, described)) != (expected := metadata.get("digest")):
        raise AdapterError(f"{path}: the file has changed since it was written: digest {found}, expected {expected!r}")


def check_base(path: str, expected: str, found: str | None, way_out: str) -> None:
    """Raises AdapterError where the base at hand is not the one that the file was written for."""
    if found is not None and found != expected:
        raise AdapterError(
            f"{path}: the adapter is for another base of the same shapes: expected the fingerprint {expected!r:.100}, "
            f"found {found!r} in the params; to load it all the same, {way_out}"
        )


def base_fingerprint(path: str, params: Any, adapter: Adapter) -> str | None:
    """Of the weights that an adapter acts on; None where some are mere shapes. `path` names the file in errors.

    Raises:
      AdapterError: the params have no such weights.
    """
    leaves = _adapted(path, flatten(params), adapter)
    if not leaves or not all(map(has_values, leaves.values())):
        return None
    at = lambda leaf: np.unravel_index(sampled(leaf.size).astype(np.int64), leaf.shape)
    return fingerprint((where, leaf.shape, entries(leaf, at(leaf))) for where, leaf in leaves.items())


def _adapted(path: str, flat: Mapping[str, Any], adapter: Adapter) -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for site in adapter.sites:
        if site.path not in flat:
            near = nearest(site.path, flat)
            raise AdapterError(f"{path}: it acts on {site.path!r}; the params have {near}")
        if (found := tuple(flat[site.path].shape)) != site.kernel.shape:
            raise AdapterError(
                f"{path}: it acts on {site.path!r} of shape {site.kernel.shape}; in the params it is {found}"
            )
        leaves |= {site.path: flat[site.path]} if site.method != "replacement" else {}
    return leaves


def _put(parts: dict[str, Part], key: str, array: Any, path: str) -> None:
    part, _, rest = key.partition("|")
    where, _, leaf = rest.rpartition("|")
    if part not in parts or not leaf:
        raise AdapterError(f"{path}: key {key!r:.200} is not 'trained|path|leaf' or 'constant|path|leaf'")
    parts[part].setdefault(where, {})[leaf] = array


def _check(adapter: Adapter, path: str) -> None:
    """Every site has the leaves that its method needs, in fitting shapes, and nothing is left over."""
    sites = {site.path: site for site in adapter.sites}
    for part in (adapter.trained, adapter.constant):
        for where in part:
            if where not in sites:
                raise AdapterError(f"{path}: {where!r:.200} has arrays but no entry in the metadata")
    for where in sites:
        if where not in adapter.trained:
            raise AdapterError(f"{path}: {where!r:.200} has an entry in the metadata but no arrays")
    for where, site in sites.items():
        wanted = METHODS[site.method].shapes(adapter.spec, site)
        found = {name: leaf.shape for name, leaf in adapter.leaves(where).items() if name != "mask"}
        if found.keys() != wanted.keys():
            told = f"expected the leaves {sorted(wanted)}, found {sorted(found)!s:.200}"
            raise AdapterError(f"{path}: {where!r:.200} does not hold what {site.method!r} needs: {told}")
        for leaf, shape in wanted.items():
            if found[leaf] != shape:
                raise AdapterError(f"{path}: {leaf!r} of {where!r:.200}: expected shape {shape}, found {found[leaf]}")
        _check_mask(adapter, site, path)


def _check_mask(adapter: Adapter, site: Site, path: str) -> None:
    leaves = adapter.leaves(site.path)
    if "mask" in leaves:
        allowed = [leaves["l"].shape] if "l" in leaves else []
        allowed = lora.mask_shapes(site.kernel, site.rank) if "b" in leaves else allowed
        if (found := leaves["mask"].shape) not in allowed:
            raise AdapterError(f"{path}: 'mask' of {site.path!r:.200}: expected a shape of {allowed}, found {found}")


def _meta_to_json(meta: Meta) -> dict[str, Any]:
    return {"method": meta.spec.method, "spec": asdict(meta.spec), "sites": [asdict(site) for site in meta.sites]}


def _meta_from_json(text: str, path: str) -> Meta:
    where = f"{path}: the metadata's 'meta'"
    found = parse_json_object(text.encode(), where, AdapterError, META_DEPTH, most=META_VALUES)
    if set(found) != {"method", "spec", "sites"} or not isinstance(found["sites"], list):
        raise AdapterError(f"{where}: expected a method, a spec and a list of sites, found {sorted(found)!s:.200}")
    if not isinstance(method := found["method"], str) or method not in SPECS:
        raise AdapterError(f"{where}: unknown method {method!r:.100}; this jpeft knows {', '.join(SPECS)}")
    if isinstance(found["spec"], dict):
        for name, value in found["spec"].items():
            if isinstance(value, list) and len(value) > MOST_NAMES:
                raise AdapterError(f"{where}: {name!r:.100}: expected at most {MOST_NAMES} entries, found {len(value)}")
    spec = from_json(SPECS[method], found["spec"], f"{where}: spec")
    sites = tuple(_site(site, f"{where}: sites[{i}]") for i, site in enumerate(found["sites"]))
    for site in sites:
        if site.method not in (method, "replacement"):
            raise AdapterError(
                f"{where}: {site.path!r:.200} has the method {site.method!r}, in an adapter of {method!r}"
            )
    if len({site.path for site in sites}) != len(sites):
        raise AdapterError(f"{where}: a path has two sites")
    return Meta(spec, sites)


def _site(found: Any, where: str) -> Site:
    if not isinstance(found, dict) or "kernel" not in found:
        raise AdapterError(f"{where}: expected an object with a kernel, found {found!r:.100}")
    kernel = from_json(Kernel, found["kernel"], f"{where}: kernel")
    plain = {name: value for name, value in found.items() if name != "kernel"}
    site = from_json(Site, plain, where, kernel=kernel)
    sizes, matrices = math.prod(kernel.shape), math.prod(kernel.batch_shape)
    if len(site.path) > MOST_LETTERS:
        raise AdapterError(f"{where}: expected a path of at most {MOST_LETTERS} characters, found {site.path!r:.200}…")
    if min(kernel.shape, default=0) < 0 or sizes >= MOST_ENTRIES or matrices > MOST_MATRICES or len(kernel.shape) > 32:
        raise AdapterError(f"{where}: expected the shape of a weight, found {kernel.shape!s:.200}")
    if not 0 <= site.rank <= MOST_RANK or site.method not in METHODS or kernel.groups < 1:
        raise AdapterError(f"{where}: no such rank ({site.rank}), method ({site.method!r:.50}) or groups")
    if site.use not in (None, "lookup", "product") or kernel.kind not in KINDS:
        raise AdapterError(f"{where}: no such use ({site.use!r:.50}) or kind ({kernel.kind!r:.50})")
    depth = kernel.depth
    if site.layers is not None and (kernel.stack is None or not all(0 <= layer < depth for layer in site.layers)):
        raise AdapterError(f"{where}: layers {site.layers!s:.100} of {kernel.depth} that are stacked")
    return site
