"""Runs of the trainer, from config to checkpoint, on a tiny model."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from safetensors.numpy import load_file, save_file
from support.run_cases import SHARED, chat_file

from spiel_jax import cli, train
from spiel_jax.checkpoint import (
    CheckpointError,
    newest_metadata,
    read_metadata,
    restore_deltas,
    restore_trainable,
)
from spiel_jax.config import ConfigError, data_config, default_config, set_key
from spiel_jax.data import load_data
from spiel_jax.errors import SpielError
from spiel_jax.losses.next_token import Objective
from spiel_jax.models import open_model
from spiel_jax.ops.tree import not_finite
from spiel_jax.sparse.delta import merge
from spiel_jax.training import run as training
from spiel_jax.training.loop import Loop
from spiel_jax.training.metrics import read_metrics
from spiel_jax.training.nonfinite import NonFiniteError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return chat_file(tmp_path_factory.mktemp("data"))


@pytest.fixture
def config(llama_folder, data):
    config = default_config()
    config.mesh.data = 1
    config.model.source = str(llama_folder)
    config.model.dtype = "float32"
    config.data.sources = (str(data),)
    config.data.heldout = 8
    config.data.sequence_length = 96
    config.targets.num_tunable = 1000
    config.targets.rules = (r".*\.up_proj\.weight",)  # others only take time to compile
    config.spiel.every = 4
    config.spiel.accumulation = 3
    config.optimizer.learning_rate = 3e-2
    config.batch_size = 4
    config.micro_batch_size = 2
    config.steps = 10
    config.eval_every = 5
    config.checkpoint_every = 6
    return config


@pytest.fixture
def few_programs(config):
    """For tests of what no method differs in: of the sparse ones this has the fewest steps to compile."""
    config.method = "spiel_ma"
    config.eval_batches = 0


def run(config, workdir, **options):
    with SHARED.used():
        return training.run(config, workdir, progress=False, **options)


@contextlib.contextmanager
def stopping_after(monkeypatch, steps):
    """As if a signal came during the given step."""
    calls = []

    @contextlib.contextmanager
    def stop_on_signal(several):
        yield lambda: calls.append(0) or len(calls) == steps

    with monkeypatch.context() as patch:
        patch.setattr(training, "stop_on_signal", stop_on_signal)
        yield


@pytest.mark.slow
@pytest.mark.parametrize("method", [pytest.param("spiel_ag", marks=pytest.mark.slow), "spiel_ma"])
def test_training_lowers_the_heldout_loss(config, tmp_path, method, capsys):
    config.method = method
    config.profile = 1 if method == "spiel_ma" else 0
    config.sample.prompt = "say tea"
    config.sample.max_new_tokens = 4
    summary = run(config, tmp_path)
    (first, before), (last, after) = summary.heldout[0], summary.heldout[-1]
    assert (first, last) == (0, 10)
    assert after < before - 0.1
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 11))
    assert [line["step"] for line in lines if "heldout_loss" in line] == [0, 5, 10]
    replaced = {line["step"]: line["replaced"] for line in lines if line.get("replaced")}
    assert list(replaced) == [3, 7]
    assert replaced[3] == 1.0
    assert replaced[7] == pytest.approx(0.2 * (1 - 7 / 10), abs=0.02)
    out = capsys.readouterr().out
    assert "held-out loss, step 10" in out
    assert "tuned: " in out
    assert "base: " in out
    assert list((tmp_path / "tensorboard").iterdir())
    assert len(list(tmp_path.glob("profile/**/perfetto_trace.json.gz"))) == (method == "spiel_ma")


@pytest.mark.parametrize(
    ("method", "programs"),
    [
        ("spiel_ma", 2),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("spiel_ag", 4), ("lora", 1))),
    ],
)
def test_a_hundred_steps_compile_few_programs(config, tmp_path, monkeypatch, method, programs):
    config.method = method
    config.steps = 100
    config.checkpoint_every = config.eval_batches = 0
    config.optimizer.learning_rate = 1e-3
    loops = []
    original = Loop.run
    monkeypatch.setattr(Loop, "run", lambda loop, *args: loops.append(loop) or original(loop, *args))
    assert run(config, tmp_path).step == 100
    assert loops[0]._step._cache_size() == programs


@pytest.mark.slow
def test_the_seed_determines_every_number(config, tmp_path):
    config.method = "spiel_ma"  # of fewer programs
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config.seed = seed
        run(config, tmp_path / name)
    one, two, three = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in "abc")
    assert one == two
    assert one != three


@pytest.mark.slow  # by default of every method in tests/common/test_methods.py
@pytest.mark.parametrize(
    ("method", "stop"),
    [("spiel_ag", 5), ("spiel_ag", 7), ("spiel_ma", 6), ("spiel_ma", 7)],
)
def test_a_continued_run_is_the_uninterrupted_one(config, tmp_path, monkeypatch, method, stop):
    """Stopped inside an estimation phase, at a reselection, and between."""
    config.method = method
    run(config, tmp_path / "whole")
    with stopping_after(monkeypatch, stop):
        assert run(config, tmp_path / "parts").step == stop
    assert read_metadata(tmp_path / "parts")["step"] == stop
    # lines that a killed run had written past its last checkpoint, the last of them cut
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": stop + 1, "loss": 0.0}) + '\n{"step": 9, "lo')
    config.log_every = 3  # may change
    assert run(config, tmp_path / "parts", resume=True).step == 10
    whole, parts = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts"))
    assert whole == parts
    one, other = restore_deltas(tmp_path / "whole"), restore_deltas(tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert run(config, tmp_path / "parts").step == 10  # nothing left to do


@pytest.mark.slow
def test_deltas_are_restored_alone_and_sorted(config, tmp_path):
    config.eval_every = 0
    summary = run(config, tmp_path)
    deltas = restore_deltas(tmp_path)
    for delta in deltas.values():
        assert (np.diff(delta.indices, axis=-1) > 0).all()
    source = open_model(config.model.source)
    base = source.load(jnp.float32, progress=False)
    tuned = merge(base, deltas)
    changed = sum(int((tuned[name] != base[name]).sum()) for name in base)
    assert 0.8 * 1000 < changed <= 1000
    # the restored model has the held-out loss of the run
    batches = load_data(data_config(config), source.tokenizer()).heldout_batches(2)
    objective = Objective(source.config, "none", 64)
    loss = sum(objective(tuned, batch) for batch in batches) / sum(b["weights"].sum() for b in batches)
    assert float(loss) == pytest.approx(summary.heldout[-1][1], rel=1e-5)
    with pytest.raises(CheckpointError, match="sparse deltas"):
        restore_trainable(tmp_path)
    with pytest.raises(CheckpointError, match=r"no checkpoint 3 .* there are 6, 10"):
        restore_deltas(tmp_path, step=3)


@pytest.mark.slow
@pytest.mark.usefixtures("few_programs")
def test_an_interrupted_save_leaves_the_previous_checkpoint(config, tmp_path, monkeypatch):
    with stopping_after(monkeypatch, 6):
        run(config, tmp_path)
    whole = restore_deltas(tmp_path)
    torn = tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp"
    (torn / "deltas").mkdir(parents=True)
    (torn / "deltas" / "manifest.ocdbt").write_bytes(b"half")
    jax.tree.map(np.testing.assert_array_equal, whole, restore_deltas(tmp_path))
    assert run(config, tmp_path).step == 10


@pytest.mark.usefixtures("few_programs")
def test_another_configuration_is_refused(config, tmp_path, monkeypatch):
    with stopping_after(monkeypatch, 2):
        run(config, tmp_path)
    before = (tmp_path / "config.json").read_text()
    config.optimizer.learning_rate = 1.0
    config.spiel.rate = 0.5
    with pytest.raises(
        ConfigError, match=r"(?s)learning_rate: 0.03 there, 1.0 now.*spiel.rate: 0.2 there, 0.5 now"
    ):
        run(config, tmp_path)
    assert (tmp_path / "config.json").read_text() == before
    for lost in (lambda path: path.write_text(before[:100]), lambda path: path.unlink()):
        lost(tmp_path / "config.json")
        found = sorted(tmp_path.rglob("*"))
        with pytest.raises(ConfigError, match=r"checkpoints, but its config\.json cannot be read"):
            run(config, tmp_path)
        assert sorted(tmp_path.rglob("*")) == found


def test_a_folder_without_a_checkpoint_may_be_used_again(config, tmp_path):
    """A run that failed early does not block the mended one."""
    config.data.sources = ("nowhere.jsonl",)
    with pytest.raises(ValueError, match="nowhere"):
        run(config, tmp_path)
    with pytest.raises(CheckpointError, match="--resume"):
        run(config, tmp_path, resume=True)
    config.method = "spiel_ma"
    config.data.sources = (str(tmp_path / "there.jsonl"),)
    (tmp_path / "there.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 60)
    config.steps = 2
    config.data.packing = False
    assert run(config, tmp_path).step == 2


@pytest.mark.usefixtures("few_programs")
def test_another_base_model_is_refused(config, tmp_path, monkeypatch, llama_folder):
    folder = tmp_path / "model"
    shutil.copytree(llama_folder, folder)
    config.model.source = str(folder)
    with stopping_after(monkeypatch, 2):
        run(config, tmp_path / "run")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"another base model.*differ: model.layers.mlp.up_proj.weight$"
    ):
        run(config, tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_asks_to_stop_and_the_second_means_it(number):
    before = signal.getsignal(number)
    with training.stop_on_signal(several=False) as asked:
        assert not asked()
        signal.raise_signal(number)
        assert asked()
        assert signal.getsignal(number) is before
    assert signal.getsignal(number) is before


def test_resume_needs_a_run(config, tmp_path):
    with pytest.raises(CheckpointError, match="holds no run to continue"):
        run(config, tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()
    with pytest.raises(CheckpointError, match="no folder of a run"):
        restore_deltas(tmp_path / "none")


@pytest.mark.slow
@pytest.mark.usefixtures("few_programs")
def test_a_loss_that_is_not_finite_stops_and_the_run_can_go_on_without_such_steps(config, tmp_path):
    config.optimizer.learning_rate = 1e38
    config.checkpoint_every = 1
    with pytest.raises(
        NonFiniteError, match=r"step \d+: loss nan.*Lower the learning rate.*on_nonfinite=skip"
    ):
        run(config, tmp_path)
    config.on_nonfinite = "skip"
    config.skip_limit = 3
    with pytest.raises(NonFiniteError, match=r"step number 4 in a row that would be skipped.*skip_limit = 3"):
        run(config, tmp_path, resume=True)
    config.skip_limit = 10
    assert run(config, tmp_path, resume=True).skipped > 3
    assert not not_finite(restore_deltas(tmp_path))


@pytest.mark.usefixtures("few_programs")
def test_values_that_the_optimizer_loses_are_never_saved(config, tmp_path):
    config.method = "full"
    config.targets.num_tunable = None
    config.checkpoint_every = 1
    config.optimizer.learning_rate = 1e38
    config.optimizer.weight_decay = 1e30
    with pytest.raises(
        NonFiniteError, match=r"step 1: the loss and the gradient are finite, and what the optim"
    ):
        run(config, tmp_path)
    assert newest_metadata(tmp_path) is None


@pytest.mark.usefixtures("few_programs")
def test_or_the_step_is_skipped(config, tmp_path):
    config.method, config.targets.num_tunable, config.lora.rank = "lora", None, 2  # one kind of step
    config.optimizer.learning_rate = 1e38
    config.on_nonfinite = "skip"
    summary = run(config, tmp_path)
    assert summary.step == 10
    assert summary.skipped > 0
    assert "nan" in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("method", "lora2", "'lora2': expected one of spiel_ag, .*lora, ia3"),
        ("lora.rank", 0, r"config\.lora\.rank = 0: expected at least 1"),
        ("model.dtype", "float16", "expected one of bfloat16, float32"),
        ("model.source", "", "expected a model"),
        ("micro_batch_size", 3, "expected a divisor of batch_size = 4"),
        ("steps", 0, "expected at least 1"),
        ("spiel.accumulation", 9, "expected 1 to spiel.every = 4"),
        ("optimizer.learning_rate", float("nan"), "expected more than 0"),
        ("optimizer.b2", 1.0, "expected 0 or more and less than 1"),
        ("targets.density", 0.1, "one of them"),
        ("data.truncate", "middle", "expected one of end, skip"),
        ("data.sources", (), "expected a tuple of paths"),
        ("data.sources", ({"path": "x", "wieght": 1.0},), "wieght"),
    ],
)
def test_bad_values_are_refused_before_any_work(config, tmp_path, key, value, message):
    if key.startswith("lora"):
        config.method = "lora"
    with config.unlocked():
        section = config
        *parts, last = key.split(".")
        for part in parts:
            section = section[part]
        section[last] = value
    with pytest.raises(ConfigError, match=message):
        run(config, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets.rules": (r".*\.o_porj\.weight",)}, r"matches no .*o_proj"),
        ({"targets.num_tunable": 10**9}, "config.targets: 1000000000 tunable entries: expected 1 to"),
        ({"targets.num_tunable": 1}, "config.targets: .* would get no active entry"),
        ({"targets.num_tunable": None, "targets.density": 1.0}, "tunable entries: expected 1 to"),
        ({"targets.grid.fsdp": 5}, "fsdp=5 does not divide"),
        ({"method": "lora", "targets.rules": (r"lm_head\.weight",)}, "lm_head"),
        ({"method": "ia3", "targets.rules": (r".*\.o_proj\.weight",)}, "matches no"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_before_data_are_read(config, tmp_path, changes, message):
    config.data.sources = ("nowhere.jsonl",)
    for key, value in changes.items():
        set_key(config, key, value)
    with pytest.raises(SpielError, match=message):
        run(config, tmp_path)


TINY = """
from spiel_jax.config import default_config


