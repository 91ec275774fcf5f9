"""What the codes of quantised weights stand for: the tables of QLoRA and of bitsandbytes."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
"""Quantiles of the normal distribution (QLoRA, arXiv 2305.14314, appendix E), ascending."""

_FP4 = np.array([0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0], np.float32) / np.float32(12)
FP4 = np.concatenate([_FP4, -_FP4])
"""Four-bit floats over their largest, in the order of bitsandbytes: the first bit is the sign."""


def _dynamic() -> np.ndarray:
    levels = [np.float32(0), np.float32(1)]
    for exponent in range(7):
        ends = _even(2**exponent + 1)
        middles = (ends[:-1] + ends[1:]) / np.float32(2)
        for sign in (1, -1):
            levels.extend(np.float32(sign * 10.0 ** (exponent - 6)) * middles)
    return np.sort(np.array(levels, np.float32))


def _even(count: int) -> np.ndarray:
    """So many numbers from 0.1 to 1 at equal distances, each rounded once, as ``torch.linspace`` has them."""
    first, last = np.float32(0.1), np.float32(1)
    step, numbers = float((last - first) / np.float32(count - 1)), np.arange(count)
    upward, downward = float(first) + step * numbers, float(last) - step * numbers[::-1]
    return np.where(numbers < count // 2, upward, downward).astype(np.float32)


DYNAMIC = _dynamic()
"""Signed dynamic 8-bit map (arXiv 1511.04561), ascending: what codes of scales stand for."""

_STEPS = 65535  # of the grid on [-1, 1] on which bitsandbytes looks for the nearest of 256 levels


def midpoints(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bounds between neighbouring levels, ascending, and the code of the level that each range has."""
    order = np.argsort(table, kind="stable").astype(np.uint8)
    return (table[order[:-1]] + table[order[1:]]) / np.float32(2), order


def _dynamic_bounds() -> np.ndarray:
    """[255] int32: the numbers on the grid up to which a level is the nearest one."""
    grid = np.arange(_STEPS + 1, dtype=np.float32) * np.float32(2 / _STEPS) - np.float32(1)
    return np.searchsorted(grid, midpoints(DYNAMIC)[0], side="right").astype(np.int32) - 1


_DYNAMIC_BOUNDS = _dynamic_bounds()


def nearest_dynamic(x: jax.Array) -> jax.Array:
    """uint8 codes in ``DYNAMIC`` of numbers in [-1, 1], as bitsandbytes finds them on a CPU.

    It puts a number on a grid of 65,536 first; so where levels are closer than that (between -1e-4 and 1e-4
    there are 16) it is not always the nearest one.
    """
    steps = jnp.floor((x + 1) * (_STEPS / 2) + 0.5).astype(jnp.int32)
    return jnp.searchsorted(jnp.asarray(_DYNAMIC_BOUNDS), steps, side="left").astype(jnp.uint8)


def nearest(x: jax.Array, table: np.ndarray) -> jax.Array:
    """uint8 codes in a table of 16 of the nearest levels; of two that are as near the lower level."""
    bounds, order = midpoints(table)
    code = jnp.full(x.shape, order[0], jnp.uint8)
    for bound, above in zip(bounds, order[1:], strict=True):
        code = jnp.where(x > bound, above, code)
    return code


def looked_up(codes: jax.Array, table: np.ndarray) -> jax.Array:
    """The levels of codes in a table of 16: by their bits, at the speed of arithmetic everywhere.

    Constants are operands of arithmetic only. Of a choice they would be arrays, which a differentiated loop
    over layers makes before it begins, and keeps: sixteen times a layer.
    """
    bits = [int(word) for word in table.view(np.uint32)]
    is_odd = -(codes & 1).astype(jnp.uint32)  # all bits of it
    levels = [(is_odd & jnp.uint32(one ^ zero)) ^ jnp.uint32(zero) for zero, one in _pairs(bits)]
    for bit in (2, 4, 8):
        is_set = (codes & bit) != 0
        levels = [jnp.where(is_set, one, zero) for zero, one in _pairs(levels)]
    return lax.bitcast_convert_type(levels[0], jnp.float32)


def _pairs(items: list) -> Iterator[tuple]:
    return zip(items[::2], items[1::2], strict=True)
