"""Adapters that the original implementation wrote give the logits that it had with them."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from spiel_jax.adapters import read_adapter
from spiel_jax.models import bind, open_model

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("name", ["rigl_linear", pytest.param("sm3_linear", marks=pytest.mark.slow)])
def test_golden_adapters(name):
    source = open_model(str(GOLDEN))
    adapter = read_adapter(GOLDEN / f"{name}_adapter", source.config)
    params = source.load("float32", progress=False)
    recorded = np.load(GOLDEN / f"{name}.npz")
    tokens = jnp.asarray(recorded["eval_input_ids"])
    for key, tree in (("base_eval_logits", params), ("eval_logits", adapter.merge(params, source.config))):
        logits = np.asarray(bind(source.config, tree)(tokens))
        # float32 noise of the original itself is 2e-6 (README.txt beside the files)
        np.testing.assert_allclose(logits, recorded[key], rtol=0, atol=5e-6)
