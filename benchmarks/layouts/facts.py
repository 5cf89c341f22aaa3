"""Which torch parameters each leaf holds, and by which axes: the facts for the layouts, one row a leaf.

``leaf = rearrange(torch, "<torch axes> -> <leaf axes>") * times + plus`` in the words of einops. Where several torch
tensors make one leaf they are stacked first, on the first of the torch axes: ``c`` counts the names of the row, ``l``
the layers of a scan. In names ``{i}`` is the layer that the path names and ``{l}`` every layer; ``{l:6:2}`` is every
sixth from layer 2 on (``{i:2:1}``: layer 2i + 1), ``{i:rest}`` the i-th of those left over by blocks of six.

Axes: v vocabulary, p positions, d hidden, f of the MLP, n heads, k heads of keys and values, h a head's size, two the
parts of a head that RoPE turns with each other, e experts, i and o any input and output, r a norm's size, x and y
pixels.

    python benchmarks/layouts/environments.py gemma facts.py DUMPS   # checks every dump below DUMPS, leaf by leaf
    python benchmarks/layouts/facts.py                               # prints the tables at the end of FACTS.md
"""

import re
import sys
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
from dumps import SIZES
from safetensors.numpy import load_file


class Row(NamedTuple):
    """A leaf's path and axes, the torch names it is made of and their axes, and what is done to the values."""

    leaf: str
    axes: str
    names: tuple[str, ...]
    torch_axes: str
    times: str = "1"
    plus: int = 0


def row(leaf: str, axes: str, names: str, torch_axes: str | None = None, times: str = "1", plus: int = 0) -> Row:
    """A row; several torch names are separated by spaces, and the torch axes are the leaf's own if not said."""
    return Row(leaf, axes, tuple(names.split()), axes if torch_axes is None else torch_axes, times, plus)


def dense(leaf: str, name: str, bias: bool = True, kernel: str = "i o") -> tuple[Row, ...]:
    """A Linen Dense for a torch Linear."""
    biases = (row(f"{leaf}/bias", "o", f"{name}.bias"),) if bias else ()
    return (row(f"{leaf}/kernel", kernel, f"{name}.weight", "o i"), *biases)


def norm(leaf: str, name: str, scale: str = "scale", bias: bool = True) -> tuple[Row, ...]:
    """A LayerNorm."""
    biases = (row(f"{leaf}/bias", "r", f"{name}.bias"),) if bias else ()
    return (row(f"{leaf}/{scale}", "r", f"{name}.weight"), *biases)


def each(rows: str, make) -> tuple[Row, ...]:
    """make(name) for each of the names, separated by spaces."""
    return sum((make(name) for name in rows.split()), ())


def linear_and_same_name(prefix: str, names: str, bias: bool = True) -> tuple[Row, ...]:
    """Dense layers whose path is the torch name with slashes."""
    return each(names, lambda n: dense(f"{prefix}/{n}", f"{prefix}/{n}".replace("/", "."), bias))


# transformers 4, Flax -----------------------------------------------------------------------------------------------
LLAMA = (
    row("model/embed_tokens/embedding", "v d", "model.embed_tokens.weight"),
    *linear_and_same_name("model/layers/{i}/self_attn", "q_proj k_proj v_proj o_proj", bias=False),
    *linear_and_same_name("model/layers/{i}/mlp", "gate_proj up_proj down_proj", bias=False),
    *each(
        "input_layernorm post_attention_layernorm",
        lambda n: norm(f"model/layers/{{i}}/{n}", f"model.layers.{{i}}.{n}", "weight", bias=False),
    ),
    *norm("model/norm", "model.norm", "weight", bias=False),
)
LLAMA_HEAD = dense("lm_head", "lm_head", bias=False)

