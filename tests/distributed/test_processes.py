"""Runs of two processes on this machine, against runs of one; and what the processes agree on."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import jax
import numpy as np
import pytest
from support.saved_runs import save_run

from spiel_jax.checkpoint import read_metadata, restore_deltas, restore_trainable
from spiel_jax.config import ConfigError, default_config
from spiel_jax.distributed import processes
from spiel_jax.distributed.mesh import local_rows, make_mesh
from spiel_jax.training import run as training
from spiel_jax.training.metrics import read_metrics
from spiel_jax.training.workdir import find_workdir, write_config

STEPS = 7
LATE = 300  # seconds after which a process of a test hangs
TRAIN = ("-m", "spiel_jax.train")


@pytest.fixture(scope="module")
def config_file(tmp_path_factory, llama_folder):
    """A config file as for the command line: with a reselection of every entry, and some of a few."""
    folder = tmp_path_factory.mktemp("config")
    rng = np.random.default_rng(0)
    rows = [{"prompt": f"say {word}", "completion": "ab" * word} for word in rng.integers(1, 9, 60).tolist()]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = folder / "tiny.py"
    file.write_text(
        "from spiel_jax.config import default_config\n\n\n"
        "def get_config():\n"
        "    config = default_config()\n"
        f"    config.model.source = {str(llama_folder)!r}\n"
        "    config.model.dtype = 'float32'\n"
        f"    config.data.sources = ({str(folder / 'data.jsonl')!r},)\n"
        "    config.data.heldout = 8\n"
        "    config.data.sequence_length = 64\n"
        "    config.targets.num_tunable = 1000\n"
        "    config.targets.rules = (r'.*\\.(o|up)_proj\\.weight',)\n"
        "    config.targets.grid = {'fsdp': 2, 'tensor': 2}\n"
        "    config.spiel.every = 2\n"  # no plain steps: one program less
        "    config.spiel.accumulation = 2\n"
        "    config.optimizer.learning_rate = 3e-2\n"
        "    config.batch_size = 8\n"
        "    config.micro_batch_size = 4\n"
        f"    config.steps = {STEPS}\n"
        "    config.checkpoint_every = 5\n"
        "    return config\n"
    )
    return file


def config_of(file, method, mesh):
    """What the file and the options of ``options`` come to."""
    namespace = {}
    exec(file.read_text(), namespace)
    config = namespace["get_config"]()
    config.method = method
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = mesh
    return config


def options(file, workdir, method, mesh):
    sizes = [
        f"--config.mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), mesh, strict=True)
    ]
    return [f"--config={file}", f"--workdir={workdir}", f"--config.method={method}", *sizes]


class Pair:
    """Two processes that run the same command."""

    def __init__(self, command, folder, devices=1, differing=((), ())):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        environment = os.environ | {
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
            "NPROC": "8",  # threads of XLA: collectives of several devices wait for each other in them
        }
        self.files = [folder / f"process_{number}.txt" for number in range(2)]
        self.processes = []
        for number, file in enumerate(self.files):
            place = [f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={number}"]
            with file.open("w") as output:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *command, *place, *differing[number]],
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        env=environment,
                        cwd=os.getcwd(),
                    )
                )

    def wait(self):
        """Exit codes, and what was printed."""
        try:
            codes = [process.wait(LATE) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()  # JAX swallows SIGTERM
                process.wait()
        return codes, [file.read_text() for file in self.files]


def both(*arguments, **kwargs):
    codes, printed = Pair(*arguments, **kwargs).wait()
    assert codes == [0, 0], "\n".join(printed)
    return printed


def same_run(one, other):
    """The same numbers up to rounding, and deltas at the same positions."""
    for a, b in zip(read_metrics(one), read_metrics(other), strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-4)
    if not read_metadata(one)["targets"]:
        close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6)
        jax.tree.map(close, restore_trainable(one), restore_trainable(other))
        return
    for (name, a), b in zip(restore_deltas(one).items(), restore_deltas(other).values(), strict=True):
        np.testing.assert_array_equal(a.indices, b.indices, err_msg=name)
        np.testing.assert_allclose(a.values, b.values, rtol=1e-3, atol=1e-6, err_msg=name)


def halfway(workdir, copy):
    """A copy of a run's folder as it was at its first checkpoint."""
    shutil.copytree(workdir, copy)
    shutil.rmtree(copy / "checkpoints" / str(STEPS))
    return copy


def train_in_two(config_file, tmp_path, method, devices, mesh):
    """A run in one process and the same in two, both on the same mesh, compared."""
    alone, pair = tmp_path / "alone", tmp_path / "pair"
    training.run(config_of(config_file, method, mesh), alone, progress=False)
    first, second = both((*TRAIN, *options(config_file, pair, method, mesh)), tmp_path, devices)
    same_run(alone, pair)
    assert f"{STEPS} of {STEPS}" in first
    for text in ("held-out loss", "training:", "rows read", "tunable"):
        assert text in first
        assert text not in second
    return alone, pair


