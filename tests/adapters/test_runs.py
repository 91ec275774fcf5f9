"""From runs to adapters and back: gridded, on a mesh, some layers only; updates from step to step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import app, flags
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file
from support.exports import assert_same, origin_of
from support.mesh_cases import mesh_of
from support.run_cases import chat_file, run, tiny_config

from spiel_jax import export, generate
from spiel_jax.adapters import (
    AdapterError,
    Export,
    adapter_of_run,
    apply_patches,
    base_of_run,
    read_adapter,
    read_patches,
    weight_patches,
    write_adapter,
)
from spiel_jax.adapters.load import load_run
from spiel_jax.checkpoint import CheckpointError, read_metadata, restore_deltas, stored_targets
from spiel_jax.checkpoint.metadata import LAYOUT
from spiel_jax.models import open_model
from spiel_jax.sparse.delta import merge


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return chat_file(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(llama_folder, data, tmp_path_factory):
    """A run on a mesh of two devices: a grid of blocks, one weight in one of its layers only."""
    config = tiny_config(llama_folder, data, "random")
    config.targets.rules = (r".*\.1\.mlp\.up_proj\.weight", r".*\.o_proj\.weight")
    config.checkpoint_every, config.spiel.every, config.spiel.accumulation = 3, 1, 1
    config.spiel.rate = 0.2
    folder = tmp_path_factory.mktemp("run") / "run"
    run(config, folder, fsdp=2)
    return folder


def command(module, *arguments):
    options = flags.FlagValues()
    module.define_flags(options)
    options(["command", *map(str, arguments)])
    module.main(options)


@pytest.mark.slow
def test_a_gridded_run_on_a_mesh_there_and_back(trained, llama_folder, tmp_path):
    adapter = adapter_of_run(trained)
    assert adapter.origin.step == 6
    assert {name for name in adapter.shapes if "up_proj" in name} == {"model.layers.1.mlp.up_proj.weight"}
    assert set(adapter.shapes) - {"model.layers.1.mlp.up_proj.weight"} == {
        f"model.layers.{layer}.self_attn.o_proj.weight" for layer in range(2)
    }
    deltas = restore_deltas(trained)
    assert any(delta.grid != (1, 1) for delta in deltas.values())
    assert adapter.count == sum(delta.values.size for delta in deltas.values())
    source = open_model(str(llama_folder))
    params = source.load("float32", progress=False)
    expected = merge(params, deltas)
    for name in ("native", "peft_supertuning", "reference"):
        found = read_adapter(write_adapter(adapter, tmp_path / name, name), source.config)
        assert_same(found, adapter)
    merged = found.merge(params, source.config)
    for parameter in params:
        np.testing.assert_array_equal(np.asarray(merged[parameter]), np.asarray(expected[parameter]))


class TestOrbax:
    @pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")
    def test_alone_it_gives_the_deltas(self, trained):
        targets = stored_targets(read_metadata(trained))
        folder = trained.absolute() / "checkpoints" / "6"
        for found in (ocp.load(folder), ocp.load(folder, checkpointable_name="deltas")):
            assert found.keys() == targets.keys()
            for name, delta in restore_deltas(trained).items():
                raw = targets[name].delta(found[name]["indices"], found[name]["values"]).sort()
                np.testing.assert_array_equal(np.asarray(raw.indices), np.asarray(delta.indices))
                np.testing.assert_array_equal(np.asarray(raw.values), np.asarray(delta.values))

    def test_onto_a_mesh_and_of_a_given_step(self, trained):
        mesh = mesh_of(1, 2, 1)
        place = jax.NamedSharding(mesh, jax.P())
        for step in (3, None):
            one, spread = (
                restore_deltas(trained, step),
                restore_deltas(trained, step, sharding=lambda _: place),
            )
            for name, delta in spread.items():
                assert delta.values.sharding.device_set == place.device_set
                np.testing.assert_array_equal(np.asarray(delta.values), np.asarray(one[name].values))

    def test_another_layout_is_refused(self, trained, monkeypatch):
        assert read_metadata(trained)["layout"] == LAYOUT
        monkeypatch.setattr("spiel_jax.checkpoint.metadata.LAYOUT", LAYOUT + 1)
        for read in (read_metadata, restore_deltas, adapter_of_run):
            with pytest.raises(CheckpointError, match=r"has layout 1, and this version of spiel_jax reads 2"):
                read(trained)


def load_as_vllm_does(served, patches):
    """What vLLM's ``load_checkpoint_weight_patches`` asks of patches, and how it puts them in.

    That is through a tensor that is NaN wherever the old weight stays.
    """
    for patch in patches:
        tensor = served[patch.name]
        assert patch.shape == tensor.shape
        assert patch.values.dtype == tensor.dtype
        assert patch.positions.dtype == np.int32
        assert patch.positions.shape == patch.values.shape == (np.unique(patch.positions).size,)
        assert 0 <= patch.positions.min() <= patch.positions.max() < tensor.size
        assert not np.isnan(patch.values.astype(np.float32)).any()
        staged = np.full(tensor.size, np.nan, tensor.dtype)
        staged[patch.positions] = patch.values
        staged = staged.reshape(tensor.shape)
        np.copyto(tensor, staged, where=~np.isnan(staged.astype(np.float32)))


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_patches_from_step_to_step_give_the_merged_model_bit_for_bit(trained, dtype, tmp_path):
    base = base_of_run(trained)
    shapes = {name: slot.shape for name, slot in base.tensors.items()}
    merged = {}
    for step in (3, 6):
        out = write_adapter(
            adapter_of_run(trained, step), tmp_path / str(step), "merged", base=base, dtype=dtype
        )
        merged[step] = load_file(out / "model.safetensors")
    adapter, before = adapter_of_run(trained, 6), adapter_of_run(trained, 3)
    dropped = [
        np.setdiff1d(before.entries[name].positions, adapter.entries[name].positions)
        for name in before.entries
    ]
    assert sum(positions.size for positions in dropped) > 0
    out = write_adapter(adapter, tmp_path / "update", "sparse_update", base=base, dtype=dtype, since=before)
    patches = list(read_patches(out, shapes))
    found = apply_patches(merged[3], patches)
    assert found.keys() == merged[6].keys()
    for name, tensor in merged[6].items():
        assert found[name].tobytes() == tensor.tobytes(), name
    assert sum(patch.positions.size for patch in patches) <= adapter.count + sum(p.size for p in dropped)
    export = Export(adapter, base, np.dtype(dtype), before)
    served = {name: tensor.copy() for name, tensor in merged[3].items()}
    load_as_vllm_does(served, weight_patches(export))
    for name, tensor in merged[6].items():
        assert served[name].tobytes() == tensor.tobytes(), name
    with pytest.raises(AdapterError, match="do not fit a tensor"):
        list(read_patches(out, {}))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "ia3", "full"])
def test_other_methods_export_merged(method, llama_folder, data, tmp_path):
    """The merged model is the tuned one of the run, bit for bit; a full run's needs no base."""
    config = tiny_config(llama_folder, data, method)
    config.targets.num_tunable, config.targets.rules = None, (r".*_proj\.weight",)
    config.steps, config.optimizer.learning_rate = 2, 1e-3
    run(config, tmp_path / "run")
    out = tmp_path / "merged"
    command(export, f"--checkpoint={tmp_path / 'run'}", "--format=merged", f"--out={out}")
    tuned = load_run(tmp_path / "run").tuned
    for name, param in open_model(str(out)).load("float32", progress=False).items():
        np.testing.assert_array_equal(np.asarray(param), np.asarray(tuned[name]), err_msg=name)


