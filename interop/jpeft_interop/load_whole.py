"""What a PEFT file trains whole: saved modules and biases, apart from what it only holds of the base's own."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator, Mapping

import numpy as np

from jpeft.errors import AdapterError
from jpeft.kernel import Kernel
from jpeft.shared import has_values
from jpeft.site import Site
from jpeft.tree import nearest
from jpeft_interop.layout import Link, find
from jpeft_interop.load_names import Named, Source, beside_factors, is_original, torch_name, without_wrapper
from jpeft_interop.peft_keys import PREFIX
from jpeft_interop.peft_resolution import around, heads_of
from jpeft_interop.provenance import CONFIG


def trained_whole(source: Source, names: Named) -> dict[str, str]:
    """Find the params that are trained whole: torch name to key. PEFT's names for the same param are folded together.

    Raises:
      AdapterError: two keys of one param differ, or what is not trained differs from the base.
    """
    found: dict[str, str] = {}
    for name, key in names.others.items():
        if is_original(source, name):
            _check_is_copy(source, torch_name(source, name, names.others), key)
            continue
        known = name in source.layout.by_key
        own = name if known else without_wrapper(name, names.others)
        if own != name and own in names.others:
            _check_same(source, key, names.others[own])
            continue
        module, leaf = ("", own) if known else beside_factors(own)
        if module and module not in names.factors and leaf != "weight":
            raise AdapterError(f"{source.file}: key {key!r} is of a layer that has no factors in the file")
        own = f"{module}.{leaf}" if module else own
        if own in found:
            _check_same(source, key, found[own])
        elif _is_trained(source, own) and not _is_bases(source, own, key):
            found[own] = key
        elif own not in source.copies:
            _check_is_base(source, own, key)
    return found


def _is_trained(source: Source, name: str) -> bool:
    """Whether the config says that a param of the base is trained whole.

    PEFT takes `modules_to_save` for the ends of modules' paths, at a dot or not (`norm`, `input_layernorm`).
    """
    module, _, leaf = name.rpartition(".")
    saved = (*source.spec.modules_to_save, *heads_of(source.config.task_type))
    tied = source.tied_names.get(name, ()) if source.config.ties else ()
    owners = (module, *(other.rpartition(".")[0] for other in tied))
    is_saved = any(path.endswith(saved) for owner in owners for path in around(owner))
    return is_saved or (leaf == "bias" and source.spec.bias != "none")


def _is_bases(source: Source, name: str, key: str) -> bool:
    """Whether the file says that it holds a tensor of the base's own beside those that are trained, and does."""
    if name not in source.copies or not all(has_values(source.flat[link.path]) for link in source.layout.by_key[name]):
        return False
    base, found = source.layout.tensor(name, source.flat), source.tensors[key]
    return found.dtype == base.dtype and np.array_equal(found, base)


def _check_same(source: Source, key: str, other: str) -> None:
    if not np.array_equal(source.tensors[key], source.tensors[other]):
        raise AdapterError(f"{source.file}: keys {key!r} and {other!r} are one param, and hold different values")


def _check_is_copy(source: Source, name: str, key: str) -> None:
    """What stands beside a module that is trained whole, and is never used: it need only be such a thing."""
    wanted = find(source.layout, name, source.file, key)[0].torch_shape
    if not _is_trained(source, name):
        raise AdapterError(f"{source.file}: key {key!r}: its module is none of 'modules_to_save' in {CONFIG}")
    if (found := source.tensors[key].shape) != wanted:
        raise AdapterError(f"{source.file}: key {key!r}: expected shape {wanted}, found {found}")


def _check_is_base(source: Source, name: str, key: str) -> None:
    """What is not trained may only say what the base is: PEFT stores a targeted embedding's weight, for one."""
    links = find(source.layout, name, source.file, key)
    path = links[0].path
    if not all(has_values(source.flat[link.path]) for link in links):
        raise AdapterError(
            f"{source.file}: key {key!r} is the base's own weight, and {path!r} in the params is only a shape, which "
            "can't be compared with it; give params with values"
        )
    base, found = source.layout.tensor(name, source.flat), source.tensors[key]
    if found.shape != base.shape or not np.array_equal(found.astype(base.dtype), base):
        raise AdapterError(
            f"{source.file}: key {key!r} is the base's own weight ({CONFIG} has it neither in 'modules_to_save' nor "
            f"as a bias), and differs from {path!r} in the params: an adapter never changes the base "
            "unasked. Was it trained on another base (a resized vocabulary)? Load that one"
        )