@pytest.mark.slow
def test_two_processes_train_as_one_does(config_file, tmp_path):
    train_in_two(config_file, tmp_path, "spiel_ag", 1, (1, 2, 1))


@pytest.mark.slow
def test_one_process_continues_on_the_mesh_of_two(config_file, tmp_path):
    alone, pair = train_in_two(config_file, tmp_path, "spiel_ag", 1, (1, 2, 1))
    continued = halfway(pair, tmp_path / "continued")
    training.run(config_of(config_file, "spiel_ag", (1, 2, 1)), continued, resume=True, progress=False)
    same_run(alone, continued)


@pytest.mark.parametrize(
    ("method", "devices", "mesh", "later"),
    [
        ("spiel_ag", 1, (2, 1, 1), (1, 2, 1)),
        ("spiel_ma", 1, (1, 1, 2), (2, 1, 1)),
        ("spiel_ag", 2, (1, 2, 2), (2, 1, 2)),
        ("spiel_ma", 2, (2, 2, 1), (1, 2, 2)),
        ("lora", 1, (1, 2, 1), (1, 1, 2)),
        ("full", 1, (1, 2, 1), (1, 1, 2)),
    ],
)
@pytest.mark.slow
def test_on_any_mesh_and_two_continue_what_one_has(config_file, tmp_path, method, devices, mesh, later):
    alone, pair = train_in_two(config_file, tmp_path, method, devices, mesh)
    continued = halfway(pair, tmp_path / "continued_alone")
    training.run(config_of(config_file, method, (1, 1, 1)), continued, resume=True, progress=False)
    same_run(alone, continued)
    continued = halfway(alone, tmp_path / "continued_by_two")
    both((*TRAIN, *options(config_file, continued, method, later), "--resume"), tmp_path, devices)
    same_run(alone, continued)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.slow
def test_a_signal_to_one_stops_both_after_the_same_step(config_file, tmp_path, number):
    alone, pair = tmp_path / "alone", tmp_path / "pair"
    config = config_of(config_file, "spiel_ma", (1, 2, 1))
    config.steps = 400
    training.run(config, alone, progress=False)
    command = options(config_file, pair, "spiel_ma", (1, 2, 1))
    run = Pair((*TRAIN, *command, "--config.steps=400"), tmp_path)
    metrics = pair / "metrics.jsonl"
    until = time.time() + LATE
    while time.time() < until and not (metrics.exists() and metrics.read_text().count("loss") > 9):
        time.sleep(0.1)
    run.processes[1].send_signal(number)
    codes, (first, _) = run.wait()
    assert codes == [75, 75], first  # stopped and saved
    step = read_metadata(pair)["step"]
    assert 8 < step < 400
    assert f"stopped after step {step} of 400" in first
    training.run(config, pair, resume=True, progress=False)
    same_run(alone, pair)


FULL = """
import runpy

from spiel_jax.training import records


def refuse(self, step, numbers):
    if step >= 2:
        raise OSError(28, "No space left on device")


records.TensorBoard.write = refuse
runpy.run_module("spiel_jax.train", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_records_that_cannot_be_written_stop_both_if_asked_to(config_file, tmp_path):
    """Only the first of them writes any."""
    pair = tmp_path / "pair"
    command = options(config_file, pair, "lora", (1, 2, 1))
    run = Pair(("-c", FULL, *command, "--config.steps=400", "--config.on_record_failure=stop"), tmp_path)
    codes, (first, _) = run.wait()
    assert codes == [75, 75], first
    assert "tensorboard cannot be written" in first
    step = read_metadata(pair)["step"]
    assert 2 <= step < 400
    assert f"stopped after step {step} of 400" in first


AGREEING = """
import json
import signal
import sys
import time

from spiel_jax.distributed import processes

place = dict(part.lstrip("-").split("=") for part in sys.argv[1:])
number = int(place["process_id"])
processes.initialise(place["coordinator"], int(place["num_processes"]), number)


def said(function):
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def fail(when):
    if when:
        raise FileNotFoundError("nothing here")
    return number


processes.check_same({"a": 1, "b": None})
answers = [
    processes.name(),
    processes.is_first(),
    said(lambda: processes.together(lambda: fail(False))),
    said(lambda: processes.together(lambda: fail(number == 1))),
    said(lambda: processes.check_same({"a": 1, "b": [number]})),
]
if number == 1:
    signal.raise_signal(signal.SIGTERM)
time.sleep(2)  # JAX looks every second: mostly it has seen the signal before the first step
asked, steps = processes.stop_agreed(10), 1
while not asked():
    steps += 1
    time.sleep(0.05)
