"""CLIP against torch, both towers and each alone: random weights, fp32."""

from typing import Any

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

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, projection_dim=12)
TEXT = SIZES | dict(vocab_size=61, max_position_embeddings=12, eos_token_id=60, bos_token_id=1)
VISION = SIZES | dict(image_size=13, patch_size=4, hidden_size=24)
TOLERANCE = 1e-5


def config_of(name: str, **options) -> Any:
    if "Text" in name:
        return transformers.CLIPTextConfig(**TEXT | options)
    if "Vision" in name:
        return transformers.CLIPVisionConfig(**VISION | options)
    text, vision = TEXT | options.pop("text", {}), VISION | options.pop("vision", {})
    return transformers.CLIPConfig(text_config=text, vision_config=vision, **{"projection_dim": 12} | options)


def model_of(name: str, **options) -> Any:
    torch.manual_seed(0)
    return randomise(getattr(transformers, name)(config_of(name, **options)))


def pixels_of(batch: int = 2) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(batch, 3, 13, 13)).astype(np.float32)


def texts_of() -> dict[str, np.ndarray]:
    """Three texts that end at their middle, at their end, and twice (padding is the end's token, as in SDXL)."""
    ids, mask = np.random.default_rng(0).integers(2, 59, (3, 9)), np.ones((3, 9), int)
    ids[0, 4], ids[1, 8], ids[2, 5:] = 60, 60, 60
    mask[0, 5:] = 0
    return dict(input_ids=ids, attention_mask=mask)


TEXTS = {
    "text": ("CLIPTextModel", {}),
    "text, old end": ("CLIPTextModel", {"eos_token_id": 2}),
    "text, other numbers": ("CLIPTextModel", {"hidden_act": "gelu", "layer_norm_eps": 1e-2, "num_attention_heads": 2}),
    "text projected": ("CLIPTextModelWithProjection", {}),
}
IMAGES = {
    "vision": ("CLIPVisionModel", {}),
    "vision, other numbers": ("CLIPVisionModel", {"hidden_act": "gelu", "layer_norm_eps": 1e-2, "patch_size": 6}),
    "vision projected": ("CLIPVisionModelWithProjection", {}),
}


def assert_same_tower(ours: Any, theirs: Any, where: Any = None) -> None:
    assert len(ours.hidden_states) == 3
    for mine, torchs in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        assert difference(mine, torchs, where) < TOLERANCE
    assert difference(ours.last_hidden_state, theirs.last_hidden_state, where) < TOLERANCE
    assert difference(ours.pooled, theirs.pooler_output) < TOLERANCE


@pytest.mark.parametrize("row", TEXTS)
def test_texts(row, tmp_path):
    name, options = TEXTS[row]
    model, inputs = model_of(name, **options), texts_of()
    through_a_folder(model, tmp_path)
    forward, params = twin(model)
    ours = forward(params, **inputs, output_hidden_states=True)
    theirs = run_torch(model, **inputs, output_hidden_states=True)
    if name == "CLIPTextModelWithProjection":
        assert difference(ours.text_embeds, theirs.text_embeds) < TOLERANCE
        theirs = run_torch(model.text_model, **inputs, output_hidden_states=True)
    else:
        assert ours.text_embeds is None
    assert_same_tower(ours, theirs, inputs["attention_mask"])


@pytest.mark.parametrize("row", IMAGES)
def test_images(row, tmp_path):
    name, options = IMAGES[row]
    model, pixels = model_of(name, **options), pixels_of()
    through_a_folder(model, tmp_path)
    forward, params = twin(model)
    ours = forward(params, pixels, output_hidden_states=True)
    theirs = run_torch(model, pixel_values=pixels, output_hidden_states=True)
    if name == "CLIPVisionModelWithProjection":
        assert difference(ours.image_embeds, theirs.image_embeds) < TOLERANCE
        theirs = run_torch(model.vision_model, pixel_values=pixels, output_hidden_states=True)
    else:
        assert ours.image_embeds is None
    assert_same_tower(ours, theirs)


BOTH = {
    "plain": {},
    "towers that differ": {"text": {"num_hidden_layers": 1, "eos_token_id": 2}, "vision": {"hidden_act": "gelu"}},
    "scale and width": {"logit_scale_init_value": 0.5, "projection_dim": 7},
}


@pytest.mark.parametrize("row", BOTH)
def test_both(row, tmp_path):
    model = model_of("CLIPModel", **BOTH[row])
    through_a_folder(model, tmp_path)
    forward, params = twin(model)
    inputs = texts_of() | dict(pixel_values=pixels_of())
    ours, theirs = forward(params, **inputs), run_torch(model, **inputs)
    assert ours.logits_per_image.shape == (2, 3)
    for name in ("logits_per_image", "logits_per_text", "image_embeds", "text_embeds"):
        assert difference(getattr(ours, name), getattr(theirs, name)) < TOLERANCE
    assert params["logit_scale"].shape == ()


def test_both_give_what_their_towers_gave():
    model, inputs = model_of("CLIPModel"), texts_of() | dict(pixel_values=pixels_of())
    forward, params = twin(model)
    positions = np.tile(np.arange(9) + 2, (3, 1))
    ours = forward(params, **inputs, position_ids=positions, output_hidden_states=True)
    theirs = run_torch(model, **inputs, position_ids=positions, output_hidden_states=True)
    assert_same_tower(ours.text_model_output, theirs.text_model_output, inputs["attention_mask"])
    assert_same_tower(ours.vision_model_output, theirs.vision_model_output)


@pytest.mark.parametrize("name", ["CLIPTextModel", "CLIPVisionModel"])
def test_a_towers_file_may_have_the_prefix_that_it_had(name, tmp_path):
    """As in the folders of Stable Diffusion."""
    model = model_of(name)
    model.save_pretrained(tmp_path)
    prefix, file = "text_model." if "Text" in name else "vision_model.", tmp_path / "model.safetensors"
    tensors = {prefix + key: tensor for key, tensor in load_file(file).items()}
    save_file(tensors | {f"{prefix}embeddings.position_ids": torch.arange(12)[None]}, file)
    assert_same_tree(load_model(tmp_path)[1], params_from_torch(model))


def test_the_config_of_old_that_has_two_of_each():
    model = model_of("CLIPModel")
    config = model.config.to_dict()
    config["text_config_dict"], config["text_config"] = config["text_config"], {"hidden_size": 64}
    module = nnx.eval_shape(lambda: build(config, architecture="CLIPModel"))
    parts = {key: config[key] for key in ("text_config", "text_config_dict")}
    assert module.text_projection.kernel.shape == (transformers.CLIPConfig(**parts).text_config.hidden_size, 12)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({}, "give pixel_values"),
        ({"pixel_values": pixels_of()}, "give input_ids"),
        ({"pixel_values": pixels_of()[:, :, :12]}, r"\(batch, 3, 13, 13\).*found \(2, 3, 12, 13\)"),
        ({"pixel_values": pixels_of(), "input_ids": np.ones((1, 13), int)}, "13 tokens; this model has 12 positions"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs, words):
    forward, params = twin(model_of("CLIPModel"))
    with pytest.raises(ModelError, match=words):
        forward(params, **inputs)


@pytest.mark.parametrize(
    ("options", "words"), [({"hidden_act": "mish"}, "mish"), ({"num_attention_heads": 5}, "evenly")]
)
@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_what_is_not_here_is_refused(options, words, part):
    config = config_of("CLIPModel").to_dict()
    config[part] |= options
    with pytest.raises(ModelError, match=words):
        nnx.eval_shape(lambda: build(config, architecture="CLIPModel"))
