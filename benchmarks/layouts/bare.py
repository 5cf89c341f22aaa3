"""Imports from packages whose ``__init__`` or neighbours ask for far more than a model's own files need."""

import importlib.util
import sys
import types
from unittest import mock


def without_its_init(*packages: str) -> None:
    """Makes the submodules of each package importable without running its ``__init__``; outer packages first.

    Raises:
        ModuleNotFoundError: A package is not installed.
    """
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(f"{package} is not installed in {sys.prefix}")
        module = types.ModuleType(package)
        module.__path__ = list(spec.submodule_search_locations)
        sys.modules[package] = module


def stand_in(*modules: str) -> None:
    """Puts a mock in the place of each module: for what a model file imports and its forward pass does not use."""
    for name in modules:
        module = mock.MagicMock(name=name)
        module.__path__ = []
        sys.modules[name] = module
        outer, _, last = name.rpartition(".")
        if outer in sys.modules:
            setattr(sys.modules[outer], last, module)
