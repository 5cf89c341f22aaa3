"""The layouts of the families that people have, by name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jpeft.errors import WeightsError
from jpeft.strict_json import read_json_object
from jpeft.tree import flatten, nearest
from jpeft_interop.layout import Layout
from jpeft_interop.ready import gemma, maxtext, transformers4, tunix
from jpeft_interop.ready.match import Matched, match, matching
from jpeft_interop.ready.rule import Table

TABLES: Mapping[str, tuple[Table, ...]] = {
    **transformers4.TABLES,
    **tunix.TABLES,
    **gemma.TABLES,
    **maxtext.TABLES,
}

# What a config calls the sizes of the tables.
CONFIG = {
    "v": "vocab_size",
    "d": "hidden_size",
    "f": "intermediate_size",
    "n": "num_attention_heads",
    "k": "num_key_value_heads",
    "h": "head_dim",
    "e": "num_experts",
    "m": "moe_intermediate_size",
    "query_pre_attn_scalar": "query_pre_attn_scalar",
}


def ready_names() -> list[str]:
    """The names that `ready_layout` knows: the package's and the family's.

    Example:
      >>> [name for name in ready_names() if name.startswith("gemma/")]
      ['gemma/gemma', 'gemma/gemma2', 'gemma/gemma3']
    """
    return list(TABLES)


def ready_layout(name: str, params: Any, config: Any = None) -> Layout:
    """The layout of a known family's params, its sizes read off the shapes.

    A model with a head of its own or a tied one, stacked layers or separate ones, `params/` in front of all paths or
    not: whichever form the family has is recognised. Torch's names are those of the modules in transformers 5, which
    PEFT's adapters are saved under. ViT's files, and its modules in transformers 4, have other names: those of
    `transformers4/vit_files`. `export_model` takes either layout and writes the names that the base's folder has.

    Args:
      name: one of `ready_names()`.
      params: arrays or anything with a shape; only shapes are looked at.
      config: the torch model's, an object, a mapping or a file: for what no shape tells (the error says so), and to
        have the shapes checked against it. A vocabulary with more rows than it says is padded.

    Raises:
      WeightsError: an unknown name; a leaf that the family does not have or lacks; shapes that contradict each other
        or the config.

    Example:
      >>> import numpy as np
      >>> shapes = {"q_proj": (8, 8), "k_proj": (8, 4), "v_proj": (8, 4), "o_proj": (8, 8)}
      >>> attn = {name: {"kernel": np.ones(shape)} for name, shape in shapes.items()}
      >>> mlp = {f"{name}_proj": {"kernel": np.ones(shape)} for name, shape in
      ...        {"gate": (8, 6), "up": (8, 6), "down": (6, 8)}.items()}
      >>> norm = {"weight": np.ones(8)}
      >>> layer = {"self_attn": attn, "mlp": mlp, "input_layernorm": norm, "post_attention_layernorm": norm}
      >>> params = {"model": {"embed_tokens": {"embedding": np.ones((9, 8))}, "layers": {"0": layer}, "norm": norm}}
      >>> layout = ready_layout("transformers4/llama", params)
      >>> layout["model/layers/0/self_attn/k_proj/kernel"].torch[0].key
      'model.layers.0.self_attn.k_proj.weight'
    """
    if name not in TABLES:
        raise WeightsError(f"there is no ready layout {name!r}; the nearest are {nearest(name, TABLES)}")
    flat, sizes = flatten(params), _sizes(config)
    matched: list[Matched] = []
    errors: list[tuple[int, str]] = []
    for table in TABLES[name]:
        try:
            matched.append(match(table, flat, sizes))
        except WeightsError as error:
            errors.append((matching(table, flat), str(error)))
    if not matched:
        raise WeightsError(f"{name}: {max(errors, key=lambda pair: pair[0])[1]}")
    shortest = min(len(one.prefix) for one in matched)
    fitting = [one for one in matched if len(one.prefix) == shortest]
    if any(one.places != fitting[0].places for one in fitting):
        raise WeightsError(f"{name}: the params fit several forms of it alike; pass config= or write the layout down")
    return Layout.of(params, fitting[0].places)


def _sizes(config: Any) -> dict[str, int]:
    """Those that a config tells."""
    found = _mapping(config)
    found = found.get("text_config") or found
    told = {name: found.get(key) for name, key in CONFIG.items()}
    return {name: size for name, size in told.items() if isinstance(size, int)}


def _mapping(config: Any) -> Mapping[str, Any]:
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return config
    if isinstance(config, (str, os.PathLike)):
        path = Path(config)
        return read_json_object(path / "config.json" if path.is_dir() else path, WeightsError)
    if not hasattr(config, "to_dict"):
        raise WeightsError(
            f"config: expected a transformers config, a mapping or a path, found {type(config).__name__}"
        )
    return config.to_dict()
