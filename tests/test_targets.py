"""Targets as PEFT resolves them, and the errors that name what is near."""

import jax
import jax.numpy as jnp
import pytest

import jpeft
from jpeft.targets import layer_number

peft_utils = pytest.importorskip("peft.tuners.tuners_utils")
from peft import LoraConfig  # noqa: E402  (after the skip: a core install has no PEFT)
from peft.utils.other import get_pattern_key  # noqa: E402  (likewise)

LLAMA = [
    "model.embed_tokens",
    *(
        f"model.layers.{i}.{name}"
        for i in range(12)
        for name in (
            *(f"self_attn.{n}_proj" for n in "qkvo"),
            *(f"mlp.{n}_proj" for n in ("gate", "up", "down")),
            "mlp.experts.3.up_proj",
        )
    ),
    "model.visual.blocks.1.attn.q_proj",
    "lm_head",
    "score",
]
GPT2 = [
    "transformer.wte",
    *(f"transformer.h.{i}.{n}" for i in range(3) for n in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")),
]
BERT = [
    "bert.embeddings.word_embeddings",
    *(
        f"bert.encoder.layer.{i}.{n}"
        for i in range(3)
        for n in ("attention.self.query", "attention.self.key", "attention.output.dense", "output.dense", "query")
    ),
    "bert.pooler.dense",
    "classifier",
    "pre_classifier",
]
MODELS = {"llama": LLAMA, "gpt2": GPT2, "bert": BERT}

# model, target_modules, further options of both sides
TABLE = [
    ("llama", ["q_proj"], {}),
    ("llama", ["q_proj", "v_proj"], {}),
    ("llama", ["self_attn.q_proj"], {}),
    ("llama", ["proj"], {}),
    ("llama", ["attn.q_proj"], {}),
    ("llama", ["model.layers.1.self_attn.q_proj", "o_proj"], {}),
    ("llama", ["lm_head", "embed_tokens"], {}),
    ("llama", ["Q_PROJ"], {}),
    ("llama", ["up_proj"], {}),
    ("llama", ["experts.3.up_proj"], {}),
    ("llama", r".*q_proj", {}),
    ("llama", r"q_proj", {}),
    ("llama", r"model\.layers\.[02]\.(self_attn|mlp)\.[a-z]+_proj", {}),
    ("llama", r".*\.(q|k)_proj$", {}),
    ("llama", r"model.*layers.1.mlp.*", {}),
    ("llama", ["q_proj", "up_proj"], {"exclude": ["experts.3.up_proj"]}),
    ("llama", ["q_proj", "k_proj"], {"exclude": ["q_proj", "layers.0.self_attn.k_proj"]}),
    ("llama", ["q_proj", "k_proj"], {"exclude": r".*layers\.[0-4]\..*"}),
    ("llama", r".*_proj", {"exclude": r".*mlp.*"}),
    ("llama", ["q_proj"], {"layers": [1]}),
    ("llama", ["q_proj"], {"layers": 2}),
    ("llama", ["q_proj", "up_proj"], {"layers": [1, 10, 11]}),
    ("llama", ["q_proj"], {"layers": [1], "pattern": "layers"}),
    ("llama", ["q_proj"], {"layers": [1], "pattern": ["blocks"]}),
    ("llama", ["q_proj"], {"layers": [1], "pattern": ["blocks", "layers"]}),
    ("llama", ["up_proj"], {"layers": [3], "pattern": "experts"}),
    ("llama", ["up_proj"], {"layers": [3]}),
    ("llama", ["q_proj", "lm_head"], {"layers": [0]}),
    ("llama", ["model.layers.1.self_attn.q_proj", "k_proj"], {"layers": [0]}),
    ("llama", ["q_proj"], {"layers": []}),
    ("llama", ["q_proj", "score"], {"saved": ["score"]}),
    ("llama", ["q_proj", "up_proj"], {"saved": ["experts"]}),
    ("llama", ["q_proj", "up_proj"], {"saved": ["mlp"], "layers": [1, 2]}),
    ("gpt2", ["c_attn"], {}),
    ("gpt2", ["c_proj"], {}),
    ("gpt2", ["attn.c_proj"], {}),
    ("gpt2", ["c_proj"], {"layers": [0, 2], "pattern": "h"}),
    ("gpt2", ["c_proj"], {"exclude": ["mlp.c_proj"]}),
    ("bert", ["query", "key"], {}),
    ("bert", ["dense"], {}),
    ("bert", ["output.dense"], {}),
    ("bert", ["classifier"], {}),
    ("bert", ["dense"], {"saved": ["classifier", "pooler"]}),
    ("bert", ["query", "dense"], {"layers": [2], "pattern": ["layer"]}),
    ("bert", ["word_embeddings", "query"], {}),
]


def params_of(modules):
    """A tree of shapes with a kernel at each module, and its biases."""
    params = {}
    for module in modules:
        at = params
        for part in module.split("."):
            at = at.setdefault(part, {})
        at["kernel"] = jax.ShapeDtypeStruct((2, 2), jnp.float32)
    return params


def found_by_jpeft(modules, targets, options):
    names = {"layers": "layers_to_transform", "pattern": "layers_pattern", "saved": "modules_to_save"}
    spec = jpeft.LoRA(rank=1, targets=targets, **{names.get(name, name): value for name, value in options.items()})
    adapter = jax.eval_shape(lambda: init_where_arrays_are_needed(spec, params_of(modules)))
    return {site.path.removesuffix("/kernel").replace("/", ".") for site in adapter.sites if site.method == "lora"}


def init_where_arrays_are_needed(spec, params):
    return jpeft.init(jax.random.key(0), spec, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), params))


