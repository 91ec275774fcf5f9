"""Causal attention of whole sequences: as XLA compiles it, or by cuDNN in one kernel.

XLA writes the scores of every pair of tokens, [B, H, S, S], to the device's memory and reads them again, some
ten times a layer and step. cuDNN's kernel (Dao et al., arXiv 2205.14135) keeps a tile of them on the chip.
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from spiel_jax.errors import SpielError
from spiel_jax.models.config import ModelConfig

AttentionKind = Literal["xla", "cudnn"]
_WIDEST = 128  # before Hopper
_DTYPES = (jnp.bfloat16, jnp.float16)


def attend(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array | None,
    window: int | None,
    kind: AttentionKind,
) -> jax.Array:
    """What queries see of the keys that are not after them.

    Example:
        >>> x = jnp.ones((1, 4, 2, 8))
        >>> attend(x, x, x, None, None, "xla").shape
        (1, 4, 2, 8)

    Args:
        queries: [B, S, H, head_dim].
        keys: [B, S, K, head_dim]; H is a multiple of K.
        values: Likewise.
        mask: [B or 1, 1, S, S] bool, True where a key is visible, none of them after the query; None: all
            that are not after it.
        window: Without a mask, how many keys a query sees at most, the last being its own; None: all.
        kind: What computes it. "cudnn" takes what ``check_attention`` lets pass.

    Returns:
        [B, S, H, head_dim] in the dtype of the queries. Scores are float32 in both.

    Raises:
        ValueError: If the kind is unknown.
    """
    if kind not in get_args(AttentionKind):
        raise ValueError(f"unknown attention {kind!r}: expected one of {', '.join(get_args(AttentionKind))}")
    reach = None if window is None else (window - 1, 0)
    if kind == "cudnn":  # told that it is causal, it leaves out the tiles that are after their queries
        return jax.nn.dot_product_attention(
            queries,
            keys,
            values,
            mask=mask,
            is_causal=True,
            local_window_size=reach if mask is None else None,
            implementation="cudnn",
        )
    if mask is None:
        return jax.nn.dot_product_attention(queries, keys, values, is_causal=True, local_window_size=reach)
    return jax.nn.dot_product_attention(queries, keys, values, mask=mask)


def check_attention(
    kind: AttentionKind, model: ModelConfig, dtype: DTypeLike, length: int, platform: str
) -> None:
    """Makes sure that attention can be computed so.

    Args:
        kind: What is to compute it.
        model: Shape of the model.
        dtype: Of the activations.
        length: Tokens of a sequence.
        platform: Of the devices, as JAX calls it.

    Raises:
        SpielError: If not; what is in the way is named.
    """
    if kind == "xla":
        return
    refused = "model.attention=cudnn takes"
    if jnp.dtype(dtype) not in _DTYPES:
        raise SpielError(f"{refused} 16-bit activations: model.dtype is {jnp.dtype(dtype)}")
    if model.head_dim % 8 or model.head_dim > _WIDEST:
        raise SpielError(
            f"{refused} heads of a multiple of 8 features, {_WIDEST} at most: this model's have "
            f"{model.head_dim}"
        )
    if length % 2:
        raise SpielError(f"{refused} sequences of an even length: data.sequence_length is {length}")
    if platform not in ("gpu", "cuda"):
        raise SpielError(f"{refused} an NVIDIA GPU: the devices are of the platform {platform!r}")

    def trained(queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        return jnp.sum(attend(queries, keys, values, None, None, kind), dtype=jnp.float32)

    shapes = [(1, length, count, model.head_dim) for count in (model.num_heads, *[model.num_kv_heads] * 2)]
    try:  # what else its version or the GPU cannot do, only JAX knows
        jax.eval_shape(jax.grad(trained), *(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes))
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise SpielError(f"model.attention=cudnn: {error} (pip install nvidia-cudnn-cu12)") from error