H = "transformer/h/{i}"
GPT2 = (
    row("transformer/wte/embedding", "v d", "transformer.wte.weight"),
    row("transformer/wpe/embedding", "p d", "transformer.wpe.weight"),
    *each(
        "attn/c_attn attn/c_proj mlp/c_fc mlp/c_proj",
        lambda n: (
            row(f"{H}/{n}/kernel", "o i", f"{H}/{n}.weight".replace("/", "."), "i o"),
            row(f"{H}/{n}/bias", "o", f"{H}/{n}.bias".replace("/", ".")),
        ),
    ),
    *each("ln_1 ln_2", lambda n: norm(f"{H}/{n}", f"transformer.h.{{i}}.{n}")),
    *norm("transformer/ln_f", "transformer.ln_f"),
)


def bert(base: str) -> tuple[Row, ...]:
    """BERT's and RoBERTa's encoder, without a head."""
    layer, torch_layer = f"{base}/encoder/layer/{{i}}", f"{base}.encoder.layer.{{i}}"
    embeddings = {"word": "v d", "position": "p d", "token_type": "t d"}
    return (
        *(
            row(f"{base}/embeddings/{n}_embeddings/embedding", axes, f"{base}.embeddings.{n}_embeddings.weight")
            for n, axes in embeddings.items()
        ),
        *norm(f"{base}/embeddings/LayerNorm", f"{base}.embeddings.LayerNorm"),
        *linear_and_same_name(layer, "attention/self/query attention/self/key attention/self/value"),
        *linear_and_same_name(layer, "attention/output/dense intermediate/dense output/dense"),
        *norm(f"{layer}/attention/output/LayerNorm", f"{torch_layer}.attention.output.LayerNorm"),
        *norm(f"{layer}/output/LayerNorm", f"{torch_layer}.output.LayerNorm"),
    )


BERT_MLM = (
    *dense("cls/predictions/transform/dense", "cls.predictions.transform.dense"),
    *norm("cls/predictions/transform/LayerNorm", "cls.predictions.transform.LayerNorm"),
    row("cls/predictions/bias", "v", "cls.predictions.bias"),
)
ROBERTA_MLM = (
    *dense("lm_head/dense", "lm_head.dense"),
    *norm("lm_head/layer_norm", "lm_head.layer_norm"),
    row("lm_head/bias", "v", "lm_head.bias"),
)

V = "vit/encoder/layer/{i}"
VIT = (
    row("vit/embeddings/cls_token", "b p d", "vit.embeddings.cls_token"),
    row("vit/embeddings/position_embeddings", "b p d", "vit.embeddings.position_embeddings"),
    row(
        "vit/embeddings/patch_embeddings/projection/kernel",
        "y x i o",
        "vit.embeddings.patch_embeddings.projection.weight",
        "o i y x",
    ),
    row("vit/embeddings/patch_embeddings/projection/bias", "o", "vit.embeddings.patch_embeddings.projection.bias"),
    *linear_and_same_name(V, "attention/attention/query attention/attention/key attention/attention/value"),
    *linear_and_same_name(V, "attention/output/dense intermediate/dense output/dense"),
    *each("layernorm_before layernorm_after", lambda n: norm(f"{V}/{n}", f"vit.encoder.layer.{{i}}.{n}")),
    *norm("vit/layernorm", "vit.layernorm"),
    *dense("classifier", "classifier"),
)


def t5(mlp: str) -> tuple[Row, ...]:
    """T5; its first block alone has the relative bias, of encoder and decoder each."""

    def stack(name: str, parts: dict[str, str]) -> tuple[Row, ...]:
        block, torch_block = f"{name}/block/{{i}}/layer", f"{name}.block.{{i}}.layer"
        bias = "block/0/layer/0/SelfAttention/relative_attention_bias"
        return (
            row(f"{name}/{bias}/embedding", "b n", f"{name}.{bias.replace('/', '.')}.weight"),
            *sum((linear_and_same_name(f"{block}/{part}", names, bias=False) for part, names in parts.items()), ()),
            *sum(
                (
                    norm(f"{block}/{part[0]}/layer_norm", f"{torch_block}.{part[0]}.layer_norm", "weight", bias=False)
                    for part in parts
                ),
                (),
            ),
            *norm(f"{name}/final_layer_norm", f"{name}.final_layer_norm", "weight", bias=False),
        )

    return (
        row("shared/embedding", "v d", "shared.weight"),
        *stack("encoder", {"0/SelfAttention": "q k v o", "1/DenseReluDense": mlp}),
        *stack("decoder", {"0/SelfAttention": "q k v o", "1/EncDecAttention": "q k v o", "2/DenseReluDense": mlp}),
    )


