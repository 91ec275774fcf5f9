"""What a fine-tune costs elsewhere, beside each window read by itself."""

import jax
import numpy as np
import pytest
from support.decoders import CONFIG

from spiel_jax.errors import SpielError
from spiel_jax.evaluation.forgetting import WINDOW, forgetting
from spiel_jax.inference.served import Served
from spiel_jax.models import bind, init_params


def one_by_one(params, texts):
    """Losses, divergences and agreement of every token, each window through both models by itself."""
    rows = []
    for text in texts:
        for start in range(0, len(text) - 1, WINDOW):
            window = np.array(text[start : start + WINDOW])
            tables = [
                np.asarray(jax.nn.log_softmax(bind(CONFIG, one)(window[None], remat="none"))[0], np.float64)
                for one in params
            ]
            old, new = (table[:-1] for table in tables)
            places, targets = np.arange(len(window) - 1), window[1:]
            rows.append(
                [
                    -old[places, targets],
                    -new[places, targets],
                    (np.exp(old) * (old - new)).sum(-1),
                    old.argmax(-1) == new.argmax(-1),
                ]
            )
    return np.concatenate(rows, axis=1)


def test_texts_of_all_lengths_are_as_each_window_by_itself():
    rng = np.random.default_rng(0)
    before = init_params(CONFIG, jax.random.key(0))
    after = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(1), x.shape, x.dtype), before)
    lengths = [1, 2, 300, 40, WINDOW, 64, 65, WINDOW + 1, 7]
    texts = [rng.integers(0, CONFIG.vocab_size, length).tolist() for length in lengths]
    found = forgetting(Served(CONFIG, before), Served(CONFIG, after), texts)
    expected = one_by_one((before, after), texts)
    assert found.tokens == expected.shape[1] == sum(lengths) - len(lengths) - 2  # one for each cut
    np.testing.assert_allclose(found[:4], expected.mean(1), rtol=1e-4)
    assert found.divergence > 0


def test_nothing_to_compare_on():
    served = Served(CONFIG, init_params(CONFIG, jax.random.key(0)))
    with pytest.raises(SpielError, match="no texts of two tokens"):
        forgetting(served, served, [[1], []])
