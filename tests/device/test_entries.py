"""Gather and set on the device against NumPy, in every dtype, and in place where donated."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from support.sparse_cases import CASES, gathered, make, places

from spiel_jax.sparse.delta import base_entries, gather, merge, set_entries, unmerge

STORED = (
    ("matrix", np.float32),
    ("matrix", ml_dtypes.bfloat16),
    ("stack", np.float32),
    ("stack", ml_dtypes.bfloat16),
    ("stack", np.float16),
    ("layers", ml_dtypes.bfloat16),
    ("stack and grid", np.float32),
    ("layers and grid", ml_dtypes.bfloat16),
)


def test_gather_and_set():
    @jax.jit
    def both(weight, delta):
        return gather(weight, delta), set_entries(weight, delta, delta.values)

    for case, dtype in STORED:
        weight, delta = make(**CASES[case])
        weight = weight.astype(dtype)
        expected, entries = weight.copy(), np.asarray(delta.values).astype(dtype)
        for slot, entry in places(delta):
            expected[entry] = entries[slot]
        taken, changed = both(weight, delta)
        assert taken.dtype == changed.dtype == dtype
        np.testing.assert_array_equal(taken, gathered(weight, delta), err_msg=f"{case}, {dtype}")
        np.testing.assert_array_equal(changed, expected, err_msg=f"{case}, {dtype}")


def test_set_takes_the_place_of_what_is_donated():
    for dtype in (np.float32, ml_dtypes.bfloat16):
        weight, delta = make(shape=(64, 128), k=100, stack=(3,))
        expected, entries = weight.astype(dtype), np.asarray(delta.values).astype(dtype)
        for slot, entry in places(delta):
            expected[entry] = entries[slot]
        stored = jax.jit(jnp.copy)(weight.astype(dtype))  # on a CPU device_put may share NumPy's memory
        change = jax.jit(set_entries, donate_argnums=0).lower(stored, delta, delta.values).compile()
        assert change.memory_analysis().alias_size_in_bytes >= stored.nbytes
        place = stored.unsafe_buffer_pointer()
        found = change(stored, delta, delta.values)
        assert stored.is_deleted()
        assert found.unsafe_buffer_pointer() == place
        np.testing.assert_array_equal(found, expected)


def test_unmerge_gives_the_pretrained_weights_back_bit_for_bit():
    @jax.jit
    def there_and_back(params, deltas):
        base, merged = base_entries(params, deltas), merge(params, deltas)
        return merged, unmerge(merged, deltas, base)

    weight, delta = make(shape=(64, 128), k=100, stack=(3,))
    params = {"weight": jnp.asarray(weight.astype(ml_dtypes.bfloat16))}
    merged, again = there_and_back(params, {"weight": delta})
    assert (np.asarray(merged["weight"]) != np.asarray(params["weight"])).any()
    np.testing.assert_array_equal(again["weight"], params["weight"])
