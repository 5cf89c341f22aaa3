from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import jpeft
from cli_folders import run, write_adapter, write_model
from jpeft.errors import JpeftError
from jpeft_interop.load_model import load_model
from jpeft_interop.load_peft import load_peft
from jpeft_interop.verify import largest_logit_difference, verify
from peft_twins import base, bert, gpt2, llama

IDS = [np.arange(3, 12, dtype=np.int32), np.asarray([7, 8, 9], np.int32)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder, module = tmp_path_factory.mktemp("verify"), base(llama)
    adapter = write_adapter(folder / "adapter", module, target_modules="all-linear", r=3)
    return write_model(folder / "model", module), adapter


def test_torch_and_jax_agree(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "texts").write_text("from a file\n\nof two line\n")
    result = run("verify", folders[0], "--adapter", folders[1], "--text", "some wordsy", "--file", tmp_path / "texts")
    assert result.exit_code == 0, result.exception
    rows = [line for line in result.stdout.splitlines() if re.search(r"\d %", line)]
    assert len(rows) == 3 and all("100.0 %" in row for row in rows)
    assert "from a file" in rows[1] and "11" in rows[1]


def test_a_difference_is_told_and_fails(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model, adapter = folders
    found = verify(model, adapter, IDS)
    assert [one.tokens for one in found] == [9, 3]
    assert 0 < largest_logit_difference(found) < 1e-4 and all(one.mean <= one.largest for one in found)
    result = run("verify", model, "--adapter", adapter, "--text", "a b", "--tolerance", 1e-12)
    assert result.exit_code == 1 and "more than the tolerance" in result.stderr


def test_it_notices_another_adapter(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(folder: Path, params: object) -> jpeft.Adapter:
        adapter = load_peft(folder, params)
        path = adapter.sites[0].path
        leaves = adapter.trained[path]
        return adapter.replace(trained=adapter.trained | {path: leaves | {"b": leaves["b"] * 1.2}})

    monkeypatch.setattr("jpeft_interop.verify.load_peft", changed)
    found = verify(*folders, IDS[:1])
    assert largest_logit_difference(found) > 1e-3


@pytest.mark.parametrize("make", [gpt2, bert])
def test_other_families_and_no_adapter(make, tmp_path: Path) -> None:
    found = verify(write_model(tmp_path, base(make)), None, IDS[:1])
    assert largest_logit_difference(found) < 1e-4


def test_an_adapter_that_brings_the_head(tmp_path: Path) -> None:
    classifier = base(bert, num_labels=3)
    config = {"task_type": "SEQ_CLS", "target_modules": ["query"], "modules_to_save": ["classifier"]}
    adapter = write_adapter(tmp_path / "adapter", classifier, **config)
    headless = write_model(tmp_path / "base", classifier.bert)
    assert largest_logit_difference(verify(headless, adapter, IDS[:1])) < 1e-4


def test_bad_input(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model, adapter = folders
    assert run("verify", model).exit_code == 2
    assert run("verify", model, "--text", "").exit_code == 2
    _, params = load_model(model)
    jpeft.save(tmp_path / "native.safetensors", load_peft(adapter, params))
    (tmp_path / "latin").write_bytes("ü".encode("latin-1"))
    assert run("verify", model, "--file", tmp_path / "latin").exit_code == 2
    for arguments, words in {
        (tmp_path / "nowhere",): "no such folder",
        (model, "--adapter", tmp_path / "nowhere"): "no such folder or file",
        (model, "--adapter", tmp_path / "native.safetensors"): "torch reads folders",
    }.items():
        result = run("verify", *arguments, "--text", "a")
        assert result.exit_code == 1 and isinstance(result.exception, JpeftError)
        assert words in str(result.exception)
    assert isinstance(run("verify", model, "--text", "a", "--file", tmp_path / "none").exception, OSError)