@pytest.mark.slow
def test_sparse_and_low_rank_goes_to_peft(llama_folder, data, tmp_path):
    config = tiny_config(llama_folder, data, "rosa")
    config.rosa.warmup, config.lora.rank, config.lora.rslora = 0, 2, True
    config.steps, config.optimizer.learning_rate = 2, 1e-3
    run(config, tmp_path / "run")
    command(export, f"--checkpoint={tmp_path / 'run'}", "--format=peft", f"--out={tmp_path / 'p'}")
    ours, found = adapter_of_run(tmp_path / "run"), read_adapter(tmp_path / "p")
    assert_same(found.sparse, ours.sparse)
    for name, term in ours.low_rank.matrices.items():
        np.testing.assert_array_equal(found.low_rank.matrices[name].b, term.b)
        assert found.low_rank.scale(name) == pytest.approx(ours.low_rank.scale(name), rel=1e-15)
    source = open_model(str(llama_folder))
    one, other = (a.merge(source.load("float32", progress=False), source.config) for a in (found, ours))
    for name, param in one.items():
        np.testing.assert_allclose(np.asarray(param), np.asarray(other[name]), rtol=1e-6, err_msg=name)


class TestCommand:
    def test_merged_is_what_the_run_gives(self, trained, tmp_path, capsys):
        command(export, f"--checkpoint={trained}", "--format=merged", f"--out={tmp_path / 'm'}")
        assert "merged, step 6" in capsys.readouterr().out
        tuned = load_run(trained).tuned
        for name, param in open_model(str(tmp_path / "m")).load("float32", progress=False).items():
            np.testing.assert_array_equal(np.asarray(param), np.asarray(tuned[name]), err_msg=name)

    def test_an_update_and_another_format(self, trained, llama_folder, tmp_path, capsys):
        command(
            export,
            f"--checkpoint={trained}",
            "--format=sparse_update",
            "--from_step=3",
            f"--out={tmp_path / 'u'}",
        )
        command(export, f"--checkpoint={trained}", "--format=peft", f"--out={tmp_path / 'p'}")
        command(
            export,
            f"--adapter={tmp_path / 'p'}",
            f"--model={llama_folder}",
            "--format=native",
            f"--out={tmp_path / 'n'}",
        )
        assert_same(read_adapter(tmp_path / "n"), adapter_of_run(trained))
        assert capsys.readouterr().out.count(" bytes") == 3

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--format=native"],
            ["--format=native", "--checkpoint=a", "--adapter=b"],
            ["--format=native", "--adapter=b", "--step=3"],
            ["--format=native", "--checkpoint=a", "--from_step=3"],
            ["--format=merged", "--adapter=b"],
        ],
    )
    def test_flags_that_do_not_go_together(self, arguments, tmp_path):
        with pytest.raises(app.UsageError):
            command(export, f"--out={tmp_path / 'x'}", *arguments)

    @pytest.mark.slow
    def test_generate_with_an_adapter(self, trained, llama_folder, tmp_path, capsys):
        out = write_adapter(adapter_of_run(trained), tmp_path / "a", "reference")
        command(generate, f"--checkpoint={trained}", "--prompt=Hi", "--max_new_tokens=6")
        expected = capsys.readouterr().out.splitlines()[1].partition("] ")[2]
        command(generate, f"--model={llama_folder}", f"--adapter={out}", "--prompt=Hi", "--max_new_tokens=6")
        assert capsys.readouterr().out.splitlines()[1] == f"[{out}] {expected}"
        other = dataclasses.replace(adapter_of_run(trained), origin=origin_of(llama_folder, "bfloat16"))
        wrong = dict.fromkeys(other.origin.fingerprint, "bfloat16[1]:00000000")
        other = dataclasses.replace(other, origin=dataclasses.replace(other.origin, fingerprint=wrong))
        write_adapter(other, tmp_path / "b")
        with pytest.raises(AdapterError, match="another base model"):
            command(generate, f"--model={llama_folder}", f"--adapter={tmp_path / 'b'}", "--prompt=Hi")


def test_matrices_with_more_entries_than_int32_counts():
    from spiel_jax.adapters import Entries
    from spiel_jax.adapters.stacking import _fitting

    shape = (2**16, 2**16)
    entries = Entries(shape, np.array([5, 2**32 - 1]), np.ones(2, np.float32))
    assert entries.positions.dtype == np.int64
    assert [axis.tolist() for axis in entries.coordinates()] == [[0, 2**16 - 1], [5, 2**16 - 1]]
    assert _fitting(shape) == (4, 1)
    assert jnp.iinfo(jnp.int32).max >= 2**32 // 4