# Tunix --------------------------------------------------------------------------------------------------------------
A, M = "model.layers.{i}.self_attn", "model.layers.{i}.mlp"
TUNIX = (
    row("embedder/input_embedding", "v d", "model.embed_tokens.weight"),
    row("layers/{i}/attn/q_proj/w", "d n h", f"{A}.q_proj.weight", "(n h) d"),
    row("layers/{i}/attn/k_proj/w", "d k h", f"{A}.k_proj.weight", "(k h) d"),
    row("layers/{i}/attn/v_proj/w", "d k h", f"{A}.v_proj.weight", "(k h) d"),
    row("layers/{i}/attn/o_proj/w", "n h d", f"{A}.o_proj.weight", "d (n h)"),
    *each(
        "input_layernorm post_attention_layernorm",
        lambda n: norm(f"layers/{{i}}/{n}", f"model.layers.{{i}}.{n}", "w", bias=False),
    ),
    *norm("final_norm", "model.norm", "w", bias=False),
)
TUNIX_MLP = each("gate_proj up_proj down_proj", lambda n: dense(f"layers/{{i}}/mlp/{n}", f"{M}.{n}", bias=False))
TUNIX_HEAD = (row("lm_head/w", "d v", "lm_head.weight", "v d"),)
TUNIX_BIAS = each("q k v", lambda n: (row(f"layers/{{i}}/attn/{n}_bias", "o", f"{A}.{n}_proj.bias"),))
TUNIX_QK_NORM = each("q_norm k_norm", lambda n: norm(f"layers/{{i}}/attn/{n}", f"{A}.{n}", "w", bias=False))
TUNIX_EXPERTS = (
    row("layers/{i}/mlp/router/kernel", "d e", f"{M}.gate.weight", "e d"),
    row("layers/{i}/mlp/gate_proj", "e d f", f"{M}.experts.gate_up_proj[:,:f]", "e f d"),
    row("layers/{i}/mlp/up_proj", "e d f", f"{M}.experts.gate_up_proj[:,f:]", "e f d"),
    row("layers/{i}/mlp/down_proj", "e f d", f"{M}.experts.down_proj", "e d f"),
)


# google/gemma and Tunix's Gemma -------------------------------------------------------------------------------------
def gemma(layer: str, generation: int, *, fused: bool, mlp: tuple[Row, ...], after: str) -> tuple[Row, ...]:
    """What google/gemma and Tunix share; ``after`` is the name of the norm behind the attention (Gemma 2 and 3)."""
    separate = (
        row(f"{layer}/attn/q_einsum/w", "n d h", f"{A}.q_proj.weight", "(n h) d"),
        row(f"{layer}/attn/kv_einsum/w", "c k d h", f"{A}.k_proj.weight {A}.v_proj.weight", "c (k h) d"),
    )
    qkv = f"{A}.q_proj.weight {A}.k_proj.weight {A}.v_proj.weight"
    norms = {"pre_attention_norm": "input_layernorm", "pre_ffw_norm": "post_attention_layernorm"}
    if generation > 1:
        norms |= {after: "post_attention_layernorm", "pre_ffw_norm": "pre_feedforward_layernorm"}
        norms |= {"post_ffw_norm": "post_feedforward_layernorm"}
    if generation == 3:
        norms |= {"attn/_query_norm": "self_attn.q_norm", "attn/_key_norm": "self_attn.k_norm"}
    return (
        row("embedder/input_embedding", "v d", "model.embed_tokens.weight"),
        *((row(f"{layer}/attn/qkv_einsum/w", "c n d h", qkv, "c (n h) d"),) if fused else separate),
        row(f"{layer}/attn/attn_vec_einsum/w", "n h d", f"{A}.o_proj.weight", "d (n h)"),
        *mlp,
        *sum((norm(f"{layer}/{a}", f"model.layers.{{i}}.{b}", bias=False) for a, b in norms.items()), ()),
        *norm("final_norm", "model.norm", bias=False),
    )


