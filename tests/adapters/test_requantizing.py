"""What merging into quantised weights loses is measured, and what it keeps is there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spiel_jax.adapters.requantizing import requantized
from spiel_jax.errors import SpielError
from spiel_jax.models.storage import NF4, Int8, Packed
from spiel_jax.ops.stored import as_array

NAME = "model.layers.mlp.up_proj.weight"


def changed(weight, change):
    """The array that a weight stands for, with 6 entries changed by so much of the largest of its block."""
    array = np.array(jax.jit(as_array)(weight))
    array[1, 2:5, [3, 70]] += change * np.abs(array).max()
    return {NAME: jnp.array(array), "norm": jnp.ones(3)}


@pytest.mark.parametrize("kind", [NF4, Int8])
def test_large_changes_are_kept_and_small_ones_are_lost(kind):
    array = np.random.default_rng(0).normal(size=(2, 8, 128)).astype(np.float32)
    weight = jax.jit(kind.hold)(jnp.array(array))
    base = {NAME: weight, "norm": jnp.ones(3)}
    small = 0.001 if kind is Int8 else 0.01
    for change, kept in ((0.5, 1.0), (small, 0.0)):
        tuned = changed(weight, change)
        dense = np.asarray(tuned[NAME])
        params, loss = requantized(base, tuned)
        assert NAME not in tuned  # whose memory is free
        assert jax.tree.structure(params) == jax.tree.structure(base)
        back, before = (np.asarray(jax.jit(as_array)(held[NAME])) for held in (params, base))
        assert (loss.changed, loss.kept) == (6, kept)
        np.testing.assert_allclose(
            loss.error, np.linalg.norm(back - dense) / np.linalg.norm(dense - before), rtol=1e-5
        )
        assert f"of 6 changed entries {kept:.1%} keep a change" in str(loss)


def test_a_base_of_arrays_is_refused():
    base = {NAME: Packed.hold(jnp.ones((1, 4, 6), jnp.bfloat16)), "norm": jnp.ones(3)}
    with pytest.raises(SpielError, match="the base is not quantised"):
        requantized(base, dict(base))
