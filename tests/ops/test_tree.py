import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spiel_jax.ops.tree import all_finite, not_finite

DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_found(dtype, bad):
    bad = math.copysign(math.nan, bad) if dtype == "float8_e4m3fn" else bad  # which has no infinity
    limits = jnp.finfo(dtype)
    leaf = (
        jnp.ones((64, 96, 32), dtype)
        .at[0, 0, :4]
        .set(jnp.array([float(limits.max), float(limits.min), -0.0, 0.0]).astype(dtype))
    )
    finite = jax.jit(all_finite)
    assert finite([leaf, jnp.zeros((0, 3), dtype), jnp.arange(3)])
    assert finite([-jnp.abs(leaf)])
    assert not finite([leaf.at[63, 5, 31].set(bad)])
    assert not finite([(-jnp.abs(leaf)).at[63, 5, 31].set(bad)])
    tree = {"a": leaf.at[63, 5, 31].set(bad), "b": {"c": leaf, "d": leaf[0].at[0, 0].set(bad)}}
    assert not_finite(tree) == ["a", "b.d"]


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_looking_for_it_makes_no_copy(dtype):
    leaf = jax.ShapeDtypeStruct((64, 96, 32), dtype)
    memory = jax.jit(all_finite).lower([leaf]).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < leaf.size / 8
