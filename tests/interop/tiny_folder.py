"""A model folder small enough for a test: random weights, a byte-level tokenizer, a chat template."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jpeft.tree import flatten, map_leaves
from jpeft_interop.models import build, pure
from jpeft_interop.save_model import save_model

CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "[CLS]", "[SEP]"]
TEXT = "the cat sat on the mat and the dog lay on the log; a cat is no dog, and a mat is no log. 0123456789"


def write_tokenizer(folder: Path, **config) -> Path:
    """Byte-level BPE with a few merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|end|>", "pad_token": "<|pad|>", "chat_template": CHAT} | config
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


CONFIGS = {
    "llama": dict(
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    ),
    "bert": dict(
        model_type="bert",
        architectures=["BertModel"],
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
    ),
}


def write_folder(folder: Path, family: str = "llama", seed: int = 0) -> Path:
    """The whole folder. Weights are noise everywhere: norms and biases, too."""
    write_tokenizer(folder.parent / "tokenizer")
    config = CONFIGS[family]
    module = nnx.eval_shape(lambda: build(config))
    abstract = pure(module)[1]
    keys = dict(zip(flatten(abstract), jax.random.split(jax.random.key(seed), len(flatten(abstract))), strict=True))
    bias = {"weight": 1.0, "scale": 1.0}
    draw = lambda path, leaf: bias.get(path.rpartition("/")[2], 0.0) + 0.15 * jax.random.normal(keys[path], leaf.shape)
    params = map_leaves(lambda path, leaf: draw(path, leaf).astype(jnp.float32), abstract)
    save_model(folder, params, config, files_from=folder.parent / "tokenizer")
    return folder
