"""What to say of a step that is not finite: whose fault it is, and what can be done about it."""

from collections.abc import Mapping
from typing import Any

from spiel_jax.config import Config
from spiel_jax.errors import SpielError
from spiel_jax.ops.tree import not_finite

_WHOLE = "the last checkpoint is whole"


class NonFiniteError(SpielError, FloatingPointError):
    """Numbers of a run are not finite, and the config says to stop, or nothing else can be done."""


def values_lost(config: Config) -> str:
    """Of a step whose loss and gradient are finite, but not what the optimizer made of them."""
    settings = config.optimizer
    names = ("learning_rate", "eps", "b1", "b2", "weight_decay")
    said = ", ".join(f"{name} = {settings[name]}" for name in names)
    return (
        "the loss and the gradient are finite, and what the optimizer makes of them is not: one of "
        f"config.optimizer's {said} does not do. No checkpoint has these values; {_WHOLE}. Start another run"
    )


def check_base(params: Mapping[str, Any], source: str) -> None:
    """Refuses base weights that no loss can be formed with.

    Raises:
        NonFiniteError: Naming the weights.
    """
    if bad := not_finite(params):
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise NonFiniteError(
            f"weights of {source} are infinite or not a number: {', '.join(bad[:3])}{more}. Another copy of "
            "the model is needed (or config.model.dtype = 'float32', if they are beyond another type's range)"
        )


def step_lost(config: Config, in_a_row: int) -> str:
    """Of a step whose loss or gradient is not finite, which changed nothing.

    Args:
        config: Of the run.
        in_a_row: How many such steps there were, one after the other.
    """
    unchanged = f"Nothing was changed by this step; {_WHOLE}"
    if config.on_nonfinite == "skip":
        return (
            f"That is step number {in_a_row} in a row that would be skipped, and config.skip_limit = "
            f"{config.skip_limit}. {unchanged}. Lower the learning rate in another run"
        )
    return (
        f"{unchanged}. The base weights were finite. Lower the learning rate or set "
        "config.optimizer.clip_norm in another run, or go on with this one without such steps: the same "
        "command with --config.on_nonfinite=skip"
    )