def linen_gemma(generation: int, *, fused: bool = False, transposed: bool = False) -> tuple[Row, ...]:
    """google/gemma's; ``transposed`` is its config's transpose_gating_einsum."""
    axes = "c f d" if transposed else "c d f"
    gating = row("layer_{i}/mlp/gating_einsum", axes, f"{M}.gate_proj.weight {M}.up_proj.weight", "c f d")
    mlp = (gating, row("layer_{i}/mlp/linear", "f d", f"{M}.down_proj.weight", "d f"))
    return gemma("layer_{i}", generation, fused=fused, mlp=mlp, after="post_attention_norm")


def tunix_gemma(generation: int, *, fused: bool = False) -> tuple[Row, ...]:
    """Tunix's: the MLP apart, and Gemma 2's norm behind the attention under another name than Gemma 3's."""
    after = "post_attention_norm" if generation == 3 else "post_attn_norm"
    return gemma("layers/{i}", generation, fused=fused, mlp=TUNIX_MLP, after=after)


# MaxText ------------------------------------------------------------------------------------------------------------
def maxtext(
    norms: dict[str, str],
    *,
    scanned: bool,
    divided: bool,
    halves: bool = True,
    gemma: bool = False,
    bias: bool = False,
    layer: str | None = None,
    suffix: str = "",
    torch_layer: str = "",
) -> tuple[Row, ...]:
    """The rows of a layer: ``divided`` its query by sqrt(h), ``halves`` False for pairs (rope_type llama3.1)."""
    layer = layer or ("params/decoder/layers" if scanned else "params/decoder/layers_{i}")
    torch_layer = torch_layer or ("model.layers.{l}" if scanned else "model.layers.{i}")
    attention, mlp = f"{layer}/self_attention{suffix}", f"{layer}/mlp{suffix}"
    stack, plus = ("l " if scanned else ""), int(gemma)
    lead = lambda axes: f"{axes.split()[0]} {stack}{' '.join(axes.split()[1:])}".strip()  # the layers are axis 1
    # RoPE turns the first half of a head's outputs with the second, or (rope_type llama3.1) each with its neighbour.
    head, torch_head = ("h", "h") if halves else ("(h two)", "two h")
    times = "h ** -0.5" if divided else "1"
    self_attn = f"{torch_layer}.self_attn"
    rows = (
        row(
            f"{attention}/query/kernel",
            f"d {stack}n {head}",
            f"{self_attn}.q_proj.weight",
            f"{stack}(n {torch_head}) d",
            times,
        ),
        row(
            f"{attention}/key/kernel", f"d {stack}k {head}", f"{self_attn}.k_proj.weight", f"{stack}(k {torch_head}) d"
        ),
        row(f"{attention}/value/kernel", lead("d k h"), f"{self_attn}.v_proj.weight", f"{stack}(k h) d"),
        row(f"{attention}/out/kernel", lead("n h d"), f"{self_attn}.o_proj.weight", f"{stack}d (n h)"),
        row(f"{mlp}/wi_0/kernel", lead("d f"), f"{torch_layer}.mlp.gate_proj.weight", f"{stack}f d"),
        row(f"{mlp}/wi_1/kernel", lead("d f"), f"{torch_layer}.mlp.up_proj.weight", f"{stack}f d"),
        row(f"{mlp}/wo/kernel", lead("f d"), f"{torch_layer}.mlp.down_proj.weight", f"{stack}d f"),
    )
    biases = {"query": ("n", "q"), "key": ("k", "k"), "value": ("k", "v")} if bias else {}
    rows += tuple(
        row(f"{attention}/{ours}/bias", lead(f"{heads} h"), f"{self_attn}.{n}_proj.bias", f"{stack}({heads} h)")
        for ours, (heads, n) in biases.items()
    )
    named = {
        a.replace("self_attention/", f"self_attention{suffix}/") if "/" in a else f"{a}{suffix}": b
        for a, b in norms.items()
    }
    rows += tuple(
        row(f"{layer}/{a}/scale", lead("r"), f"{torch_layer}.{b}.weight", f"{stack}r", plus=plus)
        for a, b in named.items()
    )
    return rows


