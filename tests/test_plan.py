"""Plans for hardware that is not here: what lies on a device, what is exchanged, what fits."""

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from runpy import run_path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.mesh_cases import adapted, mesh_of

from spiel_jax.config import ConfigError, default_config
from spiel_jax.models import ModelConfig
from spiel_jax.models.io.loading import model_shape
from spiel_jax.planning import run as planning
from spiel_jax.planning import topology as hardware
from spiel_jax.planning.hlo import Program
from spiel_jax.planning.run import prepare
from spiel_jax.planning.search import as_flags, easier, needed, search
from spiel_jax.planning.summary import plan, show
from spiel_jax.planning.topology import MissingCompilerError, TopologyError, open_topology

CONFIGS = Path(__file__).parents[1] / "configs"
GIB = 2**30
TINY = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
WEIGHTS = 3 * (4 * 32 * 32 + 3 * 32 * 64)  # of the linears
HEADS = 2 * 64 * 32  # embedding and head
NORMS = 7 * 32
SETTINGS = {"targets.num_tunable": 4800, "batch_size": 16, "data.sequence_length": 32, "model.loss_chunk": 32}


@pytest.fixture
def folder(tmp_path):
    """A model of which there is nothing but the shape."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return tmp_path


@pytest.fixture
def config(folder):
    config = default_config()
    config.model.source = str(folder)
    config.data.sources = ("nowhere.jsonl",)
    config.update_from_flattened_dict(SETTINGS)
    return config


@pytest.fixture
def command(folder):
    file = folder / "tiny.py"
    file.write_text(
        "from spiel_jax.config import default_config\n\n\n"
        "def get_config():\n"
        "    config = default_config()\n"
        f"    config.model.source = {str(folder)!r}\n"
        "    config.data.sources = ('nowhere.jsonl',)\n"
        f"    config.update_from_flattened_dict({SETTINGS!r})\n"
        "    return config\n"
    )

    def run(*arguments, hide=None):
        code = (
            f"import runpy, sys; sys.modules[{hide!r}] = None; runpy.run_module('spiel_jax.plan', run_name="
        )
        code += "'__main__', alter_sys=True)"
        how = ["-m", "spiel_jax.plan"] if hide is None else ["-c", code]
        return subprocess.run(
            [sys.executable, *how, f"--config={file}", *arguments], capture_output=True, text=True, cwd=folder
        )

    return run


def entries(fsdp, tensor):
    """Active entries of all targets on one device."""
    targets = adapted({"fsdp": fsdp, "tensor": tensor}, num_tunable=4800)
    return sum(3 * target.block_count for target in targets.values())


def test_command_line(command, folder):
    file = folder / "plan.json"
    done = command("--topology=cpu:8", "--mesh=fsdp=4,tensor=2", f"--json={file}", "--steps=ordinary")
    assert done.returncode == 0, done.stderr
    assert re.search("verdict +fits: ordinary needs most", done.stdout)
    found = json.loads(file.read_text())
    assert found["mesh"] == {"data": 1, "fsdp": 4, "tensor": 2}
    assert (found["config"]["targets.grid.fsdp"], found["config"]["targets.grid.tensor"]) == (4, 2)
    assert list(found["steps"]) == ["ordinary"]
    step = found["steps"]["ordinary"]
    memory = step["memory"]
    k = entries(4, 2)
    assert memory["weights"] == 2 * ((WEIGHTS + HEADS) // 8 + NORMS)
    assert memory["deltas"] == k * (4 + 4 + 2)  # indices, values, pretrained entries
    # three numbers an entry; three a candidate, and two a block of each of 7 stacks of 3; counts, share
    assert memory["optimizer"] == k * 3 * 4 + k * 3 * 4 + 2 * 7 * 3 * 4 + 3 * 4
    assert memory["batch"] == 5 * 4 * 16 * 32 // 4  # a data x fsdp shard
    held = sum(memory[part] for part in ("weights", "deltas", "optimizer", "batch"))
    assert memory["peak"] == held + memory["temporaries"] + memory["programs"] == found["peak"]
    assert memory["temporaries"] > 2 * 3 * 4 * 32 * 32  # what each layer was given, in float32
    assert max(item["bytes"] for item in step["largest_temporaries"]) < memory["temporaries"]
    assert step["collectives_by_kind"]["all-gather"]["count"] > 7 * 3 * 2
    assert sum(one["count"] * one["bytes"] for one in step["collectives"]) == sum(
        kind["bytes"] for kind in step["collectives_by_kind"].values()
    )


@pytest.mark.slow
def test_what_the_command_line_says_of_a_run_that_does_not_fit(command, folder):
    little = command(
        "--topology=cpu:8", "--mesh=fsdp=8", "--memory=0.0001", "--steps=ordinary", "--no-search"
    )
    assert little.returncode == 3, little.stderr
    assert "does not fit" in little.stdout
    assert "not looked at: proposing, estimating, estimating+reselecting" in little.stdout
    nowhere = command("--topology=cpu:8", f"--json={folder / 'no' / 'plan.json'}")
    assert nowhere.returncode == 1
    assert "there is no such folder" in nowhere.stdout + nowhere.stderr
    assert "Traceback" not in nowhere.stderr


@pytest.mark.slow  # what is missing is named below, and the status is tested in test_cli.py
def test_without_the_compiler_the_command_exits_with_2(command):
    done = command("--topology=v5e:2x2", hide="libtpu")
    assert done.returncode == 2
    assert 'pip install --no-deps "libtpu==' in done.stderr


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"fsdp": 3}, "3 does not divide the 8 devices"),
        ({"fsdp": 16, "data": 1}, "more than the 8 devices"),
        ({"fsdp": 5, "data": 1}, "config.batch_size = 16: expected a multiple of 5"),
        ({"tensor": 6, "data": 1}, "tensor=6 does not divide model.layers"),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused(config, mesh, message):
    with pytest.raises(ValueError, match=message):
        plan(config, "cpu:8", mesh=mesh, progress=False)


def test_a_step_that_a_run_does_not_have_is_refused(config):
    config.method = "spiel_ma"
    with pytest.raises(ConfigError, match="'proposing': it has ordinary, reselecting"):
        plan(config, "cpu:8", kinds=["proposing"], progress=False)


@pytest.mark.parametrize("name", ["", "v5e", "v5e:", "v5e:8", "cpu:2x2", "cpu:0", "h100:x", "gpu:8"])
def test_an_unknown_topology_is_refused(name):
    with pytest.raises(TopologyError, match="unknown topology"):
        open_topology(name)


@pytest.mark.parametrize(
    ("topology", "packages"),
    [
        ("v5p:2x2x1", r'pip install --no-deps "libtpu==0'),
        ("h100:8", r'"jax-cuda12-plugin==.*" "jax-cuda12-pjrt==.*" nvidia-cuda-nvcc-cu12'),
    ],
)
def test_a_missing_compiler_is_named(monkeypatch, topology, packages):
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingCompilerError, match=packages):
        open_topology(topology)


def prepared(config, mesh, **settings):
    config.update_from_flattened_dict(settings)
    return prepare(config, model_shape(config.model.source), mesh)


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({}, ["ordinary", "proposing", "estimating", "estimating+reselecting"]),
        ({"spiel.accumulation": 1}, ["ordinary", "proposing+reselecting"]),
        ({"method": "spiel_ma"}, ["ordinary", "reselecting"]),
        ({"method": "spiel_ma", "steps": 4}, ["ordinary"]),
        ({"method": "magnitude"}, ["ordinary"]),
        ({"method": "lora", "lora.rank": 2}, ["ordinary"]),
        ({"method": "full"}, ["ordinary"]),
    ],
)
def test_kinds_of_step(config, settings, kinds):
    assert list(prepared(config, mesh_of(1, 4, 2), **settings).kinds) == kinds


def test_what_is_held_of_other_methods(config):
    mesh = mesh_of(2, 2, 2)
    k = entries(2, 2)
    linears, frozen = WEIGHTS // 4, HEADS // 4 + NORMS
    ma = prepared(config, mesh, method="spiel_ma").held()
    assert ma["weights"] == 2 * (linears + frozen)
    assert ma["deltas"] == k * 10
    blocks = 4 * (16 + 16) + 3 * (32 + 16)  # rows and columns of a block of each weight of a layer
    assert ma["optimizer"] == 2 * 3 * blocks * 4 + 3 * 4  # SM3's and the criterion's; counts, share
    full = prepared(config, mesh, method="full").held()
    assert full["weights"] == 0
    assert full["deltas"] == 4 * (linears + frozen)
    assert full["optimizer"] == 2 * full["deltas"] + 2 * 4
    assert full["batch"] == 5 * 4 * 16 * 32 // 4


def test_a_micro_batch_that_can_be_spread_is_planned(config):
    mesh = mesh_of(2, 4, 1)
    assert prepared(config, mesh, micro_batch_size=2).config.micro_batch_size == 8
    assert prepared(config, mesh, micro_batch_size=16).config.micro_batch_size == 16
    assert prepared(config, mesh_of(1, 1, 1), micro_batch_size=2).batch["tokens"].shape == (8, 2, 32)


def test_the_step_is_compiled_for_the_devices_and_the_search_ends_at_one_that_fits(config):
    """Half of the micro-batch fits where all of it does not; nothing is compiled that cannot fit."""
    config.method = "spiel_ma"
    config.targets.rules = (r".*\.up_proj\.weight",)  # the others would only take time to compile
    config.data.sequence_length = 64  # activations count
    options = {"kinds": ["ordinary"], "mesh": {"fsdp": 2, "data": 1}, "progress": False}
    config.micro_batch_size = 4
    fits = plan(config, "cpu:8", **options)
    assert fits["fits"]
    assert not fits["trials"]
    config.micro_batch_size = 8
    tight = plan(config, "cpu:8", memory=1.01 * fits["peak"] / GIB, **options)
    assert not tight["fits"]
    assert [(trial["changes"], trial["fits"]) for trial in tight["trials"]] == [
        ({"micro_batch_size": 4}, True)
    ]
    assert tight["trials"][-1]["needed"] == pytest.approx(fits["peak"], rel=0.01)
    assert tight["proposal"] == {"micro_batch_size": 4}
    mesh = "--config.mesh.data=1 --config.mesh.fsdp=2 --config.mesh.tensor=1"
    assert tight["train_with"] == f"{mesh} --config.micro_batch_size=4"
    last = [line.split()[0] for line in show(tight).splitlines()[-4:]]
    assert last == ["verdict", "not", "fits", "train"]  # not looked at: the reselecting step
    nothing = plan(config, "cpu:8", memory=fits["steps"]["ordinary"]["memory"]["weights"] / GIB, **options)
    assert not any(trial["compiled"] or trial["fits"] for trial in nothing["trials"])
    assert nothing["proposal"] is nothing["train_with"] is None


def test_settings_are_tried_from_the_cheapest_on(config, monkeypatch):
    tried = []

    def compiled(run, kind, hardware):
        tried.append((run.config.method, run.config.micro_batch_size, run.config.model.remat, kind))
        return Program(0.0, GIB, GIB)

    monkeypatch.setattr(planning.PlannedRun, "compiled", compiled)
    run = prepared(config, mesh_of(2, 4, 1), **{"model.remat": "dots"})
    kinds = [as_flags(changes) for changes in easier(run.config, run.mesh.shape)]
    least = "--config.micro_batch_size=8 --config.model.remat=full"
    none = prepared(config, run.mesh, **{"model.remat": "none", "micro_batch_size": 8})
    assert [as_flags(changes) for changes in easier(none.config, run.mesh.shape)][:2] == [
        "--config.model.remat=dots",
        "--config.model.remat=full",
    ]
    run = prepared(config, run.mesh, **{"model.remat": "dots", "micro_batch_size": 16})
    spread = "--config.mesh.data=1 --config.mesh.fsdp={} --config.mesh.tensor={}"
    assert kinds[:5] == [
        "--config.micro_batch_size=8",
        least,
        f"{least} {spread.format(8, 1)}",
        f"{least} {spread.format(8, 1)} --config.method=spiel_ma",
        f"--config.micro_batch_size=4 --config.model.remat=full {spread.format(4, 2)}",
    ]
    memory = {"temporaries": 0, "programs": 0}
    shape = model_shape(config.model.source)
    few = replace(open_topology("cpu:8"), usable=GIB - 1)
    trials = search(run, shape, few, ["estimating"], memory, 4, progress=False)
    assert [trial.needed for trial in trials] == [GIB] * 4
    assert tried == [
        ("spiel_ag", 8, "dots", "estimating"),
        ("spiel_ag", 8, "full", "estimating"),
        ("spiel_ag", 8, "full", "estimating"),
        ("spiel_ma", 8, "full", "ordinary"),
    ]


def test_what_the_compiler_refuses_does_not_fit(config, monkeypatch):
    """Whatever memory was asked for; and no setting is proposed of which a kind of step does not fit."""
    config.method = "spiel_ma"
    monkeypatch.setattr(
        planning.PlannedRun, "compiled", lambda *_: Program(0.0, 0, GIB, flops=1, refusal="no")
    )
    found = plan(config, "cpu:8", mesh={"fsdp": 8, "data": 1}, memory=2, trials=0, progress=False)
    assert found["peak"] < found["usable"]
    assert not found["fits"]
    assert found["train_with"] is None
    assert "refused by the compiler, which needs at least that: ordinary, reselecting" in show(found)

    def compiled(run, kind, hardware):
        if run.config.micro_batch_size == 16:
            return Program(0.0, 0, 3 * GIB)
        if run.config.model.remat == "dots":
            raise jax.errors.JaxRuntimeError("INTERNAL: the compiler has stumbled")
        least = kind == "reselecting" and run.config.mesh.tensor == 1
        return Program(0.0, 0, GIB, refusal="no" if least else None)

    monkeypatch.setattr(planning.PlannedRun, "compiled", compiled)
    config.micro_batch_size, config.model.remat = 16, "dots"
    tried = plan(config, "cpu:8", mesh={"fsdp": 8, "data": 1}, memory=2, progress=False)
    assert [trial["fits"] for trial in tried["trials"]] == [False, True]
    assert tried["proposal"]["mesh.tensor"] == 2


def test_a_mesh_that_leaves_hosts_idle_is_refused(config, monkeypatch):
    cpus = open_topology("cpu:8")

    class OfHost:
        def __init__(self, number):
            self.process_index, self.platform, self.device_kind = number, "cpu", "cpu"

    hosts = [OfHost(number) for number in (0, 0, 0, 0, 1, 1, 1, 1)]
    monkeypatch.setattr("spiel_jax.planning.summary.open_topology", lambda name: replace(cpus, devices=hosts))
    with pytest.raises(ConfigError, match="4 devices leaves 1 of the 2 hosts of cpu:8"):
        plan(config, "cpu:8", mesh={"data": 1, "fsdp": 4}, progress=False)


def test_a_preset_with_another_source_is_refused():
    with pytest.raises(ValueError, match="a preset, here 'llama2_70b', is for the source 'random'"):
        model_shape("meta-llama/Llama-2-7b-hf", "llama2_70b")


def test_shapes_need_no_weights_and_no_network(folder):
    for size in ("7b", "13b", "70b"):
        assert model_shape(f"meta-llama/Llama-2-{size}-hf") == getattr(ModelConfig, f"llama2_{size}")()
    assert model_shape("random", "smollm2_135m") == ModelConfig.smollm2_135m()
    assert model_shape(str(folder)).hidden_size == 32
    with pytest.raises(FileNotFoundError, match=r"config\.model\.preset"):
        model_shape("nobody/nothing")


def test_what_a_program_does_not_look_at_is_needed_too():
    assert needed(30, Program(0.0, 10, 100)) == 120  # 20 that the program does not look at
    assert needed(30, Program(0.0, 0, 100, refusal="too much")) == 100


def test_stacks_of_more_entries_than_int32_has():
    """Llama 2 70B: 80 matrices of 28672 x 8192 are one parameter; a position is one of a block."""
    config, model = run_path(str(CONFIGS / "llama2_70b.py"))["get_config"](), ModelConfig.llama2_70b()
    config.mesh.fsdp = config.micro_batch_size = 4
    config.targets.grid.update({"fsdp": 16, "tensor": 2})
    run = prepare(config, model, mesh_of(1, 4, 2))
    gate = "model.layers.mlp.gate_proj.weight"
    assert run.state.params[gate].size > np.iinfo(np.int32).max
    target = run.method.targets[gate]
    assert (target.grid, target.block) == ((2, 16), (28672 // 2, 8192 // 16))
    assert (
        0 <= config.targets.num_tunable - sum(x.size for x in jax.tree.leaves(run.state.trainable)) < 20_000
    )
    indices = run.state.opt_state.active[gate].indices
    assert (indices.shape, indices.dtype) == ((80, 2, 16, target.block_count), jnp.int32)
    assert target.block_size < np.iinfo(np.int32).max
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), run.state)
    # these two hold what the others do
    for phase, reselect in (run.kinds[kind] for kind in ("proposing", "estimating+reselecting")):
        with jax.set_mesh(run.mesh):
            step = partial(run.method.step, phase=phase, reselect=reselect)
            state, metrics = jax.eval_shape(step, run.state, run.batch)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == shapes
        assert metrics["loss"].shape == ()


def installed(package):
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "package", "chip"),
    [("v5e:2x4", "libtpu", "TPU v5e"), ("h100:8", "jax_plugins.xla_cuda12", "NVIDIA H100 80GB")],
)
def test_other_peoples_hardware(command, folder, monkeypatch, topology, package, chip):
    monkeypatch.delenv("XLA_FLAGS")  # those of the tests are for a CPU
    if not installed(package):
        pytest.skip(f"{package} is not installed")
    file = folder / "plan.json"
    done = command(f"--topology={topology}", "--mesh=fsdp=4,tensor=2", f"--json={file}")
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found["chip"] == chip
    assert list(found["steps"]) == ["ordinary", "proposing", "estimating", "estimating+reselecting"]
    for name, step in found["steps"].items():
        assert step["memory"]["weights"] == 2 * ((WEIGHTS + HEADS) // 8 + NORMS)
        assert step["memory"]["temporaries"] > 0
        # every linear is collected, one tensor shard of it, for the forward and the backward pass
        gathered = [
            one for one in step["collectives"] if one["kind"] == "all-gather" and "bf16" in one["shape"]
        ]
        assert sum(one["count"] * one["bytes"] for one in gathered) >= 2 * 2 * WEIGHTS // 2, name