def get_config():
    config = default_config()
    config.model.source = {model!r}
    config.data.sources = ({data!r},)
    config.data.heldout = 4
    config.data.sequence_length = 64
    config.method = "spiel_ma"
    config.targets.num_tunable = 200
    config.targets.rules = (r".*up_proj.weight",)
    config.mesh.data = 1
    config.batch_size = 2
    config.steps = 2
    return config
"""


def test_command_line(tmp_path, llama_folder, data, monkeypatch, capsys):
    """A run; what ends one shows in the exit status."""
    file = tmp_path / "tiny.py"
    file.write_text(TINY.format(model=str(llama_folder), data=str(data)))
    monkeypatch.chdir(tmp_path)
    values = flags.FlagValues()
    train.define_flags(values)
    cli.parse(values, ["train", f"--config={file}"])
    with stopping_after(monkeypatch, 1), pytest.raises(SystemExit) as stopped:
        train.main(values)
    assert stopped.value.code == 75
    assert "steps                    1 of 2" in capsys.readouterr().out
    train.main(values)
    assert "steps                    2 of 2" in capsys.readouterr().out
    assert (tmp_path / "runs" / "tiny" / "metrics.jsonl").exists()
    assert len(train.__doc__.partition("Exit status: ")[2]) > 100  # --help shows it


def test_ctrl_c_while_it_loads(tmp_path):
    """The status of a shell's, one line, no traceback."""
    file = tmp_path / "slow.py"
    file.write_text("import time\nprint('ready', flush=True)\ntime.sleep(99)\n")
    command = [sys.executable, "-m", "spiel_jax.train", f"--config={file}"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as running:
        assert running.stdout.readline() == "ready\n"
        running.send_signal(signal.SIGINT)
        assert running.wait(30) == 130
        assert running.stderr.read() == "interrupted by SIGINT\n"
