"""Whether a PEFT file is what its config says, for the base at hand: by the header alone, before a value is read."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from jpeft.errors import AdapterError
from jpeft.targets import ALL_LINEAR
from jpeft.tree import nearest
from jpeft_interop.join import Piece
from jpeft_interop.layout import Link, find
from jpeft_interop.load_names import Named, Source, torch_name
from jpeft_interop.lora_keys import Leaves
from jpeft_interop.peft_keys import PREFIX, Spot, spot_of
from jpeft_interop.peft_resolution import Modules, heads_of, means, wrapped
from jpeft_interop.provenance import CONFIG

LEAST_RANK = 1024  # that is taken, however small the weight: more than its own sides is no low rank

Pieces = dict[str, list[Piece]]  # the factors of each weight, matrix by matrix


def checked_pieces(source: Source, names: Named) -> Pieces:
    """Group the factors by the weight that they are for.

    Raises:
      AdapterError: a key fits nothing, is missing or has another shape, or the config means other modules. Says how
        the file's keys differ from the config's, all in all.
    """
    try:
        for name, key in names.others.items():
            find(source.layout, torch_name(source, name, names.others), source.file, key)
        pieces = _pieces(source, names.factors)
        _check_targets(source, names.factors)
        _check_saved(source, {torch_name(source, name, names.others) for name in names.others}, names.factors)
    except AdapterError as error:
        raise AdapterError(f"{error}{_difference(source, names)}") from error
    return pieces


def _difference(source: Source, names: Named) -> str:
    """Say how the file's keys differ from those that the config's targets have, all in all."""
    if source.spec.where.targets == ALL_LINEAR:
        return ""
    spots = [Spot(module, source.layout.modules[module]) for module in _targeted(source)]
    expected = {key for spot in spots for key in _wanted(source, spot)}
    known = {key for name, key in names.others.items() if torch_name(source, name, ()) in source.layout.by_key}
    missing = sorted(expected - source.tensors.keys())
    unexpected = sorted(source.tensors.keys() - expected - known)
    if len(missing) + len(unexpected) < 2:
        return ""
    return f". In all, of {len(expected)} keys of targets missing: {_some(missing)}; unexpected: {_some(unexpected)}"


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(f"{name!r:.120}" for name in names[:3])
    return f"{len(names)} ({shown}{', …' if len(names) > 3 else ''})" if names else "none"


def _wanted(source: Source, spot: Spot) -> Iterator[str]:
    has_bias = getattr(source.spec, "factor_bias", False)
    return (key for leaf, key in source.keys.names(spot).items() if leaf != "bias" or has_bias)


def _targeted(source: Source) -> list[str]:
    """List the modules that the config targets and that have factors in a file."""
    has_factors = lambda module: source.keys.has_rank_zero or source.spec.rank_of(module) > 0
    return [module for module in source.layout.modules if means(source.where, module) and has_factors(module)]


def _pieces(source: Source, factors: Mapping[str, Leaves]) -> Pieces:
    found: Pieces = {}
    for module, leaves in factors.items():
        label = f"{PREFIX}{module}{next(iter(source.keys.suffixes.values()))}"
        key = module if module in source.stored else f"{module}.weight"
        for link in find(source.layout, key, source.file, label):
            one = Piece(_spot(source, link), leaves, link)
            _check_complete(source, one.spot, leaves)
            _check_shapes(source, one)
            _add(source, found.setdefault(link.path, []), one)
    return found


def _spot(source: Source, link: Link) -> Spot:
    if link.kind == "plain":
        raise AdapterError(
            f"{source.file}: {link.path!r} has factors, and in the layout it is the weight of no product"
        )
    spot = spot_of(link, source.kernels[link.path], source.layout)
    spot = spot._replace(stored=source.stored.get(spot.module))
    if (reason := source.keys.why_not(spot)) is not None:
        raise AdapterError(f"{source.file}: {spot.module!r} can't be loaded: {reason}")
    return spot


def _add(source: Source, pieces: list[Piece], one: Piece) -> None:
    """Add a piece; one of the region that another has is the same weight's other use."""
    for i, other in enumerate(pieces):
        if other.region == one.region:
            pieces[i] = _both_uses(source, other, one)
            return
    pieces.append(one)


