"""Other block grids for a state, entry by entry against brute force, and for a run's folder."""

import json
import math
import shutil
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import flags
from support.run_cases import chat_file, losses, run, tiny_config
from support.sparse_cases import places

import spiel_jax as sj
from spiel_jax import cli
from spiel_jax import regrid as command
from spiel_jax.checkpoint import CheckpointError, Checkpoints, read_metadata, restore_deltas
from spiel_jax.config import ConfigError, flatten
from spiel_jax.errors import NotFoundError, SpielError
from spiel_jax.methods.method import Method, TrainState
from spiel_jax.models import open_model
from spiel_jax.optim import block_grid
from spiel_jax.optim.criteria.accumulated_gradients import CandidateStats
from spiel_jax.sparse.delta import merge
from spiel_jax.training import regridding
from spiel_jax.training.regridding import regrid

SHAPE = (12, 24)
TARGETS = {
    "whole": sj.Target(SHAPE, 40),
    "stack": sj.Target(SHAPE, 30, stack=(2, 2)),
    "blocks": sj.Target(SHAPE, 48, stack=(3,), grid=(2, 3)),
    "w@0,2": sj.Target(SHAPE, 32, stack=(2,), grid=(4, 1), layers=(0, 2)),
}
GRIDS = [(1, 1), (2, 3), (3, 2), (4, 4), (1, 6), (12, 24)]
AG, MA = sj.AccumulatedGradients(ratio=0.7), sj.MomentApproximation()
METHODS = {
    "ag": (AG, sj.aged_adamw(0.1)),
    "ma": (MA, sj.sparse_sm3(0.1, TARGETS)),
    "ma shared": (sj.MomentApproximation(shared=True), sj.sparse_sm3(0.1, TARGETS)),
    "random": (sj.RandomGrowth(), optax.lion(0.1)),
    "static": (sj.NoGrowth(), optax.amsgrad(0.1)),
}
PLAN = sj.Reselection(9, 3, 2)


