"""What every test has: no model hub, a key that tells its seed, strict dtype promotion for jpeft's own calls."""

import os
import zlib

# Before anything imports transformers. A test that reaches for the hub fails at once, with a network or without.
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import pytest

# Most of a test's time goes to the compiler. What looks at compiled programs, at the fast path, at real models or at
# the README compiles as users do; the rest compares small numbers, for which it may hurry.
AS_USERS_DO = {
    "test_attach.py",
    "test_attention_memory.py",
    "test_flops.py",
    "test_gates.py",
    "test_generate.py",
    "test_lift.py",
    "test_load_model.py",
    "test_methods.py",
    "test_models_bert.py",
    "test_quickstart.py",
    "test_readme.py",
    "test_step_cost.py",
    "test_train.py",
}


@pytest.fixture(scope="module", autouse=True)
def compiled_in_a_hurry(request):
    """Compile with few optimizations, but for the modules above."""
    jax.config.update("jax_disable_most_optimizations", request.path.name not in AS_USERS_DO)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, help="of the fixture `key`; each test has its own if not given")


@pytest.fixture
def seed(request):
    """An integer of the test's own, the same in every run; --seed N tries another. A failing test prints it."""
    given = request.config.getoption("--seed")
    value = zlib.crc32(request.node.nodeid.encode()) if given is None else given
    print(f"seed: {value} (repeat with --seed {value})")
    return value


@pytest.fixture
def key(seed):
    """A JAX random key made from `seed`."""
    return jax.random.key(seed)


@pytest.fixture
def strict():
    """A context in which an implicit change of dtype raises: `with strict(): jpeft.apply(params, adapter)`.

    Only around jpeft's own functions: optax.adamw, and Flax's norms in bf16, fail under it.
    """
    return lambda: jax.numpy_dtype_promotion("strict")
