"""A model as inference runs it, and how much of it fits into memory."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from spiel_jax.errors import SpielError
from spiel_jax.models import ModelConfig
from spiel_jax.models.axes import LAYERS, param_sharding
from spiel_jax.models.cache import Past, init_past
from spiel_jax.models.decoder import EMBEDDING
from spiel_jax.models.stack import Layers, by_layer
from spiel_jax.models.storage.packed import Packed, runs_on_cpu
from spiel_jax.ops.sharded import BATCH_AXES, axis_size
from spiel_jax.sparse.delta import SparseDelta

LEAST_SLOTS = 64
"""Rows of a cache have at least so many slots; else a power of two times it."""

_ON_CPU = 1 << 30  # bytes of a cache where nothing tells how many there are
_SHARE = 0.6  # of what is free on a device


@dataclass(frozen=True)
class Served:
    """A model to ask.

    Attributes:
        config: Its shape.
        params: Its parameters; some can be stored weights, also with deltas beside them.

    Example:
        >>> from dataclasses import replace
        >>> from spiel_jax.models import init_params
        >>> config = replace(ModelConfig.smollm2_135m(), num_layers=2, vocab_size=100)
        >>> served = Served(config, init_params(config, jax.random.key(0), jnp.bfloat16))
        >>> served.slot_bytes
        1536
    """

    config: ModelConfig
    params: Mapping[str, Any]

    @property
    def dtype(self) -> Any:
        """Of the activations and of what is kept of them: that of the base model."""
        return self.params[EMBEDDING].dtype

    @property
    def slot_bytes(self) -> int:
        """What keys and values of one token take, in all layers."""
        config = self.config
        return 2 * config.num_layers * config.num_kv_heads * config.head_dim * jnp.dtype(self.dtype).itemsize

    def by_layer(self) -> "Served":
        """The same as it runs fastest: on CPUs each layer's weights by themselves, in the same memory.

        Not where they are dequantised for use: XLA would then hold the arrays of all layers at once.
        """
        layers = {name: param for name, param in self.params.items() if name.startswith(LAYERS)}
        if not all(isinstance(param, jax.Array | Packed) for param in layers.values()):
            return self
        return replace(self, params={**self.params} | {name: by_layer(p) for name, p in layers.items()})

    def past(self, rows: int, length: int) -> Past:
        """A cache for rows of so many tokens."""
        layered = any(isinstance(param, Layers) for param in self.params.values())
        past = init_past(self.config, rows, slots_for(length), self.dtype, by_layer=layered)
        where = self.params[EMBEDDING].sharding
        # committed from the start as programs leave it, or they would be compiled twice
        return jax.device_put(past, where) if len(where.device_set) == 1 else past

    def spread(self, mesh: Mesh) -> "Served":
        """The same, its parameters laid over a mesh; to be asked under ``jax.set_mesh(mesh)``.

        Args:
            mesh: From ``make_mesh``, of any sizes: also where deltas beside weights have another block grid.
        """

        def placed(name: str, leaf: jax.Array) -> jax.Array:
            whole = np.asarray(
                leaf
            )  # of several processes each has it, and gives its own devices their parts
            return jax.make_array_from_callback(
                whole.shape, param_sharding(name, whole.shape, mesh), lambda part: whole[part]
            )

        def loose(node: Any) -> Any:  # a delta whose blocks lie nowhere in particular
            return replace(node, axes=(None, None)) if isinstance(node, SparseDelta) and node.axes else node

        params = jax.tree.map(loose, dict(self.params), is_leaf=lambda node: isinstance(node, SparseDelta))
        spread = {name: jax.tree.map(partial(placed, name), param) for name, param in params.items()}
        return replace(self, params=spread)


@contextmanager
def on_host() -> Iterator[None]:
    """What is loaded inside lies in the memory of the host, where there is a CPU to JAX: see ``spread``."""
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        host = None
    with jax.default_device(host):
        yield


def slots_for(length: int) -> int:
    """Slots of the cache for rows of so many tokens: few sizes, so that few programs are compiled.

    >>> [slots_for(length) for length in (1, 64, 65, 700)]
    [64, 64, 128, 1024]
    """
    slots = LEAST_SLOTS
    while slots < length:
        slots *= 2
    return slots


def batch_devices() -> int:
    """Over how many devices the current mesh spreads the rows of a batch."""
    return int(np.prod([axis_size(name) for name in BATCH_AXES]))


def rows_for(served: Served, length: int, memory: int | None, most: int) -> int:
    """How many rows of so many tokens a cache holds at once.

    Args:
        served: The model.
        length: Of the longest row, in tokens.
        memory: Bytes that the cache may take on all devices together; None: what ``cache_memory`` finds.
        most: No more rows than this.

    Raises:
        SpielError: If not even one row fits.
    """
    memory = cache_memory() if memory is None else memory
    row = slots_for(length) * served.slot_bytes
    if row > memory:
        raise SpielError(
            f"a text of {length} tokens takes {row / 2**20:,.0f} MiB of cache, more than the "
            f"{memory / 2**20:,.0f} MiB there are for it: allow more memory, or shorten the text"
        )
    fit, devices = min(memory // row, most), batch_devices()
    return max(fit // devices, 1) * devices


def cache_memory() -> int:
    """Bytes for a cache: most of what is free on the devices; 1 GiB where they do not tell."""
    mesh = jax.sharding.get_abstract_mesh()
    count = 1 if mesh.empty else mesh.size
    stats = jax.local_devices()[0].memory_stats() or {}
    if runs_on_cpu() or "bytes_limit" not in stats:
        return _ON_CPU
    return int(_SHARE * (stats["bytes_limit"] - stats.get("bytes_in_use", 0))) * count
