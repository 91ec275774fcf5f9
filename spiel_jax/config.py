"""The configuration of a run: every key with its default, and the checks on their values.

A config file has ``get_config()`` that starts from ``default_config()``, sets keys, and returns it. Any key
can be set on the command line: ``--config.optimizer.learning_rate=1e-4``.
"""

import math
from typing import Any, get_args

import ml_collections
from ml_collections import config_dict

from spiel_jax.data import DataConfig, SourceSpec
from spiel_jax.methods.lora import Lora
from spiel_jax.optim.alias import Parity
from spiel_jax.optim.criteria.moment_approximation import Score

Config = Any
"""An ``ml_collections.ConfigDict``; its keys are known at run time only."""

SPARSE = ("spiel_ag", "spiel_ma", "random", "magnitude", "gradient")
"""Methods that train some entries of each weight; they differ in how the entries are chosen."""
METHODS = (*SPARSE, "lora", "ia3", "full")
LINEAR_LAYERS = (r"model\.layers\.\d+\.(self_attn|mlp)\.[a-z]+_proj\.weight",)
"""Default rules: every linear layer inside the transformer blocks."""

ADJUSTABLE = ("log_every", "checkpoint_every", "checkpoint_keep", "mesh.*", "profile", "sample.*")
"""Keys that may differ when a run is continued: they change nothing that is trained."""


class ConfigError(ValueError):
    """A key of the configuration has a value that is not allowed."""


def default_config() -> Config:
    """All keys. The defaults are the paper's recipe where it has one; a config sets model and data."""
    optional = config_dict.placeholder  # one call per key: a placeholder object is one value
    return ml_collections.ConfigDict(
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
                # a folder with safetensors, a .gguf file, package:NAME, a hub id, or random
                "source": "",
                "preset": optional(str),  # shape of a random model, such as llama2_7b
                "tokenizer": optional(str),  # another source to take the tokenizer from
                "dtype": "bfloat16",  # of the base weights: bfloat16 | float32
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
                "heldout": 0.02,  # a share below 1, a number of examples, or a tuple of sources
                "sequence_length": 2048,
                "packing": True,
                "truncate": "end",  # end | skip
                "on_malformed": "error",  # error | skip
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
            "checkpoint_keep": 2,
            # trace so many steps, from the third of this process on, into the run's folder "profile": XProf,
            # TensorBoard or ui.perfetto.dev show it
            "profile": 0,
            "on_nonfinite": "stop",  # a loss or gradient that is not finite: stop | skip that step
            "sample": {
                "prompt": optional(str),  # shown to the base and the tuned model at the end
                "max_new_tokens": 64,
            },
        }
    )


def _check(good: bool, key: str, value: Any, expected: str) -> None:
    if not good:
        raise ConfigError(f"config.{key} = {value!r}: expected {expected}")


def _one_of(config: Config, key: str, allowed: tuple[str, ...]) -> None:
    value: Any = config
    for part in key.split("."):
        value = value[part]
    _check(value in allowed, key, value, "one of " + ", ".join(allowed))


