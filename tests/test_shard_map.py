"""Under `shard_map` a weight that every device has whole stays factored, and one that is split goes in dense."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize(("child", "devices"), [("four_devices", 4), ("eight_devices", 8)])
def test_a_child_keeps_the_flags_that_the_environment_has(child, devices):
    paths = os.pathsep.join(map(str, (HERE, HERE.parent, HERE.parent / "interop")))
    flags = "--xla_cpu_max_isa=AVX2 --xla_force_host_platform_device_count=2"
    code = f"import os, {child}, jax; print(jax.device_count(), os.environ['XLA_FLAGS'])"
    environment = {**os.environ, "PYTHONPATH": paths, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.startswith(f"{devices} {flags} "), done.stdout + done.stderr[-2000:]
