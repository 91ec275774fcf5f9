"""The methods of the trainer by name: one of sparse deltas for every growth criterion, and others."""

from collections.abc import Mapping
from typing import Any

from spiel_jax.errors import SpielError
from spiel_jax.methods.full import FullMethod
from spiel_jax.methods.ia3 import IA3Method
from spiel_jax.methods.lora import LoraMethod
from spiel_jax.methods.method import Method
from spiel_jax.methods.rosa import RosaMethod
from spiel_jax.methods.sparse import SparseMethod
from spiel_jax.models.config import ModelConfig
from spiel_jax.optim.criteria.criterion import CRITERIA
from spiel_jax.sparse.targets import Target

METHODS: dict[str, type[Method]] = {
    "lora": LoraMethod,
    "ia3": IA3Method,
    "full": FullMethod,
    "rosa": RosaMethod,
}
"""Methods that are not made of a growth criterion: what ``config.method`` calls them."""


def method_names() -> tuple[str, ...]:
    """All that ``config.method`` may be, those that train sparse deltas first."""
    return (*CRITERIA, *METHODS)


def method_class(name: str) -> type[Method]:
    """The method of that name.

    Raises:
        SpielError: If there is none.
    """
    if name in CRITERIA:
        return SparseMethod
    if name not in METHODS:
        raise SpielError(f"method = {name!r}: expected one of {', '.join(method_names())}")
    return METHODS[name]


def build(config: Any, model: ModelConfig, steps: int, targets: Mapping[str, Target] | None = None) -> Method:
    """The method of a run, ready to ``init`` and ``step``; for the arguments see ``Method.from_config``."""
    return method_class(config.method).from_config(config, model, steps, targets)
