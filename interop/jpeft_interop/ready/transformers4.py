"""The Flax classes of transformers 4: paths are torch's names, but for what leaves are called."""

from __future__ import annotations

from collections.abc import Mapping

from jpeft_interop.ready.rule import Rule, Rules, Table, Tie, Torch, dense, embedding, joined, norm, with_base

LAYER = "model/layers/{i}"
LLAMA = joined(
    embedding("model/embed_tokens/embedding", "model.embed_tokens.weight"),
    *(dense(f"{LAYER}/self_attn/{name}_proj", axes="d o") for name in "qkv"),
    dense(f"{LAYER}/self_attn/o_proj", axes="i d"),
    *(dense(f"{LAYER}/mlp/{name}_proj", axes="d f") for name in ("gate", "up")),
    dense(f"{LAYER}/mlp/down_proj", axes="f d"),
    *(norm(f"{LAYER}/{name}", leaf="weight") for name in ("input_layernorm", "post_attention_layernorm")),
    norm("model/norm", leaf="weight"),
)
HEAD = dense("lm_head", axes="d v")
LLAMA_TIE = (Tie("model.embed_tokens.weight", "lm_head.weight"),)

BLOCK = "transformer/h/{i}"


def conv1d(path: str) -> Rules:
    """GPT-2's linear maps: (out, in) here, torch's Conv1D (in, out)."""
    key = path.replace("/", ".")
    kernel = Rule(f"{path}/kernel", "o i", {f"{key}.weight": ("i o", "conv1d")})
    return (kernel, Rule(f"{path}/bias", "o", {f"{key}.bias": "o"}))


