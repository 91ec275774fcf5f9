"""The same computation on the device and on the CPU that is beside it."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def use_cpu_too() -> None:
    """Lets JAX have the CPU beside the platforms that JAX_PLATFORMS names; before it looks for devices."""
    named = jax.config.jax_platforms
    if named and "cpu" not in named.split(","):
        jax.config.update("jax_platforms", f"{named},cpu")


def on_cpu(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function that is compiled and run on the CPU, from arrays that may be elsewhere."""
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        return jax.jit(function)(*jax.device_put(arguments, cpu))


def on_both(function: Callable[..., Any], *arguments: Any) -> tuple[Any, Any]:
    """The results on the default device and on the CPU, as NumPy arrays."""
    ours = jax.jit(function)(*jax.device_put(arguments, jax.devices()[0]))
    return jax.device_get(ours), jax.device_get(on_cpu(function, *arguments))


def assert_same(ours: Any, expected: Any) -> None:
    """Bit for bit, a NaN like another."""
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def assert_near(ours: Any, expected: Any, tolerance: float) -> None:
    """Integers equal; floats within a share of the largest magnitude of their array."""

    def check(one: Any, other: Any) -> None:
        one, other = np.asarray(one), np.asarray(other)
        if not np.issubdtype(other.dtype, np.inexact) and other.dtype != jax.numpy.bfloat16:
            np.testing.assert_array_equal(one, other)
            return
        one, other = one.astype(np.float64), other.astype(np.float64)
        scale = float(np.abs(other).max(initial=0.0)) or 1.0
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * scale)

    jax.tree.map(check, ours, expected)
