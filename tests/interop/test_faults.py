"""Saves whose system calls fail, or that are killed: `reliability/` tries many more of them."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*command):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "interop")])
    environment = {**os.environ, "PYTHONPATH": paths, "JPEFT_TABLES": ""}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")][1:]


def test_a_fault_at_some_of_the_calls_of_a_save():
    rows = run("reliability.faults", "--kinds", "native", "peft", "xlora", "--every", "3")
    for _, calls, *tried, broken in rows:
        assert int(calls) > 10 and int(broken) == 0
        counts = [[int(n) for n in one.split(",")] for one in tried]
        assert all(old and new and not neither for old, new, neither in counts), rows
    assert len(rows) == 3


def test_a_kill_at_some_moments_of_a_save():
    [row] = run("reliability.kills", "--kills", "5", "--megabytes", "10")
    kills, inside, old, new, mixed, broken, _, stays = map(int, row)
    assert (kills, old + new, mixed, broken, stays) == (5, 5, 0, 0, 0) and inside
