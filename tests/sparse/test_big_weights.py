"""Weights of more entries than int32 can count: cut into blocks, or stacked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spiel_jax as sj
from spiel_jax.sparse.delta import gather, set_entries
from spiel_jax.sparse.targets import Target

WIDE = (2, 2**30 + 64)  # 2^31 + 128 entries


def test_a_matrix_beyond_int32_wants_a_grid():
    shapes = {"w": jax.ShapeDtypeStruct(WIDE, "bfloat16")}
    with pytest.raises(ValueError, match="finer grid"):
        sj.find_targets(shapes, num_tunable=1000)
    target = sj.find_targets(shapes, num_tunable=1000, grid=(1, 4))["w"]
    assert target.block == (2, 2**28 + 16)
    state = jax.eval_shape(sj.spiel_ma(1e-3, {"w": target}, total_steps=100).init, sj.zeros({"w": target}))
    assert state.active["w"].indices.shape == (1, 4, 250)


def test_the_largest_stack_of_llama_70b():
    """80 x 8192 x 28672 entries: each matrix fits int32, the stack does not."""
    shapes = {"up": jax.ShapeDtypeStruct((80, 28672, 8192), "bfloat16")}
    targets = sj.find_targets(shapes, density=0.01, grid=(8, 1))
    target = targets["up"]
    assert target.total > 187e6
    tx = sj.spiel_ag(1e-3, targets, total_steps=100)

    def one_step(params, values, state):
        grads = {"up": jnp.ones_like(values["up"])}
        updates, state = tx.update(grads, state, values, phase=sj.Phase.PLAIN, reselect=False)
        return sj.merge(params, sj.deltas(jax.tree.map(jnp.add, values, updates), state)), state

    values = jax.eval_shape(lambda: sj.zeros(targets))
    merged, state = jax.eval_shape(one_step, shapes, values, jax.eval_shape(tx.init, values))
    assert (merged["up"].shape, merged["up"].dtype) == (shapes["up"].shape, jnp.bfloat16)
    assert state.active["up"].indices.shape == (80, 8, 1, target.block_count)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "stack", "grid"), [(WIDE, (), (2, 4)), ((2**15, 2**15), (3,), (1, 1))], ids=["blocks", "stack"]
)
def test_entries_past_the_2_31st(shape, stack, grid):
    target = Target(shape, 16 * grid[0] * grid[1], stack, grid)
    rng = np.random.default_rng(0)
    indices = np.stack(
        [rng.choice(target.block_size, 16, replace=False) for _ in range(int(np.prod(target.lead)))]
    ).astype(np.int32)
    indices[:, 0] = target.block_size - 1  # the very last entry of each block
    delta = target.delta(jnp.array(indices.reshape(*target.lead, 16)))
    entries = jnp.arange(1, delta.indices.size + 1, dtype=jnp.uint16).reshape(delta.indices.shape)
    put = jax.jit(set_entries, donate_argnums=0)
    assert put.lower(jax.ShapeDtypeStruct((*stack, *shape), jnp.uint16), delta, entries).compile()
    weight = put(jnp.zeros((*stack, *shape), jnp.uint16), delta, entries)
    assert weight.size > 2**31
    np.testing.assert_array_equal(jax.jit(gather)(weight, delta), entries)
    last = (-1, -1, -1)[: weight.ndim]
    assert int(weight[last]) == int(entries.reshape(-1, 16)[-1, 0])
    changed = sum(int(np.count_nonzero(np.asarray(part))) for part in weight)  # row by row: NumPy counts
    assert changed == entries.size
