"""What is said of what a run reads."""

import logging

from spiel_jax.training.inputs import warn_of_positions


def test_rows_longer_than_the_model_knows_positions_are_warned_of(caplog):
    with caplog.at_level(logging.WARNING, "spiel_jax"):
        warn_of_positions(128, 128)
        assert not caplog.records
        warn_of_positions(256, 128)
    assert "data.sequence_length is 256, and the model knows 128 positions" in caplog.text
