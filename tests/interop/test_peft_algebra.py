"""The algebra of adapters against PEFT's `add_weighted_adapter`: factors and effective weights, on random adapters."""

import copy
import warnings

import jax
import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model

import jpeft
from jpeft.algebra import combine
from jpeft.algebra.svd import factors, rank_for, svd
from jpeft.tree import flatten
from jpeft_interop import load_peft, params_from_torch, save_peft
from peft_twins import base, bert, gpt2, llama, perturb, save

EXACT = ["linear", "cat", "ties", "magnitude_prune"]
BY_SVD = ["svd", "ties_svd", "magnitude_prune_svd"]
WEIGHTS = [0.7, -0.4, 1.3]
CONFIGS = [
    {"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "embed_tokens"]},
    {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "embed_tokens"], "alpha_pattern": {"v_proj": 5}},
    {"r": 4, "lora_alpha": 2, "target_modules": ["v_proj", "gate_proj"]},
]
UNEQUAL = [
    {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "rank_pattern": {"0.self_attn.q_proj": 3}},
    {"r": 5, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "alpha_pattern": {"q_proj": 5}},
]
GPT2 = [
    {"r": 3, "lora_alpha": 3, "target_modules": ["c_attn"], "fan_in_fan_out": True},
    {"r": 3, "lora_alpha": 8, "target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True},
]


def several(module, configs):
    """A PEFT model that holds an adapter of each configuration."""
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(module), LoraConfig(**configs[0]), adapter_name="a0")
    for number, config in enumerate(configs[1:], 1):
        model.add_adapter(f"a{number}", LoraConfig(**config))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    perturb(model, 3, only_trained=True)
    return model.eval()


def loaded(model, configs, params, folder):
    """The same adapters here."""
    save(model, folder)
    return [load_peft(folder / f"a{number}", params) for number in range(len(configs))]