def replacements(source: Source, whole: Mapping[str, str]) -> Iterator[tuple[Site, np.ndarray]]:
    """Give the leaves that are trained whole, each with its value.

    Args:
      source: where the tensors are.
      whole: torch names to keys.

    Raises:
      AdapterError: of a leaf only a part is there, or of a tied one only one use.
    """
    paths: dict[str, str] = {}
    for name, key in whole.items():
        for link in find(source.layout, name, source.file, key):
            _check_whole(source, link, whole, key)
            paths.setdefault(link.path, key)
    for path, key in paths.items():
        shape = tuple(source.flat[path].shape)
        kernel = Kernel(shape, (), tuple(range(len(shape))), kind="replacement")
        yield Site(path, "replacement", kernel), _value(source, path, whole, key)


def _check_whole(source: Source, link: Link, whole: Mapping[str, str], key: str) -> None:
    """Everything that lies in the leaf is there, of a tied one the same under each name, and it is no other's."""
    others = [other.key for other in source.layout.links[link.path]]
    tied = source.tied_names.get(link.key, ())
    if missing := [other for other in others if other not in whole and not _may_be_left_out(other, tied)]:
        part = "one use" if set(missing) & set(tied) else "a part"
        raise AdapterError(
            f"{source.file}: key {key!r} replaces {part} of {link.path!r}, without {missing[0]!r}; give params where "
            "it is a leaf of its own"
        )
    for other in tied:
        if other in whole:
            _check_same(source, whole[other], key)


def _may_be_left_out(key: str, tied: Collection[str]) -> bool:
    """Whether a file need not have a bias under this one of its names: PEFT's bases keep them tied."""
    return key in tied and key.endswith(".bias")


def _value(source: Source, path: str, whole: Mapping[str, str], key: str) -> np.ndarray:
    links = source.layout.links[path]
    keys = {link.key: whole[_present(source, link.key, whole)] for link in links}
    state = {name: source.tensors[stored] for name, stored in keys.items()}
    for link in links:
        if (found := state[link.key].shape) != link.torch_shape:
            raise AdapterError(
                f"{source.file}: key {keys[link.key]!r}: expected a tensor for {path!r} of shape "
                f"{link.torch_shape} (here {tuple(source.flat[path].shape)}), found {found}"
            )
    if len(dtypes := {tensor.dtype.name for tensor in state.values()}) > 1:
        raise AdapterError(
            f"{source.file}: {path!r} holds {key!r} and others in one array, and in the file they are of the dtypes "
            f"{sorted(dtypes)}: expected one"
        )
    return source.layout.leaf(path, state)


def _present(source: Source, name: str, whole: Container[str]) -> str:
    """Give the name by which the file has a tensor: of a tied bias, any."""
    return name if name in whole else next(other for other in source.tied_names[name] if other in whole)


def check_biases(source: Source, found: Collection[str]) -> None:
    """Raise AdapterError where `bias` is set, and one of the biases that PEFT then trains is not in the file.

    Args:
      source: whose config it is.
      found: the paths of all that the file adapts or replaces.
    """
    has = {key: any(link.path in found for link in links) for key, links in source.layout.by_key.items()}
    adapted = {key.rpartition(".")[0] for key, is_found in has.items() if is_found}
    for key, links in source.layout.by_key.items():
        module, _, leaf = key.rpartition(".")
        if leaf != "bias" or source.spec.bias == "none" or links[0].path in found:
            continue
        if source.spec.bias == "all" or module in adapted:
            raise AdapterError(
                f"{source.file}: 'bias' is {source.spec.bias!r} in {CONFIG}, and {PREFIX + key!r} is missing; the file "
                f"has {nearest(PREFIX + key, source.tensors)}"
            )
