"""Random weights and deltas, and what NumPy gathers from them."""

import jax.numpy as jnp
import numpy as np

from spiel_jax.sparse.delta import SparseDelta

CASES = {
    "matrix": {"shape": (5, 7), "k": 6},
    "stack": {"shape": (5, 7), "k": 6, "stack": (3,)},
    "two stack axes": {"shape": (4, 3), "k": 5, "stack": (2, 2)},
    "layers": {"shape": (5, 7), "k": 6, "stack": (4,), "layers": (1, 3)},
    "grid": {"shape": (4, 6), "k": 3, "grid": (2, 2)},
    "stack and grid": {"shape": (3, 8), "k": 4, "stack": (2,), "grid": (1, 4)},
    "layers and grid": {"shape": (4, 6), "k": 3, "stack": (3,), "grid": (2, 2), "layers": (0, 2)},
}


def make(shape, k, stack=(), grid=(1, 1), layers=None, unused=1, seed=0) -> tuple[np.ndarray, SparseDelta]:
    """A random weight, and a delta on it whose positions are distinct, unsorted, and in part unused."""
    rng = np.random.default_rng(seed)
    block = shape[0] // grid[0] * (shape[1] // grid[1])
    lead = (len(layers),) if layers is not None else stack
    lead += () if grid == (1, 1) else grid
    indices = np.array([rng.permutation(block)[:k] for _ in range(int(np.prod(lead)))], np.int32)
    indices[:, k - unused :] = block
    indices = rng.permuted(indices, axis=1).reshape(*lead, k)
    values = rng.normal(size=indices.shape).astype(np.float32)
    weight = rng.normal(size=(*stack, *shape)).astype(np.float32)
    return weight, SparseDelta(jnp.array(indices), jnp.array(values), shape, grid, layers)


def places(delta: SparseDelta):
    """(slot, entry of the weight) of each slot in use."""
    rows, columns = delta.shape[0] // delta.grid[0], delta.shape[1] // delta.grid[1]
    for slot, index in np.ndenumerate(np.asarray(delta.indices)):
        if index == rows * columns:
            continue
        stack, block = slot[:-1], (0, 0)
        if delta.grid != (1, 1):
            stack, block = slot[:-3], slot[-3:-1]
        if delta.layers is not None:
            stack = (delta.layers[stack[0]],)
        yield slot, (*stack, block[0] * rows + index // columns, block[1] * columns + index % columns)


def gathered(weight: np.ndarray, delta: SparseDelta) -> np.ndarray:
    entries = np.zeros(delta.indices.shape, weight.dtype)
    for slot, entry in places(delta):
        entries[slot] = weight[entry]
    return entries
