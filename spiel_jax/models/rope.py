"""Rotary position embeddings in the Hugging Face convention (the halves of a head rotate together).

References:
    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv 2104.09864.
    The llama3 scaling is that of Llama 3.1: Grattafiori et al., arXiv 2407.21783.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from spiel_jax.errors import SpielError

RopeKind = Literal["linear", "llama3"]


@dataclass(frozen=True)
class RopeScaling:
    """How the frequencies are stretched for contexts longer than the pretraining context.

    Attributes:
        kind: "linear" divides every frequency by ``factor``. "llama3" divides those that turn less
            than ``low_freq_factor`` times in the pretraining context, keeps those that turn more
            than ``high_freq_factor`` times, and interpolates between the two.
        factor: The stretch, at least 1.
        low_freq_factor: llama3 only.
        high_freq_factor: llama3 only.
        original_max_positions: Pretraining context in tokens; llama3 only, and required there.

    Raises:
        SpielError: If the kind is unknown or a number is outside its range.
    """

    kind: RopeKind
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(RopeKind):
            allowed = ", ".join(("default", *get_args(RopeKind)))
            raise SpielError(f"unknown rope type {self.kind!r}: expected one of {allowed}")
        if not self.factor >= 1:
            raise SpielError(f"rope factor must be at least 1, got {self.factor}")
        if self.kind == "llama3":
            if not self.original_max_positions or self.original_max_positions < 1:
                raise SpielError(
                    "llama3 rope scaling needs original_max_positions of at least 1, "
                    f"got {self.original_max_positions}"
                )
            if not 0 < self.low_freq_factor < self.high_freq_factor:
                raise SpielError(
                    "llama3 rope scaling needs 0 < low_freq_factor < high_freq_factor, "
                    f"got {self.low_freq_factor} and {self.high_freq_factor}"
                )


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Angle per position of every pair of dimensions.

    Args:
        head_dim: Size of a head; even.
        theta: Base of the geometric sequence of wavelengths.
        scaling: None keeps the sequence as it is.

    Returns:
        [head_dim / 2] float32, radians per position.
    """
    # float64 on the host, rounded once: at position 100,000 the last bit of a frequency shows
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        pass
    elif scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    else:
        assert scaling.original_max_positions is not None
        turns = scaling.original_max_positions * frequencies / (2 * np.pi)  # in the old context
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequencies = kept * frequencies + (1 - kept) * frequencies / scaling.factor
    return frequencies.astype(np.float32)


def rotation(positions: jax.Array, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every angle.

    Args:
        positions: [B, S] integers.
        frequencies: [head_dim / 2] float32, from ``inverse_frequencies``.

    Returns:
        Two arrays [B, S, 1, head_dim / 2] float32; the unit axis is that of the heads.
    """
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate queries or keys.

    Args:
        x: [B, S, heads, head_dim].
        cos: [B, S, 1, head_dim / 2] float32.
        sin: [B, S, 1, head_dim / 2] float32.

    Returns:
        The shape and dtype of ``x``; computed in float32.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