GPT2 = joined(
    embedding("transformer/wte/embedding", "transformer.wte.weight"),
    embedding("transformer/wpe/embedding", "transformer.wpe.weight", "p d"),
    *(conv1d(f"{BLOCK}/{name}") for name in ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj")),
    *(norm(f"{BLOCK}/{name}", bias=True) for name in ("ln_1", "ln_2")),
    norm("transformer/ln_f", bias=True),
)

LINEARS = ("intermediate/dense", "output/dense")
ATTENTION = ("attention/self/query", "attention/self/key", "attention/self/value", "attention/output/dense")


def encoder(base: str) -> Rules:
    """BERT's and RoBERTa's."""
    layer, tables = f"{base}/encoder/layer/{{i}}", {"word": "v d", "position": "p d", "token_type": "t d"}
    return joined(
        *(
            embedding(f"{base}/embeddings/{n}_embeddings/embedding", f"{base}.embeddings.{n}_embeddings.weight", axes)
            for n, axes in tables.items()
        ),
        norm(f"{base}/embeddings/LayerNorm", bias=True),
        *(dense(f"{layer}/{name}", bias=True) for name in ATTENTION + LINEARS),
        *(norm(f"{layer}/{name}/LayerNorm", bias=True) for name in ("attention/output", "output")),
    )


def pooler(base: str) -> Rules:
    """The first token's."""
    return dense(f"{base}/pooler/dense", bias=True)


BERT_MLM = joined(
    dense("cls/predictions/transform/dense", bias=True),
    norm("cls/predictions/transform/LayerNorm", bias=True),
    (Rule("cls/predictions/bias", "v", {"cls.predictions.bias": "v", "cls.predictions.decoder.bias": "v"}),),
)
ROBERTA_MLM = joined(
    dense("lm_head/dense", bias=True),
    norm("lm_head/layer_norm", bias=True),
    (Rule("lm_head/bias", "v", {"lm_head.bias": "v", "lm_head.decoder.bias": "v"}),),
)
CLASSIFIER, ANSWERS = dense("classifier", bias=True), dense("qa_outputs", bias=True)
NEXT_SENTENCE = dense("cls/seq_relationship", bias=True)
ROBERTA_CLASSIFIER = joined(dense("classifier/dense", bias=True), dense("classifier/out_proj", bias=True))

PATCHES = "vit/embeddings/patch_embeddings/projection"
IMAGE = "vit/encoder/layer/{i}"
IMAGE_NORMS = ("layernorm_before", "layernorm_after")
# What transformers 5 calls the modules of a layer; in files, and in transformers 4, they are called as in the paths.
RENAMED = {
    "attention/attention/query": "attention.q_proj",
    "attention/attention/key": "attention.k_proj",
    "attention/attention/value": "attention.v_proj",
    "attention/output/dense": "attention.o_proj",
    "intermediate/dense": "mlp.fc1",
    "output/dense": "mlp.fc2",
}


def vit(layer: str, names: Mapping[str, str]) -> tuple[Table, ...]:
    """ViT, torch's layers at `layer`, their modules called by `names`."""
    rules = joined(
        (
            Rule("vit/embeddings/cls_token", "one p d", {"vit.embeddings.cls_token": "one p d"}),
            Rule("vit/embeddings/position_embeddings", "one s d", {"vit.embeddings.position_embeddings": "one s d"}),
            Rule(f"{PATCHES}/kernel", "y x i o", {f"{PATCHES}.weight".replace("/", "."): "o i y x"}),
            Rule(f"{PATCHES}/bias", "o", {f"{PATCHES}.bias".replace("/", "."): "o"}),
        ),
        *(dense(f"{IMAGE}/{ours}", f"{layer}.{theirs}", bias=True) for ours, theirs in names.items()),
        *(norm(f"{IMAGE}/{name}", f"{layer}.{name}", bias=True) for name in IMAGE_NORMS),
        norm("vit/layernorm", bias=True),
    )
    return with_base(Table(rules, (pooler("vit"), CLASSIFIER)), "vit")


def t5(mlp: tuple[str, ...]) -> Table:
    """T5: the first block of each stack alone has the relative bias."""
    names = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    embeddings: Torch = {name: ("v d", "embedding") for name in names}
    parts = {"encoder": ("SelfAttention",), "decoder": ("SelfAttention", "EncDecAttention")}
    rules = (Rule("shared/embedding", "v d", embeddings),)
    return Table(
        joined(rules, *(_stack(name, attention, mlp) for name, attention in parts.items())),
        options=(HEAD,),
        ties=(Tie("shared.weight", "lm_head.weight"),),
    )


def _stack(name: str, attention: tuple[str, ...], mlp: tuple[str, ...]) -> Rules:
    block, last = f"{name}/block/{{i}}/layer", len(attention)
    bias = f"{name}/block/0/layer/0/SelfAttention/relative_attention_bias"
    return joined(
        embedding(f"{bias}/embedding", f"{bias}.weight".replace("/", "."), "b n"),
        *(dense(f"{block}/{at}/{part}/{n}") for at, part in enumerate(attention) for n in "qkvo"),
        *(dense(f"{block}/{last}/DenseReluDense/{n}") for n in mlp),
        *(norm(f"{block}/{at}/layer_norm", leaf="weight") for at in range(last + 1)),
        norm(f"{name}/final_layer_norm", leaf="weight"),
    )


BERT_TIE = (Tie("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight", "cls/predictions/bias"),)
ROBERTA_TIE = (Tie("roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight", "lm_head/bias"),)
LLAMAS = with_base(Table(LLAMA, (HEAD,), LLAMA_TIE), "model")
BERT = Table(encoder("bert"), (pooler("bert"), BERT_MLM, NEXT_SENTENCE, CLASSIFIER, ANSWERS), BERT_TIE)
ROBERTA = Table(encoder("roberta"), (pooler("roberta"), ROBERTA_MLM, CLASSIFIER, ANSWERS), ROBERTA_TIE)
TABLES: dict[str, tuple[Table, ...]] = {
    "transformers4/llama": LLAMAS,
    "transformers4/mistral": LLAMAS,
    "transformers4/gemma": LLAMAS,
    "transformers4/gpt2": with_base(
        Table(GPT2, (HEAD,), (Tie("transformer.wte.weight", "lm_head.weight"),)), "transformer"
    ),
    "transformers4/bert": with_base(BERT, "bert"),
    "transformers4/roberta": (*with_base(ROBERTA, "roberta"), Table(encoder("roberta"), (ROBERTA_CLASSIFIER,))),
    "transformers4/vit": vit("vit.layers.{i}", RENAMED),
    "transformers4/vit_files": vit("vit.encoder.layer.{i}", {name: name.replace("/", ".") for name in RENAMED}),
    "transformers4/t5": (t5(("wi", "wo")), t5(("wi_0", "wi_1", "wo"))),
}
