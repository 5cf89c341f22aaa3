"""What every test has: no model hub, a key that tells its seed, strict dtype promotion for jpeft's own calls."""

import os
import zlib

# Before anything imports transformers. A test that reaches for the hub fails at once, with a network or without.
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import pytest


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