answers.append(steps)
processes.wait_for_all("the end")
print(json.dumps(answers))
"""


def test_processes_agree_on_errors_and_where_to_stop(tmp_path):
    printed = both(("-c", AGREEING), tmp_path)
    one, two = (json.loads(text.splitlines()[-1]) for text in printed)
    assert one.pop() == two.pop()
    different = (
        "ProcessError: the processes were started differently:\n  b: [0] in process 0, [1] in process 1"
    )
    failed = "nothing here"
    assert one == ["process 0 of 2", True, 0, f"ProcessError: process 1 failed: {failed}", different]
    assert two == ["process 1 of 2", False, 1, f"FileNotFoundError: {failed}", different]


@pytest.mark.slow
def test_a_refused_run_stops_both_with_the_message(config_file, tmp_path):
    command = (*TRAIN, *options(config_file, tmp_path / "run", "spiel_ma", (1, 2, 1)))
    codes, printed = Pair((*command, "--resume"), tmp_path).wait()
    message = f"--resume: {tmp_path / 'run'} holds no run to continue"
    assert codes == [1, 1]
    assert f"error: in process 0 of 2: {message}" in printed[0]
    assert f"error: in process 1 of 2: process 0 failed: {message}" in printed[1]
    codes, printed = Pair(command, tmp_path, differing=((), ("--config.seed=1",))).wait()
    assert codes == [1, 1]
    for text in printed:
        assert "started differently:\n  seed: 0 in process 0, 1 in process 1" in text
    codes, printed = Pair(command, tmp_path, differing=(("--config.mesh.fsdp=1",),) * 2).wait()
    assert codes == [1, 1]
    assert "a mesh of 1 devices leaves process 1 of 2 without one: use all 2 devices" in printed[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a:1", None, None), "--num_processes and --process_id missing: .* belong together"),
        ((None, 2, 0), "--coordinator missing"),
        (("a", 2, 0), "--coordinator=a: expected host:port"),
        (("a:x", 2, 0), "--coordinator=a:x: expected host:port"),
        ((":1", 2, 0), "--coordinator=:1: expected host:port"),
        (("a:99999", 2, 0), "--coordinator=a:99999: expected host:port"),
        (("a:1", 0, 0), "--num_processes=0: expected at least 1"),
        (("a:1", 2, 2), "--process_id=2: expected 0 to 1"),
        (("a:1", 2, -1), "--process_id=-1: expected 0 to 1"),
    ],
)
def test_refused_flags(arguments, message):
    with pytest.raises(ValueError, match=message):
        processes.initialise(*arguments)


def test_the_environment_and_flags_exclude_each_other(monkeypatch):
    with pytest.raises(ValueError, match="--distributed detects what --process_id would say"):
        processes.initialise(None, None, 1, detect=True)
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: calls.append(given))
    processes.initialise()
    assert calls == []
    processes.initialise(detect=True)
    processes.initialise("host:1234", 2, 1)
    assert "coordinator_address" not in calls[0]
    assert (calls[1]["coordinator_address"], calls[1]["num_processes"], calls[1]["process_id"]) == (
        "host:1234",
        2,
        1,
    )


def test_nothing_to_detect(monkeypatch):
    def initialize(**given):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(processes.ProcessError, match="--distributed: JAX detects no processes here"):
        processes.initialise(detect=True)


def test_one_process_agrees_with_itself():
    processes.check_same({"a": 1})
    processes.wait_for_all("nobody")
    assert processes.is_first()
    assert processes.name() == ""
    assert processes.together(lambda: 3) == 3
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    processes.check_devices(mesh)
    assert local_rows(8, mesh) == list(range(8))


def test_a_folder_that_is_not_shared_is_noticed(config_file, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    config = default_config()
    with pytest.raises(ConfigError, match="all processes must see one folder"):
        find_workdir(tmp_path, config)
    write_config(tmp_path, config)
    find_workdir(tmp_path, config)
    config.seed = 3
    with pytest.raises(ConfigError, match="not what process 0 has written"):
        find_workdir(tmp_path, config)


@pytest.mark.slow
def test_an_evaluation_is_that_of_one_process(llama_folder, tmp_path):
    pytest.importorskip("lm_eval")
    (tmp_path / "gsm8k").mkdir()
    problems = [{"question": f"{n}?", "answer": f"#### {n}"} for n in range(5)]
    (tmp_path / "gsm8k/test.jsonl").write_text("".join(json.dumps(one) + "\n" for one in problems))
    (tmp_path / "texts.txt").write_text("It rains in Spain.\n\nAnd elsewhere, too.\n")
    run = save_run(tmp_path / "run", llama_folder)
    command = ("-m", "spiel_jax.evaluate", f"--checkpoint={run}", "--base", "--tasks=gsm8k", "--forgetting")
    command += (f"--data_dir={tmp_path}", "--num_fewshot=0", "--max_new_tokens=7", "--limit=5")
    command += (f"--texts={tmp_path / 'texts.txt'}",)
    both([*command, "--mesh=fsdp=2,tensor=2", f"--output={tmp_path / 'two'}"], tmp_path, devices=2)
    subprocess.run([sys.executable, *command, f"--output={tmp_path / 'one'}"], check=True, timeout=LATE)
    tables = [(tmp_path / name / "table.md").read_text() for name in ("one", "two")]
    assert tables[0] == tables[1]
