"""Config files and what is set beside them: read, and refused with file, line and key."""

import os
import sys

import pytest

from spiel_jax.config import ConfigError, default_config, flatten
from spiel_jax.config.bounds import (
    KEYS,
    HeldOut,
    Number,
    OneOf,
    OrNone,
    Rules,
    Sources,
    Switch,
    Text,
    Texts,
    Whole,
)
from spiel_jax.config.file import load, read

HEAD = "from spiel_jax.config import default_config\n\n\ndef get_config():\n    config = default_config()\n"
BODY = """    config.model.source = "here"
    config.data.sources = ("a.jsonl",)
    config.targets.density = 0.1
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="some.py"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def set_in_file(*lines):
    return HEAD + BODY + "".join(f"    {line}\n" for line in lines) + "    return config\n"


def refused(file, given=None):
    with pytest.raises(ConfigError) as raised:
        load(file, given or {})
    return str(raised.value)


def examples(kind):
    """Texts of the command line to the values that they stand for, of all that a kind allows."""
    match kind:
        case OrNone():
            return {"None": None, **examples(kind.kind)}
        case Whole():
            return {str(kind.low): kind.low, "4": 4, "0x10": 16}
        case Number():
            return {str(x): x for x in (0.0, 0.5, 1.0, 1e-3, -1.0) if not kind.expected(x)} | (
                {} if kind.expected(1) else {"1": 1.0}
            )
        case Switch():
            spelt = {"true": True, "True": True, "1": True, "yes": True, "on": True, "t": True}
            return spelt | {"false": False, "False": False, "0": False, "no": False, "off": False}
        case OneOf():
            return {name: name for name in kind.names()}
        case HeldOut():
            return {"0": 0, "100": 100, "0.1": 0.1, "('a.jsonl',)": ("a.jsonl",), "a.jsonl": ("a.jsonl",)}
        case Sources():
            one = {"path": "a.jsonl", "weight": 2}
            return {
                "a.jsonl": ("a.jsonl",),
                "('a', 'b')": ("a", "b"),
                f"({one},)": (one,),
                f"[{one}]": (one,),
            }
        case Rules():
            return {"(a|b).*": ("(a|b).*",), r"('a\\.b', '.*')": (r"a\.b", ".*")}
        case Texts():
            return {"()": (), "a b": ("a b",), "('a', 'b')": ("a", "b"), "['a']": ("a",)}
        case Text():
            return {"a b": "a b", "x=y": "x=y"}
    raise AssertionError(kind)


@pytest.mark.parametrize("key", KEYS)
def test_every_key_takes_what_it_may_be_whatever_the_file_has(key, write, monkeypatch):
    """Through the real parsing of flags; the file's own value is of each type in turn."""
    from absl import flags

    from spiel_jax import cli
    from spiel_jax.config import file as config_file

    # what the keys may not be beside each other is tested elsewhere
    monkeypatch.setattr(config_file, "check_config", lambda config: None)
    monkeypatch.setattr(config_file, "without_effect", lambda config, keys: ())
    wanted = examples(KEYS[key])
    assert wanted
    for own in list(wanted.values())[:3]:
        file = write(
            "from spiel_jax.config import default_config, set_key\ndef get_config():\n"
            f"    config = default_config()\n    set_key(config, {key!r}, {own!r})\n    return config\n"
        )
        for text, value in wanted.items():
            arguments = [[f"--config.{key}={text}"]]
            if isinstance(KEYS[key], Switch):
                arguments.append([f"--config.{key}" if value else f"--noconfig.{key}"])
            else:
                arguments.append([f"--config.{key}", text])
            for given in arguments:
                values = flags.FlagValues()
                cli.define_config(values)
                cli.parse(values, ["program", *given, f"--config={file}"])
                found = cli.read_config(values)
                section, _, name = key.rpartition(".")
                set_value = (found[section] if section else found)[name]
                assert (set_value, type(set_value)) == (value, type(value)), given


def test_texts_that_are_nothing_a_key_may_be(write):
    file = write(set_in_file())
    for key, text, expected in (
        ("steps", "1.5", "a whole number, at least 1, or None"),
        ("steps", "ten", "a whole number, at least 1, or None"),
        ("seed", "None", "a whole number, 0 or more"),
        ("data.packing", "maybe", "True or False"),
        ("optimizer.b1", "nan", "0 or more and less than 1"),
        ("optimizer.learning_rate", "True", "a number, more than 0"),
        ("data.sources", "('a.jsonl', 'b.jsonl'", "a tuple of paths"),
        ("data.heldout", "-3", "a share between 0 and 1, a number of examples, or paths"),
        ("method", "spiel", "one of spiel_ag"),
    ):
        message = refused(file, {key: [text]})
        assert message.startswith(f"config.{key} = "), message
        assert expected in message


def test_flags_that_are_given_several_times(write):
    file = write(set_in_file())
    config = load(file, {"data.sources": ["a", "('b', 'c')"], "seed": ["1", "2"]})
    assert (config.data.sources, config.seed) == (("a", "b", "c"), 2)


