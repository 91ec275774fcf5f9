"""Pruned weights, in NumPy."""

import numpy as np


def two_of_four(weight):
    """The weight with the two smallest of each four entries along its rows at zero."""
    groups = np.abs(weight).reshape(-1, 4)
    kept = np.argsort(np.argsort(-groups, axis=-1, kind="stable"), axis=-1) < 2
    return weight * kept.reshape(weight.shape)


def smallest(weight, share):
    """The weight with that share of its entries, the smallest, at zero."""
    magnitude = np.abs(weight)
    return np.where(magnitude > np.quantile(magnitude, share), weight, 0).astype(weight.dtype)


def scored(weight, norms, share):
    """As Wanda has it: in each row the share of smallest |weight| times norm of its input at zero."""
    scores = np.abs(weight) * norms
    cut = np.quantile(scores, share, axis=-1, keepdims=True)
    return np.where(scores > cut, weight, 0).astype(weight.dtype)