def ends(gemma: bool) -> tuple[Row, ...]:
    """MaxText's embedding, last norm and head."""
    head = () if gemma else (row("params/decoder/logits_dense/kernel", "d v", "lm_head.weight", "v d"),)
    return (
        row("params/token_embedder/embedding", "v d", "model.embed_tokens.weight", times="d ** 0.5" if gemma else "1"),
        row("params/decoder/decoder_norm/scale", "r", "model.norm.weight", plus=int(gemma)),
        *head,
    )


PLAIN = {
    "pre_self_attention_layer_norm": "input_layernorm",
    "post_self_attention_layer_norm": "post_attention_layernorm",
}
QK = {"self_attention/query_norm": "self_attn.q_norm", "self_attention/key_norm": "self_attn.k_norm"}
GEMMA = {"pre_self_attention_norm": "input_layernorm", "pre_ffw_norm": "post_attention_layernorm"}
GEMMA_AFTER = {
    "pre_self_attention_norm": "input_layernorm",
    "post_self_attention_norm": "post_attention_layernorm",
    "pre_ffw_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def maxtext_gemma2(scanned: bool) -> tuple[Row, ...]:
    """A block is two layers, local then global: block b holds torch layers 2b and 2b + 1."""
    one = lambda suffix, at: maxtext(
        GEMMA_AFTER,
        scanned=scanned,
        divided=True,
        gemma=True,
        suffix=suffix,
        torch_layer=f"model.layers.{{{'l' if scanned else 'i'}:2:{at}}}",
    )
    return (*one("_local", 0), *one("_global", 1), *ends(gemma=True))


def maxtext_gemma3(scanned: bool) -> tuple[Row, ...]:
    """Scanned, a block is six layers, and the layers left over are not scanned."""
    one = lambda **kwargs: maxtext(GEMMA_AFTER | QK, divided=False, gemma=True, **kwargs)
    if not scanned:
        return (*one(scanned=False), *ends(gemma=True))
    blocks = (
        one(scanned=True, layer=f"params/decoder/layers/layers_{j}", torch_layer=f"model.layers.{{l:6:{j}}}")
        for j in range(6)
    )
    rest = one(scanned=False, layer="params/decoder/layers_remainder/layers_{i}", torch_layer="model.layers.{i:rest}")
    return (*sum(blocks, ()), *rest, *ends(gemma=True))


def of_maxtext(scanned: bool) -> dict[str, tuple[Row, ...]]:
    """MaxText's families, scanned or not."""
    plain = lambda norms=PLAIN, **kwargs: (*maxtext(norms, scanned=scanned, **kwargs), *ends(gemma=False))
    tables = {
        "llama2": plain(divided=True),
        "llama31": plain(divided=True, halves=False),
        "mistral": plain(divided=True),
        "qwen2": plain(divided=False, bias=True),
        "qwen3": plain(PLAIN | QK, divided=False),
        "gemma": (*maxtext(GEMMA, scanned=scanned, divided=True, gemma=True), *ends(gemma=True)),
        "gemma2": maxtext_gemma2(scanned),
        "gemma3": maxtext_gemma3(scanned),
    }
    return {f"maxtext/{name}{'' if scanned else '_unscanned'}": rows for name, rows in tables.items()}


FACTS: dict[str, tuple[Row, ...]] = {
    "transformers4/llama": LLAMA + LLAMA_HEAD,
    "transformers4/mistral": LLAMA + LLAMA_HEAD,
    "transformers4/gemma": LLAMA,
    "transformers4/gpt2": GPT2,
    "transformers4/bert": bert("bert")
    + dense("bert/pooler/dense", "bert.pooler.dense")
    + dense("classifier", "classifier"),
    "transformers4/bert_mlm": bert("bert") + BERT_MLM,
    "transformers4/roberta": bert("roberta") + linear_and_same_name("classifier", "dense out_proj"),
    "transformers4/roberta_mlm": bert("roberta") + ROBERTA_MLM,
    "transformers4/vit": VIT,
    "transformers4/t5": t5("wi wo"),
    "transformers4/t5_gated": t5("wi_0 wi_1 wo") + LLAMA_HEAD,
    "tunix/llama3": TUNIX + TUNIX_MLP + TUNIX_HEAD,
    "tunix/llama3_tied": TUNIX + TUNIX_MLP,
    "tunix/qwen2": TUNIX + TUNIX_MLP + TUNIX_BIAS + TUNIX_HEAD,
    "tunix/qwen2_tied": TUNIX + TUNIX_MLP + TUNIX_BIAS,
    "tunix/qwen3": TUNIX + TUNIX_MLP + TUNIX_QK_NORM + TUNIX_HEAD,
    "tunix/qwen3_tied": TUNIX + TUNIX_MLP + TUNIX_QK_NORM,
    "tunix/qwen3_moe": TUNIX + TUNIX_EXPERTS + TUNIX_QK_NORM + TUNIX_HEAD,
    "tunix/gemma": tunix_gemma(1),
    "tunix/gemma_fused": tunix_gemma(1, fused=True),
    "tunix/gemma2": tunix_gemma(2),
    "tunix/gemma3": tunix_gemma(3),
    "gemma/gemma1": linen_gemma(1),
    "gemma/gemma1_fused": linen_gemma(1, fused=True),
    "gemma/gemma2": linen_gemma(2),
    "gemma/gemma2_transposed": linen_gemma(2, transposed=True),
    "gemma/gemma3": linen_gemma(3, transposed=True),
    **of_maxtext(scanned=True),
    **of_maxtext(scanned=False),
}


# Checking -----------------------------------------------------------------------------------------------------------
def check(family: str, folder: Path) -> str:
    """Makes every leaf of a dump from its torch tensors by the family's rows, and says how many there were.

    Raises:
        ValueError: A leaf differs, or leaves or torch tensors have no row.
    """
    params, state = load_file(folder / "params.safetensors"), load_file(folder / "torch.safetensors")
    used: set[str] = set()
    made: dict[str, np.ndarray] = {}
    for fact in FACTS[family]:
        made |= _leaves(fact, params, state, used)
    if made.keys() != params.keys() or used != state.keys():
        raise ValueError(f"{family}: no row for {params.keys() - made.keys()}, unused {state.keys() - used}")
    differ = [path for path in params if params[path].shape != made[path].shape or not _same(params[path], made[path])]
    if differ:
        raise ValueError(f"{family}: rows are wrong for {differ}")
    exact = sum(np.array_equal(params[path], made[path]) for path in params)
    return f"{family}: {len(params)} leaves of {len(state)} tensors, {exact} bit for bit"


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return np.allclose(a, b, rtol=1e-6, atol=0)


def _leaves(fact: Row, params, state, used: set[str]) -> dict[str, np.ndarray]:
    pattern = re.escape(fact.leaf).replace(re.escape("{i}"), "([0-9]+)")
    layers = [match for match in (re.fullmatch(pattern, path) for path in params) if match]
    if not layers:
        raise ValueError(f"no leaf for {fact.leaf}")
    return {m.group(0): _leaf(fact, m.group(1) if m.groups() else None, state, used) for m in layers}


def _leaf(fact: Row, i: str | None, state, used: set[str]) -> np.ndarray:
    tensors = [_tensor(name, i, state, used) for name in fact.names]
    stacked = tensors[0] if len(tensors) == 1 else np.stack(tensors)
    sizes = {"n": SIZES.heads, "k": SIZES.kv_heads, "two": 2, "d": SIZES.hidden}
    sizes = {axis: size for axis, size in sizes.items() if re.search(rf"\b{axis}\b", fact.torch_axes)}
    if "two" in sizes or not re.search(r"\([nk] h\)", fact.torch_axes):
        sizes = {axis: size for axis, size in sizes.items() if axis in ("two", "n", "k")}
    leaf = import_module("einops").rearrange(stacked, f"{fact.torch_axes} -> {fact.axes}", **sizes)
    head = SIZES.wide_head
    times = {"1": 1, "h ** -0.5": head**-0.5, "d ** 0.5": SIZES.hidden**0.5}[fact.times]
    return leaf * np.float32(times) + fact.plus


def _tensor(name: str, i: str | None, state, used: set[str]) -> np.ndarray:
    """The torch tensor of a name, or the stack of those of a pattern."""
    name, _, part = name.partition("[")
    count = len({m.group(1) for m in (re.search(r"model\.layers\.([0-9]+)\.", key) for key in state) if m})
    if step := re.search(r"\{([il]):([0-9]+):([0-9]+)\}", name):
        every, at = int(step.group(2)), int(step.group(3))
        here = range(at, count // every * every, every) if step.group(1) == "l" else [int(i or 0) * every + at]
        names = [name.replace(step.group(0), str(layer)) for layer in here]
    elif "{i:rest}" in name:
        names = [name.replace("{i:rest}", str(count // 6 * 6 + int(i or 0)))]
    elif "{l}" in name:
        names = [name.replace("{l}", str(layer)) for layer in range(count)]
    else:
        names = [name.replace("{i}", i or "")]
    used.update(names)
    tensors = [state[each] for each in names]
    if part:
        half = tensors[0].shape[1] // 2
        return tensors[0][:, :half] if part.startswith(":,:f") else tensors[0][:, half:]
    return np.stack(tensors) if "{l" in name else tensors[0]


def tables() -> str:
    """Every family's rows in Markdown, said by what sets it apart from the nearest family of its package before it."""
    return "\n\n".join(f"### {family}\n\n{_described(family)}" for family in FACTS)


def _described(family: str) -> str:
    before = [each for each in list(FACTS)[: list(FACTS).index(family)] if each.split("/")[0] == family.split("/")[0]]
    mine = [fact for fact in FACTS[family] if not re.search("layers/layers_[1-5]", fact.leaf)]  # as layers_0
    like = max(before, key=lambda each: len({*mine} & {*FACTS[each]}), default=family)
    lacking = [fact for fact in FACTS[like] if fact not in mine]
    own = [fact for fact in mine if fact not in FACTS[like]]
    if like == family or 2 * len(lacking) > len(FACTS[like]):
        return _table(mine)
    without = f", without {', '.join(f'`{fact.leaf}`' for fact in lacking)}" if lacking else ""
    return f"As {like}{without}" + (f", and\n\n{_table(own)}" if own else ".")


def _table(rows: list[Row]) -> str:
    lines = ["| leaf | axes | torch name(s) | torch axes | values |", "|---|---|---|---|---|"]
    for fact in rows:
        done = " ".join(part for part in (f"× {fact.times}" * (fact.times != "1"), "+ 1" * fact.plus) if part)
        names = " ".join(f"`{name}`" for name in fact.names)
        lines.append(f"| `{fact.leaf}` | `{fact.axes}` | {names} | `{fact.torch_axes}` | {done} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:]:
        for each_family in FACTS:
            print(check(each_family, Path(sys.argv[1]) / each_family))
    else:
        print(tables())
