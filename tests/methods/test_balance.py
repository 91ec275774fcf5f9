"""Balanced sets: parts of rows and columns with as many entries each, whatever chooses them."""

import jax
import numpy as np
import pytest
from support import mesh_cases
from support.mesh_cases import CONFIG

from spiel_jax.config import LINEAR_LAYERS, ConfigError, check_config, default_config
from spiel_jax.errors import SpielError
from spiel_jax.methods.configured import configured_grid, configured_targets
from spiel_jax.methods.registry import build

DOWN, UP = "model.layers.mlp.down_proj.weight", "model.layers.mlp.up_proj.weight"  # (32, 64) and (64, 32)


def configured(method="spiel_ag", rows=None, columns=None, **grid):
    config = default_config()
    config.method = method
    config.model.source = "random"
    config.data.sources = ("chat.jsonl",)
    config.targets.num_tunable = 3 * 1600
    config.targets.grid.update({"fsdp": 1, "tensor": 1} | grid)
    config.targets.balance.update({"rows": rows, "columns": columns})
    config.spiel.every = config.spiel.accumulation = 2
    config.spiel.rate = 0.2  # of random too
    config.spiel.filter_rank = 4
    config.batch_size = mesh_cases.ROWS
    config.optimizer.learning_rate = 1e-2
    return config


@pytest.mark.parametrize(
    ("sizes", "down", "up"),
    [
        ({}, (1, 1), (1, 1)),
        ({"rows": 1}, (32, 1), (64, 1)),
        ({"rows": 16, "columns": 16}, (2, 4), (4, 2)),
        ({"columns": 1}, (1, 64), (1, 32)),
        ({"rows": 16, "fsdp": 4}, (4, 1), (4, 4)),  # a block of down_proj has 8 rows: see below
        ({"rows": 8, "fsdp": 2, "tensor": 2}, (4, 2), (8, 2)),
    ],
)
def test_parts_are_cut_from_the_blocks_of_the_mesh(sizes, down, up):
    grid = configured_grid(configured(**sizes), CONFIG)
    if sizes == {"rows": 16, "fsdp": 4}:
        with pytest.raises(SpielError, match=r"rows = 16 does not divide the 8 rows .*: expected 1 or"):
            grid(DOWN)
    else:
        assert (grid(DOWN), grid(UP)) == (down, up)


def test_a_model_s_norms_are_no_weights_to_be_cut():
    targets = configured_targets(configured(rows=16, columns=16), CONFIG)
    assert {target.block for target in targets.values()} == {(16, 16)}


def per_part(state, parts):
    """Entries of each part of each matrix of the weights, counted in the whole matrix."""
    for name, delta in mesh_cases.sj.deltas(state.trainable, state.opt_state).items():
        rows, columns = (np.asarray(axis).reshape(CONFIG.num_layers, -1) for axis in delta.coordinates())
        for matrix in zip(rows, columns, strict=True):
            mask = np.zeros(delta.shape, int)
            mask[matrix] = 1
            assert mask.sum() == matrix[0].size  # distinct
            height, width = parts[0] or delta.shape[0], parts[1] or delta.shape[1]
            yield name, mask.reshape(mask.shape[0] // height, height, -1, width).sum((1, 3))


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        ("spiel_ag", (1, None)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("gradient", (8, 8)),
                ("random", (None, 1)),
                ("magnitude", (1, None)),
                ("lift", (16, 16)),
            ]
        ),
    ],
)
def test_every_part_has_as_many_entries_after_a_reselection_too(method, parts):
    config = configured(method, *parts)
    config.targets.rules = (r".*\.(o|up)_proj\.weight",) if method == "spiel_ag" else LINEAR_LAYERS
    check_config(config)
    training = build(config, CONFIG, 8)
    state = jax.jit(training.init)(mesh_cases.pretrained())
    step = jax.jit(
        lambda s, b, phase, reselect: training.step(s, b, phase=phase, reselect=reselect),
        static_argnames=("phase", "reselect"),
    )
    before = mesh_cases.positions(state)
    for number in (1, 2):
        phase, reselect = training.step_kind(number)
        state, metrics = step(state, mesh_cases.batch(number), phase=phase, reselect=reselect)
        assert np.isfinite(metrics["loss"])
    after = mesh_cases.positions(state)
    assert (method == "magnitude") == all(np.array_equal(before[n], after[n]) for n in before)
    for name, counts in per_part(state, parts):
        assert np.all(counts == training.targets[name].block_count)
        assert counts.size > 1


@pytest.mark.parametrize(
    ("method", "key", "value", "message"),
    [
        (
            "spiel_ma",
            "targets.balance.rows",
            1,
            "balance.rows = 1: expected None: SM3 keeps a number for each",
        ),
        ("spiel_ag", "targets.balance.columns", 0, "balance.columns = 0: expected at least 1"),
        ("random", "init_from.adapter", "somewhere", "expected unset: the entries of an adapter are where"),
    ],
)
def test_what_cannot_be_balanced_is_refused(method, key, value, message):
    config = configured(method, rows=8)
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ConfigError, match=message):
        check_config(config)


def test_a_part_without_an_entry_is_told():
    with pytest.raises(SpielError, match="would get no active entry: raise the budget"):
        configured_targets(configured(rows=1, columns=4), CONFIG)
