"""What a run has changed, weight by weight, as its checkpoint tells it. The base model is not read."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spiel_jax.adapters.info import layer_and_module
from spiel_jax.checkpoint import read_metadata, restore_deltas, restore_trainable, stored_targets
from spiel_jax.checkpoint.arrays import stored_arrays
from spiel_jax.checkpoint.metadata import checkpoints_of
from spiel_jax.methods.ia3 import INPUT_SCALED
from spiel_jax.models.decoder import LAYERS
from spiel_jax.ops.tree import parameter_name

MAGNITUDES = np.arange(-10, 2.01, 0.25)
"""Bounds of the bins of magnitudes, powers of ten."""

CELLS = 56
"""Cells at most along each side of the map of a weight."""


@dataclass(frozen=True)
class Weight:
    """What was changed of one weight.

    Attributes:
        name: Hugging Face's.
        shape: (rows, columns).
        count: Numbers that were trained.
        norm: Of the change, Euclidean (Frobenius); of factors, of their distance from 1.
        largest: Magnitude of the largest change of an entry; NaN where it is not known.
        rows: [rows] entries in each, of sparse deltas; else None.
        columns: [columns] likewise.
    """

    name: str
    shape: tuple[int, int]
    count: int
    norm: float
    largest: float = math.nan
    rows: np.ndarray | None = None
    columns: np.ndarray | None = None

    @property
    def place(self) -> tuple[int, str]:
        """Layer, -1 outside of one, and kind of weight."""
        return layer_and_module(self.name)

    @property
    def size(self) -> int:
        """Entries of the weight."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Map:
    """Where the entries of one weight are.

    Attributes:
        weight: Whose.
        counts: [m, n] entries in each cell.
        row_bounds: [m + 1] first row of each cell, and the number of rows.
        column_bounds: [n + 1] likewise.
    """

    weight: Weight
    counts: np.ndarray
    row_bounds: np.ndarray
    column_bounds: np.ndarray


@dataclass(frozen=True)
class Changes:
    """What a run has changed.

    Attributes:
        step: Of the checkpoint.
        kind: "sparse", "lora", "ia3", or "other".
        count: Numbers that were trained, all in all.
        weights: What was changed of each; empty for "other", such as full fine-tuning, of which nothing is
            read.
        magnitudes: How many changes of entries are in each bin of ``MAGNITUDES``; of sparse deltas.
        zeros: Entries that are there, and 0.
        maps: Of the chosen weights.
    """

    step: int
    kind: str
    count: int
    weights: list[Weight] = field(default_factory=list)
    magnitudes: np.ndarray | None = None
    zeros: int = 0
    maps: list[Map] = field(default_factory=list)


def read_changes(directory: Path, chosen: list[str]) -> Changes:
    """What the newest checkpoint of a run has changed.

    Args:
        directory: The run's folder.
        chosen: Names of weights, or ends of them, to map; empty: of each kind of weight the one of largest
            norm.

    Raises:
        CheckpointError: If there is no checkpoint, or it is damaged.
    """
    metadata = read_metadata(directory)
    step, settings = metadata["step"], metadata["config"]
    if metadata["targets"]:
        return _sparse(directory, metadata, chosen)
    if settings["method"] not in ("lora", "ia3"):
        parameters = stored_arrays(checkpoints_of(directory), step)["trainable"]
        return Changes(step, "other", sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameters)))
    found = restore_trainable(directory, step)
    weights = list(_low_rank(found, settings) if settings["method"] == "lora" else _factors(found))
    return Changes(step, settings["method"], sum(weight.count for weight in weights), weights)


def _layers(target: str, number: int) -> list[str]:
    """Hugging Face names of the matrices of a target.

    >>> _layers("model.layers.mlp.up_proj.weight@0-1,4", 3)[-1], _layers("lm_head.weight", 1)
    ('model.layers.4.mlp.up_proj.weight', ['lm_head.weight'])
    """
    name, _, ranges = target.partition("@")
    if not name.startswith(LAYERS):
        return [name]
    layers = list(range(number))
    if ranges:
        ends = [list(map(int, part.split("-"))) for part in ranges.split(",")]
        layers = [layer for part in ends for layer in range(part[0], part[-1] + 1)]
    return [f"{LAYERS}{layer}.{name.removeprefix(LAYERS)}" for layer in layers]


