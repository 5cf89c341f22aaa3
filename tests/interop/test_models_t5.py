"""T5 against torch, v1.0 and v1.1: random weights, fp32."""

import json
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.torch import load_file, save_file
from transformers.models.t5.modeling_t5 import T5Attention

from folder_twins import assert_same_tree, through_a_folder
from jpeft.errors import WeightsError
from jpeft.tree import flatten
from jpeft_interop.load_model import load_model, read_config
from jpeft_interop.models import ModelError, build, init_cache, pure
from jpeft_interop.models.relative import relative_buckets
from jpeft_interop.save_model import save_model
from jpeft_interop.torch_params import params_from_torch, torch_table
from torch_twins import difference, randomise, run_torch, twin

SIZES = dict(vocab_size=61, d_model=32, d_kv=6, d_ff=48, num_layers=2, num_heads=4)
SIZES |= dict(relative_attention_num_buckets=8, relative_attention_max_distance=10, initializer_factor=0.3)
TOLERANCE = 1e-5


def model_of(name: str = "T5ForConditionalGeneration", untied: bool = False, **options) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, name)(transformers.T5Config(**SIZES | options))
    if untied:  # transformers ties until a file says otherwise
        model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn(61, 32))
    return randomise(model)


def config_of(model: Any, untied: bool = False) -> dict[str, Any]:
    return model.config.to_dict() | ({"tie_word_embeddings": False} if untied else {})


def ours_of(model: Any, untied: bool = False) -> tuple[Any, dict]:
    if not untied:
        return twin(model)
    module = nnx.eval_shape(lambda: build(config_of(model, True), architecture=type(model).__name__))
    return jax.jit(pure(module)[0], static_argnames="output_hidden_states"), params_from_torch(model)


def inputs_of(name: str = "T5ForConditionalGeneration") -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    mask, later = np.ones((3, 11), int), np.ones((3, 7), int)
    mask[0, 6:], mask[1, :2], later[0, 5:], later[1, :2] = 0, 0, 0, 0
    encoder = dict(input_ids=random.integers(1, 61, (3, 11)), attention_mask=mask)
    if name == "T5EncoderModel":
        return encoder
    return encoder | dict(decoder_input_ids=random.integers(1, 61, (3, 7)), decoder_attention_mask=later)


V11 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
MODELS = {
    "v1.0": ("T5ForConditionalGeneration", False, {}),
    "v1.1": ("T5ForConditionalGeneration", True, V11),
    "v1.1, tied": ("T5ForConditionalGeneration", False, V11),
    "untied and scaled": ("T5ForConditionalGeneration", True, {}),
    "other numbers": (
        "T5ForConditionalGeneration",
        False,
        {
            "feed_forward_proj": "gated-silu",
            "layer_norm_epsilon": 1e-2,
            "num_decoder_layers": 3,
            "relative_attention_num_buckets": 32,
        },
    ),
    "encoder": ("T5EncoderModel", False, {}),
}


@pytest.mark.parametrize("row", MODELS)
def test_all_outputs_equal_torch(row):
    name, untied, options = MODELS[row]
    model, inputs = model_of(name, untied, **options), inputs_of(name)
    forward, params = ours_of(model, untied)
    ours = forward(params, **inputs, output_hidden_states=True)
    theirs = run_torch(model, **inputs, output_hidden_states=True)
    mask = inputs["attention_mask"]
    if name == "T5EncoderModel":
        pairs = [(ours.hidden_states, theirs.hidden_states, mask)]
        assert difference(ours.last_hidden_state, theirs.last_hidden_state, mask) < TOLERANCE
        assert ours.logits is None
    else:
        later = inputs["decoder_attention_mask"]
        pairs = [
            (ours.hidden_states, theirs.decoder_hidden_states, later),
            (ours.encoder_hidden_states, theirs.encoder_hidden_states, mask),
        ]
        assert difference(ours.encoder_last_hidden_state, theirs.encoder_last_hidden_state, mask) < TOLERANCE
        assert difference(ours.logits, theirs.logits, later) < TOLERANCE
    for states, torchs, where in pairs:
        assert len(states) == len(torchs)
        for mine, other in zip(states, torchs, strict=True):
            assert difference(mine, other, where) < TOLERANCE


@pytest.mark.parametrize("row", ["v1.0", "v1.1, tied", "encoder"])
def test_folders(row, tmp_path):
    name, _, options = MODELS[row]
    inputs = inputs_of(name)
    forward, params, again = through_a_folder(model_of(name, **options), tmp_path)
    key = "last_hidden_state" if name == "T5EncoderModel" else "logits"
    where = inputs.get("decoder_attention_mask", inputs["attention_mask"])
    theirs = getattr(run_torch(again, **inputs), key)
    assert difference(getattr(forward(params, **inputs), key), theirs, where) < TOLERANCE


def test_a_tie_of_four_names_is_one_leaf_at_the_first():
    tied, untied = model_of(), model_of(untied=True)
    names = torch_table(tied)["shared/embedding"].names
    assert names == ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    assert torch_table(untied)["shared/embedding"].names == names[:3]
    assert not any("embed_tokens" in path for path in flatten(params_from_torch(tied)))