def _both_uses(source: Source, one: Piece, other: Piece) -> Piece:
    """Take the same change on either side of a tied weight for one of all its uses."""
    embedding, head = (other, one) if one.spot.as_head else (one, other)
    pairs = ((embedding.leaves["a"], head.leaves["b"].T), (embedding.leaves["b"], head.leaves["a"].T))
    same_scale = source.spec.alpha_of(one.spot.module) == source.spec.alpha_of(other.spot.module)
    if not same_scale or not all(np.array_equal(x, y) for x, y in pairs):
        raise AdapterError(
            f"{source.file}: {one.spot.module!r} and {other.spot.module!r} are one tied weight, {one.link.path!r}, "
            "with different factors; an adapter holds one change of a weight: save them as two adapters"
        )
    return replace(embedding, both=True)


def _check_complete(source: Source, spot: Spot, leaves: Leaves) -> None:
    """The keys are those of such a weight, all of them."""
    names = source.keys.names(spot)
    has_bias = getattr(source.spec, "factor_bias", False) and not spot.is_lookup
    for leaf, key in names.items():
        if key not in source.tensors and (leaf != "bias" or has_bias):
            raise AdapterError(f"{source.file}: key {key!r} is missing; the others of that module are there")
    if "bias" in leaves and not has_bias:
        key = f"{PREFIX}{spot.module}{source.keys.suffixes['bias']}"
        raise AdapterError(f"{source.file}: key {key!r} is unexpected: 'lora_bias' is false in {CONFIG}")


def _check_shapes(source: Source, one: Piece) -> None:
    spec, keys = source.spec, source.keys
    wanted, names, rank = keys.shapes(spec, one.spot), keys.names(one.spot), spec.rank_of(one.spot.module)
    most = max(LEAST_RANK, one.spot.kernel.fan_in, one.spot.kernel.fan_out)
    if rank > most:
        raise AdapterError(
            f"{source.file}: {one.spot.module!r} has the rank {rank} in {CONFIG}: expected at most {most} on a "
            f"weight of shape {one.spot.kernel.shape}"
        )
    for leaf, tensor in one.leaves.items():
        if tensor.shape != wanted[leaf]:
            of_rank = f"rank {rank} on " if "a" in wanted else ""
            raise AdapterError(
                f"{source.file}: key {names[leaf]!r}: expected shape {wanted[leaf]} ({of_rank}a weight of shape "
                f"{one.spot.kernel.shape}), found {tensor.shape}"
            )


def _check_targets(source: Source, factors: Collection[str]) -> None:
    """The config's targets and the file's modules are the same."""
    where = source.where
    if where.targets == ALL_LINEAR:
        return
    for parameter in source.parameters:
        if parameter not in factors:
            raise AdapterError(
                f"{source.file}: {parameter!r} is in 'target_parameters' in {CONFIG}, and its factors are missing"
            )
    targeted = set(_targeted(source))
    for module in source.layout.modules:
        if module in targeted and module not in factors:
            raise AdapterError(
                f"{source.file}: {module!r} is a target in {CONFIG}, and its factors are missing from the file"
            )
        if module in factors and module not in targeted:
            raise AdapterError(
                f"{source.file}: {module!r} has factors, and is no target in {CONFIG}: {where.targets!r:.300}"
            )


def _check_saved(source: Source, there: Collection[str], adapted: Collection[str]) -> None:
    """The file has every tensor of the modules that PEFT wraps, for the config's names and for the task's."""
    modules, task = Modules(tuple(source.layout.by_key)), source.config.task_type
    asked = ((source.spec.modules_to_save, "'modules_to_save'"), (heads_of(task), f"task_type={task!r}"))
    for names, why in asked:
        wanted = modules.below(wrapped(names, modules, adapted))
        missing = sorted(key for key in wanted if key not in there and not _is_made_of_another(source, key))
        if missing:
            raise AdapterError(
                f"{source.file}: {PREFIX + missing[0]!r} is missing: {why} in {CONFIG} trains its module whole, and "
                f"PEFT raises KeyError for this file; the file has {nearest(PREFIX + missing[0], source.tensors)}. "
                f"If the module was not trained, take it out of {CONFIG}"
            )


def _is_made_of_another(source: Source, key: str) -> bool:
    """Whether PEFT makes the module of a tensor anew from the embedding, and drops what else it has (a head's bias)."""
    if not source.config.ties or key in source.tied_names:
        return False
    module = key.rpartition(".")[0]
    return any(other.rpartition(".")[0] == module for other in source.tied_names)
