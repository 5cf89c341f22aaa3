"""Writes small models of transformers 4 as its own converter makes Flax params of torch weights.

    python benchmarks/layouts/environments.py transformers4 dump_transformers4.py OUT

One folder a family under OUT: see dumps.py.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
import transformers
from dumps import SIZES, randomized, save
from flax.traverse_util import flatten_dict

# Where a class derives the head's size from the hidden one, q is square (24, 24); that of Gemma and T5 is (60, 24).
LLAMA = {
    "hidden_size": SIZES.hidden,
    "num_attention_heads": SIZES.heads,
    "num_key_value_heads": SIZES.kv_heads,
    "intermediate_size": SIZES.ffn,
    "num_hidden_layers": SIZES.layers,
    "vocab_size": SIZES.vocab,
    "max_position_embeddings": SIZES.positions,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BERT = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"} | {"num_labels": 7, "type_vocab_size": 3}
T5 = {
    "d_model": SIZES.hidden,
    "num_heads": SIZES.heads,
    "d_kv": SIZES.wide_head,
    "d_ff": SIZES.ffn,
    "num_layers": SIZES.layers,
    "num_decoder_layers": 2,
    "vocab_size": SIZES.vocab,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "decoder_start_token_id": 0,
}
GPT2 = {
    "n_embd": SIZES.hidden,
    "n_head": SIZES.heads,
    "n_inner": SIZES.ffn,
    "n_layer": SIZES.layers,
    "vocab_size": SIZES.vocab,
    "n_positions": SIZES.positions,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VIT = {
    "hidden_size": SIZES.hidden,
    "num_attention_heads": SIZES.heads,
    "intermediate_size": SIZES.ffn,
    "num_hidden_layers": SIZES.layers,
    "image_size": 15,
    "patch_size": 5,
    "num_labels": 7,
}

# family: (the torch class, its Flax one being of the same name behind "Flax", its config)
FAMILIES = {
    "llama": ("LlamaForCausalLM", LLAMA),
    "gemma": ("GemmaForCausalLM", LLAMA | {"head_dim": SIZES.wide_head}),
    "mistral": ("MistralForCausalLM", LLAMA),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "bert": ("BertForSequenceClassification", BERT),
    "bert_mlm": ("BertForMaskedLM", BERT),
    "roberta": ("RobertaForSequenceClassification", BERT),
    "roberta_mlm": ("RobertaForMaskedLM", BERT),
    "vit": ("ViTForImageClassification", VIT),
    "t5": ("T5ForConditionalGeneration", T5),
    "t5_gated": (
        "T5ForConditionalGeneration",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
}


def knowing_a_max(clip: Callable) -> Callable:
    """``jnp.clip`` with the argument that the T5 of transformers 4 gives and jax has dropped."""
    return lambda x, *args, a_max=None, **kwargs: clip(x, *args, **(kwargs if a_max is None else {"max": a_max}))


def inputs_of(family: str) -> dict[str, np.ndarray]:
    """Fixed inputs, by the names that both the torch and the Flax class take."""
    rng = np.random.default_rng(1)
    if family == "vit":
        return {"pixel_values": rng.standard_normal((2, 3, 15, 15)).astype(np.float32)}
    tokens = lambda: rng.integers(3, SIZES.vocab, (2, 9))
    decoder = {"decoder_input_ids": tokens()} if family.startswith("t5") else {}
    return {"input_ids": tokens(), "attention_mask": np.ones((2, 9), np.int64), **decoder}


def forward(family: str, model: Any) -> Callable[[Any, dict[str, np.ndarray]], Any]:
    """The Flax class's logits of params (nested dicts) and inputs."""
    jnp.clip = knowing_a_max(jnp.clip)
    flax_model = getattr(transformers, f"Flax{FAMILIES[family][0]}")(model.config, _do_init=False)
    return lambda params, inputs: flax_model(**inputs, params=params).logits


def dump(family: str, out: Path) -> None:
    """Draws the torch model, converts it, and saves both with their logits on the same inputs."""
    name, config = FAMILIES[family]
    torch_class, flax_class = getattr(transformers, name), getattr(transformers, f"Flax{name}")
    model = randomized(torch_class(torch_class.config_class(**config)))
    inputs = inputs_of(family)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        flax_model = flax_class.from_pretrained(folder, from_pt=True)
    with torch.no_grad():
        torch_logits = model(**{k: torch.from_numpy(v) for k, v in inputs.items()}).logits.numpy()
    save(
        out / family,
        params={"/".join(path): np.asarray(leaf) for path, leaf in flatten_dict(flax_model.params).items()},
        model=model,
        inputs=inputs,
        logits=np.asarray(flax_model(**inputs).logits),
        torch_logits=torch_logits,
        made_by=f"transformers {transformers.__version__}: Flax{name}.from_pretrained(from_pt=True)",
    )


if __name__ == "__main__":
    jnp.clip = knowing_a_max(jnp.clip)
    for each in sys.argv[2:] or FAMILIES:
        dump(each, Path(sys.argv[1]))