def found_by_peft(modules, targets, options):
    names = {
        "layers": "layers_to_transform",
        "pattern": "layers_pattern",
        "saved": "modules_to_save",
        "exclude": "exclude_modules",
    }
    config = LoraConfig(target_modules=targets, **{names[name]: value for name, value in options.items()})
    excluded = peft_utils._ExcludedModule
    matches = {m: peft_utils.check_target_module_exists(config, m) for m in modules}
    return {m for m, match in matches.items() if match and not isinstance(match, excluded)}


@pytest.mark.parametrize(("model", "targets", "options"), TABLE)
def test_as_peft_resolves_them(model, targets, options):
    modules = MODELS[model]
    expected = found_by_peft(modules, targets, options)
    if expected:
        assert found_by_jpeft(modules, targets, options) == expected
    else:  # PEFT raises too, when it finds nothing
        with pytest.raises(jpeft.SpecError, match="match"):
            found_by_jpeft(modules, targets, options)


PATTERNS = [
    {"q_proj": 1, "v_proj": 2},
    {"layers.1.self_attn.q_proj": 1, "q_proj": 2},
    {"q_proj": 2, "layers.1.self_attn.q_proj": 1},
    {r"layers\.\d\.self_attn\..*": 3},
    {r".*\.mlp\..*_proj": 3, "down_proj": 4},
    {"model.layers.11.mlp.up_proj": 5, r"experts\.3\.up_proj|gate_proj": 6},
    {"proj": 9, "up_proj": 1},
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_rank_and_alpha_patterns_as_peft_resolves_them(pattern):
    spec = jpeft.LoRA(rank=8, alpha=16, rank_pattern=pattern, alpha_pattern=pattern)
    for module in LLAMA:
        expected = pattern.get(get_pattern_key(pattern.keys(), module), 8)
        assert spec.rank_of(module.replace(".", "/")) == expected, module
        assert spec.alpha_of(module) == pattern.get(get_pattern_key(pattern.keys(), module), 16)


@pytest.mark.parametrize(
    ("path", "number"),
    [
        ("layers/3/q", 3),
        ("layers_3/q", 3),
        ("model/h_11/mlp/c_proj", 11),
        ("layers/3/experts/7/up", 3),
        ("layers_3/Dense_0", 3),
        ("Dense_0", None),
        ("lm_head", None),
        ("block2/q", None),
    ],
)
def test_layer_numbers_in_either_spelling(path, number):
    assert layer_number(path) == number


def test_slash_and_dot_are_the_same():
    both = [found_by_jpeft(LLAMA, [name], {}) for name in ("self_attn/q_proj", "self_attn.q_proj")]
    assert both[0] == both[1] and len(both[0]) == 12


def test_a_regex_does_not_match_a_part():
    with pytest.raises(jpeft.SpecError, match="'q_proj' matches nothing"):
        found_by_jpeft(LLAMA, "q_proj", {})


# ---- weights that share a module ----

RAW = {"attn": {"q": jnp.ones((4, 2)), "k": jnp.ones((4, 2))}, "mlp": jnp.ones((4, 4)), "norm": {"scale": jnp.ones(4)}}
RAW_KERNELS = jpeft.Kernels(
    tuple(
        (path, jpeft.Kernel(shape, (0,), (1,)))
        for path, shape in (("attn/q", (4, 2)), ("attn/k", (4, 2)), ("mlp", (4, 4)))
    )
)


def sites(spec, params=RAW, kernels=RAW_KERNELS):
    return [site.path for site in jpeft.init(jax.random.key(0), spec, params, kernels=kernels).sites]


def test_weights_with_names_of_their_own():
    """Many trees have no `kernel`: what is there is named by its whole path, or the end of it."""
    assert sites(jpeft.LoRA(targets=["attn.q"])) == ["attn/q"]
    assert sites(jpeft.LoRA(targets=["q", "mlp"])) == ["attn/q", "mlp"]
    assert sites(jpeft.LoRA(targets=["attn"])) == ["attn/k", "attn/q"]
    assert sites(jpeft.LoRA(targets=["attn"], exclude=["k"])) == ["attn/q"]
    assert sites(jpeft.LoRA(targets=["attn"], modules_to_save=["mlp"])) == ["attn/k", "attn/q", "mlp"]
    adapter = jpeft.init(jax.random.key(0), jpeft.LoRA(rank_pattern={"attn.q": 1}), RAW, kernels=RAW_KERNELS)
    assert {site.path: site.rank for site in adapter.sites} == {"attn/k": 8, "attn/q": 1, "mlp": 8}


# ---- errors ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["qproj"]}, r"target 'qproj' matches nothing; the nearest are .*q_proj'"),
        ({"targets": ["q_proj", "vproj"]}, r"target 'vproj'.*v_proj'"),
        ({"targets": ["q_proj"], "exclude": ["q_prj"]}, r"exclude: 'q_prj' matches nothing.*q_proj'"),
        ({"targets": ["q_proj"], "exclude": ".*"}, r"match 13 weights, but exclude='\.\*'.*leave none"),
        ({"targets": ["q_proj"], "layers_to_transform": [99]}, r"layers_to_transform=\(99,\)"),
        ({"targets": ["score"], "modules_to_save": ["score"]}, r"modules_to_save=\('score',\)"),
        (
            {"targets": ["q_proj"], "modules_to_save": ["scores"]},
            r"modules_to_save: 'scores' matches nothing; the nearest are 'score'",
        ),
        ({"targets": ["q_proj"], "rank_pattern": {"k_proj": 1}}, r"pattern 'k_proj' matches no target.*q_proj'"),
        ({"targets": ["q_proj"], "alpha_pattern": {"k_proj": 1}}, r"pattern 'k_proj' matches no target.*q_proj'"),
        ({"targets": "*_proj"}, r"'\*_proj' is no regex.*targets=\['\*_proj'\]"),
        ({"targets": ["q_proj"], "rank_pattern": {"(q": 1}}, r"'\(q' is no regex"),
        ({"targets": []}, "trains nothing"),
    ],
)
def test_errors_show_the_nearest(options, message):
    with pytest.raises(jpeft.SpecError, match=message):
        init_where_arrays_are_needed(jpeft.LoRA(**options), params_of(LLAMA))


