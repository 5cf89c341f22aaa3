"""Adapters at random through `save_peft`: read by PEFT, read by `load_peft`, or refused.

PEFT has to give the same logits, and `load_peft` the same arrays and a spec that means them. A save that is refused
leaves nothing. Anything else is broken, and printed with its seed: other logits, keys that PEFT misses, any error but
the save's own.

    python -m reliability.round_trips [--specs 60] [--base Mixtral] [--seed 7]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from peft import PeftModel
from rich.progress import track

import jpeft
from benchmarks.tables import publish, table
from jpeft.targets import matches_pattern, names_weight
from jpeft.tree import flatten, module_of
from jpeft_interop import load_peft, save_peft
from reliability.round_trip_bases import MAKERS, Base, make, without
from reliability.round_trip_specs import Trip, drawn, made

TOLERANCE, EFFECT = 1e-5, 1e-3
COMPLAINTS = ("missing", "unexpected", "not found")


class End(NamedTuple):
    """How a trip ended: `same`, `refused`, `no adapter` (by `jpeft.init`) or `BROKEN`; and what there is to tell."""

    how: str
    told: str = ""


def taken(base: Base, trip: Trip, place: Path) -> End:
    """There and back."""
    try:
        adapter = made(base, trip)
    except jpeft.JpeftError as error:
        return End("no adapter", str(error))
    folder, options = place / trip.folder, {"task_type": trip.task_type, "target": trip.target}
    try:
        save_peft(folder, adapter, params=base.params, **options)
    except jpeft.AdapterError as error:
        return End("BROKEN", "refused, and the folder is there") if folder.exists() else End("refused", str(error))
    except Exception as error:  # any other is what this is about
        return End("BROKEN", f"save_peft: {_named(error)}")
    broken = [*_unlike_peft(base, adapter, folder), *_unlike_itself(base, adapter, trip, folder)]
    return End("BROKEN", "; ".join(broken)) if broken else End("same")


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


def _unlike_peft(base: Base, adapter: jpeft.Adapter, folder: Path) -> Iterator[str]:
    """What PEFT makes of a folder that is not what the adapter does."""
    expected = base.adapted(adapter)
    try:
        loaded, warned = _by_peft(base, folder)
        found = base.logits(loaded)
    except Exception as error:  # whatever PEFT raises
        yield f"PEFT raises {_named(error)}"
        return
    yield from (f"PEFT warns: {text[:300]}" for text in warned if any(word in text.lower() for word in COMPLAINTS))
    if not (gap := np.abs(found - expected).max()) <= TOLERANCE * max(1, np.abs(expected).max()):
        yield f"PEFT's logits are off by {gap:.1e}, where the adapter changes {np.abs(expected - base.plain).max():.1e}"
    elif np.abs(expected - base.plain).max() < EFFECT:
        yield "the adapter has no effect, so nothing was tried"


def _by_peft(base: Base, folder: Path) -> tuple[Any, list[str]]:
    """The folder loaded by PEFT, with nothing left of the random numbers before; and what it warned of."""
    torch.manual_seed(99)
    np.random.seed(99)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(base.fresh(), str(folder))
    return loaded.eval(), sorted({str(warning.message) for warning in caught})


def _unlike_itself(base: Base, adapter: jpeft.Adapter, trip: Trip, folder: Path) -> Iterator[str]:
    """What `load_peft` makes of a folder that is not the adapter."""
    try:
        again = load_peft(folder, base.params)
    except Exception as error:  # any is one too many
        yield f"load_peft: {_named(error)}"
        return
    if trip.target == "vllm":
        yield from _other_weights(base, adapter, again)
    else:
        yield from _other_arrays(_written(adapter), again)
    yield from _other_meaning(base, again)


def _written(adapter: jpeft.Adapter) -> jpeft.Adapter:
    """Without the weights of rank 0, which PEFT's LoRA does not have."""
    return without(adapter, lambda site: site.method in ("lora", "dora") and site.rank == 0)


def _other_weights(base: Base, one: jpeft.Adapter, other: jpeft.Adapter) -> Iterator[str]:
    left, right = (flatten(jpeft.merge(base.params, adapter)) for adapter in (one, other))
    off = {path: float(np.abs(np.asarray(left[path]) - np.asarray(right[path])).max()) for path in left}
    if (worst := max(off, key=lambda path: off[path])) and off[worst] > TOLERANCE:
        yield f"load_peft's ΔW is off by {off[worst]:.1e} at {worst!r}"


