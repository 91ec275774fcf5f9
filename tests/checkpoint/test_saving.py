"""Which checkpoints are kept, and what is said when one cannot be saved."""

import logging
import os
import resource
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spiel_jax.checkpoint import CheckpointError, Checkpoints, read_metadata, restore_trainable
from spiel_jax.losses.next_token import Objective
from spiel_jax.methods.full import FullMethod
from spiel_jax.models import ModelConfig

CONFIG = ModelConfig(
    vocab_size=8, hidden_size=4, intermediate_size=4, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=4,
    max_positions=8,
)  # fmt: skip


@pytest.fixture
def method():
    return FullMethod(Objective(CONFIG), optax.sgd(1.0), jnp.dtype("float32"))


def save(folder, method, losses, size=(1,), **options):
    """Saves a step for each loss; those that are there afterwards."""
    noise = jax.random.uniform(jax.random.key(0), size)  # what cannot be compressed
    with Checkpoints(folder, **options) as checkpoints:
        for step, loss in losses.items():
            state = method.init({"w": jnp.full(4, step, jnp.float32), "noise": noise})
            checkpoints.save(step, state, method, {}, loss)
        checkpoints.wait()
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


class TestBest:
    def test_is_kept_beside_the_newest(self, tmp_path, method):
        losses = {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: None}
        assert save(tmp_path, method, losses, keep=1, keep_best=True) == [2, 5]
        assert read_metadata(tmp_path, "best")["step"] == 2
        assert read_metadata(tmp_path)["step"] == 5
        np.testing.assert_array_equal(restore_trainable(tmp_path, "best")["w"], 2.0)
        # also by those who continue
        with Checkpoints(tmp_path, 1, keep_best=True) as checkpoints:
            assert checkpoints.best_loss == 1.0
        assert save(tmp_path, method, {6: 4.0, 7: 1.5}, keep=1, keep_best=True) == [2, 7]
        assert save(tmp_path, method, {8: 0.5}, keep=1, keep_best=True) == [8]

    def test_is_not_kept_unless_asked_for(self, tmp_path, method):
        assert save(tmp_path, method, {1: 1.0, 2: 2.0, 3: None}, keep=2) == [2, 3]
        assert read_metadata(tmp_path, "best")["step"] == 2  # of those that are there

    def test_losses_of_other_examples_are_not_compared(self, tmp_path, method):
        options = {"keep": 1, "keep_best": True}
        assert save(tmp_path, method, {1: 1.0, 2: 3.0}, **options, heldout="a") == [1, 2]
        assert save(tmp_path, method, {3: 2.0, 4: 2.5}, **options, heldout="b") == [3, 4]
        assert read_metadata(tmp_path, "best")["step"] == 3

    def test_needs_an_evaluation(self, tmp_path, method):
        save(tmp_path, method, {1: None})
        with pytest.raises(CheckpointError, match=r"was evaluated.*checkpoint_keep_best"):
            read_metadata(tmp_path, "best")


@pytest.mark.parametrize("saves", [20, pytest.param(300, marks=pytest.mark.slow)])
def test_saves_leave_no_thread_and_no_descriptor_behind(tmp_path, method, saves):
    def held():
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    save(tmp_path, method, {1: None, 2: None})
    before = held()
    save(tmp_path, method, dict.fromkeys(range(3, 3 + saves)))
    # pools may have grown by a few; each save once left three descriptors and a thread
    assert all(now <= then + 5 for now, then in zip(held(), before, strict=True)), (before, held())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_saved(tmp_path, method, bad):
    save(tmp_path, method, {1: None})
    with Checkpoints(tmp_path) as checkpoints:
        state = method.init({"w": jnp.ones(4), "noise": jnp.ones(3).at[1].set(bad)})
        with pytest.raises(CheckpointError, match=r"checkpoint 2 is not written .*: trainable\.noise hold"):
            checkpoints.save(2, state, method, {})
    assert read_metadata(tmp_path)["step"] == 1


def test_what_cannot_be_read_back_is_an_error(tmp_path, method):
    """Orbax itself saves without a word under such a name."""
    with pytest.raises(CheckpointError, match=r"checkpoint 1 in .* cannot be read back: "):
        save(tmp_path / "a[b]", method, {1: None})


def test_odd_names_are_written_and_read(tmp_path, method):
    folder = tmp_path / "a #1 {100%20} |'\" \n é:日本 ?x"
    assert save(folder, method, {1: None}) == [1]
    np.testing.assert_array_equal(restore_trainable(folder)["w"], 1.0)


@pytest.fixture
def small_files():
    """As on a full disk: no file may grow beyond so many bytes."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_save_that_fails_is_a_line_and_leaves_the_others_whole(tmp_path, method, small_files, caplog):
    save(tmp_path, method, {1: None})
    small_files(1 << 16)
    with pytest.raises(CheckpointError, match=r"2 could not be saved in .*: File too large\. ") as error:
        save(tmp_path, method, {2: None}, size=(1 << 18,))
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    small_files(resource.RLIM_INFINITY)
    np.testing.assert_array_equal(restore_trainable(tmp_path)["w"], 1.0)
    assert save(tmp_path, method, {2: None}) == [1, 2]
