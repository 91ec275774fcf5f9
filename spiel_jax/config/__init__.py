"""The configuration of a run: every key with its default, and the checks on their values.

A config file has ``get_config()`` that starts from ``default_config()``, sets keys, and returns it. Any key
can be set on the command line: ``--config.optimizer.learning_rate=1e-4``.
"""

from spiel_jax.config.checks import (
    ConfigError,
    check_config,
    check_micro_batch,
    data_config,
    micro_batch_size,
    with_defaults,
)
from spiel_jax.config.defaults import LINEAR_LAYERS, Config, default_config
from spiel_jax.config.flat import ADJUSTABLE, differences, flatten, set_key, unflatten

__all__ = [
    "ADJUSTABLE",
    "LINEAR_LAYERS",
    "Config",
    "ConfigError",
    "check_config",
    "check_micro_batch",
    "data_config",
    "default_config",
    "differences",
    "flatten",
    "micro_batch_size",
    "set_key",
    "unflatten",
    "with_defaults",
]
