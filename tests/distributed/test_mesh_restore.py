"""A checkpoint written on one mesh of eight virtual devices is continued on others, and regridded."""

import shutil

import numpy as np
import pytest
from support.run_cases import chat_file, losses, run, tiny_config

from spiel_jax.checkpoint import read_metadata, restore_deltas
from spiel_jax.regrid import regrid

GRID = {"fsdp": 4, "tensor": 2}
STOP = 3  # inside an estimation phase
slow = pytest.mark.slow


class Runs:
    """The uninterrupted run and one killed after ``STOP`` steps, both on the mesh like the grid."""

    def __init__(self, config, folder):
        self.config, self.whole, self.part = config, folder / "whole", folder / "part"
        config.checkpoint_every = STOP
        run(config, self.whole, **GRID)
        shutil.copytree(self.whole, self.part)
        shutil.rmtree(self.part / "checkpoints" / "6")

    def copy(self, folder):
        return shutil.copytree(self.part, folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return chat_file(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", params=["spiel_ag", *(pytest.param(m, marks=slow) for m in ("spiel_ma",))])
def runs(request, llama_folder, data, tmp_path_factory):
    config = tiny_config(llama_folder, data, request.param)
    config.targets.grid = GRID
    return Runs(config, tmp_path_factory.mktemp(request.param))


def check_continued(runs, folder, steps=6):
    """The run in ``folder`` is the uninterrupted one up to this many steps."""
    found, expected = losses(folder), losses(runs.whole)
    assert list(found) == list(expected) == list(range(1, 7))
    for step in range(1, steps + 1):
        assert found[step] == pytest.approx(expected[step], rel=1e-5), step


@pytest.mark.parametrize(
    "mesh",
    [
        {"data": 1, "fsdp": 2, "tensor": 1},
        *(
            pytest.param({"data": data, "fsdp": fsdp, "tensor": tensor}, marks=slow)
            for data, fsdp, tensor in [(1, 1, 2), (1, 1, 1), (2, 2, 1), (1, 2, 2), (4, 1, 2), (1, 4, 2)]
        ),
    ],
    ids=lambda mesh: "x".join(map(str, mesh.values())),
)
def test_any_mesh_that_divides_the_grid_continues_the_run(runs, tmp_path, mesh):
    folder = runs.copy(tmp_path / "run")
    config = runs.config.copy_and_resolve_references()
    config.targets.grid = {"fsdp": None, "tensor": None}  # the folder knows
    assert run(config, folder, **mesh).step == 6
    check_continued(runs, folder)
    one, other = restore_deltas(runs.whole), restore_deltas(folder)
    for name, delta in one.items():
        np.testing.assert_array_equal(other[name].indices, delta.indices)
        np.testing.assert_allclose(other[name].values, delta.values, atol=2e-5)


@pytest.mark.slow
def test_a_mesh_that_does_not_divide_the_grid_needs_another_grid(runs, tmp_path):
    folder = runs.copy(tmp_path / "run")
    mesh = {"data": 1, "fsdp": 1, "tensor": 4}
    message = "does not divide .* of 2 blocks along tensor: use a mesh of tensor=1 or 2, or regrid the run to"
    with pytest.raises(ValueError, match=rf"mesh tensor=4 {message} 4 blocks \(python -m spiel_jax.regrid"):
        run(runs.config, folder, **mesh)

    changed = regrid(folder, {"tensor": 4}, tmp_path / "new")
    assert {change.new.grid for change in changed.values()} == {(4, 4)}
    config = runs.config.copy_and_resolve_references()
    config.targets.grid = {"fsdp": None, "tensor": None}
    assert run(config, tmp_path / "new", **mesh).step == 6
    check_continued(runs, tmp_path / "new", steps=4)  # it ends with a reselection within the new blocks
    stored = read_metadata(tmp_path / "new")["targets"]
    assert {name: target["count"] for name, target in stored.items()} == {
        name: change.new.count for name, change in changed.items()
    }
    for name, delta in restore_deltas(tmp_path / "new").items():
        used = np.asarray(delta.indices) < delta.block[0] * delta.block[1]
        assert changed[name].entries < used.sum() <= changed[name].new.total  # some were filled


@slow
@pytest.mark.parametrize("method", ["lora", "full", "ia3"])
def test_methods_without_deltas_take_any_mesh(llama_folder, data, tmp_path, method):
    config = tiny_config(llama_folder, data, method)
    config.targets.rules = (r".*\.(k|up|down)_proj\.weight",)
    config.steps = 4
    assert run(config, tmp_path / "one").step == 4
    assert run(config, tmp_path / "many", until=2, fsdp=2, tensor=2).step == 2
    assert run(config, tmp_path / "many", fsdp=4).step == 4
    expected, found = losses(tmp_path / "one"), losses(tmp_path / "many")
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)
