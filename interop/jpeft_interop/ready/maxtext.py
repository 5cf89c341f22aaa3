"""MaxText: layers stacked on axis 1 of every leaf (scanned), or apart; attention kernels with an axis for heads.

Its query kernels of some families hold 1/√h, its norms of the Gemmas 1 + torch's, its embedding of the Gemmas √d times
torch's; with Llama 3.1's rope the two outputs that turn with each other are neighbours, torch's a half apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jpeft_interop.ready.rule import Rule, Rules, Table, Tie, Torch, joined

# What a row's scale is: the size, and its power.
BY_HEAD = ("h", -0.5)
BY_SCALAR = ("query_pre_attn_scalar", -0.5)  # Gemma 2 27B's is not its heads' size
BY_WIDTH = ("d", 0.5)

NORMS = {
    "pre_self_attention_layer_norm": "input_layernorm",
    "post_self_attention_layer_norm": "post_attention_layernorm",
}
GEMMA_NORMS = {"pre_self_attention_norm": "input_layernorm", "pre_ffw_norm": "post_attention_layernorm"}
GEMMA_NORMS_AFTER = {
    "pre_self_attention_norm": "input_layernorm",
    "post_self_attention_norm": "post_attention_layernorm",
    "pre_ffw_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
QK_NORMS = {"query_norm": "q_norm", "key_norm": "k_norm"}


@dataclass(frozen=True)
class Layer:
    """What sets a family's layers apart.

    Attributes:
      norms: torch's names of the norms, by MaxText's.
      query: the scale of the query kernels.
      pairs: whether those outputs of a head that turn with each other are neighbours.
      bias: whether queries, keys and values have one.
      qk_norms: whether queries and keys have norms.
      offset: how much more than torch's a norm's scale is.
    """

    norms: Mapping[str, str]
    query: tuple[str, float] | None = None
    pairs: bool = False
    bias: bool = False
    qk_norms: bool = False
    offset: float = 0.0

    def rules(self, path: str, key: str, suffix: str = "") -> Rules:
        """The rows of the layers at `path`, stacked on axis 1 where torch's names number them by `{l`.

        Args:
          path: of one layer or a stack of them.
          key: torch's layer.
          suffix: of the names of its modules.
        """
        stack = "l " if "{l" in key else ""
        attention, mlp = f"{path}/self_attention{suffix}", f"{path}/mlp{suffix}"
        torch = f"{key}.self_attn"
        head, torch_head = ("(half two)", "two half") if self.pairs else ("h", "h")
        two = {"two": 2} if self.pairs else {}
        rules = [
            Rule(f"{attention}/value/kernel", f"d {stack}k h", {f"{torch}.v_proj.weight": "(k h) d"}),
            Rule(
                f"{attention}/query/kernel",
                f"d {stack}n {head}",
                {f"{torch}.q_proj.weight": f"(n {torch_head}) d"},
                self.query,
                sizes=two,
            ),
            Rule(
                f"{attention}/key/kernel",
                f"d {stack}k {head}",
                {f"{torch}.k_proj.weight": f"(k {torch_head}) d"},
                sizes=two,
            ),
            Rule(f"{attention}/out/kernel", f"n {stack}h d", {f"{torch}.o_proj.weight": "d (n h)"}),
            Rule(f"{mlp}/wi_0/kernel", f"d {stack}f", {f"{key}.mlp.gate_proj.weight": "f d"}),
            Rule(f"{mlp}/wi_1/kernel", f"d {stack}f", {f"{key}.mlp.up_proj.weight": "f d"}),
            Rule(f"{mlp}/wo/kernel", f"f {stack}d", {f"{key}.mlp.down_proj.weight": "d f"}),
        ]
        biases = {"query": ("n", "q"), "key": ("k", "k"), "value": ("k", "v")} if self.bias else {}
        for ours, (heads, theirs) in biases.items():
            torch_bias = {f"{torch}.{theirs}_proj.bias": f"({heads} h)"}
            rules.append(Rule(f"{attention}/{ours}/bias", f"{heads} {stack}h", torch_bias))
        norms = {f"{path}/{ours}{suffix}": f"{key}.{theirs}" for ours, theirs in self.norms.items()}
        if self.qk_norms:
            norms |= {f"{attention}/{ours}": f"{torch}.{theirs}" for ours, theirs in QK_NORMS.items()}
        for ours, theirs in norms.items():
            axes = f"r {stack}".strip()
            rules.append(Rule(f"{ours}/scale", axes, {f"{theirs}.weight": "r"}, offset=self.offset))
        return tuple(rules)


EMBEDDING: Torch = {"model.embed_tokens.weight": ("v d", "embedding")}
ENDS = (
    Rule("token_embedder/embedding", "v d", EMBEDDING),
    Rule("decoder/decoder_norm/scale", "r", {"model.norm.weight": "r"}),
)
GEMMA_ENDS = (
    Rule("token_embedder/embedding", "v d", EMBEDDING, BY_WIDTH),
    Rule("decoder/decoder_norm/scale", "r", {"model.norm.weight": "r"}, offset=1.0),
)
HEAD = (Rule("decoder/logits_dense/kernel", "d v", {"lm_head.weight": "v d"}),)
TIE = (Tie("model.embed_tokens.weight", "lm_head.weight"),)

SCANNED, APART = "decoder/layers", "decoder/layers_{i}"


def family(layer: Layer, ends: Rules = ENDS) -> tuple[Table, ...]:
    """Scanned, and not."""
    layers = (layer.rules(SCANNED, "model.layers.{l}"), layer.rules(APART, "model.layers.{i}"))
    return tuple(Table(joined(ends, rules), (HEAD,), TIE) for rules in layers)


def gemma2(layer: Layer) -> tuple[Table, ...]:
    """A block is two layers, the first of them local."""
    rows = lambda path, i: joined(
        layer.rules(path, f"model.layers.{{{i}*2}}", "_local"),
        layer.rules(path, f"model.layers.{{{i}*2+1}}", "_global"),
    )
    return tuple(Table(joined(GEMMA_ENDS, rows(*at)), ties=TIE) for at in ((SCANNED, "l"), (APART, "i")))


def gemma3(layer: Layer) -> tuple[Table, ...]:
    """Scanned, a block is six layers, and the layers left over are apart."""
    blocks = (layer.rules(f"{SCANNED}/layers_{j}", f"model.layers.{{l*6+{j}}}") for j in range(6))
    rest = layer.rules("decoder/layers_remainder/layers_{i}", "model.layers.{i+6*l}")
    return (
        Table(joined(GEMMA_ENDS, *blocks), (rest,), TIE),
        Table(joined(GEMMA_ENDS, layer.rules(APART, "model.layers.{i}")), ties=TIE),
    )


TABLES: dict[str, tuple[Table, ...]] = {
    "maxtext/llama2": family(Layer(NORMS, BY_HEAD)),
    "maxtext/llama3.1": family(Layer(NORMS, BY_HEAD, pairs=True)),
    "maxtext/mistral": family(Layer(NORMS, BY_HEAD)),
    "maxtext/qwen2": family(Layer(NORMS, bias=True)),
    "maxtext/qwen3": family(Layer(NORMS, qk_norms=True)),
    "maxtext/gemma": family(Layer(GEMMA_NORMS, BY_HEAD, offset=1.0), GEMMA_ENDS),
    "maxtext/gemma2": gemma2(Layer(GEMMA_NORMS_AFTER, BY_SCALAR, offset=1.0)),
    "maxtext/gemma3": gemma3(Layer(GEMMA_NORMS_AFTER, qk_norms=True, offset=1.0)),
}
