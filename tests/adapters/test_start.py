"""Runs that start from an adapter: with its entries or positions, fixed or evolving; continued; planned."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.exports import assert_same, lora_adapter, origin_of, sparse_adapter
from support.mesh_cases import mesh_of
from support.run_cases import chat_file, run, tiny_config

from spiel_jax.adapters import AdapterError, SparseAdapter, adapter_of_run, write_adapter
from spiel_jax.adapters.stacking import entries_of
from spiel_jax.adapters.start import read_start
from spiel_jax.checkpoint import read_metadata
from spiel_jax.config import ConfigError, check_config, with_defaults
from spiel_jax.methods.registry import build
from spiel_jax.models import abstract_params, open_model
from spiel_jax.optim.positions import deltas
from spiel_jax.planning.run import prepare


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return chat_file(tmp_path_factory.mktemp("data"))


@pytest.fixture
def adapter(llama_folder):
    """Entries of one stacked weight, and of one layer of another."""
    model = open_model(str(llama_folder)).config
    return sparse_adapter(
        model, origin_of(llama_folder), names=lambda name: "o_proj" in name or ".1.mlp.up" in name
    )


def starting(llama_folder, data, path, **changes):
    """A run of one step that hardly learns, from an adapter."""
    config = tiny_config(llama_folder, data, "random")
    config.targets.num_tunable = None
    config.steps, config.spiel.rate = 1, 0.0
    config.optimizer.learning_rate = 1e-30
    config.init_from.adapter = str(path)
    config.update_from_flattened_dict(changes)
    return config


class TestInitFrom:
    @pytest.mark.slow
    @pytest.mark.parametrize("what", ["entries", "positions"])
    def test_a_sparse_run_begins_with_the_entries(self, what, adapter, llama_folder, data, tmp_path):
        write_adapter(adapter, tmp_path / "a")
        config = starting(llama_folder, data, tmp_path / "a", **{"init_from.what": what})
        run(config, tmp_path / "run", **({} if what == "entries" else {"fsdp": 2}))
        found = adapter_of_run(tmp_path / "run")
        assert found.shapes == adapter.shapes
        for name, entries in adapter.entries.items():
            np.testing.assert_array_equal(found.entries[name].positions, entries.positions)
            expected = entries.values if what == "entries" else 0 * entries.values
            np.testing.assert_allclose(found.entries[name].values, expected, rtol=0, atol=1e-29)

    @pytest.mark.slow
    def test_lora_continues_lora(self, llama_folder, data, tmp_path):
        model = open_model(str(llama_folder)).config
        adapter = lora_adapter(model, origin_of(llama_folder), uneven=False)
        write_adapter(adapter, tmp_path / "a", "peft")
        changes = {
            "method": "lora",
            "lora.rank": 2,
            "lora.alpha": 4.0,
            "targets.rules": (r".*_proj\.weight",),
        }
        config = starting(llama_folder, data, tmp_path / "a", **changes)
        run(config, tmp_path / "run")
        found = adapter_of_run(tmp_path / "run")
        assert_same(dataclasses.replace(found, origin=adapter.origin), adapter)
        config.lora.rank = 3
        with pytest.raises(AdapterError, match=r"rank 2 and scale 2.* gives 3"):
            run(config, tmp_path / "other")

    @pytest.mark.slow
    def test_what_cannot_be(self, llama_folder, data, tmp_path):
        for method in ("magnitude", "gradient"):
            config = starting(llama_folder, data, tmp_path, method=method)
            with pytest.raises(ConfigError, match=rf"init_from.adapter.*{method} chooses its own"):
                check_config(config)
        config = starting(llama_folder, data, tmp_path, **{"init_from.what": "all"})
        with pytest.raises(ConfigError, match=r"init_from.what = 'all': expected one of entries, positions"):
            check_config(config)
        origin = origin_of(llama_folder)
        wrong = dataclasses.replace(origin, fingerprint=dict.fromkeys(origin.fingerprint, "float32[1]:0"))
        write_adapter(sparse_adapter(open_model(str(llama_folder)).config, wrong), tmp_path / "a")
        with pytest.raises(AdapterError, match="another base model"):
            run(starting(llama_folder, data, tmp_path / "a"), tmp_path / "run")

    @pytest.mark.slow
    def test_positions_evolve(self, adapter, llama_folder, data, tmp_path):
        """As many entries of each matrix as the adapter has, and from the first reselection on others."""
        write_adapter(adapter, tmp_path / "a")
        config = starting(llama_folder, data, tmp_path / "a", method="spiel_ag", steps=4)
        config.spiel.rate, config.init_from.what = 0.25, "positions"
        run(config, tmp_path / "run")
        found = adapter_of_run(tmp_path / "run")
        for name, entries in adapter.entries.items():
            kept = np.intersect1d(found.entries[name].positions, entries.positions).size
            assert found.entries[name].count == entries.count
            assert 0.4 * entries.count < kept < entries.count  # not all anew, as a random start is

    @pytest.mark.slow
    def test_a_continued_run_is_the_same_and_does_not_read_the_adapter(
        self, adapter, llama_folder, data, tmp_path, monkeypatch
    ):
        write_adapter(adapter, tmp_path / "a")
        monkeypatch.chdir(tmp_path)
        config = starting(llama_folder, data, "a", steps=4, **{"optimizer.learning_rate": 1e-2})
        run(config, tmp_path / "whole")
        run(config, tmp_path / "half", until=2)
        assert read_metadata(tmp_path / "half")["config"]["init_from.adapter"] == str(tmp_path / "a")
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        shutil.rmtree(tmp_path / "a")
        monkeypatch.chdir("/")
        for other in (str(tmp_path / "b"), None):
            changed = config.copy_and_resolve_references()
            changed.init_from.adapter = other
            changed.targets.num_tunable = None if other else adapter.count
            with pytest.raises(ConfigError, match=r"init_from.adapter: .*/a' there"):
                run(changed, tmp_path / "half")
        run(config, tmp_path / "half")
        assert_same(adapter_of_run(tmp_path / "half"), adapter_of_run(tmp_path / "whole"))

    def test_is_planned(self, adapter, llama_folder, data, tmp_path):
        """With the slots that it will have: those of the fullest block of each matrix."""
        write_adapter(adapter, tmp_path / "a")
        config = starting(llama_folder, data, tmp_path / "a")
        planned = prepare(config, open_model(str(llama_folder)).config, mesh_of(1, 1, 1))
        assert planned.held()["deltas"] == adapter.count * (4 + 4 + 4)  # value, position, pretrained weight

    def test_the_state_that_a_method_begins_with(self, adapter, llama_folder, data, tmp_path):
        write_adapter(adapter, tmp_path / "a")
        config = with_defaults(starting(llama_folder, data, tmp_path / "a"), {"fsdp": 2, "tensor": 1}, {})
        model = open_model(str(llama_folder)).config
        start = read_start(config, model)
        method = build(config, model, 1, start.targets)
        like = jax.eval_shape(method.init, abstract_params(model, jnp.float32))
        begun = method.begun(like, start.trainable(method))
        found = deltas(begun.trainable, begun.opt_state)
        assert_same(SparseAdapter(entries_of(found, model)), adapter, origin=False)
