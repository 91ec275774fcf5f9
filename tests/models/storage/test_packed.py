"""Bits of arrays (as a weight: see test_weight), and rows of a table by them, against a plain lookup."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.programs import AS_USERS

from spiel_jax.models.storage.packed import Packed, packed, take_rows

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def table_of(dtype, rows=7, width=5):
    return jnp.array(np.random.default_rng(0).normal(size=(rows, width)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_16_bit_floats_are_held_by_their_bits(dtype):
    table = table_of(dtype).at[0, 0].set(-jnp.inf)
    held = packed(table)
    if dtype == jnp.float32:
        assert held is table
        with pytest.raises(ValueError, match="bfloat16 and float16 weights, got float32"):
            Packed.hold(table)
    else:
        assert held.bits.dtype == jnp.uint16
        np.testing.assert_array_equal(np.asarray(held.bits), np.asarray(table).view(np.uint16))
        np.testing.assert_array_equal(held.dequantize(), table)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_those_of_the_table(dtype):
    table = table_of(dtype).at[3, 1].set(-0.0).at[3, 2].set(jnp.inf)
    found = take_rows(table, jnp.array([[3, 0], [6, 3]]))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, np.asarray(table)[[[3, 0], [6, 3]]])
    assert np.signbit(np.float32(found[0, 0, 1]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_beyond_the_table_is_nan(dtype):
    found = take_rows(table_of(dtype), jnp.array([7, 6]))
    assert jnp.isnan(found[0]).all()
    assert jnp.isfinite(found[1]).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_is_that_of_a_plain_lookup(dtype):
    table, rows = table_of(dtype), jnp.array([[3, 0], [3, 9]])
    dy = table_of(dtype, 4).reshape(2, 2, 5)
    expected = jax.vjp(lambda table: jnp.take(table, rows, axis=0, mode="fill"), table)[1](dy)[0]
    found = jax.vjp(lambda table: take_rows(table, rows), table)[1](dy)[0]
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, expected)
    assert jnp.any(found[3] != 0)


def test_a_16_bit_table_is_not_made_wide():
    table, rows = jax.ShapeDtypeStruct((1000, 8), jnp.bfloat16), jax.ShapeDtypeStruct((4,), jnp.int32)
    program = jax.jit(take_rows).lower(table, rows).compile(AS_USERS)
    assert "f32[1000,8]" not in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes < 1000 * 8 * 2