def check_config(config: Config) -> None:
    """Refuses values that no run could use, before anything is loaded.

    Raises:
        ConfigError: Naming the key, its value and what is allowed.
    """
    _one_of(config, "method", METHODS)
    _one_of(config, "model.dtype", ("bfloat16", "float32"))
    _one_of(config, "model.remat", ("none", "dots", "full"))
    _one_of(config, "spiel.schedule", ("linear", "cosine", "constant"))
    _one_of(config, "spiel.merge", ("resident", "per_use"))
    _one_of(config, "spiel.parity", get_args(Parity))
    _one_of(config, "spiel.score", get_args(Score))
    _one_of(config, "spiel.magnitude", ("largest", "smallest"))
    _one_of(config, "optimizer.schedule", ("linear", "cosine", "constant"))
    _one_of(config, "on_nonfinite", ("stop", "skip"))
    _check(bool(config.model.source), "model.source", config.model.source, "a model")
    _check(config.model.loss_chunk > 0, "model.loss_chunk", config.model.loss_chunk, "at least 1")
    _check(config.batch_size > 0, "batch_size", config.batch_size, "at least 1")
    micro = micro_batch_size(config)
    _check(
        micro > 0 and config.batch_size % micro == 0,
        "micro_batch_size",
        micro,
        f"a divisor of batch_size = {config.batch_size}",
    )
    if config.steps is None:
        _check(config.epochs > 0, "epochs", config.epochs, "at least 1")
    else:
        _check(config.steps > 0, "steps", config.steps, "at least 1")
    _check(config.seed >= 0, "seed", config.seed, "0 or more")
    for axis, blocks in config.targets.grid.items():
        _check(blocks is None or blocks > 0, f"targets.grid.{axis}", blocks, "at least 1")
    for key in ("eval_every", "checkpoint_every", "profile"):
        _check(config[key] >= 0, key, config[key], "0 or more")
    for key in ("log_every", "checkpoint_keep"):
        _check(config[key] > 0, key, config[key], "at least 1")
    optimizer = config.optimizer
    rate = optimizer.learning_rate
    _check(math.isfinite(rate) and rate > 0, "optimizer.learning_rate", rate, "a positive number")
    _check(0 <= optimizer.warmup <= 1, "optimizer.warmup", optimizer.warmup, "0 to 1")
    _check(optimizer.weight_decay >= 0, "optimizer.weight_decay", optimizer.weight_decay, "0 or more")
    clip = optimizer.clip_norm
    _check(clip is None or clip > 0, "optimizer.clip_norm", clip, "a positive number or None")
    if config.method == "lora":
        try:
            Lora({}, **config.lora)
        except ValueError as error:
            raise ConfigError(f"config.lora: {error}") from error
    if config.method in SPARSE:
        given = [config.targets.density is not None, config.targets.num_tunable is not None]
        _check(sum(given) == 1, "targets", dict(config.targets), "density or num_tunable, one of them")
        spiel = config.spiel
        _check(spiel.every >= 1, "spiel.every", spiel.every, "at least 1")
        _check(
            spiel.accumulation >= 1
            and (
                spiel.accumulation <= spiel.every
                or spiel.parity == "reference"
                or config.method == "gradient"
            ),
            "spiel.accumulation",
            spiel.accumulation,
            f"1 to spiel.every = {spiel.every}",
        )
        _check(0 <= spiel.rate <= 1, "spiel.rate", spiel.rate, "0 to 1")
        first = spiel.first
        _check(first is None or first <= 1, "spiel.first", first, "0 to 1, or negative")
        if spiel.parity == "reference":
            what = "what the original has, as spiel.parity = 'reference' asks for"
            _check(
                config.method in ("spiel_ag", "spiel_ma"),
                "method",
                config.method,
                f"a method of SpIEL: {what}",
            )
            _check(first is None, "spiel.first", first, f"unset: {what}")
            _check(
                spiel.schedule != "constant", "spiel.schedule", spiel.schedule, f"linear or cosine: {what}"
            )
            _check(spiel.candidate_ratio == 1, "spiel.candidate_ratio", spiel.candidate_ratio, f"1: {what}")
            _check(spiel.score == "product", "spiel.score", spiel.score, f"product: {what}")
        _check(spiel.candidate_ratio > 0, "spiel.candidate_ratio", spiel.candidate_ratio, "more than 0")
    data_config(config)


def micro_batch_size(config: Config) -> int:
    """Sequences per micro-batch."""
    return config.batch_size if config.micro_batch_size is None else config.micro_batch_size


def _sources(sources: Any, key: str) -> tuple[SourceSpec, ...]:
    specs = []
    for source in sources:
        try:
            specs.append(SourceSpec(source) if isinstance(source, str) else SourceSpec(**source))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"config.{key}: {error}") from error
    return tuple(specs)


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
        heldout = int(heldout)  # a ConfigDict keeps the type of the default, a share
    try:
        return DataConfig(
            sources=_sources(data.sources, "data.sources"),
            heldout=heldout,
            sequence_length=data.sequence_length,
            packing=data.packing,
            truncate=data.truncate,
            on_malformed=data.on_malformed,
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


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ between two flattened configs, but for the adjustable ones."""

    def adjustable(key: str) -> bool:
        return any(key == a or (a.endswith(".*") and key.startswith(a[:-1])) for a in ADJUSTABLE)

    keys = sorted(old.keys() | new.keys())
    return {
        key: (old.get(key), new.get(key))
        for key in keys
        if not adjustable(key) and old.get(key) != new.get(key)
    }