@pytest.mark.parametrize(
    "options",
    [
        {"rank": -1},
        {"rank": 1.5},
        {"rank": True},
        {"rank_pattern": {"q": -1}},
        {"alpha": float("nan")},
        {"alpha": 1e39},
        {"alpha_pattern": {"q": float("inf")}},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"bias": "some"},
        {"init": "zeros"},
    ],
)
def test_values_out_of_range(options):
    name = next(iter(options))
    with pytest.raises(jpeft.SpecError, match=rf"LoRA: ({name}|q) must be .*found"):
        jpeft.LoRA(**options)


def test_geometry_that_is_not_known():
    params = {"experts": {"kernel": jnp.ones((2, 3, 4))}, "dense": {"kernel": jnp.ones((3, 4))}}
    with pytest.raises(
        jpeft.KernelError, match=r"'experts/kernel' has shape \(2, 3, 4\).*kernels=jpeft\.kernels\(fn, params, x\)"
    ):
        jpeft.init(jax.random.key(0), jpeft.LoRA(targets=["experts"]), params)


# ---- layers of a stack ----


def stack():
    params = {"layers": {"q": {"kernel": jnp.ones((4, 3, 2))}}, "out": {"kernel": jnp.ones((2, 2))}}
    kernels = jpeft.Kernels(
        (
            ("layers/q/kernel", jpeft.Kernel((4, 3, 2), (1,), (2,), (0,))),
            ("out/kernel", jpeft.Kernel((2, 2), (0,), (1,))),
        )
    )
    return params, kernels


def test_layers_of_a_stacked_kernel():
    """The others keep the base, get no gradient, and do not count."""
    params, kernels = stack()
    spec = jpeft.LoRA(rank=2, alpha=6, targets=["q"], layers_to_transform=[1, 3])
    adapter = jpeft.init(jax.random.key(0), spec, params, kernels=kernels)
    assert adapter.constant["layers/q/kernel"]["scaling"].tolist() == [0, 3, 0, 3]
    adapter = adapter.replace(trained=jax.tree.map(jnp.ones_like, adapter.trained))
    changed = jpeft.apply(params, adapter)["layers"]["q"]["kernel"] - params["layers"]["q"]["kernel"]
    assert (abs(changed).max((1, 2)) > 0).tolist() == [False, True, False, True]
    gradient = jax.grad(lambda t: jpeft.apply(params, adapter.replace(trained=t))["layers"]["q"]["kernel"].sum())(
        adapter.trained
    )
    for leaf in jax.tree.leaves(gradient):
        assert (abs(leaf).max((1, 2)) > 0).tolist() == [False, True, False, True]
    assert jpeft.count(params, adapter).trainable == 2 * (3 * 2 + 2 * 2)


def test_no_such_layer_in_a_stack():
    params, kernels = stack()
    spec = jpeft.LoRA(targets=["q"], layers_to_transform=[1, 4])
    with pytest.raises(jpeft.SpecError, match="layers_to_transform: 4 is none of the 4 layers stacked in 'layers/q'"):
        jpeft.init(jax.random.key(0), spec, params, kernels=kernels)
