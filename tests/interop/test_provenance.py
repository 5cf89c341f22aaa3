"""What a folder says of itself: whether it is as it was written, and for which base."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jpeft
from jpeft_interop import load_peft, params_from_torch, save_peft
from jpeft_interop.adapter_summary import summarise
from jpeft_interop.merge_folder import merge_folder
from jpeft_interop.provenance import provenance
from llama_layouts import base_here
from peft_twins import adapted, base, llama, save
from test_merge_stream import SPECS, normal, trained, whole, written
from test_peft_experts import mixtral

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def params_of(seed):
    draw = lambda n, *shape: jax.random.normal(jax.random.key(seed * 10 + n), shape)
    return {"block": {"q_proj": {"kernel": draw(0, 6, 4), "bias": draw(1, 4)}, "v_proj": {"kernel": draw(2, 6, 4)}}}


@pytest.fixture
def folder(tmp_path, key):
    adapter = jpeft.init(key, jpeft.LoRA(rank=2, targets=["q_proj"]), params_of(0))
    adapter = adapter.replace(trained=jax.tree.map(lambda leaf: leaf + 0.5, adapter.trained))
    save_peft(tmp_path / "adapter", adapter, params=params_of(0))
    return tmp_path / "adapter"


def test_what_is_known_of_a_folder(folder):
    known = provenance(folder, params_of(0))
    assert (known.digest, known.base) == ("ok", "ok")
    assert (provenance(folder).digest, provenance(folder).base) == ("ok", "unverified")
    assert "unchanged" in summarise(folder).provenance


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_flipped_bit_anywhere_is_found(folder, name):
    data, draw = (folder / name).read_bytes(), np.random.default_rng(0)
    for place in range(len(data)):
        bits = bytearray(data)
        bits[place] ^= 1 << int(draw.integers(8))
        (folder / name).write_bytes(bits)
        with pytest.raises(jpeft.AdapterError):
            load_peft(folder, params_of(0))
    (folder / name).write_bytes(data)
    load_peft(folder, params_of(0))


def test_words_in_a_strangers_metadata_state_nothing(folder):
    """Only a statement of jpeft's is one."""
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors, folder / WEIGHTS, {"format": "pt", "note": "trained with base=llama, digest=none"})
    load_peft(folder, params_of(0))
    assert provenance(folder).digest == "unverified"


def test_another_base_of_the_same_shapes(folder):
    with pytest.raises(
        jpeft.AdapterError, match=r"another base.*expected the fingerprint '\w+', found '\w+'.*check_base"
    ):
        load_peft(folder, params_of(1))
    with pytest.raises(jpeft.AdapterError, match="another base"):
        provenance(folder, params_of(1))
    load_peft(folder, params_of(1), check_base=False)
    load_peft(folder, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params_of(0)))


def test_weights_that_are_not_adapted_are_not_asked(folder):
    params = params_of(0)
    params["block"]["v_proj"] = params_of(1)["block"]["v_proj"]
    load_peft(folder, params)


def test_a_base_without_values_is_no_witness(folder, tmp_path):
    shapes = jax.eval_shape(lambda: params_of(1))
    adapter = load_peft(folder, shapes)
    assert provenance(folder, shapes).base == "unverified"
    save_peft(tmp_path / "new", adapter, params=shapes)
    assert provenance(tmp_path / "new", params_of(0)).digest == "ok"
    assert provenance(tmp_path / "new", params_of(0)).base == "unverified"


def test_a_changed_file_can_be_read_all_the_same(folder):
    config = json.loads((folder / CONFIG).read_text()) | {"lora_alpha": 5}
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(jpeft.AdapterError, match="has changed since it was written: expected the digest"):
        load_peft(folder, params_of(0))
    assert load_peft(folder, params_of(0), check_digest=False).spec.alpha == 5
    assert summarise(folder).provenance.startswith("CHANGED")


def test_pefts_own_folder_is_unverified_and_says_so(tmp_path):
    module = base(llama)
    folder = save(adapted(module, r=2, target_modules=["q_proj"]), tmp_path)
    params = params_from_torch(module)
    assert (provenance(folder, params).digest, provenance(folder, params).base) == ("unverified", "unverified")
    assert "unverified" in summarise(folder).provenance
    jpeft.save(tmp_path / "native.safetensors", load_peft(folder, params))
    assert "unchanged" in summarise(tmp_path / "native.safetensors").provenance


def test_a_base_is_known_in_any_layout(tmp_path):
    """Of the same torch weights: the fused, the stacked and torch's own names have one fingerprint."""
    module, other = base(llama), base(llama, seed=1)
    peft_model = adapted(module, r=2, target_modules=["k_proj", "v_proj", "o_proj", "down_proj", "gate_proj"])
    theirs = save(peft_model, tmp_path)
    params = params_from_torch(module)
    save_peft(tmp_path / "new", load_peft(theirs, params), params=params)
    for form in ("fused", "scanned"):
        here, layout = base_here(module, form)
        assert provenance(tmp_path / "new", here, layout=layout).base == "ok"
        wrong, layout = base_here(other, form)
        with pytest.raises(jpeft.AdapterError, match="another base"):
            load_peft(tmp_path / "new", wrong, layout=layout)


def test_a_layout_that_scales_is_no_witness(tmp_path):
    module = base(llama)
    theirs = save(adapted(module, r=2, target_modules=["q_proj"]), tmp_path)
    here, layout = base_here(module, "scanned")
    save_peft(tmp_path / "new", load_peft(theirs, here, layout=layout), params=here, layout=layout)
    assert provenance(tmp_path / "new", here, layout=layout).base == "unverified"


def test_merging_into_another_base_is_refused(tmp_path):
    """Of the same shapes, so that nothing else would tell."""
    _, params = written(tmp_path / "base", normal)
    written(tmp_path / "other", whole)
    adapter = trained(SPECS["lora"], params, normal)
    save_peft(tmp_path / "peft", adapter, params=params)
    jpeft.save(tmp_path / "native.safetensors", adapter, params=params)
    for place in ("peft", "native.safetensors"):
        with pytest.raises(jpeft.AdapterError, match="another base of the same shapes"):
            merge_folder(tmp_path / "other", tmp_path / place, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    merge_folder(tmp_path / "base", tmp_path / "native.safetensors", tmp_path / "out")


@pytest.mark.parametrize("names", [["experts.down_proj"], ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]])
def test_stacked_experts_are_asked_too(names, tmp_path):
    module, other = base(mixtral), base(mixtral, seed=1)
    theirs = save(adapted(module, r=2, target_modules=[], target_parameters=names), tmp_path)
    params = params_from_torch(module)
    save_peft(tmp_path / "new", load_peft(theirs, params), params=params)
    assert provenance(tmp_path / "new", params).base == "ok"
    with pytest.raises(jpeft.AdapterError, match="another base"):
        load_peft(tmp_path / "new", params_from_torch(other))
