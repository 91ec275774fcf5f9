"""Traces of a few steps."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from spiel_jax.training.profiler import Profile


@pytest.mark.parametrize(("count", "last", "expected"), [(2, 9, {3, 4}), (5, 4, {3, 4}), (0, 4, set())])
def test_traces_the_steps_it_says(tmp_path, count, last, expected):
    profile = Profile(tmp_path / "profile", 3, count)
    double = jax.jit(lambda x: 2 * x)
    x = jnp.ones(3)
    for number in range(1, last + 1):
        with profile.step(number):
            x = double(x)
        profile.end(number, x, last=number == last)
    files = list(tmp_path.rglob("perfetto_trace.json.gz"))
    assert len(files) == bool(expected)
    for file in files:
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
        steps = {int(e["args"]["step_num"]) for e in events if e.get("name") == "train"}
        assert steps == expected
