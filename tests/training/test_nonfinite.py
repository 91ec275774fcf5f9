"""Base weights that are not finite are refused with their names, however they are held."""

import jax.numpy as jnp
import pytest
from support.weight_cases import RowScaled

from spiel_jax.models.storage import NF4, Packed
from spiel_jax.training.nonfinite import NonFiniteError, check_base


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("held", [None, Packed, RowScaled, NF4], ids=["array", "packed", "scaled", "nf4"])
def test_base_weights(bad, held):
    def stored(array):
        return array if held is None else held.hold(array)

    good = jnp.ones((2, 3, 4), jnp.bfloat16)
    check_base({"a": stored(good), "count": jnp.arange(3)}, "here")
    with pytest.raises(
        NonFiniteError, match=r"weights of here are infinite or not a number: b\. Another copy"
    ):
        check_base({"a": stored(good), "b": stored(good.at[1, 2, 0].set(bad))}, "here")


def test_many_are_counted():
    with pytest.raises(NonFiniteError, match="a, b, c and 2 more"):
        check_base(dict.fromkeys("abcde", jnp.array([jnp.nan])), "here")