def filled(state, targets, growth, unused=0.3, seed=0):
    """A state with random numbers wherever a run would have some; some slots are unused."""
    rng = np.random.default_rng(seed)

    def random(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.array(rng.uniform(1, 2, leaf.shape), leaf.dtype)
        return jnp.array(rng.integers(1, 99, leaf.shape), leaf.dtype)

    def distinct(shape, size, unused):
        rows = [rng.permutation(size)[: shape[-1]] for _ in range(math.prod(shape[:-1]))]
        rows = np.array(rows, np.int32).reshape(shape)
        return jnp.array(np.where(rng.random(shape) < unused, size, rows))

    active, stats = {}, {}
    for name, target in targets.items():
        indices = distinct((*target.lead, target.block_count), target.block_size, unused)
        active[name] = target.delta(indices)
        stats[name] = jax.tree.map(random, state.growth[name])
        if isinstance(stats[name], CandidateStats):
            candidates = distinct((*target.lead, growth.count(target)), target.block_size, unused)
            sevens = jnp.full(target.lead, 7, jnp.int32)
            stats[name] = stats[name]._replace(indices=candidates, samples=sevens, steps=sevens)
    values = {name: random(jnp.zeros(delta.indices.shape)) for name, delta in active.items()}
    state = state._replace(active=active, growth=stats, inner=jax.tree.map(random, state.inner))
    # unused slots hold nothing
    used = {name: delta.indices < targets[name].block_size for name, delta in active.items()}
    state = state._replace(inner=cleared(state.inner, used))
    return TrainState({}, {}, {name: jnp.where(used[name], v, 0) for name, v in values.items()}, state)


def convert(state, targets, grids, growth):
    values, opt_state, changed = block_grid.convert(state.trainable, state.opt_state, targets, grids, growth)
    return TrainState({}, {}, values, opt_state), changed


def is_per_slot(path, leaf, name, shape):
    """Whether a leaf holds a number for each slot of a target, which has values of this shape."""
    moments = any(getattr(key, "name", "").endswith("_moments") for key in path)
    return any(getattr(key, "key", None) == name for key in path) and leaf.shape == shape and not moments


def cleared(tree, used):
    """A tree with 0 in the unused slots."""

    def clear(path, leaf):
        masks = [mask for name, mask in used.items() if is_per_slot(path, leaf, name, mask.shape)]
        return jnp.where(masks[0], leaf, 0) if masks else leaf

    return jax.tree_util.tree_map_with_path(clear, tree)


def made(method, targets=TARGETS, **options):
    growth, inner = METHODS[method]
    tx = sj.spiel(inner, targets, growth=growth, schedule=PLAN)
    return filled(tx.init(sj.zeros(targets)), targets, growth, **options)


def entries(target, indices, *arrays):
    """Entry of the weight to what the arrays hold for it; as many as there are slots in use."""
    delta = target.delta(np.asarray(indices))
    found = {entry: tuple(np.asarray(a)[slot] for a in arrays) for slot, entry in places(delta)}
    assert len(found) == np.sum(np.asarray(indices) < target.block_size)
    return found


def per_slot(state, name, target):
    """Every array of a state that has a number per slot of a target."""
    leaves = jax.tree_util.tree_leaves_with_path((state.trainable, state.opt_state.inner))
    shape = (*target.lead, target.block_count)
    return [leaf for path, leaf in leaves if is_per_slot(path, leaf, name, shape)]


@pytest.mark.parametrize("method", METHODS)
def test_every_entry_keeps_what_the_state_holds_for_it(method):
    state = made(method)
    growth, inner = METHODS[method]
    arrays = {"ag": 4, "ma": 1, "ma shared": 1, "random": 2, "static": 4}[method]
    for grid in GRIDS:
        new, changed = convert(state, TARGETS, dict.fromkeys(TARGETS, grid), growth)
        targets = {name: change.new for name, change in changed.items()}
        for name, target in targets.items():
            before, after = per_slot(state, name, TARGETS[name]), per_slot(new, name, target)
            assert len(before) == len(after) == arrays
            was = entries(TARGETS[name], state.opt_state.active[name].indices, *before)
            found = entries(target, new.opt_state.active[name].indices, *after)
            assert found == was
            assert changed[name].entries == len(was)
            unused = new.opt_state.active[name].indices == target.block_size
            assert not any(np.any(array[unused]) for array in after)
            # no slot more than the fullest block needs
            fullest = (~unused).sum(-1).max()
            assert target.block_count == fullest
            assert changed[name].unused == pytest.approx(np.mean(unused))
        # what a trainer expects of a run with these targets
        inner = sj.sparse_sm3(0.1, targets) if method.startswith("ma") else inner
        expected = jax.eval_shape(
            lambda t=targets, i=inner: sj.spiel(i, t, growth=growth, schedule=PLAN).init(sj.zeros(t))
        )
        shapes, wanted = (jax.tree.map(lambda x: (x.shape, x.dtype), t) for t in (new.opt_state, expected))
        assert shapes == wanted
        assert new.opt_state.spiel_count == state.opt_state.spiel_count


def test_without_unused_slots_coarsening_puts_blocks_together():
    targets = {"w": sj.Target((4, 8), 16, stack=(2,), grid=(2, 2))}
    state = made("static", targets, unused=0)
    new, changed = convert(state, targets, {"w": (1, 2)}, sj.NoGrowth())
    assert changed["w"].new == sj.Target((4, 8), 16, stack=(2,), grid=(1, 2))
    assert changed["w"].unused == 0
    indices = state.opt_state.active["w"].indices.reshape(2, 2, 2, 4)
    lower = indices + jnp.array([0, 8])[:, None, None]  # the lower block starts after two rows of four
    expected = lower.swapaxes(1, 2).reshape(2, 1, 2, 8)
    np.testing.assert_array_equal(new.opt_state.active["w"].indices, expected)
    values = state.trainable["w"].swapaxes(1, 2).reshape(2, 1, 2, 8)
    np.testing.assert_array_equal(new.trainable["w"], values)
    back, again = convert(new, {"w": changed["w"].new}, {"w": (2, 2)}, sj.NoGrowth())
    assert again["w"].new == targets["w"]
    jax.tree.map(np.testing.assert_array_equal, back, state)


def test_the_bounds_of_rows_and_columns_hold_for_the_new_blocks():
    state = made("ma")
    for grid in GRIDS:
        new, changed = convert(state, TARGETS, dict.fromkeys(TARGETS, grid), MA)
        for name, change in changed.items():
            was, now = (
                [
                    np.asarray(array).reshape(-1, *target.grid, array.shape[-1])
                    for array in (*s.opt_state.growth[name], *sm3(s, name))
                ]
                for target, s in ((change.old, state), (change.new, new))
            )
            for old, found, rows in zip(was, now, (True, False, True, False), strict=True):
                np.testing.assert_array_equal(found, joined(old, change.old, change.new, rows))


def sm3(state, name):
    return [optax.tree.get(state.opt_state.inner, f"{side}_moments")[name] for side in ("row", "column")]


def joined(bounds, old, new, rows):
    """Of each line of each new block, the largest bound of the old blocks that it meets."""
    expected = np.zeros((len(bounds), *new.grid, new.block[0 if rows else 1]), bounds.dtype)
    for i in range(old.shape[0]):
        for j in range(old.shape[1]):
            at, to = ((i // t.block[0], j // t.block[1]) for t in (old, new))
            line = [i % t.block[0] if rows else j % t.block[1] for t in (old, new)]
            here = (slice(None), *to, line[1])
            expected[here] = np.maximum(expected[here], bounds[(slice(None), *at, line[0])])
    return expected


def test_candidates_move_and_those_of_largest_sum_have_precedence():
    state = made("ag")
    some = 0
    for grid in GRIDS:
        new, changed = convert(state, TARGETS, dict.fromkeys(TARGETS, grid), AG)
        for name, change in changed.items():
            before, after = state.opt_state.growth[name], new.opt_state.growth[name]
            was, found = (
                entries(target, s.indices, s.grad_sum, s.grad_sq_sum)
                for target, s in ((change.old, before), (change.new, after))
            )
            assert after.indices.shape[-1] == AG.count(change.new)
            assert found.items() <= was.items()
            lost = was.items() - found.items()
            assert len(lost) == change.forgotten
            some += len(lost)
            rows, columns = change.new.block

            def block(entry, rows=rows, columns=columns):
                return *entry[:-2], entry[-2] // rows, entry[-1] // columns

            room = Counter(map(block, found))
            for entry, (total, _) in lost:
                assert room[block(entry)] == AG.count(change.new)
                assert all(total <= s for e, (s, _) in found.items() if block(e) == block(entry))
            assert np.all(after.samples == 7)
            assert np.all(after.steps == 7)
            assert after.samples.shape == change.new.lead
    assert some > 0


def test_every_block_draws_with_a_key_of_its_own():
    state = made("random")
    new, changed = convert(state, TARGETS, dict.fromkeys(TARGETS, (2, 3)), sj.RandomGrowth())
    for name, change in changed.items():
        was, keys = (np.asarray(s.opt_state.growth[name]) for s in (state, new))
        assert keys.shape == (*change.new.lead, 2)
        if change.old.grid == (2, 3):
            np.testing.assert_array_equal(keys, was)
        assert len({*map(tuple, keys.reshape(-1, 2))}) == keys.size // 2


def test_a_grid_that_does_not_divide_a_weight_is_refused():
    with pytest.raises(
        ValueError, match=r"stack: a grid of \(5, 1\) blocks does not divide a weight of \(12, 24\)"
    ):
        convert(made("static"), TARGETS, dict.fromkeys(TARGETS, (1, 1)) | {"stack": (5, 1)}, sj.NoGrowth())


def test_a_state_of_whole_matrices_is_refused():
    state = made("static")
    inner = {"whole": {"w@0,2": jnp.zeros((2, 3))}, "state": state.opt_state.inner}
    state = TrainState({}, {}, state.trainable, state.opt_state._replace(inner=inner))
    with pytest.raises(ValueError, match=r"\['whole'\].* shape \(2, 3\) does not belong to entries"):
        convert(state, TARGETS, dict.fromkeys(TARGETS, (1, 1)), sj.NoGrowth())


# ------------------------------------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return chat_file(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(llama_folder, data, tmp_path_factory):
    """A static mask, whose numbers do not depend on the blocks: the config, the whole run and half of it."""
    folder = tmp_path_factory.mktemp("static")
    config = tiny_config(llama_folder, data, "magnitude")
    run(config, folder / "whole")
    run(config, folder / "half", until=3)
    return config, folder / "whole", folder / "half"


@pytest.mark.slow
def test_a_regridded_run_of_a_static_mask_is_the_uninterrupted_one(whole, tmp_path):
    config, expected, half = whole
    before = {path: path.read_bytes() for path in half.rglob("*") if path.is_file()}
    changed = regrid(half, {"fsdp": 2, "tensor": 4}, tmp_path / "fine")
    assert before == {path: path.read_bytes() for path in half.rglob("*") if path.is_file()}
    assert {name: change.new.grid for name, change in changed.items()} == {
        "model.layers.self_attn.o_proj.weight": (2, 4),
        "model.layers.mlp.up_proj.weight": (4, 2),
    }
    base = open_model(config.model.source).load(jnp.float32, progress=False)
    one, other = (merge(base, restore_deltas(folder)) for folder in (half, tmp_path / "fine"))
    jax.tree.map(np.testing.assert_array_equal, one, other)

    assert run(config, tmp_path / "fine").step == 6
    regrid(tmp_path / "fine", {"fsdp": 1, "tensor": 1}, tmp_path / "again")
    for folder in ("fine", "again"):
        one, other = (merge(base, restore_deltas(path)) for path in (expected, tmp_path / folder))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, other)
        assert losses(tmp_path / folder) == pytest.approx(losses(expected), rel=1e-6)


def test_the_new_folder_is_one_of_the_new_grid(whole, tmp_path):
    config, _, half = whole
    regrid(half, {"tensor": 2}, tmp_path / "new")
    metadata, old = read_metadata(tmp_path / "new"), read_metadata(half)
    assert metadata["step"] == old["step"] == 3
    assert metadata["config"] == old["config"] | {"targets.grid.tensor": 2}
    assert metadata["config"] == json.loads((tmp_path / "new" / "config.json").read_text())
    assert metadata["data"] == old["data"]
    assert metadata["fingerprint"] == old["fingerprint"]
    assert all(target["count"] % 2 == 0 for target in metadata["targets"].values())
    config = config.copy_and_resolve_references()
    config.targets.grid.tensor = 4
    with pytest.raises(ConfigError, match=r"targets.grid.tensor: 2 there, 4 now"):
        run(config, tmp_path / "new")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spiel_ag", "spiel_ma", "random", "gradient"])
def test_a_regridded_run_continues_with_the_same_numbers_until_it_reselects(
    llama_folder, data, tmp_path, method
):
    config = tiny_config(llama_folder, data, method)
    if method == "random":
        config.spiel.first, config.spiel.rate = 1.0, 0.2
    run(config, tmp_path / "whole")
    run(config, tmp_path / "half", until=3)
    changed = regrid(tmp_path / "half", {"fsdp": 2, "tensor": 2}, tmp_path / "new")
    assert run(config, tmp_path / "new").step == 6
    found, expected = losses(tmp_path / "new"), losses(tmp_path / "whole")
    assert list(found) == list(expected)
    for step in range(1, 7 if method == "gradient" else 5):
        assert found[step] == pytest.approx(expected[step], rel=1e-5)
    for name, delta in restore_deltas(tmp_path / "new").items():
        used = np.sum(np.asarray(delta.indices) < changed[name].new.block_size)
        assert used == changed[name].entries if method == "gradient" else used > changed[name].entries


def test_what_cannot_be_converted_is_refused(whole, tmp_path):
    config, expected, half = whole
    with pytest.raises(
        ValueError, match=r"tensor=5 does not divide .*weight of \(\d+, \d+\): expected a divisor"
    ):
        regrid(half, {"tensor": 5}, tmp_path / "new")
    with pytest.raises(
        ValueError, match="grid data=2: expected positive numbers of blocks along fsdp and tensor"
    ):
        regrid(half, {"data": 2}, tmp_path / "new")
    with pytest.raises(CheckpointError, match="no folder of a run"):
        regrid(tmp_path / "none", {"tensor": 2}, tmp_path / "new")
    with pytest.raises(CheckpointError, match=r"no checkpoint 2 in .*: there are 3"):
        regrid(half, {"tensor": 2}, tmp_path / "new", step=2)
    with pytest.raises(CheckpointError, match="is there already and not empty"):
        regrid(half, {"tensor": 2}, expected)
    config = config.copy_and_resolve_references()
    config.method = "lora"
    with Checkpoints(tmp_path / "lora") as checkpoints:
        metadata = {"config": flatten(config)}
        checkpoints.save(
            1, TrainState({}, {}, {"w": jnp.zeros(2)}, optax.sgd(1.0).init({})), Method(), metadata
        )
    with pytest.raises(
        CheckpointError, match="no sparse deltas: method 'lora' trains none, and its checkpoints"
    ):
        regrid(tmp_path / "lora", {"tensor": 2}, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_base_model_that_lies_elsewhere_now(whole, llama_folder, tmp_path, monkeypatch):
    _, _, half = whole
    metadata = read_metadata(half)
    moved = metadata | {"config": metadata["config"] | {"model.source": str(tmp_path / "gone")}}
    monkeypatch.setattr(regridding, "read_metadata", lambda *_: moved)
    with pytest.raises(NotFoundError, match=r"no model at .*gone.*elsewhere now, name the place: --model="):
        regrid(half, {"tensor": 2}, tmp_path / "new")
    (tmp_path / "here").mkdir()
    shape = json.loads((llama_folder / "config.json").read_text())
    (tmp_path / "here" / "config.json").write_text(json.dumps(shape | {"rms_norm_eps": 0.5}))
    with pytest.raises(CheckpointError, match=r"on another model than .*here: .*eps"):
        regrid(half, {"tensor": 2}, tmp_path / "new", model=str(tmp_path / "here"))
    (tmp_path / "here" / "config.json").write_text(json.dumps(shape))
    regrid(half, {"tensor": 2}, tmp_path / "new", model=str(tmp_path / "here"))
    assert restore_deltas(tmp_path / "new").keys() == restore_deltas(half).keys()


def test_command_line(whole, tmp_path, monkeypatch, capsys):
    _, _, half = whole
    shutil.copytree(half, tmp_path / "run")

    monkeypatch.chdir(tmp_path)

    def parsed(grid):
        options = flags.FlagValues()
        command.define_flags(options)
        cli.parse(options, ["regrid", "--workdir=run", f"--grid={grid}", "--out=new"])
        return options

    with pytest.raises(SpielError, match="flag --grid=fsdp:2: expected sizes of mesh axes"):
        parsed("fsdp:2")
    command.main(parsed("fsdp=16,tensor=8"))
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert lines[0].split() == ["target", "grid", "slots", "per", "block", "unused"]
    assert any("mlp.up_proj.weight" in line and "1x1 -> 8x16" in line for line in lines)
    assert "% of the slots are unused" in shown
    assert "--workdir=new" in lines[-1]
    assert read_metadata(tmp_path / "new")["config"]["targets.grid.fsdp"] == 16