def _sparse(directory: Path, metadata: Mapping[str, Any], chosen: list[str]) -> Changes:
    weights, magnitudes, zeros = [], np.zeros(MAGNITUDES.size - 1, np.int64), 0
    found = restore_deltas(directory, metadata["step"])

    def matrices() -> Iterator[tuple[str, tuple[int, int], np.ndarray, np.ndarray, np.ndarray]]:
        for target, delta in found.items():
            names = _layers(target, math.prod(stored_targets(metadata)[target].stack))
            parts = [*delta.coordinates(), delta.values]
            rows, columns, values = (np.asarray(part).reshape(len(names), -1) for part in parts)
            for name, *one in zip(names, rows, columns, values, strict=True):
                used = one[0] < delta.shape[0]
                yield name, delta.shape, one[0][used], one[1][used], one[2][used].astype(np.float64)

    for name, shape, rows, columns, values in matrices():
        sizes = np.abs(values)
        filled = sizes[sizes > 0]
        zeros += sizes.size - filled.size
        bins = np.clip(np.log10(filled), MAGNITUDES[0], MAGNITUDES[-1])
        magnitudes += np.histogram(bins, MAGNITUDES)[0]
        counts = [np.bincount(at, minlength=n) for at, n in zip((rows, columns), shape, strict=True)]
        largest = float(sizes.max(initial=0.0))
        weights.append(Weight(name, shape, values.size, float(np.linalg.norm(values)), largest, *counts))
    wanted = _chosen(weights, chosen)
    maps = {
        name: _map(wanted[name], rows, columns) for name, _, rows, columns, _ in matrices() if name in wanted
    }
    count = sum(weight.count for weight in weights)
    ordered = [maps[name] for name in wanted]
    return Changes(metadata["step"], "sparse", count, weights, magnitudes, zeros, ordered)


def _chosen(weights: list[Weight], names: list[str]) -> dict[str, Weight]:
    """The weights to map by name."""
    if names:
        return {w.name: w for name in names for w in weights if f".{w.name}".endswith(f".{name}")}
    best: dict[str, Weight] = {}
    for weight in weights:
        kind = weight.place[1]
        if kind not in best or weight.norm > best[kind].norm:
            best[kind] = weight
    return {weight.name: weight for weight in best.values()}


def _map(weight: Weight, rows: np.ndarray, columns: np.ndarray) -> Map:
    bounds = [np.linspace(0, n, min(n, CELLS) + 1).round().astype(int) for n in weight.shape]
    return Map(weight, np.histogram2d(rows, columns, bounds)[0].astype(int), *bounds)


def _low_rank(trained: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[Weight]:
    """Norms of scale * B A, from products of rank times rank."""
    for target, parts in trained.items():
        a, b = (np.asarray(parts[f"lora_{part}"], np.float64) for part in "AB")
        rank = a.shape[-2]
        scale = settings["lora.alpha"] / (math.sqrt(rank) if settings.get("lora.rslora") else rank)
        for name, one, other in zip(_layers(target, len(a)), a, b, strict=True):
            squares = np.sum((other.T @ other) * (one @ one.T))
            shape = other.shape[0], one.shape[1]
            yield Weight(name, shape, one.size + other.size, scale * math.sqrt(max(squares, 0.0)))


def _factors(trained: Mapping[str, Any]) -> Iterator[Weight]:
    for target, values in trained.items():
        values = np.asarray(values, np.float64)
        inputs = parameter_name(target) in INPUT_SCALED
        for name, one in zip(_layers(target, len(values)), values, strict=True):
            shape = (1, one.size) if inputs else (one.size, 1)
            away = np.abs(one - 1)
            yield Weight(name, shape, one.size, float(np.linalg.norm(away)), float(away.max()))
