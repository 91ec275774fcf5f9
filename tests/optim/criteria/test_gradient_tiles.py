"""Rectangles of largest gradient: by hand, in the step of a model against dense autodiff, on other grids."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import mesh_cases
from support.mesh_cases import CONFIG, adapted, batch

import spiel_jax as sj
from spiel_jax.errors import SpielError
from spiel_jax.losses.next_token import Objective
from spiel_jax.methods.sparse import SparseMethod
from spiel_jax.models import init_params
from spiel_jax.optim.criteria.gradient_tiles import LargestGradientTiles

PLAN = sj.Reselection(2, 2, 2, sj.constant(0.0), first=1.0)
GROWTH = LargestGradientTiles(4, 8)
RULES = (r".*\.q_proj\.weight", r".*\.1\.mlp\.down_proj\.weight")
OBJECTIVE = Objective(CONFIG, loss_chunk=16)


def method(targets, growth=GROWTH):
    tx = sj.spiel(sj.aged_adamw(0.0), targets, growth=growth, schedule=PLAN)
    return SparseMethod(OBJECTIVE, tx, targets, growth, schedule=PLAN)


def dense_sums(params, names):
    """Name to the sum over micro-batches of |gradient|, each of its share of the step's mean loss."""
    total = dict.fromkeys(names, 0.0)
    some = {name: params[name] for name in names}

    @jax.jit
    def gradient(micro, supervised):
        return jax.grad(lambda some: OBJECTIVE(params | some, micro) / supervised)(some)

    for number in (1, 2):
        data = batch(number, 2)
        for micro in range(2):
            one = gradient({key: array[micro] for key, array in data.items()}, data["weights"].sum())
            total = {name: total[name] + np.abs(np.asarray(one[name], np.float64)) for name in names}
    return total


@pytest.mark.slow
@pytest.mark.parametrize("grid", [False, True])
def test_the_rectangles_of_largest_gradient_are_chosen(grid):
    blocks = {"fsdp": 2, "tensor": 2} if grid else {}
    targets = adapted(blocks, RULES, num_tunable=3 * 300 + 500)
    params = init_params(CONFIG, jax.random.key(0), jnp.float32)
    state = mesh_cases.after_phase(method(targets), params)
    sums = dense_sums(params, {name.partition("@")[0] for name in targets})
    for name, delta in sj.deltas(state.trainable, state.opt_state).items():
        target, (height, width) = targets[name], delta.block
        dense = sums[name.partition("@")[0]]
        dense = dense if delta.layers is None else dense[list(delta.layers)]
        inside = dense.reshape(len(dense), -1, height // 4, 4, delta.grid[1], width // 8, 8).mean((3, 6))
        scores = inside.swapaxes(2, 3).reshape(-1, (height // 4) * (width // 8))
        number = target.block_count // 32
        indices = np.sort(np.asarray(delta.indices)).reshape(-1, target.block_count)
        for row, score in zip(indices, scores, strict=True):
            used = row[row < target.block_size]
            assert used.size == 32 * number < target.block_count + (target.block_count % 32 == 0)
            chosen = np.unique(used // width // 4 * (width // 8) + used % width // 8)
            np.testing.assert_array_equal(chosen, np.sort(np.argsort(-score, kind="stable")[:number]))


@pytest.mark.slow
def test_on_a_mesh_they_choose_the_same():
    targets, found = adapted({"fsdp": 2, "tensor": 2}, RULES, num_tunable=3 * 300 + 500), []
    for sizes in ((1, 1, 1), (2, 2, 2)):
        mesh, training = mesh_cases.mesh_of(*sizes), method(targets)
        with jax.set_mesh(mesh):
            state, shardings = mesh_cases.placed(training, mesh)
            step = mesh_cases.compiled_step(training, shardings)
            for number in (1, 2):
                data = jax.device_put(batch(number), mesh_cases.batch_sharding(mesh, 1))
                phase, reselect = training.step_kind(number)
                state, _ = step(state, data, phase=phase, reselect=reselect)
            found.append(mesh_cases.positions(state))
    for name in found[0]:
        np.testing.assert_array_equal(*(np.sort(one[name]) for one in found))


def test_what_does_not_fit_is_refused():
    with pytest.raises(SpielError, match=r"parts of \(3, 6\) .* do not divide a block of \(4, 6\) of w"):
        LargestGradientTiles(3, None).init({"w": sj.Target((4, 6), 20)}, {})
    with pytest.raises(SpielError, match=r"w: 13 entries are not one part of \(4, 6\)"):
        LargestGradientTiles(4, None).init({"w": sj.Target((4, 6), 13)}, {})


def test_sums_move_with_their_rectangles():
    old = sj.Target((8, 12), 32, stack=(2,), grid=(2, 1))
    new = replace(old, grid=(1, 2))
    growth = LargestGradientTiles(2, 3)
    gradient = np.random.default_rng(0).normal(size=(2, 8, 12)).astype(np.float32)
    before, after = (
        np.stack([growth.measure(jnp.array(matrix), target.block) for matrix in gradient])
        for target in (old, new)
    )
    moved = growth.regrid(before, SimpleNamespace(old=old, new=new))
    np.testing.assert_array_equal(moved, after)
    with pytest.raises(SpielError, match=r"parts of \(4, 1\) .* would be of \(8, 1\)"):
        LargestGradientTiles(None, 1).regrid(before, SimpleNamespace(old=old, new=new))
