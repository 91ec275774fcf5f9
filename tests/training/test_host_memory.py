import ctypes
import sys
from unittest.mock import Mock, patch

import jax
import jax.numpy as jnp
import pytest

from spiel_jax.training import host_memory
from spiel_jax.training.host_memory import given_back_after_compiling


@pytest.mark.skipif(sys.platform != "linux", reason="the C library of Linux")
def test_memory_is_given_back_between_compiling_and_running():
    """JAX could call what it tells otherwise."""
    library, counts = Mock(), []

    def run(number):
        def count():
            counts.append(library.malloc_trim.call_count)

        jax.block_until_ready(jax.jit(lambda x: jax.debug.callback(count) or x + number)(jnp.zeros(3)))
        jax.effects_barrier()

    run(0)  # and what it needs besides is compiled
    with patch.object(ctypes, "CDLL", return_value=library), given_back_after_compiling():
        run(1)  # too fast
        with patch.object(host_memory, "_LONG", 0.0):
            run(2)
    run(3)
    assert counts == [0, 0, 1, 1]
