"""What no run could use is refused before anything is loaded, with the key, its value and what is allowed."""

import dataclasses
import difflib
import fnmatch
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from spiel_jax.config.bounds import KEYS
from spiel_jax.config.defaults import Config
from spiel_jax.config.flat import WAS, flatten
from spiel_jax.data import DataConfig, SourceSpec
from spiel_jax.data.templates import read_template
from spiel_jax.errors import SpielError
from spiel_jax.methods.registry import method_class
from spiel_jax.optim.criteria.accumulated_gradients import default_seeds
from spiel_jax.optim.criteria.criterion import CRITERIA, Complaint


class ConfigError(SpielError):
    """A key of the configuration has a value that is not allowed.

    Attributes:
        key: Which; empty where it is not about one.
    """

    def __init__(self, message: str = "", key: str = ""):
        super().__init__(message)
        self.key = key


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
    if not config.sample.prompt and not config.sample.prompts:
        yield "sample.max_new_tokens", "sample.prompt = None", "set that"
    if not config.eval_tasks.names:
        for key in ("every", "limit", "data_dir", "max_new_tokens"):
            yield f"eval_tasks.{key}", "eval_tasks.names = ()", "name tasks"
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


def with_defaults(config: Config, mesh: Mapping[str, int], known: Mapping[str, Any]) -> Config:
    """The config with what depends on mesh and method filled in: block grid, replacement rate and seeds.

    Args:
        config: What is set stays.
        mesh: Sizes of the run's mesh, which a new run that trains sparse deltas has its grid from.
        known: Flat config of the run that is continued, which keeps what it had; empty for a new run.
    """
    config = config.copy_and_resolve_references()
    if config.spiel.rate is None:
        growth = CRITERIA.get(config.rosa.entries if config.method == "rosa" else config.method)
        config.spiel.rate = known.get("spiel.rate", None if growth is None else growth.default_rate)
    if config.spiel.seeds is None:
        was = (WAS | dict(known))["spiel.seeds"]
        config.spiel.seeds = was if known else default_seeds(config.spiel.parity)
    sparse = method_class(config.method).has_deltas
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
