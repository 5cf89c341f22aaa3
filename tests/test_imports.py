"""What importing jpeft costs, and what it must never reach for."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "jpeft").rglob("*.py"), *(ROOT / "interop").rglob("*.py")])


def modules_after(statement: str) -> set[str]:
    """The top-level modules that a fresh Python holds after `statement`."""
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'interop')!r}]; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_jpeft_imports_neither_torch_nor_transformers():
    loaded = modules_after("import jpeft")
    assert "jpeft" in loaded
    assert not loaded & {"torch", "transformers", "peft", "tokenizers", "jpeft_interop"}


def imported(source: Path) -> set[str]:
    """Every module that a file names in an import, with what it takes from it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def is_private(name: str) -> bool:
    top, *rest = name.split(".")
    own = top in ("jpeft", "jpeft_interop")
    return not own and top != "__future__" and any(part.startswith("_") for part in (top, *rest))


def test_nothing_rests_on_what_others_keep_private():
    found = {str(path.relative_to(ROOT)): sorted(filter(is_private, imported(path))) for path in SOURCES}
    assert not {path: names for path, names in found.items() if names}
