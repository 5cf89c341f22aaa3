"""Under `shard_map` a weight that every device has whole stays factored, and one that is split goes in dense."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_on_four_devices():
    paths = os.pathsep.join(map(str, (HERE, HERE.parent, HERE.parent / "interop")))
    command = [sys.executable, "-W", "error", HERE / "four_devices.py"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [
        *["whole", "lora", "factored", "whole", "dora", "factored", "whole", "ia3", "factored"],
        *["split", "lora", "dense", "split", "dora", "dense", "split", "ia3", "dense"],
    ]
