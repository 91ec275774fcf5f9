"""What a run reads beside the model's weights: tokenizer, data, and where in them it goes on."""

import datetime
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from spiel_jax.adapters.identity import identity
from spiel_jax.config import Config, data_config, micro_batch_size
from spiel_jax.data import Data, load_data
from spiel_jax.data.templates import read_template, use_template
from spiel_jax.distributed.mesh import local_rows
from spiel_jax.models.io.loading import ModelSource
from spiel_jax.models.io.tokenizer_places import open_tokenizer
from spiel_jax.training.continuing import Course, check_identity, course, tell_of_new_data

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Claim:
    """A run's folder and what is in it."""

    workdir: Path
    places: dict[str, Any]  # as the config gives them
    known: dict[str, Any] | None  # metadata of the checkpoint that is continued
    accept_new_data: bool


@dataclass(frozen=True)
class Inputs:
    """What a run reads beside the model's weights."""

    tokenizer: Any
    data: Data
    identity: dict[str, Any]  # digests of model, tokenizer and data
    course: Course
    rows: list[int]  # of a micro-batch, those that this process makes
    heldout: list[dict]  # this process's rows of the batches


def read_inputs(
    config: Config, claim: Claim, source: ModelSource, mesh: Mesh, date: str, progress: bool
) -> Inputs:
    """Reads tokenizer and data.

    Args:
        config: Of the run.
        claim: Its folder, and what is in it.
        source: The model.
        mesh: The run's mesh.
        date: What templates are told that ask for it, in ISO format.
        progress: Whether to show progress bars.

    Raises:
        ConfigError: If the run cannot be extended so.
        DataError: If the data cannot be used: among others, if a token is beyond the model's.
        CheckpointError: If the run that is continued had others.
    """
    elsewhere = config.model.tokenizer
    tokenizer = source.tokenizer() if elsewhere is None else open_tokenizer(elsewhere)
    if config.data.chat_template is not None:
        use_template(tokenizer, read_template(config.data.chat_template))
    data = load_data(
        data_config(config),
        tokenizer,
        date=datetime.datetime.fromisoformat(date),
        vocab_size=source.config.vocab_size,
        progress=progress,
    )
    for reported in data.report.sources + data.report.heldout_sources:
        _log.info("%s", reported)
    warn_of_positions(config.data.sequence_length, source.config.max_positions)

    found, known, changed = identity(source.config, tokenizer, data), claim.known, []
    if known is not None:
        changed = check_identity(claim.workdir, known, found, accept_new_data=claim.accept_new_data)

    def length() -> int:
        if config.steps is not None:
            return config.steps
        return len(data.train_dataset(config.batch_size, epochs=config.epochs))

    way = course(config, known, length, changed)
    if known is not None and changed:
        tell_of_new_data(way, changed, known, data)
    micro = micro_batch_size(config)
    rows = local_rows(micro, mesh)
    heldout = data.heldout_batches(micro, rows)[: config.eval_batches]
    return Inputs(tokenizer, data, found, way, rows, heldout)


def warn_of_positions(sequence_length: int, known: int) -> None:
    """Says that rows are longer than what the model was made for."""
    if sequence_length > known:
        _log.warning(
            "data.sequence_length is %d, and the model knows %d positions: examples that are longer teach it "
            "positions that it has never seen; lower data.sequence_length to %d",
            *(sequence_length, known, known),
        )


def training_batches(config: Config, inputs: Inputs, known: dict[str, Any] | None) -> Any:
    """This process's rows of each step's batch, from the first or from where a run was left."""
    starts, course = range(0, config.batch_size, micro_batch_size(config)), inputs.course
    rows = [start + row for start in starts for row in inputs.rows]
    found = inputs.data.train_iterator(config.batch_size, steps=course.steps - course.since, rows=rows)
    if known is not None and not course.new_data:
        found.set_state(known["data"])
    return found


def step_tokens(config: Config, inputs: Inputs) -> list[int]:
    """Of each step, in the rows of all processes; those of earlier data are not known."""
    course = inputs.course
    known = inputs.data.batch_tokens(config.batch_size, steps=course.steps - course.since).tolist()
    return [0] * course.since + known
