"""Whether the CPU kernels that the environment asks for are those that run: a misspelt name is ignored."""

import ctypes
import os
from pathlib import Path

import numpy as np
import pytest
import scipy
import torch

ISAS = ("SSE4_2", "AVX", "AVX2", "AVX512", "AVX512_VNNI", "AVX512_BF16", "AMX", "AMX_FP16")
SAME = {"Zen": "Haswell"}  # OpenBLAS has the same kernels for both and calls them by the first


def openblas_core(package):
    """What a package's own OpenBLAS says of itself; None where it has none."""
    for path in Path(package.__file__).parents[1].glob(f"{package.__name__}.libs/*openblas*"):
        library = ctypes.CDLL(str(path))
        for name in ("scipy_openblas_get_corename64_", "scipy_openblas_get_corename"):
            if hasattr(library, name):
                getattr(library, name).restype = ctypes.c_char_p
                return getattr(library, name)().decode()
    return None


@pytest.mark.parametrize("package", [np, scipy], ids=lambda package: package.__name__)
def test_openblas_runs_the_kernels_asked_for(package):
    asked = os.environ.get("OPENBLAS_CORETYPE")
    found = openblas_core(package)
    assert asked is None or found is None or found == SAME.get(asked, asked)


def test_torch_runs_the_kernels_asked_for():
    asked = os.environ.get("ATEN_CPU_CAPABILITY")
    assert asked is None or torch.backends.cpu.get_cpu_capability() == asked.upper()


def test_xla_knows_the_instructions_asked_for():
    asked = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if flag.startswith("--xla_cpu_max_isa=")]
    assert all(flag.partition("=")[2].upper() in ISAS for flag in asked)
