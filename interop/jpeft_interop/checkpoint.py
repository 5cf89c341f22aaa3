"""Which key of a checkpoint belongs to which leaf of a model: every key accounted for, before anything is read.

The model's own names give the table; the family's record gives the rest: the prefix of the base model, which a
checkpoint of the base alone lacks, the ties, and what else may lie in a file without being a parameter of this model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jpeft.errors import WeightsError
from jpeft.tree import nearest
from jpeft_interop.fit import some
from jpeft_interop.models import Family
from jpeft_interop.torch_table import Kind, Table, TorchKey, make_table, to_torch_shape
from jpeft_interop.weights import Weights

# what LayerNorms called theirs when BERT was new
OLD_NAMES = ((".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias"))
POOLER = "pooler"


@dataclass(frozen=True)
class Match:
    """What was found.

    Attributes:
      sources: the key of the checkpoint for each path of the model that has one.
      missing: the paths without one, all of them in the model's head.
      ignored: why a key of the checkpoint is not read, by key.
    """

    sources: Mapping[str, str]
    missing: tuple[str, ...]
    ignored: Mapping[str, str]


def model_table(abstract: Mapping[str, Any], family: Family) -> dict[str, TorchKey]:
    """The torch names of a model of `jpeft_interop.models`, as `torch_table` gives them for its torch twin.

    Args:
      abstract: anything with a shape by path.
      family: the model's family.
    """
    ties = family.ties(abstract)
    entries = []
    for path, leaf in abstract.items():
        kind = _kind(path, len(leaf.shape), family)
        entries.append(TorchKey(_torch_name(path), kind, tuple(map(_torch_name, ties.get(path, ())))))
    return make_table(entries)


def _kind(path: str, ndim: int, family: Family) -> Kind:
    *_, module, leaf = ["", *path.split("/")]
    if leaf == "kernel":
        return "conv" if ndim > 2 else "conv1d" if module in family.conv1d else "linear"
    return "embedding" if leaf == "embedding" else "other"


def _torch_name(path: str) -> str:
    *modules, leaf = path.split("/")
    return ".".join([*modules, "weight" if leaf in ("kernel", "embedding") else leaf])


def match(weights: Weights, table: Table, shapes: Mapping[str, Any], family: Family, model: str) -> Match:
    """Find each leaf's key, and a reason for each key that is no leaf's.

    Args:
      weights: the checkpoint; only its header is looked at, and tensors that are tied.
      table: the model's, by `model_table`.
      shapes: anything with a shape by path.
      family: the model's family.
      model: what errors call the model.

    Raises:
      WeightsError: a key missing (unless all those are in the head), unexpected, of another shape, or untied.
    """
    rename = _prefix_rule(weights, table, family)
    keys = _current_names(weights, family)
    sources: dict[str, str] = {}
    ignored: dict[str, str] = {}
    for path, entry in table.items():
        found = [keys[name] for name in map(rename, entry.names) if name in keys]
        if found:
            sources[path] = found[0]
            ignored |= _tied(weights, found[0], found[1:])
    missing = [path for path in table if path not in sources]
    accounted = {*sources.values(), *ignored}
    unexpected = [key for key in weights if key not in accounted]
    ignored |= _harmless(unexpected, table, family)
    absent = [rename(table[path].key) for path in missing]
    _refuse_unexpected(weights, [key for key in unexpected if key not in ignored], absent or list(keys), model)
    _refuse_missing(weights, [name for name in absent if _part(name, family) is None], unexpected or list(keys), model)
    for path, key in sources.items():
        _require_shape(weights, key, to_torch_shape(tuple(shapes[path].shape), table[path]))
    return Match(sources, tuple(missing), ignored)


def _prefix_rule(weights: Weights, table: Table, family: Family) -> Callable[[str], str]:
    """From a torch name of the model to the name in the checkpoint, where only one of the two has the prefix."""
    prefix = family.prefix + "."
    model_has = any(entry.key.startswith(prefix) for entry in table.values())
    file_has = any(key.startswith(prefix) for key in weights)
    if model_has and not file_has:
        return lambda name: name.removeprefix(prefix)
    if file_has and not model_has:
        return lambda name: prefix + name
    return lambda name: name


def _current_names(weights: Weights, family: Family) -> dict[str, str]:
    """The checkpoint's keys by the names that the module has for them today."""
    keys: dict[str, str] = {}
    for key in weights:
        name = family.module_name(key)
        for old, new in OLD_NAMES:
            name = name.removesuffix(old) + new if name.endswith(old) else name
        if name in keys:
            raise WeightsError(f"{weights.file(key)}: {key!r} and {keys[name]!r} are two names of one parameter")
        keys[name] = key
    return keys


def _tied(weights: Weights, first: str, others: Iterable[str]) -> dict[str, str]:
    for key in others:
        if not weights.same(first, key):
            raise WeightsError(
                f"{weights.file(key)}: {key!r} is tied to {first!r} by config.json, but holds other values; set "
                '"tie_word_embeddings": false there if they are meant to differ'
            )
    return {key: f"tied to {first!r}, and equal to it" for key in others}


def _harmless(keys: Iterable[str], table: Table, family: Family) -> dict[str, str]:
    """Keys that are known to be no parameter of this model, with the reason."""
    present = {_part(entry.key, family) for entry in table.values()}
    reasons: dict[str, str] = {}
    for key in keys:
        part = _part(key, family)
        if any(("." + key).endswith("." + buffer) for buffer in family.buffers):
            reasons[key] = "a buffer that older versions saved; it is computed, not trained"
        elif part and part not in present:
            reasons[key] = f"of {part!r}, which this architecture does not have"
    return reasons


def _part(name: str, family: Family) -> str | None:
    """The head that a name belongs to (`lm_head`, `cls.predictions`, the pooler), None for the base model's own."""
    *modules, _ = name.removeprefix(family.prefix + ".").split(".")
    if modules and modules[0] == POOLER:
        return POOLER
    if modules and modules[0] in family.heads and not name.startswith(family.prefix + "."):
        return ".".join(modules[:2])
    return None


def _refuse_unexpected(weights: Weights, keys: list[str], near: list[str], model: str) -> None:
    if keys:
        raise WeightsError(
            f"{weights.file(keys[0])}: {some(keys)} found, for which {model} has no parameter; nearest of its own: "
            f"{nearest(keys[0], near)}"
        )


def _refuse_missing(weights: Weights, names: list[str], near: list[str], model: str) -> None:
    if names:
        file = weights.file(next(iter(weights))) if weights else "the weights"
        raise WeightsError(f"{file}: {some(names)} missing, which {model} expects; nearest: {nearest(names[0], near)}")


def _require_shape(weights: Weights, key: str, expected: tuple[int, ...]) -> None:
    found = weights.spec(key).shape
    if found != expected:
        raise WeightsError(f"{weights.file(key)}: {key!r}: config.json makes it {expected}, found {found}")
