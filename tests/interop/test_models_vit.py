"""ViT against torch: random weights, fp32."""

from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.torch import load_file, save_file

from folder_twins import assert_same_tree, through_a_folder
from jpeft_interop.load_model import load_model
from jpeft_interop.models import ModelError, build
from jpeft_interop.torch_params import params_from_torch
from torch_twins import difference, randomise, run_torch, twin

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(image_size=12, patch_size=4)
TOLERANCE = 1e-5


def model_of(name: str, **options) -> Any:
    torch.manual_seed(0)
    return randomise(getattr(transformers, name)(transformers.ViTConfig(**SIZES | options)))


def pixels_of(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape or (3, 3, 12, 12)).astype(np.float32)


MODELS = {
    "base": ("ViTModel", {}),
    "other numbers": ("ViTModel", {"hidden_act": "gelu_new", "layer_norm_eps": 1e-2, "qkv_bias": False}),
    "pooler": ("ViTModel", {"pooler_output_size": 5, "pooler_act": "relu"}),
    "edges left over": ("ViTModel", {"patch_size": 5}),
    "gray": ("ViTModel", {"num_channels": 1}),
    "classifier": ("ViTForImageClassification", {"num_labels": 3}),
}


@pytest.mark.parametrize("row", MODELS)
def test_all_outputs_equal_torch_and_pass_through_folders(row, tmp_path):
    name, options = MODELS[row]
    model, pixels = model_of(name, **options), pixels_of(3, options.get("num_channels", 3), 12, 12)
    through_a_folder(model, tmp_path)
    forward, params = twin(model)
    ours = forward(params, pixel_values=pixels, output_hidden_states=True)
    theirs = run_torch(model, pixel_values=pixels, output_hidden_states=True)
    assert len(ours.hidden_states) == 3
    for mine, torchs in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert difference(mine, torchs) < TOLERANCE
    if name == "ViTModel":
        assert difference(ours.last_hidden_state, theirs.last_hidden_state) < TOLERANCE
        assert difference(ours.pooled, theirs.pooler_output) < TOLERANCE
        assert ours.logits is None
    else:
        assert difference(ours.logits, theirs.logits) < TOLERANCE
        assert ours.pooled is None


def test_oblong_images_and_patches():
    model = model_of("ViTModel", image_size=[8, 12], patch_size=[4, 3])
    forward, params = twin(model)
    pixels = pixels_of(2, 3, 8, 12)
    theirs = run_torch(model, pixel_values=pixels).last_hidden_state
    assert theirs.shape[1] == 9
    assert difference(forward(params, pixels).last_hidden_state, theirs) < TOLERANCE


def test_a_mask_over_patches():
    model, mask = model_of("ViTModel"), np.ones((3, 10), int)
    mask[0, 7:] = 0
    forward, params = twin(model)
    ours = forward(params, pixels_of(), attention_mask=mask).last_hidden_state
    theirs = run_torch(model, pixel_values=pixels_of(), attention_mask=mask).last_hidden_state
    assert difference(ours, theirs) < TOLERANCE
    assert difference(forward(params, pixels_of()).last_hidden_state, theirs) > 1e-3


def test_gradients_equal_torchs():
    model = model_of("ViTForImageClassification", num_labels=3)
    forward, params = twin(model)
    model(torch.tensor(pixels_of())).logits[:, 0].sum().backward()
    ours = jax.grad(lambda params: forward(params, pixels_of()).logits[:, 0].sum())(params)["vit"]["embeddings"]
    theirs = model.vit.embeddings
    kernel = ours["patch_embeddings"]["projection"]["kernel"]
    assert difference(kernel.transpose(3, 2, 0, 1), theirs.patch_embeddings.projection.weight.grad) < TOLERANCE
    for name in ("cls_token", "position_embeddings"):
        assert difference(ours[name], getattr(theirs, name).grad) < TOLERANCE


def test_files_may_have_todays_names(tmp_path):
    model = model_of("ViTForImageClassification")
    model.save_pretrained(tmp_path)
    assert "vit.encoder.layer.0.attention.attention.query.weight" in load_file(tmp_path / "model.safetensors")
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    assert_same_tree(load_model(tmp_path)[1], params_from_torch(model))


def test_a_classifiers_weights_without_the_classifier(tmp_path):
    model = model_of("ViTForImageClassification", num_labels=3)
    model.save_pretrained(tmp_path)
    with pytest.raises(Exception, match=r"'pooler/dense/bias'.*init_missing"):
        load_model(tmp_path, architecture="ViTModel")
    base = model_of("ViTModel")
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(Exception, match=r"'classifier/bias'.*init_missing"):
        load_model(tmp_path / "base", architecture="ViTForImageClassification")


@pytest.mark.parametrize("shape", [(3, 3, 12, 16), (3, 1, 12, 12), (3, 12, 12, 3), (3, 12, 12)])
def test_images_of_another_size_are_refused(shape):
    forward, params = twin(model_of("ViTModel"))
    with pytest.raises(ModelError, match=r"\(batch, 3, 12, 12\).*found \(3, "):
        forward(params, pixel_values=pixels_of(*shape))


def test_bf16_is_as_near_to_fp32_as_torch_is():
    half = model_of("ViTForImageClassification", num_labels=3).to(torch.bfloat16)
    forward, params = twin(half)
    ours, theirs = forward(params, pixels_of()), run_torch(half, pixel_values=pixels_of(), output_hidden_states=True)
    assert str(ours.logits.dtype) == "bfloat16"
    exact = run_torch(half.float(), pixel_values=pixels_of(), output_hidden_states=True)
    torchs = difference(theirs.logits.float(), exact.logits)
    assert difference(ours.logits, exact.logits) < max(2 * torchs, 0.02 * float(exact.logits.abs().max()))


@pytest.mark.parametrize(
    ("options", "words"), [({"hidden_act": "mish"}, "'mish' is not"), ({"num_attention_heads": 5}, "split evenly")]
)
def test_what_is_not_here_is_refused(options, words):
    with pytest.raises(ModelError, match=words):
        nnx.eval_shape(lambda: build({"model_type": "vit"} | SIZES | options, architecture="ViTModel"))