def rewritten(folder: Any, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def test_an_untied_folder_there_and_back(tmp_path):
    """As google/flan-t5-small is: an untied head, and the embeddings under all their names."""
    model = model_of(untied=True, **V11)
    model.save_pretrained(tmp_path / "theirs")
    rewritten(tmp_path / "theirs", tie_word_embeddings=False)
    forward, params = load_model(tmp_path / "theirs")
    assert_same_tree(params, params_from_torch(model))
    save_model(tmp_path / "ours", params, read_config(tmp_path / "theirs"))
    again = type(model).from_pretrained(tmp_path / "ours").eval()
    assert not again.config.scale_decoder_outputs
    theirs = run_torch(again, **inputs_of()).logits
    assert difference(forward(params, **inputs_of()).logits, theirs, inputs_of()["decoder_attention_mask"]) < TOLERANCE


def test_a_tied_config_with_an_untied_head_is_refused(tmp_path):
    model_of(untied=True, **V11).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="'lm_head.weight' is tied to 'shared.weight'.*tie_word_embeddings"):
        load_model(tmp_path)


def test_what_old_files_hold_besides(tmp_path):
    """As google-t5/t5-small is: every name of the embeddings, and a table of the cross-attention that nothing reads."""
    model, file = model_of(), tmp_path / "model.safetensors"
    model.save_pretrained(tmp_path)
    tensors = load_file(file)
    names = torch_table(model)["shared/embedding"].names
    tensors |= {name: tensors["shared.weight"].clone() for name in names}
    tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.ones(8, 4)
    save_file(tensors, file)
    assert_same_tree(load_model(tmp_path)[1], params_from_torch(model))


def test_gradients_equal_torchs():
    model, inputs = model_of(), inputs_of()
    forward, params = twin(model)
    weight = np.random.default_rng(3).normal(size=(3, 7, 61)).astype(np.float32)
    (
        model(**{key: torch.as_tensor(value) for key, value in inputs.items()}).logits * torch.tensor(weight)
    ).sum().backward()
    ours = jax.grad(lambda params: (forward(params, **inputs).logits * weight).sum())(params)
    tables = [(ours["shared"], model.shared)]
    for side, stack in (("encoder", model.encoder), ("decoder", model.decoder)):
        first = ours[side]["block"]["0"]["layer"]["0"]["SelfAttention"]["relative_attention_bias"]
        tables.append((first, stack.block[0].layer[0].SelfAttention.relative_attention_bias))
    for mine, torchs in tables:
        assert difference(mine["embedding"], torchs.weight.grad) < TOLERANCE


def test_an_encoder_from_the_whole_models_folder(tmp_path):
    model = model_of()
    model.save_pretrained(tmp_path)
    _, params = load_model(tmp_path, architecture="T5EncoderModel")
    assert_same_tree(params, params_from_torch(transformers.T5EncoderModel.from_pretrained(tmp_path)))


def test_defaults_and_embeddings_given():
    model, inputs = model_of(), inputs_of()
    forward, params = twin(model)
    ids = {key: inputs[key] for key in ("input_ids", "decoder_input_ids")}
    words = np.array(params["shared"]["embedding"])
    given = dict(inputs_embeds=words[ids["input_ids"]], decoder_inputs_embeds=words[ids["decoder_input_ids"]])
    theirs = run_torch(model, **ids).logits
    assert difference(forward(params, **ids).logits, theirs) < TOLERANCE
    assert difference(forward(params, **given).logits, theirs) < TOLERANCE
    assert difference(run_torch(model, **given).logits, theirs) < TOLERANCE


def test_the_encoder_need_not_run_again():
    model, inputs = model_of(), inputs_of()
    forward, params = twin(model)
    whole = forward(params, **inputs)
    ids = inputs.pop("input_ids")
    again = forward(params, **inputs, encoder_outputs=(whole.encoder_last_hidden_state,))
    assert difference(again.logits, whole.logits) == 0
    other = forward(params, ids[::-1].copy(), **inputs).encoder_last_hidden_state
    assert difference(forward(params, **inputs, encoder_outputs=(other,)).logits, whole.logits) > 1e-3


@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize(("buckets", "longest"), [(32, 128), (8, 10), (16, 500), (30, 100)])
def test_buckets_of_every_distance(both_ways, buckets, longest):
    ahead = torch.arange(700)[None] - torch.arange(700)[:, None]
    theirs = T5Attention._relative_position_bucket(ahead, both_ways, buckets, longest)
    np.testing.assert_array_equal(relative_buckets(700, 700, both_ways, buckets, longest), theirs.numpy())


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"input_ids": np.ones((1, 3), int)}, "exactly one of decoder_input_ids"),
        ({"decoder_input_ids": np.ones((1, 3), int)}, "exactly one of input_ids"),
        ({"cache": init_cache(8)}, "takes no cache here: give all of decoder_input_ids"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs, words):
    forward, params = twin(model_of())
    with pytest.raises(ModelError, match=words):
        forward(params, **inputs)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"feed_forward_proj": "mish"}, "'mish' is not supported"),
        ({"feed_forward_proj": "double-relu"}, "'gated-' and an activation"),
        ({"is_decoder": True}, "is_decoder=True is not supported"),
    ],
)
def test_what_is_not_here_is_refused(options, words):
    with pytest.raises(ModelError, match=words):
        nnx.eval_shape(lambda: build({"model_type": "t5"} | SIZES | options, architecture="T5EncoderModel"))


def test_bf16_is_as_near_to_fp32_as_torch_is():
    half, inputs = model_of().to(torch.bfloat16), inputs_of()
    forward, params = twin(half)
    ours, theirs, where = forward(params, **inputs), run_torch(half, **inputs), inputs["decoder_attention_mask"]
    assert str(ours.logits.dtype) == "bfloat16"
    exact = run_torch(half.float(), **inputs)
    assert difference(ours.logits, exact.logits, where) < 1.5 * difference(theirs.logits.float(), exact.logits, where)
