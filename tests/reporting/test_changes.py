"""What the checkpoint tells, against the dense computation."""

import numpy as np
import pytest
from support.run_folders import TARGETS, checkpoint, config, lora_items, sparse_items

from spiel_jax.reporting.changes import MAGNITUDES, read_changes


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse")
    checkpoint(folder, 60, config(folder, method="spiel_ag"), sparse_items(), TARGETS)
    return folder


@pytest.fixture(scope="module")
def dense():
    """Hugging Face name to the deltas as a matrix, NaN where no entry is."""
    found = {}
    for name, target in TARGETS.items():
        parts = sparse_items()["deltas"][name]
        shape = (-1, *target.grid, target.block_count)
        stacks = [np.asarray(parts[part]).reshape(shape) for part in ("indices", "values")]
        for number, (indices, values) in enumerate(zip(*stacks, strict=True)):
            matrix = np.full(target.shape, np.nan)
            for place in np.ndindex(indices.shape):
                if indices[place] < target.block_size:
                    row, column = divmod(int(indices[place]), target.block[1])
                    at = row + place[0] * target.block[0], column + place[1] * target.block[1]
                    matrix[at] = values[place]
            layer = number if target.layers is None else target.layers[number]
            found[name.partition("@")[0].replace("layers.", f"layers.{layer}.")] = matrix
    return found


def test_weights_are_those_of_the_dense_matrices(sparse, dense):
    changes = read_changes(sparse, [])
    assert (changes.step, changes.kind) == (60, "sparse")
    assert {weight.name for weight in changes.weights} == set(dense)
    for weight in changes.weights:
        matrix = dense[weight.name]
        there = ~np.isnan(matrix)
        assert weight.shape == matrix.shape
        assert weight.count == there.sum()
        assert weight.norm == pytest.approx(np.sqrt(np.nansum(matrix.astype(float) ** 2)))
        assert weight.largest == np.nanmax(np.abs(matrix))
        np.testing.assert_array_equal(weight.rows, there.sum(axis=1))
        np.testing.assert_array_equal(weight.columns, there.sum(axis=0))
    entries = np.concatenate([matrix[~np.isnan(matrix)] for matrix in dense.values()])
    sizes = np.log10(np.abs(entries[entries != 0]))
    np.testing.assert_array_equal(changes.magnitudes, np.histogram(sizes, MAGNITUDES)[0])
    assert (changes.count, changes.zeros) == (entries.size, (entries == 0).sum())


def test_maps_are_of_the_largest_or_of_those_asked_for(sparse, dense):
    found = read_changes(sparse, []).maps
    assert sorted(one.weight.place[1] for one in found) == ["lm_head", "mlp.up_proj", "self_attn.q_proj"]
    (one,) = read_changes(sparse, ["1.mlp.up_proj.weight"]).maps
    there = ~np.isnan(dense["model.layers.1.mlp.up_proj.weight"])
    np.testing.assert_array_equal(one.counts, there)  # small enough for a cell each
    assert read_changes(sparse, ["proj.weight"]).maps == []  # an end of the name, by its parts


def test_low_rank(tmp_path):
    settings = config(tmp_path, method="lora", **{"lora.alpha": 8.0})
    checkpoint(tmp_path, 3, settings, lora_items())
    changes = read_changes(tmp_path, [])
    parts = lora_items()["trainable"]["model.layers.mlp.up_proj.weight"]
    products = np.einsum("lor,lri->loi", parts["lora_B"], parts["lora_A"]) * (8.0 / 4)
    assert [weight.norm for weight in changes.weights] == pytest.approx(
        [np.linalg.norm(product) for product in products], rel=1e-5
    )
    assert [weight.shape for weight in changes.weights] == [(12, 8)] * 2
    assert changes.count == 2 * 4 * (8 + 12)


def test_factors(tmp_path):
    names = ("model.layers.self_attn.k_proj.weight", "model.layers.mlp.down_proj.weight")
    trained = {name: np.ones((2, 4), np.float32) for name in names}
    trained[names[0]][1, 2] = 1.5
    checkpoint(
        tmp_path,
        3,
        config(tmp_path, method="ia3"),
        {"trainable": trained, "optimizer": {"count": np.ones(2)}},
    )
    changes = read_changes(tmp_path, [])
    found = {weight.name: (weight.shape, weight.norm) for weight in changes.weights}
    assert found["model.layers.1.self_attn.k_proj.weight"] == ((4, 1), 0.5)
    assert found["model.layers.0.mlp.down_proj.weight"] == ((1, 4), 0.0)


def test_of_other_methods_only_the_number_is_read(tmp_path):
    trained = {"w": np.ones((3, 4), np.float32), "b": {"c": np.ones(2, np.float32)}}
    checkpoint(
        tmp_path,
        3,
        config(tmp_path, method="full"),
        {"trainable": trained, "optimizer": {"count": np.ones(2)}},
    )
    changes = read_changes(tmp_path, [])
    assert (changes.kind, changes.count, changes.weights) == ("other", 14, [])
