"""A save over an adapter that is there, while each of its system calls in turn fails or is the process' last.

Every call that opens, makes, writes, syncs, renames or removes something beside the adapter is one trial with ENOSPC,
one with EIO, and one with SIGKILL. A save that fails leaves the old adapter, byte for byte; one that returns, the new
one; one that is killed, either of the two. The save after it leaves nothing else. Needs Linux and gcc.

    python -m reliability.faults [--kinds native peft adapters xlora] [--every 1]
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import track

import jpeft
import jpeft_interop
from benchmarks.tables import publish, table
from reliability.forks import in_child, must

SOURCE = Path(__file__).with_suffix(".c")
KILLED = 0
FAULTS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "SIGKILL": KILLED}
Save = Callable[[Path, Any, Any], None]


def native(place: Path, adapter: Any, params: Any) -> None:
    jpeft.save(place / "adapter.safetensors", adapter, params=params)


def peft(place: Path, adapter: Any, params: Any) -> None:
    jpeft_interop.save_peft(place / "adapter", adapter, params=params)


def adapters(place: Path, adapter: Any, params: Any) -> None:
    jpeft_interop.save_adapters(place / "adapters", {"default": adapter, "other": adapter}, params=params)


def xlora(place: Path, adapter: Any, params: Any) -> None:
    experts = {"one": adapter, "other": adapter}
    classifier = ({"kernel": next(iter(adapter.trained.values()))["a"]},)  # (features, experts), whatever it says
    spec = jpeft.xlora.XLoRA(bias=False)
    jpeft.xlora.save(place / "mixture", jpeft.xlora.Mixture(experts, classifier, spec, tuple(experts)))


def load_native(place: Path, params: Any) -> Any:
    return jpeft.load(place / "adapter.safetensors", params=params)


def load_peft(place: Path, params: Any) -> Any:
    return jpeft_interop.load_peft(place / "adapter", params)


def load_adapters(place: Path, params: Any) -> Any:
    return jpeft_interop.load_adapters(place / "adapters", params)["other"]


def load_xlora(place: Path, params: Any) -> Any:
    del params
    return jpeft.xlora.load(place / "mixture").experts["other"]


KINDS: dict[str, tuple[Save, Callable[[Path, Any], Any]]] = {
    "native": (native, load_native),
    "peft": (peft, load_peft),
    "adapters": (adapters, load_adapters),
    "xlora": (xlora, load_xlora),
}


@dataclass
class Found:
    """What the trials of one kind came to."""

    calls: tuple[str, ...]
    ends: Counter[tuple[str, str]] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)


def example() -> tuple[Any, Any, Any]:
    """A base, an adapter of it and another one, in NumPy: what is forked later must not have started JAX."""
    import jax
    import numpy as np

    draw = lambda n: jax.random.normal(jax.random.key(n), (16, 16))
    params = {f"block{n}": {"q_proj": {"kernel": draw(n)}} for n in range(3)}
    spec = jpeft.LoRA(rank=2, targets=["q_proj"])
    old, new = (jpeft.init(jax.random.key(seed), spec, params) for seed in (1, 2))
    return tuple(jax.tree.map(np.asarray, tree) for tree in (params, old, new))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def visible(found: Mapping[str, bytes]) -> dict[str, bytes]:
    """Without what a writer keeps hidden."""
    return {name: data for name, data in found.items() if not name.startswith(".")}


def tried(kind: str, every: int, shim: Any) -> Found:
    """All trials of one kind of save."""
    save, load = KINDS[kind]
    params, old, new = in_child(example)[1]
    with tempfile.TemporaryDirectory() as folder:
        start, place = Path(folder) / "start", Path(folder) / "place"
        start.mkdir()
        must(in_child(lambda: save(start, old, params)))
        before = contents(start)

        def armed(number: int, code: int) -> list[str]:
            shim.fault_arm(os.fsencode(place), number, code)
            save(place, new, params)
            shim.fault_disarm()
            return [shim.fault_name(n + 1).decode() for n in range(shim.fault_count())]

        shutil.copytree(start, place)
        found = Found(tuple(must(in_child(lambda: armed(-1, 0)))))
        after = contents(place)
        for state, adapter in ((start, old), (place, new)):
            must(in_child(lambda state=state, adapter=adapter: same(load(state, params), adapter)))
        for number, name, code in trials(found.calls, every, kind):
            shutil.rmtree(place)
            shutil.copytree(start, place)
            ended, _ = in_child(lambda number=number, code=code: armed(number, code))
            state = {"old": before, "new": after}
            is_now = next((label for label, it in state.items() if visible(contents(place)) == it), "neither")
            may_be = {"old", "new"} if code == KILLED else {"new"} if ended == 0 else {"old"} if ended == 2 else set()
            found.ends[name, is_now] += 1
            must(in_child(lambda: save(place, new, params)))
            if is_now not in may_be or contents(place) != after:
                found.broken.append(f"{kind}: {name} at call {number}, {found.calls[number - 1]}: {is_now}, {ended}")
    return found


def same(found: Any, expected: Any) -> None:
    """Raises where two adapters differ in a bit."""
    import jax
    import numpy as np

    jax.tree.map(np.testing.assert_array_equal, found.trained, expected.trained)


def trials(calls: tuple[str, ...], every: int, kind: str) -> Iterator[tuple[int, str, int]]:
    """The number of a call, and what becomes of it."""
    numbers = range(1, len(calls) + 1, every)
    every_one = [(number, name, code) for number in numbers for name, code in FAULTS.items()]
    yield from track(every_one, f"{kind}, {len(calls)} calls")


def with_shim() -> Any:
    """The library that counts calls; starts this program again with it in place, where it is not yet."""
    library = ctypes.CDLL(None)
    if hasattr(library, "fault_name"):
        library.fault_name.restype = ctypes.c_char_p
        return library
    with tempfile.TemporaryDirectory() as folder:
        built = f"{folder}/faults.so"
        subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", built, SOURCE, "-ldl"], check=True)
        environment = {**os.environ, "LD_PRELOAD": built}
        command = [sys.executable, "-m", "reliability.faults", *sys.argv[1:]]
        raise SystemExit(subprocess.run(command, env=environment).returncode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="what is saved")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="try each N-th call only")
    options = parser.parse_args()
    shim = with_shim()
    found = {kind: tried(kind, options.every, shim) for kind in options.kinds}
    header = ["save", "calls", *(f"{name}: old, new, neither" for name in FAULTS), "broken promises"]
    states = lambda one, name: ", ".join(str(one.ends[name, state]) for state in ("old", "new", "neither"))
    rows = [
        [kind, len(one.calls), *(states(one, name) for name in FAULTS), len(one.broken)] for kind, one in found.items()
    ]
    publish("faults", f"How many trials left the old adapter, the new one, or neither.\n\n{table(header, rows)}")
    broken = [line for one in found.values() for line in one.broken]
    print(*broken, sep="\n")
    raise SystemExit(bool(broken))


if __name__ == "__main__":
    main()
