"""The configuration of a run: every key with its default, and the checks on their values.

A config file has ``get_config()`` that starts from ``default_config()``, sets keys, and returns it. Any key
can be set on the command line: ``--config.optimizer.learning_rate=1e-4``.
"""

import dataclasses
import difflib
import fnmatch
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from spiel_jax.bounds import KEYS
from spiel_jax.data import DataConfig, SourceSpec
from spiel_jax.data.templates import read_template
from spiel_jax.errors import SpielError
from spiel_jax.methods.registry import method_class
from spiel_jax.optim.criteria.criterion import CRITERIA, Complaint

Config = Any
"""An ``ml_collections.ConfigDict``; its keys are known at run time only."""

LINEAR_LAYERS = (r"model\.layers\.\d+\.(self_attn|mlp)\.[a-z]+_proj\.weight",)
"""Default rules: every linear layer inside the transformer blocks."""

ADJUSTABLE = (
    *("log_every", "checkpoint_every", "checkpoint_keep", "mesh.*", "profile", "sample.*"),
    *("checkpoint_keep_best", "on_nonfinite", "skip_limit", "data.on_mismatch"),
)
"""Keys that may differ when a run is continued: they change nothing that was trained."""


class ConfigError(SpielError):
    """A key of the configuration has a value that is not allowed.

    Attributes:
        key: Which; empty where it is not about one.
    """

    def __init__(self, message: str = "", key: str = ""):
        super().__init__(message)
        self.key = key


