"""Small decoders whose greedy texts are not all alike."""

import dataclasses

from spiel_jax.models import ModelConfig

CONFIG = ModelConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=512,
    initializer_range=0.3,
)
WINDOW = dataclasses.replace(CONFIG, sliding_window=4)
MIXED = dataclasses.replace(WINDOW, sliding_layers=(True, False))
