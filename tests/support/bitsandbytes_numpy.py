"""bitsandbytes' quantisation, one entry after another and in NumPy: slow, and plain to read."""

from itertools import pairwise

import ml_dtypes
import numpy as np

from spiel_jax.models.storage.codebooks import DYNAMIC, FP4, NF4

F = np.float32
TABLES = {"nf4": NF4, "fp4": FP4}
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def blocks_of(entries, size):
    return [entries[start : start + size] for start in range(0, len(entries), size)]


def nearest(x, table):
    """The code of the nearest level; bounds are the rounded midpoints, and belong to the level below."""
    order = sorted(range(len(table)), key=lambda code: table[code])
    for low, high in pairwise(order):
        if x <= F(table[low] + table[high]) / F(2):
            return low
    return order[-1]


def quantize(matrix, kind, block=64):
    """Codes, one an entry, and float32 scales of the blocks of a matrix, row by row."""
    codes, scales = [], []
    for entries in blocks_of(matrix.astype(F).reshape(-1), block):
        scale = F(max(abs(x) for x in entries))
        scales.append(scale)
        for x in entries:
            if scale == 0:
                share = F(0)
            elif len(entries) < block:
                share = x / scale
            else:
                share = x * (F(1) / scale)
            codes.append(nearest(min(max(share, F(-1)), F(1)), TABLES[kind]))
    return np.array(codes, np.uint8), np.array(scales, F)


def compress(scales, offset):
    """uint8 codes of the scales, and the scales of these."""
    levels = DYNAMIC.tolist()
    bounds = [F(low + high) / F(2) for low, high in pairwise(DYNAMIC)]
    assert levels == sorted(levels)
    codes, nested = [], []
    for group in blocks_of(scales - offset, 256):
        scale = F(max(abs(x) for x in group))
        nested.append(scale)
        for x in group:
            if scale == 0:
                codes.append(0)
                continue
            step = int(np.floor(F(F(x * (F(1) / scale)) + F(1)) * F(32767.5) + F(0.5)))
            on_grid = F(step) * F(2 / 65535) - F(1)
            codes.append(sum(on_grid > bound for bound in bounds))
    return np.array(codes, np.uint8), np.array(nested, F)


def expand(codes, nested, offset):
    """Float32 scales again; two roundings."""
    return np.array(
        [F(DYNAMIC[code] * nested[i // 256]) + offset for i, code in enumerate(codes)],
        F,
    )


def dequantize(codes, scales, kind, shape, dtype, block=64):
    entries = [TABLES[kind][code] * scales[i // block] for i, code in enumerate(codes)]
    return np.array(entries, F).reshape(shape).astype(DTYPES[dtype])


def packed(codes):
    """Two codes a byte, the first in the high bits."""
    even = np.append(codes, np.zeros(len(codes) % 2, np.uint8))
    return even[::2] * 16 + even[1::2]


def quantize_rows(matrix):
    """LLM.int8(): integers and the largest magnitude of each row."""
    wide = matrix.astype(F)
    largest = np.abs(wide).max(axis=1)
    codes = [
        [int(np.rint(x * (F(1) / m * F(127)))) if m else 0 for x in row]
        for row, m in zip(wide, largest, strict=True)
    ]
    return np.array(codes, np.int8), largest


def dequantize_rows(codes, largest):
    return codes.astype(F) * largest[:, None] * F(1 / 127)


def unpacked(pairs, count):
    """So many codes, of bytes with two each."""
    pairs = pairs.reshape(-1)
    return np.stack([pairs // 16, pairs % 16], axis=1).reshape(-1)[:count]