def added(model, names, weights, kind, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(names, weights, "new", combination_type=kind, **options)
        model.set_adapter("new")


def merged(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return params_from_torch(copy.deepcopy(model).merge_and_unload())


def largest_difference(one, other):
    one, other = flatten(one), flatten(other)
    return max(float(np.abs(np.asarray(one[path]) - np.asarray(other[path])).max()) for path in one)


def options_of(kind):
    return {"density": 0.6} if kind.startswith(("ties", "magnitude", "dare")) else {}


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """By name: the params, PEFT's model with several adapters, and those adapters here."""
    found = {}
    for name, make, configs in [("llama", llama, CONFIGS), ("unequal", llama, UNEQUAL), ("gpt2", gpt2, GPT2)]:
        module = base(make, tie_word_embeddings=False)
        params = params_from_torch(module)
        model = several(module, configs)
        found[name] = params, model, loaded(model, configs, params, tmp_path_factory.mktemp(name))
    return found


def compare(twin, kind, **options):
    """The merged params of both, and our adapter."""
    params, model, adapters = twin
    model = copy.deepcopy(model)
    weights = WEIGHTS[: len(adapters)]
    ours = combine(adapters, weights, kind, **options)
    theirs = dict(options)
    if "rank" in theirs:
        theirs["svd_rank"] = theirs.pop("rank")
    if "majority_sign" in theirs:
        theirs["majority_sign_method"] = theirs.pop("majority_sign")
    added(model, [f"a{i}" for i in range(len(adapters))], weights, kind, **theirs)
    assert largest_difference(jpeft.apply(params, ours), merged(model)) <= 1e-5
    assert largest_difference(jpeft.apply(params, ours), params) > 1e-2
    return params, ours, model


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", EXACT)
def test_the_factors_are_pefts(kind, name, twins, tmp_path):
    params, ours, model = compare(twins[name], kind, **options_of(kind))
    theirs = load_peft(save(model, tmp_path) / "new", params)
    for path, leaves in ours.trained.items():
        for leaf, array in leaves.items():  # PEFT fills up with zeros where fewer adapters act
            other = np.asarray(theirs.trained[path][leaf])
            there = other[..., : array.shape[-1]] if leaf == "a" else other[: array.shape[0]]
            np.testing.assert_allclose(array, there, atol=1e-5)
            assert np.abs(other).sum() == pytest.approx(np.abs(there).sum())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", BY_SVD)
def test_the_change_of_the_svd_kinds_is_pefts(kind, name, twins):
    compare(twins[name], kind, **options_of(kind))


@pytest.mark.parametrize(("kind", "options"), [("cat", {}), ("svd", {}), ("svd", {"rank": 2}), ("svd", {"rank": 6})])
def test_unequal_ranks(kind, options, twins):
    compare(twins["unequal"], kind, **options)


@pytest.mark.parametrize("kind", ["ties", "ties_svd"])
def test_the_other_vote(kind, twins):
    compare(twins["llama"], kind, density=0.4, majority_sign="frequency")


def test_unequal_ranks_can_not_be_added_here_or_there(twins):
    _, model, adapters = twins["unequal"]
    with pytest.raises(ValueError, match="same r"):
        added(copy.deepcopy(model), ["a0", "a1"], [1, 1], "linear")
    with pytest.raises(jpeft.KernelError, match=r"q_proj.*'cat'.*shrink"):
        combine(adapters, [1, 1], "linear")


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"])
def test_dare_is_pefts_with_the_same_mask(kind, monkeypatch):
    """PEFT's random choice replaced by ours, which shows as zeros."""
    from peft.utils import merge_utils

    from jpeft.algebra import sparsify

    rng = np.random.default_rng(0)
    x = [rng.standard_normal((6, 5)).astype(np.float32) for _ in range(3)]
    pruned = [sparsify.random(jax.random.key(i), one, 0.6) for i, one in enumerate(x)]
    masks = iter([torch.tensor(np.asarray(one) != 0).float() for one in pruned])
    monkeypatch.setattr(torch, "bernoulli", lambda _: next(masks))
    weights = torch.tensor(WEIGHTS)
    ours_weights = [np.float32(w) for w in WEIGHTS]
    if "ties" in kind:
        theirs = merge_utils.dare_ties(list(map(torch.tensor, x)), weights, 0.6, "total")
        ours = sparsify.elected_mean(pruned, list(map(jax.numpy.asarray, ours_weights)))
    else:
        theirs = merge_utils.dare_linear(list(map(torch.tensor, x)), weights, 0.6)
        ours = sparsify.weighted_sum(pruned, list(map(jax.numpy.asarray, ours_weights)))
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-6)


def test_peft_keeps_the_scaling_of_rank_stabilised_adapters_and_this_does_not(tmp_path):
    """There the sum of rsLoRAs is sqrt(r) times what it should be; here it is the sum."""
    configs = [{"r": 4, "use_rslora": True, "target_modules": ["q_proj"]} for _ in range(2)]
    module = base(llama, tie_word_embeddings=False)
    params = params_from_torch(module)
    model = several(module, configs)
    adapters = loaded(model, configs, params, tmp_path)
    expected = jpeft.apply(params, adapters, weights=[0.5, 0.25])
    ours = combine(adapters, [0.5, 0.25], "cat")
    assert largest_difference(jpeft.apply(params, ours), expected) <= 1e-5
    added(model, ["a0", "a1"], [0.5, 0.25], "cat")
    assert largest_difference(merged(model), expected) > 1e-2


def test_a_combination_goes_to_peft(twins, tmp_path):
    params, _, adapters = twins["unequal"]
    new = combine(adapters, [0.5, 0.25], "cat")
    save_peft(tmp_path / "new", new, params=params)
    again = load_peft(tmp_path / "new", params)
    assert largest_difference(jpeft.apply(params, again), jpeft.apply(params, new)) == 0


@pytest.mark.parametrize("rank", [2, 0.5, 0.95])
def test_conversion_by_rank_and_energy_is_pefts(rank):
    """Of an adapter whose change has full rank, made a LoRA by PEFT and here."""
    from peft import LoHaConfig, convert_to_lora

    module = base(llama, tie_word_embeddings=False)
    torch.manual_seed(1)
    config = LoHaConfig(r=3, alpha=3, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(copy.deepcopy(module), config)
    perturb(model, 3, only_trained=True)
    _, theirs = convert_to_lora(model, rank=rank)
    for name, layer in model.named_modules():
        if not hasattr(layer, "hada_w1_a"):
            continue
        change = jax.numpy.asarray(layer.get_delta_weight("default").detach().numpy().T)
        found = svd(change)
        kept = rank if isinstance(rank, int) else rank_for(found.s, rank)
        a, b = factors(found, kept)
        key = name.removeprefix("base_model.model.")
        expected = [theirs[k] for k in sorted(theirs) if key in k]
        assert len(expected) == 2
        assert expected[0].shape[0] == kept
        np.testing.assert_allclose(a @ b, (expected[1] @ expected[0]).numpy().T, atol=1e-5)


def test_ia3_adapters_are_added_as_in_peft():
    configs = [
        {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []},
    ]
    module = base(llama, tie_word_embeddings=False)
    params = params_from_torch(module)
    model = get_peft_model(copy.deepcopy(module), IA3Config(**configs[0]), adapter_name="a0")
    model.add_adapter("a1", IA3Config(**configs[1]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("ia3_" in name)
    perturb(model, 3, only_trained=True)
    ours = combine([ia3_here(model, params, f"a{i}", config) for i, config in enumerate(configs)], [0.7, -0.4])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.base_model.add_weighted_adapter(["a0", "a1"], [0.7, -0.4], "new")
        model.set_adapter("new")
    assert largest_difference(jpeft.apply(params, ours), merged(model)) <= 1e-5
    assert largest_difference(jpeft.apply(params, ours), params) > 1e-2


def ia3_here(model, params, name, config):
    """The adapter of PEFT's model of this name."""
    targets, feedforward = config["target_modules"], config["feedforward_modules"]
    new = jpeft.init(jax.random.key(0), jpeft.IA3(targets=targets, feedforward=feedforward), params)
    state = dict(model.named_parameters())
    trained = {}
    for path, leaves in new.trained.items():
        module = path.rpartition("/")[0].replace("/", ".")
        value = state[f"base_model.model.{module}.ia3_l.{name}"].detach().numpy().ravel()
        trained[path] = {leaf: jax.numpy.asarray(value) for leaf in leaves}
    return new.replace(trained=trained)


def test_one_adapter_is_pruned_as_asked_which_peft_does_not(twins):
    params, model, adapters = twins["llama"]
    ours = jpeft.apply(params, combine(adapters[:1], [0.7], "magnitude_prune", density=0.5))
    model = copy.deepcopy(model)
    added(model, ["a0"], [0.7], "magnitude_prune", density=0.5)
    linear = jpeft.apply(params, combine(adapters[:1], [0.7], "linear"))
    assert largest_difference(merged(model), linear) <= 1e-5
    assert largest_difference(ours, linear) > 1e-2


def test_a_bias_of_b_is_kept_which_peft_loses(tmp_path):
    configs = [{"r": 4, "lora_bias": True, "target_modules": ["query"]} for _ in range(2)]
    module = base(bert)
    params = params_from_torch(module)
    model = several(module, configs)
    adapters = loaded(model, configs, params, tmp_path)
    expected = jpeft.apply(params, adapters, weights=[0.5, 0.25])
    assert largest_difference(jpeft.apply(params, combine(adapters, [0.5, 0.25], "cat")), expected) <= 1e-5
    added(model, ["a0", "a1"], [0.5, 0.25], "cat")
    assert largest_difference(merged(model), expected) > 1e-3