def default_config() -> Config:
    """All keys. The defaults are the paper's recipe where it has one; a config sets model and data.

    What each may be is in ``bounds.KEYS``. No key can be added.

    Example:
        >>> config = default_config()
        >>> config.optimizer.learning_rate = 3e-4
        >>> config.is_locked
        True
    """
    optional = config_dict.placeholder  # one call per key: a placeholder object is one value
    config = ml_collections.ConfigDict(
        {
            "seed": 0,  # of the initial positions, the order of the data, random weights
            # spiel_ag | spiel_ma: entries evolve by accumulated gradients, by approximated moments
            # random: they evolve at random (SET); with spiel.rate=0, a static random mask (SHiRA, SpaRTA)
            # magnitude: static, largest or smallest pretrained weights (Super-Tuning)
            # gradient: static, largest gradients at the start (SIFT); the entries are chosen at the end of
            # step spiel.accumulation
            # lora: matrices of low rank beside the weights; ia3: scaled keys, values and MLP activations
            # full: AdamW on every weight
            "method": "spiel_ag",
            "model": {
                # a folder with safetensors, a .gguf file, package:NAME, a hub id (org/name, org/name/folder,
                # org/name@revision), or random
                "source": "",
                "preset": optional(str),  # shape of a random model, such as llama2_7b
                "tokenizer": optional(str),  # another source to take the tokenizer from
                "dtype": "bfloat16",  # of the base weights: bfloat16 | float32
                # how the frozen weights of the blocks' linears are held: none (as they are)
                "quantization": "none",
                "remat": "full",  # stored for the backward pass: none | dots | full
                "loss_chunk": 512,  # tokens whose logits are in memory at a time
            },
            "targets": {
                "rules": LINEAR_LAYERS,  # regular expressions on names, first match wins; of adapters too
                "density": optional(float),  # of sparse methods: tunable entries as a share of all parameters
                "num_tunable": optional(int),  # or their number
                # blocks of each weight along the mesh axes, each with its own share of the entries; a run's
                # mesh must divide them. Default: as the mesh at the start; 1 and 1 is the paper's algorithm
                "grid": {"fsdp": optional(int), "tensor": optional(int)},
            },
            # devices along each axis; -1: the rest of them
            "mesh": {
                "data": -1,  # each has its own sequences and all weights
                "fsdp": 1,  # its own sequences and a part of the weights
                "tensor": 1,  # the same sequences and a part of every layer's heads and hidden units
            },
            "spiel": {
                "every": 20,  # steps between reselections
                "accumulation": 5,  # steps of the estimation phase before one
                "schedule": "linear",  # of the replacement rate: linear | cosine | constant
                "rate": 0.2,  # initial replacement rate
                # rate of the first reselection; negative: as the schedule says; default: 1 for SpIEL, whose
                # entries start at random, and as the schedule says for random
                "first": optional(float),
                "candidate_ratio": 1.0,  # spiel_ag, gradient: candidates per active entry
                "score": "product",  # spiel_ma: of a row's and a column's accumulator: product | minimum
                "magnitude": "largest",  # magnitude: largest | smallest
                "merge": "resident",  # resident | per_use
                # corrected | reference: every quirk of the original implementation
                "parity": "corrected",
            },
            "lora": {
                "rank": 64,
                "alpha": 16.0,
                "dropout": 0.1,
                "rslora": False,  # scale by alpha / sqrt(rank), not alpha / rank
            },
            "optimizer": {
                # The paper tries, with AdamW for all but spiel_ma: spiel_ag and lora 1e-4, 3e-5, 1e-5, 3e-6;
                # spiel_ma 2e-3, 1e-3, 7e-4, 4e-4; ia3 from 3e-4 to 1e-5
                "learning_rate": 1e-4,
                "schedule": "linear",  # after the warm-up: linear | cosine | constant
                "warmup": 0.03,  # share of the steps
                "weight_decay": 0.0,
                "b1": 0.9,
                "b2": 0.999,
                "eps": optional(float),  # default: the method's
                "clip_norm": optional(float),
            },
            "data": {
                # tuple of paths, package:NAME, hub ids; or dicts of the fields of SourceSpec
                "sources": (),
                # a share below 1, a number of examples, or a tuple of sources
                "heldout": config_dict.FieldReference(0.02, field_type=object),
                "sequence_length": 2048,
                "packing": True,
                "truncate": "end",  # end | skip
                "on_malformed": "error",  # error | skip
                # a file with another chat template (Jinja) than the tokenizer's; the run keeps its text
                "chat_template": optional(str),
                # generation asks otherwise than an example teaches, or it teaches no stop: warn | error
                "on_mismatch": "warn",
                "style": "auto",  # of prompt/completion rows: chat | plain | auto
            },
            "batch_size": 128,  # sequences per optimizer step
            "micro_batch_size": optional(int),  # of these at a time; default: all
            "epochs": 2,
            "steps": optional(int),  # instead of epochs
            "eval_every": 50,  # steps between evaluations of the held-out loss; 0: only at the ends
            "eval_batches": optional(int),  # at most so many held-out batches; default: all
            "log_every": 1,
            "checkpoint_every": 100,  # 0: only at the end
            "checkpoint_keep": 2,  # the newest
            # the one of lowest held-out loss beside them: an evaluation that is the best so far is saved
            "checkpoint_keep_best": False,
            # trace so many steps, from the third of this process on, into the run's folder "profile": XProf,
            # TensorBoard or ui.perfetto.dev show it
            "profile": 0,
            "on_nonfinite": "stop",  # a loss or gradient that is not finite: stop | skip that step
            "skip_limit": 10,  # so many steps in a row are skipped, and not one more
            "sample": {
                "prompt": optional(str),  # shown to the base and the tuned model at the end
                "max_new_tokens": 64,
            },
        }
    )
    return config.lock()


def check_config(config: Config) -> None:
    """Refuses values that no run could use, before anything is loaded.

    Raises:
        ConfigError: Naming the key, its value and what is allowed.
    """
    flat = flatten(config)
    for key in flat.keys() - KEYS.keys():
        raise ConfigError(no_key(key), key)
    for key in KEYS.keys() - flat.keys():
        raise ConfigError(f"config.{key} is missing: a config starts from default_config()", key)
    of_one_key = ((key, flat[key], kind.expected(flat[key])) for key, kind in KEYS.items())
    for key, value, expected in itertools.chain(of_one_key, _bad_run(config), _bad_method(config)):
        if expected:
            raise ConfigError(f"config.{key} = {shown(value)}: expected {expected}", key)
    data_config(config)
    if config.data.chat_template is not None:
        read_template(config.data.chat_template)


