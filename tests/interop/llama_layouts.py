"""The tiny Llama of `peft_twins` in other forms: stacked with heads split and rotary halves turned, and fused."""

from __future__ import annotations

from typing import Any

from jpeft_interop import Layout, Place

HEADS, KV, HEAD = 4, 2, 8
ATTENTION, MLP = "model.layers.{l}.self_attn.", "model.layers.{l}.mlp."
SIZES = {"d": 32, "n": HEADS, "m": KV, "h": HEAD, "half": 4, "two": 2, "f": 48, "l": 2, "v": 50, "k": 1, "w": 1}
WHOLE = {
    "embed": Place.of("v d", {"model.embed_tokens.weight": ("v d", "embedding")}),
    "head": Place.of("v d", {"lm_head.weight": "v d"}),
    "norm": Place.of("d", {"model.norm.weight": "d"}),
    "norms/attn": Place.of("l d", {"model.layers.{l}.input_layernorm.weight": "d"}),
    "norms/mlp": Place.of("l d", {"model.layers.{l}.post_attention_layernorm.weight": "d"}),
}
SCANNED = WHOLE | {
    "q": Place.of("d l n (half two)", {f"{ATTENTION}q_proj.weight": "(n two half) d"}, scale=HEAD**-0.5),
    "k": Place.of("d l m (half two)", {f"{ATTENTION}k_proj.weight": "(m two half) d"}),
    "v": Place.of("d l m h", {f"{ATTENTION}v_proj.weight": "(m h) d"}),
    "o": Place.of("n l h d", {f"{ATTENTION}o_proj.weight": "d (n h)"}),
    "gate": Place.of("d l f", {f"{MLP}gate_proj.weight": "f d"}),
    "up": Place.of("d l f", {f"{MLP}up_proj.weight": "f d"}),
    "down": Place.of("f l d", {f"{MLP}down_proj.weight": "d f"}),
}
FUSED = WHOLE | {
    "qkv": Place.of(
        "l d (n h + k m h + w m h)",
        {
            f"{ATTENTION}q_proj.weight": "(n h) d",
            f"{ATTENTION}k_proj.weight": "(k m h) d",
            f"{ATTENTION}v_proj.weight": "(w m h) d",
        },
    ),
    "o": Place.of("l n h d", {f"{ATTENTION}o_proj.weight": "d (n h)"}),
    "gate_up": Place.of("l (k + w) d f", {f"{MLP}gate_proj.weight": "(k f) d", f"{MLP}up_proj.weight": "(w f) d"}),
    "down": Place.of("l f d", {f"{MLP}down_proj.weight": "d f"}),
}
LAYOUTS = {"scanned": SCANNED, "fused": FUSED}


def sized(place: Place) -> Place:
    return Place(
        place.axes, place.torch, tuple(sorted((n, s) for n, s in SIZES.items() if n in place.axes)), place.scale
    )


def base_here(module: Any, form: str) -> tuple[dict, Layout]:
    """The module's weights in another form, and the layout."""
    places = {path: sized(place) for path, place in LAYOUTS[form].items()}
    layout = Layout({path: place.fit(place.shape, path) for path, place in places.items()})
    layout.check_keys()
    return layout.from_torch(module.state_dict()), layout