def _other_arrays(one: jpeft.Adapter, other: jpeft.Adapter) -> Iterator[str]:
    if one.spec.method != other.spec.method:
        yield f"load_peft's method is {other.spec.method!r}, not {one.spec.method!r}"
    if one.sites != other.sites:
        mine, found = set(one.sites), set(other.sites)
        yield f"load_peft's sites: {_few(found - mine)} for {_few(mine - found)}"
        return
    for part in ("trained", "constant"):
        mine, found = flatten(getattr(one, part)), flatten(getattr(other, part))
        if mine.keys() != found.keys():
            yield f"load_peft's {part} leaves: {_few(mine.keys() ^ found.keys())}"
        unlike = [path for path in sorted(mine.keys() & found.keys()) if not _equal(mine[path], found[path])]
        if unlike:
            yield f"load_peft's {part} {unlike[0]!r} is not the one that was saved"


def _few(found: Any) -> str:
    shown = sorted(map(str, found))
    return f"{len(shown)} ({'; '.join(shown[:2])})"


def _equal(one: Any, other: Any) -> bool:
    return one.dtype == other.dtype and np.array_equal(np.asarray(one), np.asarray(other))


def _other_meaning(base: Base, again: jpeft.Adapter) -> Iterator[str]:
    """The spec that was read has to mean the sites and scalings that were read."""
    spec = _alive(again)
    try:
        fresh = jpeft.init(jax.random.key(0), spec, base.params, kernels=base.layout.kernels)
    except jpeft.JpeftError as error:
        yield f"the spec that was read is refused by jpeft.init: {_named(error)}"
        return
    if [(site.path, site.rank) for site in fresh.sites] != [(site.path, site.rank) for site in again.sites]:
        yield f"the spec that was read means other sites: {_few(set(fresh.sites) ^ set(again.sites))}"
        return
    mine, found = flatten(again.constant), flatten(fresh.constant)
    if unlike := [path for path in mine if path not in found or not _equal(mine[path], found[path])]:
        yield f"the spec that was read means another {unlike[0]!r}"


def _alive(adapter: jpeft.Adapter) -> Any:
    """The spec without the names that mean nothing, which `jpeft.init` refuses."""
    spec: Any = adapter.spec
    paths = [site.path for site in adapter.sites]
    means = lambda pattern: any(matches_pattern(pattern, module_of(path), path) for path in paths)
    if isinstance(spec, jpeft.LoRA):
        kept = {n: tuple(p for p in getattr(spec, n) if means(p[0])) for n in ("rank_pattern", "alpha_pattern")}
        spec = replace(spec, **kept)
    if isinstance(spec.targets, tuple):
        spec = replace(
            spec, targets=tuple(name for name in spec.targets if any(names_weight((name,), p) for p in paths))
        )
    return spec


def trips(base: Base, seeds: range, place: Path) -> Iterator[tuple[Trip, End]]:
    for seed in seeds:
        trip = drawn(base, seed)
        with tempfile.TemporaryDirectory(dir=place) as folder:
            yield trip, taken(base, trip, Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--specs", type=int, default=60, help="for each base")
    parser.add_argument("--base", choices=list(MAKERS), help="this one alone")
    parser.add_argument("--seed", type=int, help="this one alone, told in full")
    options = parser.parse_args()
    seeds = range(options.specs) if options.seed is None else range(options.seed, options.seed + 1)
    jax.config.update("jax_disable_most_optimizations", True)
    rows, broken = [], 0
    with tempfile.TemporaryDirectory() as place:
        for name in [options.base] if options.base else MAKERS:
            base, found = make(name), Counter[str]()
            for trip, end in track(trips(base, seeds, Path(place)), name, total=len(seeds)):
                found[end.how] += 1
                if end.how == "BROKEN" or options.seed is not None:
                    print(f"{end.how}: {name}, seed {trip.seed}: {trip}\n    {end.told}", file=sys.stderr)
            rows.append([name, len(seeds), *(found[how] for how in ("same", "refused", "no adapter", "BROKEN"))])
            broken += found["BROKEN"]
    header = ["base", "specs", "the same", "refused", "refused by init", "broken"]
    publish("round-trips", table(header, rows), ("peft", "transformers", "torch"))
    raise SystemExit(bool(broken))


if __name__ == "__main__":
    main()
