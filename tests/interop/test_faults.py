"""Saves whose system calls fail, or are their process' last: `python -m reliability.faults` tries them all."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_fault_at_some_of_the_calls_of_a_save():
    command = [sys.executable, "-m", "reliability.faults", "--kinds", "native", "peft", "--every", "3"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "interop")])
    environment = {**os.environ, "PYTHONPATH": paths, "JPEFT_TABLES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith(("| native", "| peft"))]
    for _, calls, *tried, broken in rows:
        assert int(calls) > 10 and int(broken) == 0
        counts = [[int(n) for n in one.split(",")] for one in tried]
        assert all(old and new and not neither for old, new, neither in counts), rows
    assert len(rows) == 2
