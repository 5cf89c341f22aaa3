"""Tunix (NNX): attention kernels with an axis for heads; the MLP's are Linear's."""

from __future__ import annotations

from jpeft_interop.ready.gemma import gemma
from jpeft_interop.ready.rule import Rule, Rules, Table, Tie, dense, embedding, joined, norm

LAYER, TORCH = "layers/{i}", "model.layers.{i}"
ATTENTION, MLP = f"{TORCH}.self_attn", f"{TORCH}.mlp"
TIE = (Tie("model.embed_tokens.weight", "lm_head.weight"),)
HEAD = (Rule("lm_head/w", "d v", {"lm_head.weight": "v d"}),)

BODY = joined(
    embedding("embedder/input_embedding", "model.embed_tokens.weight"),
    (
        Rule(f"{LAYER}/attn/q_proj/w", "d n h", {f"{ATTENTION}.q_proj.weight": "(n h) d"}),
        Rule(f"{LAYER}/attn/k_proj/w", "d k h", {f"{ATTENTION}.k_proj.weight": "(k h) d"}),
        Rule(f"{LAYER}/attn/v_proj/w", "d k h", {f"{ATTENTION}.v_proj.weight": "(k h) d"}),
        Rule(f"{LAYER}/attn/o_proj/w", "n h d", {f"{ATTENTION}.o_proj.weight": "d (n h)"}),
    ),
    *(norm(f"{LAYER}/{n}", f"{TORCH}.{n}", leaf="w") for n in ("input_layernorm", "post_attention_layernorm")),
    norm("final_norm", "model.norm", leaf="w"),
)
LINEARS = joined(
    dense(f"{LAYER}/mlp/gate_proj", f"{MLP}.gate_proj", axes="d f"),
    dense(f"{LAYER}/mlp/up_proj", f"{MLP}.up_proj", axes="d f"),
    dense(f"{LAYER}/mlp/down_proj", f"{MLP}.down_proj", axes="f d"),
)
BIASES = tuple(Rule(f"{LAYER}/attn/{n}_bias", "o", {f"{ATTENTION}.{n}_proj.bias": "o"}) for n in "qkv")
QK_NORMS = joined(*(norm(f"{LAYER}/attn/{n}", f"{ATTENTION}.{n}", leaf="w") for n in ("q_norm", "k_norm")))
EXPERTS = (
    Rule(f"{LAYER}/mlp/router/kernel", "d e", {f"{MLP}.gate.weight": ("e d", "matrix")}),
    Rule(f"{LAYER}/mlp/gate_proj", "e d m", {f"{MLP}.experts.gate_up_proj": ("e (m + {m}) d", "experts")}),
    Rule(f"{LAYER}/mlp/up_proj", "e d m", {f"{MLP}.experts.gate_up_proj": ("e ({m} + m) d", "experts")}),
    Rule(f"{LAYER}/mlp/down_proj", "e m d", {f"{MLP}.experts.down_proj": ("e d m", "experts")}),
)


def family(*groups: Rules) -> tuple[Table, ...]:
    """A family with a head of its own or a tied one."""
    return (Table(joined(BODY, *groups), (HEAD,), TIE),)


def of_gemma(generation: int) -> tuple[Table, ...]:
    """Google's Gemma with the MLP apart, and another name for Gemma 2's norm behind the attention."""
    after = "post_attention_norm" if generation == 3 else "post_attn_norm"
    return tuple(
        Table(gemma(LAYER, generation, LINEARS, fused=fused, after=after), ties=TIE) for fused in (False, True)
    )


TABLES: dict[str, tuple[Table, ...]] = {
    "tunix/llama3": family(LINEARS),
    "tunix/qwen2": family(LINEARS, BIASES),
    "tunix/qwen3": family(LINEARS, QK_NORMS),
    "tunix/qwen3_moe": family(EXPERTS, QK_NORMS),
    "tunix/gemma": of_gemma(1),
    "tunix/gemma2": of_gemma(2),
    "tunix/gemma3": of_gemma(3),
}
