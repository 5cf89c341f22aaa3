"""The README's Python runs: every ```python block, in order, as one program, unless a comment right above says why not.

A block is left out by `<!-- not run: reason -->` on the line before it.
"""

import ast
import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"^(?:<!-- not run: (?P<reason>\S.*) -->\n)?```python\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(text: str) -> list[tuple[str, str | None]]:
    """Each Python block with the reason why it is not run; blank lines in front keep the README's line numbers."""
    found = BLOCK.finditer(text)
    return [("\n" * text.count("\n", 0, block.start("code")) + block["code"], block["reason"]) for block in found]


def run(text: str, name: str) -> int:
    """Execute the blocks of `text` in one namespace, and say how many there were."""
    programs = [compile(ast.parse(code), name, "exec") for code, reason in blocks(text) if reason is None]
    namespace = {"__name__": "__readme__"}
    for program in programs:
        exec(program, namespace)
    return len(programs)


def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(README.read_text(), str(README)) > 0


@pytest.mark.parametrize("folder", ["benchmarks", "reliability"])
def test_each_table_has_its_place(folder):
    scripts = (README.parent / folder).glob("*.py")
    names = [
        name for script in scripts for name in re.findall(r'^ +publish\("([\w-]+)"', script.read_text(), re.MULTILINE)
    ]
    text = (README.parent / folder / "README.md").read_text()
    assert len(names) >= 6
    assert not [
        name for name in names if text.count(f"<!-- begin {name} -->") * text.count(f"<!-- end {name} -->") != 1
    ]


def test_every_block_is_found():
    text = README.read_text()
    assert len(blocks(text)) == len(re.findall(r"^\s*```py", text, re.MULTILINE))


def test_a_failing_block_tells_its_line():
    with pytest.raises(ZeroDivisionError) as caught:
        run("# title\n\n```python\nx = 0\n```\n\n```python\n1 / x\n```\n", "page.md")
    assert (caught.traceback[-1].path, caught.traceback[-1].lineno) == ("page.md", 7)


def test_a_block_is_left_out_only_with_a_reason():
    marked = "<!-- not run: {} -->\n```python\nraise KeyError\n```\n"
    assert run(marked.format("takes an hour"), "page.md") == 0
    with pytest.raises(KeyError):
        run(marked.format(""), "page.md")