def test_what_is_set_by_hand_must_have_an_effect_but_a_file_may_carry_it(write):
    file = write(set_in_file("config.steps = 3", "config.epochs = 1", "config.lora.rank = 8"))
    assert load(file, {}).steps == 3
    assert load(file, {"steps": ["None"], "epochs": ["1"]}).epochs == 1
    assert load(file, {"method": ["lora"], "lora.rank": ["4"]}).lora.rank == 4
    assert "epochs = 1 has no effect beside steps = 3" in refused(file, {"epochs": ["1"]})
    assert "lora.rank = 4 has no effect beside method = 'spiel_ag'" in refused(file, {"lora.rank": ["4"]})


def test_references_follow_what_the_command_line_sets(write):
    file = write(set_in_file('config.eval_every = config.get_ref("checkpoint_every")'))
    assert load(file, {"checkpoint_every": ["7"]}).eval_every == 7


def test_an_argument_of_the_file(write):
    file = write(
        "from spiel_jax.config import default_config\n\ndef get_config(name):\n"
        "    config = default_config()\n    config.method = name\n    return config\n"
    )
    assert read(f"{file}:lora").method == "lora"
    assert "missing 1 required positional argument: 'name'" in refused(file)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("def get_config(:\n", 1, "invalid syntax"),
        (HEAD + "  return config\n", 6, "unindent does not match"),
        ("import nothing_of_this_name\n", 1, "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("x = 1 / 0\n", 1, "ZeroDivisionError: division by zero"),
        (HEAD + "    raise RuntimeError('why')\n", 6, "RuntimeError: why"),
        (set_in_file("config.bach_size = 3"), 9, "config.bach_size is no key; near: batch_size"),
        (set_in_file("config.optimizer.lr = 3"), 9, "config.optimizer.lr is no key; near: optimizer.l"),
        (set_in_file("config.optimzer.b1 = 3"), 9, "config.optimzer is no key; near: optimizer."),
        (set_in_file("config['sed'] = 3"), 9, "config.sed is no key; near: seed"),
        (set_in_file("config.optimizer.update({'b3': 3})"), 9, "config.optimizer.b3 is no key; near: "),
        (set_in_file("config.batch_size = '8'"), 9, "config.batch_size = '8': expected a whole"),
        (set_in_file("config.steps = 10.0"), 9, "config.steps = 10.0: expected a whole"),
        (set_in_file("config.targets.rules = '.*'"), 9, "config.targets.rules = '.*': expected a tup"),
        (
            set_in_file("config.data.packing = 'yes'"),
            9,
            "config.data.packing = 'yes': expected True or False",
        ),
        (set_in_file("import numpy", "config.seed = numpy.int64(3)"), 10, "config.seed = np.int64(3): exp"),
        (set_in_file("config.data = 3"), 9, "config.data is a section of keys: data.sources"),
    ],
)
def test_errors_in_a_file_name_the_line(write, text, line, message):
    file = write(text)
    shown = refused(file)
    assert shown.startswith(f"{file}, line {line}: {message}"), shown
    assert "\n" not in shown


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "{file} defines no function get_config()"),
        ("get_config = 3", "{file} defines no function get_config()"),
        ("get_config = lambda: None", "{file}: get_config() returns None (is `return config` missing?)"),
        ("get_config = dict", "{file}: get_config() returns {{}}: expected the config that default_config()"),
        (b"a\0b", "{file} is no text"),
        (b"# a comment\n# caf\xe9\n", "{file}: b'\\xe9' in line 2 is not UTF-8"),
        (b"\n\n\n# caf\xe9\n", "{file}: b'\\xe9' in line 4 is not UTF-8"),
        (b"# coding: klingon\n", "{file}: unknown encoding: klingon"),
        (
            "from ml_collections import ConfigDict\nget_config = ConfigDict",
            "is missing: a config starts from",
        ),
        (set_in_file("config.batch_size = True"), "True: expected a whole number, at least 1 (in {file})"),
        (set_in_file("config.optimizer.b1 = 1"), "b1 = 1.0: expected 0 or more and less than 1 (in {file})"),
    ],
)
def test_other_errors_in_a_file(write, text, message):
    file = write(text)
    assert message.format(file=file) in refused(file)


def test_what_is_no_file(tmp_path, write):
    assert refused(str(tmp_path)) == f"{tmp_path} is a folder: expected a file with get_config()"
    assert refused("") == "--config= names no file: expected one with get_config()"
    assert refused(str(tmp_path / "no.py")) == f"{tmp_path / 'no.py'}: there is no such file"
    if os.getuid():  # nothing is closed to root
        file = write("")
        os.chmod(file, 0)
        assert refused(file) == f"{file} cannot be read: Permission denied"


def test_a_frozen_config_and_dataclasses_in_the_file(write):
    file = write(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "from ml_collections import FrozenConfigDict\n@dataclass\nclass Mine:\n    x: int = 3\n"
        + set_in_file().replace("return config", "return FrozenConfigDict(config)")
    )
    assert load(file, {"seed": ["3"]}).seed == 3
    assert sys.modules["spiel_jax_config_file"].Mine().x == 3


def test_the_defaults_are_what_they_are():
    assert flatten(default_config())["data.heldout"] == 0.02
