"""How the weights of a model are held. To add a kind, see README.md beside this file."""

from typing import Any

from spiel_jax.models.storage.four_bit import FP4, NF4
from spiel_jax.models.storage.int8 import Int8
from spiel_jax.models.storage.packed import Packed, packed_kind
from spiel_jax.models.storage.weight import KINDS, Weight, kind_named, register

__all__ = ["FP4", "KINDS", "NF4", "Int8", "Packed", "Weight", "kind_named", "register", "storage_for"]


def storage_for(quantization: str, dtype: Any) -> type[Weight] | None:
    """How training holds the frozen weights of linears; None: as arrays.

    Args:
        quantization: One of ``KINDS``; "none" leaves it to the hardware.
        dtype: Of the model's parameters.

    Raises:
        ValueError: If no kind has this name.
    """
    return kind_named(quantization) or packed_kind(dtype)
