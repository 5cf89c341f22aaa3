"""Environments with the packages whose parameter trees the layouts describe, built when first asked for.

Each is a virtual environment whose own packages come first and this interpreter's after them: so the trees are made
with the jax, flax and torch that jpeft is tested with, and building takes seconds.

    python benchmarks/layouts/environments.py tunix dump_tunix.py OUT   # runs the script beside this file in it
"""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

# What each needs beyond this interpreter's packages; installed without dependencies, which would bring gigabytes that
# no model file imports (and, for transformers, another jax).
PACKAGES = {
    "transformers4": ("transformers==4.57.6", "huggingface_hub==0.36.2", "tokenizers==0.22.2"),
    "tunix": ("google-tunix==0.1.7", "einops==0.8.2", "jaxtyping==0.3.11", "wadler_lindig==0.1.8"),
    "gemma": (
        "gemma==3.3.0",
        "einops==0.8.2",
        "chex==0.1.92",
        "toolz==1.2.0",
        "jaxtyping==0.3.11",
        "wadler_lindig==0.1.8",
    ),
    "maxtext": ("maxtext==0.2.5", "omegaconf==2.4.0", "antlr4-python3-runtime==4.9.3"),
}
ROOT = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jpeft" / "environments"


def python_of(name: str) -> Path:
    """The interpreter of the environment ``name``, built first if it is not there (or its packages changed).

    Raises:
        KeyError: No such environment is described.
        subprocess.CalledProcessError: pip could not install its packages.
    """
    folder = ROOT / f"{name}-{_digest(PACKAGES[name])}"
    if not folder.exists():
        _build(folder, PACKAGES[name])
    return folder / "bin" / "python"


def run(name: str, script: str, *arguments: str) -> None:
    """Runs a script that lies beside this file in the environment ``name``, on CPU."""
    python, path = python_of(name), Path(__file__).with_name(script)
    subprocess.run([python, path, *arguments], check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})


def _digest(packages: tuple[str, ...]) -> str:
    here = (*packages, sys.version, sysconfig.get_path("purelib"))
    return hashlib.sha256("\n".join(here).encode()).hexdigest()[:8]


def _build(folder: Path, packages: tuple[str, ...]) -> None:
    # Built aside and moved into place, so that a build cut short, or two at once, leave no half of one behind.
    ROOT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT) as aside:
        built = Path(aside) / folder.name
        venv.create(built, with_pip=False, symlinks=True)
        _let_see_this_interpreters_packages(built)
        install = [sys.executable, "-m", "pip", "--python", built / "bin" / "python", "install", "-qq", "--no-deps"]
        install += ["--ignore-requires-python"]  # MaxText asks for 3.12 and its model files run on 3.11
        subprocess.run([*install, *packages], check=True)
        if not folder.exists():
            shutil.move(built, folder)


def _let_see_this_interpreters_packages(built: Path) -> None:
    (site_packages,) = built.glob("lib/python*/site-packages")
    (site_packages / "after.pth").write_text(sysconfig.get_path("purelib") + "\n")


if __name__ == "__main__":
    run(*sys.argv[1:])
