"""What does `import jpeft` cost over the `import flax, optax` that its user has already?

Each import in a Python of its own, the three in turn, so that a busy moment of the machine meets all of them. The first
round, which reads the files from disk, is not counted.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import median

from tables import publish, table

ROOT = Path(__file__).parents[1]
BASE = "import flax, optax"
STATEMENTS = (BASE, "import jpeft", "import jpeft_interop")
TARGET = 1.5  # of BASE, for jpeft


def seconds(statement: str) -> float:
    """The wall time of one import, Python's own start not counted."""
    code = f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
    path = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'interop')!r}]; "
    done = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    """Print the medians as one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    times = [[seconds(statement) for statement in STATEMENTS] for _ in range(rounds + 1)][1:]
    medians = dict(zip(STATEMENTS, map(median, zip(*times, strict=True)), strict=True))
    rows = [[f"`{name}`", f"{taken:.2f}", f"{taken / medians[BASE]:.2f}"] for name, taken in medians.items()]
    shown = table(["statement", "s", "× the first"], rows)
    publish("import_time", f"{shown}\n\nThe target for `import jpeft` is at most {TARGET} ×.", peers=["optax"])


if __name__ == "__main__":
    main()