def shown(value: Any) -> str:
    """A value for a message; of a long one beginning and end.

    >>> shown((1, "a")), len(shown("a" * 1000))
    ("(1, 'a')", 155)
    """
    text = repr(value)
    return text if len(text) < 200 else f"{text[:100]} ... {text[-50:]}"


def no_key(key: str) -> str:
    """That there is no such key, and which are near."""
    if any(known.startswith(f"{key}.") for known in KEYS):
        return f"config.{key} is a section of keys: {', '.join(k for k in KEYS if k.startswith(f'{key}.'))}"
    return f"config.{key} is no key; near: {', '.join(near_keys(key))}"


def near_keys(key: str, number: int = 3) -> list[str]:
    """The keys that are most like a mistyped one.

    >>> near_keys("learning_rat")[0], near_keys("lora.rnk")[0], near_keys("lr")[0]
    ('optimizer.learning_rate', 'lora.rank', 'optimizer.learning_rate')
    """

    def likeness(known: str) -> float:
        short, last = (name.rpartition(".")[2] for name in (key, known))
        if short == "".join(word[0] for word in last.split("_")) and len(short) > 1:
            return 1.0
        pairs = ((key, known), (short, last))
        return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    return sorted(KEYS, key=likeness, reverse=True)[:number]


def without_effect(config: Config, keys: Iterable[str]) -> Iterator[str]:
    """Which of some keys change nothing in a config, a sentence each: what they are beside, and what to do.

    Args:
        config: Checked.
        keys: Those that were set by hand. One that is None is not looked at: it asks for nothing.
    """
    method, idle = config.method, list(_idle_keys(config))
    idle += [
        (pattern, f"method = {method!r}", "choose another method")
        for pattern in method_class(method).unused(config)
    ]
    flat = flatten(config)
    for key in keys:
        for pattern, beside, remedy in idle:
            if fnmatch.fnmatchcase(key, pattern) and flat[key] is not None:
                what = f"config.{key} = {shown(flat[key])} has no effect beside {beside}"
                yield f"{what}: leave it out, or {remedy}"


def _idle_keys(config: Config) -> Iterator[tuple[str, str, str]]:
    """Keys that another one makes idle, whatever the method: pattern, that other one, and what would do."""
    if config.steps is not None:
        yield "epochs", f"steps = {config.steps}", "unset that: --config.steps=None"
    if not config.sample.prompt:
        yield "sample.max_new_tokens", "sample.prompt = None", "set that"
    if config.on_nonfinite == "stop":
        yield "skip_limit", "on_nonfinite = 'stop'", "skip such steps: --config.on_nonfinite=skip"
    if not config.data.heldout:
        for key in ("eval_every", "eval_batches", "checkpoint_keep_best"):
            if config[key]:
                yield key, "data.heldout = 0", "hold examples out"


def _bad_run(config: Config) -> Iterator[Complaint]:
    micro = micro_batch_size(config)
    if config.batch_size % micro:
        yield "micro_batch_size", micro, f"a divisor of batch_size = {config.batch_size}"
    if micro * config.data.sequence_length > 2**31 - 1:
        yield (
            "data.sequence_length",
            config.data.sequence_length,
            f"less, or a smaller micro-batch than {micro}: its tokens are counted in int32",
        )


def _bad_method(config: Config) -> Iterator[Complaint]:
    method = method_class(config.method)
    if not method.keeps_base and config.model.quantization != "none":
        expected = f"none: method = {config.method!r} trains every weight"
        yield "model.quantization", config.model.quantization, expected
    yield from method.complaints(config)


def micro_batch_size(config: Config) -> int:
    """Sequences per micro-batch."""
    return config.batch_size if config.micro_batch_size is None else config.micro_batch_size


