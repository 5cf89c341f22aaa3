"""The quickstart, on a model that takes seconds."""

import re

import pytest
from rich.console import Console

from jpeft_interop import quickstart as module
from jpeft_interop.quickstart import QuickstartError, Result, quickstart
from tiny_folder import write_folder

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A tiny model, a rate that moves it, and fewer topics."""
    some = module.topics()[:12]
    monkeypatch.setattr(module, "RATE", 0.05)
    monkeypatch.setattr(module, "HELD_OUT", 0.2)
    monkeypatch.setattr(module, "topics", lambda: some)
    return write_folder(tmp_path / "model")


def test_it_learns_and_torch_says_the_same(small, tmp_path):
    console = Console(record=True, width=100)
    result = quickstart(tmp_path / "out", steps=20, model=small, console=console)
    assert result.after < 0.75 * result.before and 0 < result.difference < 1e-3
    shown = console.export_text()
    for part in ("trainable params", "held out", "step 20/20", "before", "after", "✓"):
        assert part in shown
    assert re.search(r"max \|d\| \d\.\de-\d\d", shown)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"adapter", "loss.png"}


def test_it_fails_where_it_does_not_hold_its_promise(tmp_path):
    conclude = lambda *result: module._conclude(Console(quiet=True), Result(*result), tmp_path)
    conclude(20.0, 15.0, 1e-3)
    with pytest.raises(QuickstartError, match="perplexity went from 20.00 to 15.01"):
        conclude(20.0, 15.01, 0.0)
    with pytest.raises(QuickstartError, match="logits on torch differ by 1.01e-03"):
        conclude(20.0, 1.0, 1.01e-3)
    for broken in ((20.0, float("nan"), 0.0), (20.0, 1.0, float("nan"))):
        with pytest.raises(QuickstartError):
            conclude(*broken)
