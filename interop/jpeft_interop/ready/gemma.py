"""google/gemma (Linen): einsum kernels, the one of keys and values fused on its first axis, or of all three."""

from __future__ import annotations

from jpeft_interop.ready.rule import Rule, Rules, Table, Tie, embedding, joined, norm

TORCH = "model.layers.{i}"
ATTENTION, MLP = f"{TORCH}.self_attn", f"{TORCH}.mlp"
Q, K, V = (f"{ATTENTION}.{name}_proj.weight" for name in "qkv")
TIE = (Tie("model.embed_tokens.weight", "lm_head.weight"),)
ONE = {"one": 1, "two": 1, "three": 1}  # of what is fused, each has one


def separate(layer: str) -> Rules:
    """Queries, and fused keys and values."""
    fused = {K: "(one k h) d", V: "(two k h) d"}
    return (
        Rule(f"{layer}/attn/q_einsum/w", "n d h", {Q: "(n h) d"}),
        Rule(f"{layer}/attn/kv_einsum/w", "(one + two) k d h", fused, sizes={"one": 1, "two": 1}),
    )


def together(layer: str) -> Rules:
    """All in one: where there are as many heads of keys as of queries."""
    fused = {Q: "(one n h) d", K: "(two n h) d", V: "(three n h) d"}
    return (Rule(f"{layer}/attn/qkv_einsum/w", "(one + two + three) n d h", fused, sizes=ONE),)


def gemma(layer: str, generation: int, mlp: Rules, *, fused: bool, after: str) -> Rules:
    """What google/gemma and Tunix share; `after` is the norm behind the attention (Gemma 2 and 3)."""
    norms = {"pre_attention_norm": "input_layernorm", "pre_ffw_norm": "post_attention_layernorm"}
    if generation > 1:
        norms |= {after: "post_attention_layernorm", "pre_ffw_norm": "pre_feedforward_layernorm"}
        norms |= {"post_ffw_norm": "post_feedforward_layernorm"}
    if generation == 3:
        norms |= {"attn/_query_norm": "self_attn.q_norm", "attn/_key_norm": "self_attn.k_norm"}
    return joined(
        embedding("embedder/input_embedding", "model.embed_tokens.weight"),
        together(layer) if fused else separate(layer),
        (Rule(f"{layer}/attn/attn_vec_einsum/w", "n h d", {f"{ATTENTION}.o_proj.weight": "d (n h)"}),),
        mlp,
        *(norm(f"{layer}/{ours}", f"{TORCH}.{theirs}") for ours, theirs in norms.items()),
        norm("final_norm", "model.norm"),
    )


def mlp(leaf: str, gating: str) -> Rules:
    """The MLP, gate and up fused; in a checkpoint's tree the leaves end in `/w`."""
    fused = {f"{MLP}.gate_proj.weight": "(one f) d", f"{MLP}.up_proj.weight": "(two f) d"}
    return (
        Rule(f"layer_{{i}}/mlp/linear{leaf}", "f d", {f"{MLP}.down_proj.weight": "d f"}),
        Rule(f"layer_{{i}}/mlp/gating_einsum{leaf}", gating, fused, sizes={"one": 1, "two": 1}),
    )


def forms(generation: int, gatings: tuple[str, ...]) -> tuple[Table, ...]:
    """Fused or not, in memory or a checkpoint, the gating kernel transposed or not."""
    return tuple(
        Table(gemma("layer_{i}", generation, mlp(leaf, axes), fused=fused, after="post_attention_norm"), ties=TIE)
        for fused in (False, True)
        for leaf in ("", "/w")
        for axes in gatings
    )


PLAIN, TRANSPOSED = "(one + two) d f", "(one + two) f d"  # transpose_gating_einsum
TABLES: dict[str, tuple[Table, ...]] = {
    "gemma/gemma": forms(1, (PLAIN,)),
    "gemma/gemma2": forms(2, (PLAIN, TRANSPOSED)),
    "gemma/gemma3": forms(3, (TRANSPOSED,)),
}
