"""The entries of a sparse adapter as our models hold them: layers stacked, matrices cut into blocks."""

import math
from collections.abc import Callable, Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from spiel_jax.adapters.adapter import adapted_layers
from spiel_jax.adapters.entries import Entries
from spiel_jax.models.config import ModelConfig
from spiel_jax.models.decoder import layer_names
from spiel_jax.ops.tree import parameter_name
from spiel_jax.sparse.delta import SparseDelta
from spiel_jax.sparse.targets import Target, target_name

_MOST = np.iinfo(np.int32).max

Layers = Mapping[int | None, str]
"""A parameter's layers and the Hugging Face names of their weights, as ``Adapter.parameters`` has them."""


def entries_of(deltas: Mapping[str, SparseDelta], model: ModelConfig) -> dict[str, Entries]:
    """The entries of deltas by Hugging Face name; grid and stack undone, unused slots left out.

    Args:
        deltas: Target name to delta, as of a run's checkpoint.
        model: Shape of the model.
    """
    found: dict[str, dict[str, Entries]] = {}
    for target, delta in deltas.items():
        parameter = parameter_name(target)
        names = layer_names(parameter, model.num_layers)
        if delta.layers is not None:
            names = [names[layer] for layer in delta.layers]
        rows, columns = (np.asarray(axis).reshape(len(names), -1) for axis in delta.coordinates())
        values = np.asarray(delta.values).reshape(len(names), -1)
        for number, name in enumerate(names):
            used = rows[number] < delta.shape[0]
            if used.any():
                flat = rows[number][used].astype(np.int64) * delta.shape[1] + columns[number][used]
                entries = Entries.unordered(delta.shape, flat, values[number][used])
                found.setdefault(parameter, {})[name] = entries
    order = {parameter: layer_names(parameter, model.num_layers) for parameter in found}
    return {
        name: found[parameter][name]
        for parameter, names in order.items()
        for name in names
        if name in found[parameter]
    }


def stacked_deltas(
    entries: Mapping[str, Entries], parameters: Mapping[str, Layers], model: ModelConfig
) -> dict[str, SparseDelta]:
    """Entries as deltas to ``merge`` into one of our models: one for each parameter.

    Args:
        entries: Hugging Face name to entries.
        parameters: Name of a parameter to its layers.
        model: Shape of the model.
    """
    deltas = {}
    for parameter, layers in parameters.items():
        parts = [entries[name] for name in layers.values()]
        shape, grid = parts[0].shape, _fitting(parts[0].shape)
        indices, values = _slots(parts, grid)
        if None in layers:
            indices, values = indices[0], values[0]
        chosen = adapted_layers(layers, model)
        deltas[parameter] = SparseDelta(jnp.asarray(indices), jnp.asarray(values), shape, grid, chosen)
    return deltas


def trained_deltas(
    entries: Mapping[str, Entries],
    parameters: Mapping[str, Layers],
    model: ModelConfig,
    grid: Callable[[str], tuple[int, int]],
) -> dict[str, SparseDelta]:
    """Entries as deltas to train from: a matrix has as many slots as its fullest block needs.

    Args:
        entries: Hugging Face name to entries.
        parameters: Name of a parameter to its layers.
        model: Shape of the model.
        grid: Block grid of a parameter, by its name.

    Returns:
        Target name to delta, arrays of the host; where layers have different numbers of slots, each group of
        them is a target of its own, as in ``find_targets``.

    Raises:
        SpielError: If a grid does not divide a weight.
    """
    deltas = {}
    for parameter, layers in parameters.items():
        groups: dict[int, list[int]] = {}
        for layer, name in layers.items():
            slots = int(_in_blocks(entries[name], grid(parameter))[2].max())
            groups.setdefault(slots, []).append(layer or 0)
        for numbers in groups.values():
            parts = [entries[layers[number]] for number in numbers]
            chosen = adapted_layers(numbers, model)
            indices, values = _slots(parts, grid(parameter))
            delta = SparseDelta(indices, values, parts[0].shape, grid(parameter), chosen)  # pyright: ignore
            deltas[target_name(parameter, chosen)] = delta
    return deltas


def targets_of(deltas: Mapping[str, SparseDelta]) -> dict[str, Target]:
    """The targets that deltas of stacked weights belong to."""
    return {
        name: Target(
            delta.shape,
            delta.indices.shape[-1] * math.prod(delta.grid),
            delta.indices.shape[: delta.stack_axes],
            delta.grid,
            delta.layers,
        )
        for name, delta in deltas.items()
    }


def _fitting(shape: tuple[int, int]) -> tuple[int, int]:
    """The coarsest cut along the rows whose blocks int32 positions can count."""
    return next(
        (n, 1) for n in range(1, shape[0] + 1) if shape[0] % n == 0 and shape[0] // n * shape[1] <= _MOST
    )


def _in_blocks(entries: Entries, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Block and position in it of each entry, and how many entries each block has."""
    rows, columns = entries.coordinates()
    height, width = entries.shape[0] // grid[0], entries.shape[1] // grid[1]
    block = rows // height * grid[1] + columns // width
    position = rows % height * width + columns % width
    return block, position, np.bincount(block, minlength=math.prod(grid))


def _slots(parts: Sequence[Entries], grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Positions in blocks [matrices, ..., k] and values of matrices of one shape, ascending in each block."""
    placed = [_in_blocks(entries, grid) for entries in parts]
    most, blocks = max(int(counts.max()) for *_, counts in placed), math.prod(grid)
    size = parts[0].shape[0] * parts[0].shape[1] // blocks
    indices = np.full((len(parts), blocks, most), size, np.int32)
    values = np.zeros(indices.shape, np.float32)
    for number, (entries, (block, position, counts)) in enumerate(zip(parts, placed, strict=True)):
        order = np.lexsort((position, block))
        block, rank = block[order], np.arange(order.size) - (np.cumsum(counts) - counts)[block[order]]
        indices[number, block, rank] = position[order]
        values[number, block, rank] = entries.values[order]
    shape = (len(parts), *(() if grid == (1, 1) else grid), most)
    return indices.reshape(shape), values.reshape(shape)
