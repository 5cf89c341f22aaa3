"""Folders as an enemy would make them: refused in bounded time and memory, and nothing else is opened or run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft_interop import load_adapters, load_peft, save_adapters, save_peft
from jpeft_interop.adapter_summary import summarise
from reliability.hostile import CONFIG, FOLDERS, HARMLESS, WEIGHTS, measured, params, valid
from reliability.hostile_files import FILES, LOADS, pair, put

SLACK = 20  # of the time that is promised, which `python -m reliability.hostile` measures on a quiet machine
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def base():
    return params()


@pytest.fixture
def folder(tmp_path, base):
    valid(tmp_path / "adapter", base)
    return tmp_path / "adapter"


@pytest.mark.parametrize("name", FOLDERS)
def test_each_way_to_spoil_a_folder(folder, base, name):
    load_peft(folder, base)
    FOLDERS[name](folder)
    ended, seconds, peak = measured(lambda: load_peft(folder, base))
    assert ended.startswith("loaded" if name in HARMLESS else "AdapterError"), ended
    assert len(ended) <= 3_000 and seconds < SLACK and peak < 256


@pytest.mark.parametrize("name", FILES)
def test_each_hostile_file(tmp_path, name):
    ended, seconds, peak = measured(FILES[name](tmp_path))
    assert ended.startswith("loaded" if name in LOADS else "AdapterError"), ended
    assert len(ended) <= 3_000 and seconds < SLACK and peak < 256


@pytest.mark.parametrize(
    ("a", "b", "told"),
    [
        (np.ones((), np.float32), np.ones((2, 1), np.float32), "expected an array of floats, found float32"),
        (np.ones((2, 1), np.complex64), np.ones((1, 2), np.complex64), "expected an array of floats, found complex64"),
        (np.ones((2, 1), np.float32), np.ones((1, 3), np.float32), "have no rank in common"),
        (np.ones((2, 1), np.float32), np.ones((2,), np.float32), "have no rank in common"),
        (np.ones((2, 3), np.float32), np.ones((0, 2), np.float32), None),
        (np.ones((5, 2), np.float32), np.full((3, 5), 2, np.float32), None),
    ],
)
def test_a_summary_of_any_factors(tmp_path, a, b, told):
    pair(tmp_path, "q", 2)
    put(tmp_path / WEIGHTS, {f"base_model.model.q.lora_{n}.weight": array for n, array in (("A", a), ("B", b))}, {})
    if told is None:
        (found,) = summarise(tmp_path).factors
        s = found.scaling
        assert found.norm == pytest.approx(s * np.linalg.norm(b @ a)) and found.size == a.size + b.size
        return
    with pytest.raises(jpeft.AdapterError, match=told):
        summarise(tmp_path)


def test_adapters_over_a_file(folder, base, tmp_path):
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / "one").write_text("notes")
    with pytest.raises(jpeft.JpeftError, match="holds things that would be lost: one"):
        save_adapters(tmp_path / "all", {"one": load_peft(folder, base)}, params=base)
    assert (tmp_path / "all" / "one").read_text() == "notes"


def test_links_within_the_folder_and_its_cache(folder, base, tmp_path):
    (folder / WEIGHTS).rename(folder / "elsewhere")
    (folder / WEIGHTS).symlink_to("elsewhere")
    load_peft(folder, base)
    snapshot = tmp_path / "models--me--mine" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir()
    for name in (CONFIG, WEIGHTS):
        (blobs / name).write_bytes((folder / name).read_bytes())
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    load_peft(snapshot, base)
    (tmp_path / "link").symlink_to(folder)
    load_peft(tmp_path / "link", base)  # who calls chooses the folder


def test_names_of_folders(folder, base, tmp_path):
    adapter = load_peft(folder, base)
    for name in ("../x", "a/b", "a.b", "", "x" * 65, "a\n"):
        with pytest.raises(jpeft.AdapterError, match="nothing was written"):
            save_adapters(tmp_path / "many", {name: adapter}, params=base)
    save_adapters(tmp_path / "many", {"default": adapter, "A-1_b": adapter}, params=base)
    assert load_adapters(tmp_path / "many", base).keys() == {"default", "A-1_b"}
    (tmp_path / "many" / "out").symlink_to(folder)
    with pytest.raises(jpeft.AdapterError, match="a link out of the folder"):
        load_adapters(tmp_path / "many", base)
    (tmp_path / "many" / "out").unlink()
    (tmp_path / "many" / "A-1_b").rename(tmp_path / "many" / "a b")
    with pytest.raises(jpeft.AdapterError, match="'a b' is no adapter's name"):
        load_adapters(tmp_path / "many", base)


def change(folder, edit):
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def test_the_whole_difference_of_keys_is_told(folder, base):
    def edit(tensors):
        for layer in range(5):
            key = f"base_model.model.model.layers.{layer}.q_proj.lora_"
            tensors[f"{key.replace('q_proj', 'k_proj')}A.weight"] = tensors.pop(f"{key}A.weight")
            tensors[f"{key.replace('q_proj', 'k_proj')}B.weight"] = tensors.pop(f"{key}B.weight")

    change(folder, edit)
    with pytest.raises(jpeft.AdapterError) as caught:
        load_peft(folder, base)
    told = str(caught.value)
    assert "of 128 keys of targets missing: 10 ('base_model.model.model.layers.0.q_proj.lora_A.weight'" in told
    assert "unexpected: 10 ('base_model.model.model.layers.0.k_proj.lora_A.weight'" in told


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_a_newer_pefts_field_that_does_nothing_passes(folder, base, value):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"use_hyper": value}))
    load_peft(folder, base)


@pytest.mark.parametrize("value", [True, 0, 1, 0.0, "none", [None], {"a": None}])
def test_a_newer_pefts_field_that_may_do_something_is_refused_by_name(folder, base, value):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"use_hyper": value}))
    with pytest.raises(jpeft.AdapterError, match=re.escape(f"unknown field 'use_hyper', set to {value!r}:")):
        load_peft(folder, base)


def test_base_weights_are_never_replaced_unasked(folder, base):
    """A param whole in the file, which the config does not name, is no part of an adapter."""
    key = "base_model.model.model.layers.0.k_proj.weight"
    change(folder, lambda tensors: tensors.update({key: np.zeros((8, 8), np.float32)}))
    with pytest.raises(jpeft.AdapterError, match=r"k_proj"):
        load_peft(folder, base)


WATCHED = """
import json, os, sys
from pathlib import Path
import jpeft
from jpeft_interop import load_peft
from jpeft_interop.provenance import provenance
from reliability.hostile import params
folder, clean = sys.argv[1:]
base = params()
load_peft(clean, base)  # what JAX and Python load late is loaded
seen, watching = [], True
QUIET = ("object.", "sys._getframe", "builtins.id", "marshal.", "mmap.__new__", "os.scandir", "os.listdir", "cpython.")

