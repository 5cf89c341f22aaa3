"""What every test has: no model hub, a key that tells its seed, strict dtype promotion for jpeft's own calls."""

import os
import random
import zlib
from pathlib import Path

# Before anything imports transformers. A test that reaches for the hub fails at once, with a network or without.
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import pytest

HERE = Path(__file__).parent
# Most of a test's time goes to the compiler. What looks at compiled programs, at the fast path, at real models or at
# the README compiles as users do; the rest compares small numbers, for which it may hurry.
AS_USERS_DO = {
    "test_attach.py",
    "test_attention_memory.py",
    "test_draws.py",
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


def in_a_hurry(path):
    """Whether what a file tests may be compiled with few optimizations: not doctests, nor the modules above."""
    return HERE in path.parents and path.name not in AS_USERS_DO


class Compiler:
    """Chooses how to compile; a plugin of its own, because a fixture of this file would not reach the doctests."""

    @pytest.fixture(scope="module", autouse=True)
    @classmethod
    def compiled_in_a_hurry(cls, request):
        """Compile with few optimizations, but for doctests and the modules above.

        To JAX a function compiled the other way is the same one, so what it has kept is dropped with each change:
        else a module's numbers would depend on which modules ran before it.
        """
        hurry = in_a_hurry(request.path)
        if hurry != jax.config.read("jax_disable_most_optimizations"):
            jax.clear_caches()
            jax.config.update("jax_disable_most_optimizations", hurry)


def pytest_configure(config):
    config.pluginmanager.register(Compiler())


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, help="of the fixture `key`; each test has its own if not given")
    parser.addoption("--shuffle", type=int, help="run the files in a random order, drawn from this number")


def pytest_collection_modifyitems(config, items):
    """Run what is compiled in a hurry first, so that little is compiled twice; or shuffle the files, as told."""
    if (drawn_from := config.getoption("--shuffle")) is None:
        items.sort(key=lambda item: not in_a_hurry(item.path))
        return
    files = sorted({item.path for item in items})
    random.Random(drawn_from).shuffle(files)
    items.sort(key=lambda item: files.index(item.path))


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