def with_grid(config: Config, mesh: Mapping[str, int], known: Mapping[str, Any]) -> Config:
    """The config with its block grid filled in.

    Args:
        config: Its axes that are set stay.
        mesh: Sizes of the run's mesh, which a new run that trains sparse deltas has its grid from.
        known: Flat config of the run that is continued, whose grid it keeps; empty for a new run.
    """
    config = config.copy_and_resolve_references()
    sparse = config.method in CRITERIA
    for axis, blocks in config.targets.grid.items():
        if blocks is None:
            config.targets.grid[axis] = known.get(f"targets.grid.{axis}", mesh[axis] if sparse else 1)
    return config


def check_micro_batch(config: Config, mesh: Mapping[str, int]) -> None:
    """Makes sure that a micro-batch can be spread over a mesh of these sizes.

    Raises:
        ConfigError: If it cannot.
    """
    rows, shards = micro_batch_size(config), mesh["data"] * mesh["fsdp"]
    if rows % shards:
        raise ConfigError(
            f"config.micro_batch_size = {rows}: expected a multiple of {shards}, the size of data x fsdp in "
            "config.mesh"
        )


def _sources(sources: Any, key: str) -> tuple[SourceSpec, ...]:
    return tuple(_source(source, key) for source in sources)


def _source(source: Any, key: str) -> SourceSpec:
    fields = [field.name for field in dataclasses.fields(SourceSpec)]
    given: dict[str, Any] = {"path": source} if isinstance(source, str) else dict(source)
    for name in given:
        if name not in fields:
            raise ConfigError(
                f"config.{key}: a source has no {name!r}: expected some of {', '.join(fields)} in {given}"
            )
    if "path" not in given:
        raise ConfigError(f"config.{key}: a source without a path: {given}")
    try:
        return SourceSpec(**given)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"config.{key}: {error}, in {given}") from error


def data_config(config: Config) -> DataConfig:
    """The data section, checked.

    Raises:
        ConfigError: If a value is not allowed.
    """
    data = config.data
    heldout = data.heldout
    if isinstance(heldout, tuple | list):
        heldout = _sources(heldout, "data.heldout")
    elif isinstance(heldout, float) and heldout.is_integer():
        heldout = int(heldout)  # 64.0: the share that an earlier version made of a number
    try:
        return DataConfig(
            sources=_sources(data.sources, "data.sources"),
            heldout=heldout,
            sequence_length=data.sequence_length,
            packing=data.packing,
            truncate=data.truncate,
            on_malformed=data.on_malformed,
            on_mismatch=data.on_mismatch,
            style=data.style,
            seed=config.seed,
        )
    except ValueError as error:
        raise ConfigError(f"config.data: {error}") from error


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key to value, JSON-like: tuples are lists."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ml_collections.ConfigDict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def unflatten(flat: Mapping[str, Any]) -> Config:
    """The config that ``flatten`` made flat; keys that are not there have their defaults.

    Args:
        flat: As any version may have stored it: keys that are not known here are kept.
    """
    config = default_config()
    for key, value in flat.items():
        set_key(config, key, value)
    return config


def set_key(config: Config, key: str, value: Any) -> None:
    """Gives a key a value, whatever the type of its last one."""
    *sections, name = key.split(".")
    with config.unlocked():
        section = config
        for part in sections:
            if part not in section:
                section[part] = ml_collections.ConfigDict()
            section = section[part]
        with section.ignore_type():
            section[name] = value


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ between two flattened configs, but for the adjustable ones.

    Args:
        old: As an earlier version may have stored it: a key that it lacks has its default.
        new: Of this version.
    """
    old = {key: value for key, value in flatten(default_config()).items() if key in new} | old

    def adjustable(key: str) -> bool:
        return any(key == a or (a.endswith(".*") and key.startswith(a[:-1])) for a in ADJUSTABLE)

    keys = sorted(old.keys() | new.keys())
    return {
        key: (old.get(key), new.get(key))
        for key in keys
        if not adjustable(key) and old.get(key) != new.get(key)
    }
