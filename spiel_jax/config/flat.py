"""The configuration as a flat dict of dotted keys, as it is stored, and what differs between two of them."""

from collections.abc import Mapping
from typing import Any

import ml_collections

from spiel_jax.config.defaults import Config, default_config

ADJUSTABLE = (
    *("log_every", "checkpoint_every", "checkpoint_keep", "mesh.*", "profile", "sample.*", "eval_tasks.*"),
    *("checkpoint_keep_best", "on_nonfinite", "on_record_failure", "skip_limit", "data.on_mismatch"),
)
"""Keys that may differ when a run is continued: they change nothing that was trained."""

WAS: dict[str, Any] = {"spiel.seeds": "both"}
"""What versions did that did not have a key, where it is not what the key's default does."""


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key to value, JSON-like: tuples are lists."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def unflatten(flat: Mapping[str, Any]) -> Config:
    """The config that ``flatten`` made flat; keys that are not there have their defaults, or are in ``WAS``.

    Args:
        flat: As any version may have stored it: keys that are not known here are kept.
    """
    config = default_config()
    for key, value in (WAS | dict(flat)).items():
        set_key(config, key, value)
    return config


def set_key(config: Config, key: str, value: Any) -> None:
    """Gives a key a value, whatever the type of its last one."""
    *sections, name = key.split(".")
    with config.unlocked():
        section = config
        for part in sections:
            if part not in section:
                section[part] = ml_collections.ConfigDict()
            section = section[part]
        with section.ignore_type():
            section[name] = value


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ between two flattened configs, but for the adjustable ones.

    Args:
        old: As an earlier version may have stored it: a key that it lacks has its default, or is in ``WAS``.
        new: Of this version.
    """
    old = {key: value for key, value in (flatten(default_config()) | WAS).items() if key in new} | old

    def adjustable(key: str) -> bool:
        return any(key == a or (a.endswith(".*") and key.startswith(a[:-1])) for a in ADJUSTABLE)

    keys = sorted(old.keys() | new.keys())
    return {
        key: (old.get(key), new.get(key))
        for key in keys
        if not adjustable(key) and old.get(key) != new.get(key)
    }
