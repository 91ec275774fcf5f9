"""Whole rows, columns and rectangles."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spiel_jax as sj
from spiel_jax.errors import SpielError
from spiel_jax.optim.criteria.structured import tile_positions

TARGETS = {
    "one": sj.Target((4, 6), 13),
    "stack": sj.Target((4, 6), 12, stack=(3,)),
    "blocks": sj.Target((4, 12), 24, grid=(1, 2)),
    "some@0,2": sj.Target((4, 6), 12, stack=(2,), layers=(0, 2)),
}
SHAPES = {"one": (4, 6), "stack": (3, 4, 6), "blocks": (4, 12), "some": (3, 4, 6)}


def masks(found, name):
    """[matrices and blocks, rows, columns] of what is chosen."""
    target = TARGETS[name]
    rows, columns = target.block
    indices = np.asarray(found[name].indices).reshape(-1, target.block_count)
    out = np.zeros((len(indices), target.block_size + 1), int)
    np.add.at(out, (np.arange(len(indices))[:, None], indices), 1)
    assert out[:, :-1].max() == 1  # distinct; unused slots are at the block's size
    return out[:, :-1].reshape(-1, rows, columns)


@pytest.mark.parametrize("tile", [(1, None), (None, 1), (2, 3)])
@pytest.mark.parametrize("seed", [None, 7])
def test_parts_are_whole_and_those_of_largest_mean(tile, seed):
    rng = np.random.default_rng(0)
    params = {name: jnp.array(rng.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}
    found = jax.jit(lambda p: tile_positions(p, TARGETS, rows=tile[0], columns=tile[1], seed=seed))(params)
    for name, target in TARGETS.items():
        rows, columns = target.block
        height, width = tile[0] or rows, tile[1] or columns
        number = target.block_count // (height * width)
        parts = masks(found, name).reshape(-1, rows // height, height, columns // width, width)
        whole = parts.mean((2, 4)).reshape(len(parts), -1)
        assert set(np.unique(whole)) <= {0.0, 1.0}
        assert np.all(whole.sum(-1) == number)
        if seed is None:
            weight = np.abs(np.asarray(params[name.partition("@")[0]], np.float64))
            weight = weight if target.layers is None else weight[list(target.layers)]
            blocks = weight.reshape(-1, rows, target.grid[1], columns).swapaxes(1, 2)
            means = blocks.reshape(-1, rows // height, height, columns // width, width).mean((2, 4))
            means = means.reshape(len(parts), -1)
            expected = np.argsort(-means, axis=-1)[:, :number]
            np.testing.assert_array_equal(np.sort(expected, -1), np.nonzero(whole)[1].reshape(-1, number))


def test_what_does_not_fit_is_refused():
    weights = {"one": jnp.ones((4, 6))}
    target = {"one": TARGETS["one"]}
    with pytest.raises(SpielError, match=r"parts of \(3, 6\) .* do not divide a block of \(4, 6\) of one"):
        tile_positions(weights, target, rows=3)
    with pytest.raises(SpielError, match=r"one: 13 entries are not one part of \(4, 6\) .*, which has 24"):
        tile_positions(weights, target, rows=4)
