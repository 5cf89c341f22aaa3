"""How leaves start at random: the same bits whatever the program around the draw, and however it is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpeft
from jpeft.xlora import XLoRA, classifier

PARAMS = {"dense": {"kernel": jnp.zeros((37, 21))}, "embed": {"embedding": jnp.zeros((50, 16))}}
XLORA = XLoRA(depth=2)
UNOPTIMIZED = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def starts(spec, dtype):
    return lambda key: jpeft.init(key, spec, PARAMS, dtype=dtype).trained


UNIFORM = {
    "lora": lambda dtype: starts(jpeft.LoRA(rank=6, targets=["dense"]), dtype),
    "xlora": lambda dtype: lambda key: classifier.init(key, XLORA, 37, (3,), dtype),
}
NORMAL = {
    "gaussian": lambda dtype: starts(jpeft.LoRA(rank=6, targets=["dense"], init="gaussian"), dtype),
    "embedding": lambda dtype: starts(jpeft.LoRA(rank=6, targets=["embed"]), dtype),
    "adalora": lambda dtype: starts(jpeft.AdaLoRA(rank=6, target_rank=2, targets=["dense"]), dtype),
}


def assert_equal(one, other):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.float32(x), np.float32(y)), one, other)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", [*UNIFORM, *NORMAL])
def test_a_start_under_jit_is_the_start_outside(name, dtype):
    draw, key = (UNIFORM | NORMAL)[name](dtype), jax.random.key(5)
    assert_equal(jax.jit(draw)(key), draw(key))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", UNIFORM)
def test_a_uniform_start_does_not_depend_on_the_compiler_s_options(name, dtype):
    draw, key = UNIFORM[name](dtype), jax.random.key(5)
    assert_equal(jax.jit(draw)(key), jax.jit(draw, compiler_options=UNOPTIMIZED)(key))
