"""SIGKILL at random moments of a save over an adapter of 200 MB; then what is there is loaded.

It has to load as the adapter that was there or as the one that was saved, bit for bit: never as some of both, never as
neither. The moments are spread evenly over the time that a save takes. What dead writers left is gone after the save
that ends.

    python -m reliability.kills [--kills 40] [--megabytes 200]
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.progress import track

import jpeft
from benchmarks.tables import publish, table
from jpeft_interop import load_peft, save_peft
from reliability.forks import in_child, must

SIDE = RANK = 512


def example(megabytes: int) -> tuple[Any, list[Any]]:
    """A base, and two adapters of so many megabytes for it, in NumPy."""
    import jax

    draw = np.random.default_rng(0)
    normal = lambda shape: draw.standard_normal(shape, np.float32)
    names = [f"block{n}" for n in range(-(-megabytes * 10**6 // (2 * 4 * SIDE * RANK)))]
    params = {name: {"q_proj": {"kernel": normal((SIDE, SIDE))}} for name in names}
    start = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=RANK, targets=["q_proj"]), params)
    fresh = lambda: start.replace(trained=jax.tree.map(lambda leaf: normal(leaf.shape), start.trained))
    return params, [jax.tree.map(np.asarray, fresh()) for _ in range(2)]


def killed_after(seconds: float, work: Callable[[], Any]) -> bool:
    """Whether the work was still going on when its process was killed, so long after it began."""
    begun, begins = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(begins, b"!")
        work()
        os._exit(0)
    os.read(begun, 1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(begun)
    os.close(begins)
    return os.WIFSIGNALED(status)


def seconds_of(work: Callable[[], Any]) -> float:
    """How long it takes in a process of its own."""
    begun = time.perf_counter()
    must(in_child(work))
    return time.perf_counter() - begun


def is_there(folder: Path, params: Any, adapters: list[Any]) -> int | None:
    """Which of the adapters the folder loads as; None of them if it is mixed."""
    import jax

    found = load_peft(folder, params).trained
    equal = lambda one: all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(one.trained)))
    return next((number for number, one in enumerate(adapters) if equal(one)), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40, help="how many saves to kill")
    parser.add_argument("--megabytes", type=int, default=200, help="of the adapter")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    params, adapters = must(in_child(lambda: example(options.megabytes)))
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "adapter"
        save = lambda number: save_peft(folder, adapters[number], params=params)
        takes = median([seconds_of(partial(save, number)) for number in (1, 0, 1, 0)][1:])
        size = sum(file.stat().st_size for file in folder.iterdir())
        moments = np.random.default_rng(options.seed).uniform(0, takes, options.kills)
        now, left = 0, 0
        for moment in track(moments, f"{options.kills} kills, a save takes {takes:.1f} s"):
            found["in the save"] += killed_after(moment, partial(save, 1 - now))
            code, loaded = in_child(lambda: is_there(folder, params, adapters))
            state = "does not load" if code else "mixed" if loaded is None else "old" if loaded == now else "new"
            found[state] += 1
            now = 1 - now if state == "new" else now
            left = max(left, sum(file.stat().st_size for one in Path(place).glob(".*") for file in one.rglob("*")))
        must(in_child(partial(save, now)))
        stays = len(os.listdir(place)) - 1
    columns = ["in the save", "old", "new", "mixed", "does not load"]
    row = [options.kills, *(found[name] for name in columns), f"{left / 1e6:.0f}", stays]
    told = f"A folder of {size / 1e6:.0f} MB, whose save takes {takes:.1f} s."
    header = ["kills", *columns, "most left behind, MB", "left after a save that ends"]
    publish("kills", f"{told}\n\n{table(header, [row])}")
    raise SystemExit(bool(found["mixed"] or found["does not load"] or stays))


if __name__ == "__main__":
    main()
