"""A damaged checkpoint is told of, with the newest whole one; what was changed is not taken for saved."""

import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spiel_jax.checkpoint import (
    CheckpointError,
    Checkpoints,
    Damaged,
    newest_metadata,
    read_metadata,
    restore_state,
    restore_trainable,
    set_aside,
)
from spiel_jax.losses.next_token import Objective
from spiel_jax.methods.full import FullMethod
from spiel_jax.models import ModelConfig

CONFIG = ModelConfig(
    vocab_size=8, hidden_size=4, intermediate_size=4, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=4,
    max_positions=8,
)  # fmt: skip
METHOD = FullMethod(Objective(CONFIG), optax.adam(1.0), jnp.dtype("float32"))
STEPS = (1, 2, 3)


def state(step):
    values = jax.random.normal(jax.random.key(step), (40, 50))
    return METHOD.init({"weight": values, "small": values[0]})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    with Checkpoints(folder, keep=3) as checkpoints:
        for step in STEPS:
            checkpoints.save(step, state(step), METHOD, {"data": {"taken": step}}, float(step))
        checkpoints.wait()
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def read_all(folder):
    return read_metadata(folder), restore_state(folder, state(0), METHOD), restore_trainable(folder)


def removed(*names):
    def damage(place):
        for name in names:
            path = place / name
            path.unlink() if path.is_file() else shutil.rmtree(path)

    return damage


def cut(pattern, share=0.5):
    def damage(place):
        paths = list(place.glob(pattern))
        assert paths
        for path in paths:
            content = path.read_bytes()
            path.write_bytes(content[: int(share * len(content))])

    return damage


def emptied(place):
    shutil.rmtree(place)
    place.mkdir()


def replaced_by_a_file(place):
    shutil.rmtree(place)
    place.write_text("")


def of_another_step(place):
    shutil.rmtree(place)
    shutil.copytree(place.with_name("1"), place)


DAMAGES = {
    "emptied": (emptied, "its folder is empty"),
    "a file": (replaced_by_a_file, "it is a file"),
    "another's": (of_another_step, "is not what was saved"),
    "metadata lost": (removed("_CHECKPOINT_METADATA"), r"metadata \(_CHECKPOINT_METADATA\) is lost"),
    "metadata cut": (cut("_CHECKPOINT_METADATA"), r"metadata \(_CHECKPOINT_METADATA\) is lost or cut"),
    "a part lost": (removed("trainable"), "its part trainable is missing"),
    "structure lost": (removed("trainable/_METADATA"), "its part trainable cannot be read"),
    "structure cut": (cut("trainable/_METADATA"), "its part trainable cannot be read"),
    "manifest lost": (removed("optimizer/manifest.ocdbt"), "arrays of its part optimizer are missing"),
    "manifest cut": (cut("optimizer/manifest.ocdbt"), "what it holds cannot be read"),
    "data empty": (cut("trainable/ocdbt.process_0/d/*", 0), "its arrays cannot be read"),
    "data cut": (cut("trainable/ocdbt.process_0/d/*"), "its arrays cannot be read"),
}


SLOW = ("structure lost", "data empty")  # told like those that are cut


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind in SLOW else ()) for kind in DAMAGES]
)
def test_damage_is_named_with_the_newest_whole_one(kind, folder):
    damage, problem = DAMAGES[kind]
    damage(folder / "checkpoints" / "3")
    with pytest.raises(Damaged, match=problem) as error:
        read_all(folder)
    said = str(error.value)
    assert said.startswith(f"checkpoint 3 in {folder / 'checkpoints'} is damaged: ")
    assert "newest whole one is 2: --resume_from=2" in said
    assert "\n" not in said
    np.testing.assert_array_equal(restore_trainable(folder, 2)["weight"], state(2).trainable["weight"])
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["1", "2", "3"]
    # what is damaged can be moved away, and the run goes on
    assert [path.name for path in set_aside(folder, 2)] == ["3"]
    assert newest_metadata(folder)["step"] == 2


def test_whole_is_who_can_be_read_to_the_end(folder):
    cut("optimizer/**/d/*", 0)(folder / "checkpoints" / "2")
    emptied(folder / "checkpoints" / "3")
    with pytest.raises(Damaged, match="newest whole one is 1:"):
        read_metadata(folder)
    emptied(folder / "checkpoints" / "1")
    with pytest.raises(Damaged, match="No other in the folder is whole"):
        read_metadata(folder)
    with pytest.raises(CheckpointError, match=r"no checkpoint 4 in .*: there are 1, 2, 3"):
        read_metadata(folder, 4)


def test_the_best_is_found_by_what_is_sealed(folder):
    assert read_metadata(folder, "best")["step"] == 1
    place = folder / "checkpoints" / "1" / "_CHECKPOINT_METADATA"
    place.write_text(place.read_text().replace('"heldout_loss": 1.0', '"heldout_loss": 9.0'))
    with pytest.raises(Damaged, match=r"checkpoint 1 in .* is not what was saved"):
        read_metadata(folder, "best")


def test_nothing_that_is_in_the_way_is_overwritten_when_set_aside(folder):
    shutil.copytree(folder / "checkpoints" / "3", folder / "set_aside" / "3")
    assert [path.name for path in set_aside(folder, 1)] == ["2", "3-2"]
    assert set_aside(folder, 1) == []


def test_another_structure_is_no_damage(folder):
    like = METHOD.init({"weight": jnp.zeros((40, 51)), "other": jnp.zeros(3)})
    with pytest.raises(
        CheckpointError, match=r"does not fit: .*weight is float32\[40, 50\] there, .*51"
    ) as error:
        restore_state(folder, like, METHOD)
    assert not isinstance(error.value, Damaged)


def flip(place, seed):
    """One bit of one of a checkpoint's files, any byte of them as likely as another."""
    source = random.Random(seed)
    files = sorted(path for path in place.rglob("*") if path.is_file() and path.stat().st_size)
    (path,) = source.choices(files, [path.stat().st_size for path in files])
    content = bytearray(path.read_bytes())
    content[source.randrange(len(content))] ^= 1 << source.randrange(8)
    path.write_bytes(content)
    return path.relative_to(place)


def flipped(folder, seeds):
    """How many of the flips were refused; the others changed nothing of what is read."""
    place, refused = folder / "checkpoints" / "3", 0
    expected = jax.device_get(read_all(folder))
    for seed in seeds:
        shutil.rmtree(place)
        shutil.copytree(folder / "whole", place)
        name = flip(place, seed)
        try:
            found = jax.device_get(read_all(folder))
        except CheckpointError:
            refused += 1
            continue
        assert found[0] == expected[0], f"{seed}: {name}"
        jax.tree.map(np.testing.assert_array_equal, found[1:], expected[1:])
    return refused


def test_a_flipped_bit_is_refused_or_changes_nothing(folder):
    shutil.copytree(folder / "checkpoints" / "3", folder / "whole")
    flipped(folder, range(5))


def test_a_flipped_bit_of_the_values_is_refused(folder):
    files = [path for path in (folder / "checkpoints" / "3" / "trainable").rglob("d/*") if path.is_file()]
    values = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(values.read_bytes())
    content[len(content) // 2] ^= 1
    values.write_bytes(content)
    with pytest.raises(CheckpointError):
        read_all(folder)


@pytest.mark.slow
def test_200_flipped_bits_are_refused_or_change_nothing(folder):
    """Which bytes are read, and so how many flips are refused, differs from save to save: most of them."""
    shutil.copytree(folder / "checkpoints" / "3", folder / "whole")
    assert flipped(folder, range(1000, 1200)) > 100
