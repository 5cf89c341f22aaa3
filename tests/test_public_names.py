"""The public names, pinned: whoever adds, renames or loses one says so here and in the CHANGELOG."""

import inspect
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

import jpeft
import jpeft_interop

JPEFT = (
    "AdaLoRA",
    "Adapter",
    "AdapterError",
    "Count",
    "DoRA",
    "IA3",
    "JpeftError",
    "Kernel",
    "KernelError",
    "Kernels",
    "LiftError",
    "LoRA",
    "MergeError",
    "ShardingError",
    "SpecError",
    "WeightsError",
    "adalora",
    "adapted_saveable",
    "apply",
    "attach",
    "count",
    "coverage",
    "init",
    "kernels",
    "lift",
    "load",
    "lora_fa",
    "lora_plus",
    "merge",
    "optimizer_shardings",
    "penalty",
    "prune",
    "ranks",
    "rows",
    "save",
    "shardings",
    "stack",
)

JPEFT_INTEROP = (
    "Layout",
    "Place",
    "Provenance",
    "export_model",
    "generate",
    "infer_layout",
    "load_adapters",
    "load_layout",
    "load_model",
    "load_peft",
    "load_peft_xlora",
    "params_from_torch",
    "params_to_torch",
    "provenance",
    "ready_layout",
    "ready_names",
    "save_adapters",
    "save_layout",
    "save_model",
    "save_peft",
)

PACKAGES = pytest.mark.parametrize(("package", "names"), [(jpeft, JPEFT), (jpeft_interop, JPEFT_INTEROP)])


def public(package: ModuleType) -> list[str]:
    """What a user sees: every name without an underscore that is not a submodule."""
    found = (name for name in dir(package) if not name.startswith("_"))
    return sorted(name for name in found if not isinstance(getattr(package, name), ModuleType))


@PACKAGES
def test_the_public_names_are_these(package, names):
    assert public(package) == sorted(names)


@PACKAGES
def test_public_names_are_explained(package, names):
    bare = [name for name in public(package) if not inspect.getdoc(getattr(package, name))]
    assert not bare, "a docstring is missing"


@PACKAGES
def test_packages_are_typed(package, names):
    assert all((Path(folder) / "py.typed").is_file() for folder in package.__path__)


def test_the_version_is_the_installed_one():
    assert jpeft.__version__ == version("jpeft")