def hook(event, args):
    if watching and not event.startswith(QUIET):
        seen.append([event, str(args[0]) if args else ""])

sys.addaudithook(hook)
for _ in range(2):
    try:
        load_peft(folder, base)
        ended = "loaded"
    except jpeft.AdapterError:
        ended = "refused"
watching = False
print(json.dumps([ended, seen]))
"""
LURES = {
    "auto_mapping": {"parent_library": "antigravity", "base_model_class": "os.system"},
    "base_model_name_or_path": "/etc/passwd",
    "revision": "https://localhost:1/x",
    "peft_version": "../../x",
    "megatron_core": "antigravity",
    "loftq_config": {"loftq_bits": 4},
    "eva_config": {"__class__": "os.system"},
    "runtime_config": {"trust_remote_code": True},
}


def test_no_value_opens_imports_connects_or_runs(folder, base, tmp_path):
    """Audit events of a process that loads it: opened are the two files, and nothing else happens."""
    valid(tmp_path / "clean", base)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | LURES))
    (folder / "antigravity.py").write_text("raise SystemExit('it was run')")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'interop'}"}
    call = [sys.executable, "-c", WATCHED, str(folder), str(tmp_path / "clean")]
    done = subprocess.run(call, capture_output=True, text=True, cwd=folder, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    ended, seen = json.loads(done.stdout)
    assert ended == "loaded"
    opened = {path for event, path in seen if event == "open" and not path.isdigit()}  # a number is a file already open
    assert opened == {str(folder / CONFIG), str(folder / WEIGHTS)}
    assert {event for event, _ in seen} <= {"open", "os.stat"}, seen


def test_a_folder_of_ours_is_for_its_base_alone(tmp_path, base):
    adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(rank=2, targets=["q_proj"]), base)
    save_peft(tmp_path / "ours", adapter, params=base)
    other = jax.tree.map(lambda leaf: leaf + 1, base)
    with pytest.raises(jpeft.AdapterError, match="another base of the same shapes"):
        load_peft(tmp_path / "ours", other)
