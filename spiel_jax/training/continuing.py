"""Whether a run may be continued, by what config and on what data; how long it is then."""

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spiel_jax.adapters.identity import other_data, other_model, other_tokenizer
from spiel_jax.checkpoint import CheckpointError
from spiel_jax.config import Config, ConfigError, differences, flatten
from spiel_jax.methods.method import Method
from spiel_jax.optim.schedules import Phase
from spiel_jax.training.workdir import PLACES, TOLD, settings

_log = logging.getLogger(__name__)

LENGTH = ("steps", "epochs")
EXTENDABLE = (
    *LENGTH,
    "optimizer.learning_rate",
    "optimizer.schedule",
    "optimizer.warmup",
    "spiel.rate",
    "spiel.schedule",
)
"""Keys that may differ when a run is extended: its length, and the schedules over it."""


@dataclass(frozen=True)
class Course:
    """How a run goes.

    Attributes:
        steps: Optimizer steps of the run, the earlier ones included.
        since: The step after which its present data begin, at their beginning; 0 unless they were changed.
        new_data: Whether they begin now.
    """

    steps: int
    since: int = 0
    new_data: bool = False


def check_config_of(
    workdir: Path, known: Mapping[str, Any], config: Config, *, extend: bool, accept_new_data: bool
) -> None:
    """Makes sure that a config is that of the run whose checkpoint is continued.

    Places may differ where digests tell what lies there, and with ``extend`` what makes an extension.

    Args:
        workdir: The run's folder.
        known: The checkpoint's metadata.
        config: With what depends on mesh and method filled in.
        extend: Whether the run may be made longer.
        accept_new_data: Whether data may be others.

    Raises:
        ConfigError: If it is of another; the differences are shown.
    """
    changed = differences(known["config"], json.loads(json.dumps(flatten(config))))
    may_be_elsewhere = _digests_tell(known) or accept_new_data
    now = settings(config)
    for key in PLACES:
        told = key == "model.source" or (key in TOLD and may_be_elsewhere)
        if key in changed and (told or known["config"].get(key) == now[key]):
            del changed[key]
    if extend:
        changed = {key: pair for key, pair in changed.items() if key not in EXTENDABLE}
    if not changed:
        return
    lines = [f"  {key}: {old!r} there, {new!r} now" for key, (old, new) in changed.items()]
    advice = "Choose another --workdir, or set these keys as they are there."
    if not changed.keys() - set(EXTENDABLE) and changed.keys() & set(LENGTH):
        advice = "To train this run further add --extend; for a new one choose another --workdir."
    raise ConfigError(f"{workdir} holds a run of another configuration:\n" + "\n".join(lines) + f"\n{advice}")


def _digests_tell(known: Mapping[str, Any]) -> bool:
    return "identity" in known


def check_identity(
    workdir: Path, known: Mapping[str, Any], found: Mapping[str, Any], *, accept_new_data: bool
) -> list[str]:
    """Makes sure that model, tokenizer and data are those of the run that is continued.

    Returns:
        What of tokenizer and data is other, and accepted.

    Raises:
        CheckpointError: If something is another; what, is shown.
    """
    if not _digests_tell(known):
        _log.warning(
            "the checkpoint is of an earlier version, without digests of its data: whether data, tokenizer "
            "and the model's configuration are those it was trained with cannot be checked"
        )
        return []
    if changed := other_model(known["identity"], found):
        raise CheckpointError(
            f"{workdir} was trained on a model that computes otherwise: {'; '.join(changed)}. Name the right "
            "one by --config.model.source, or put its config.json back"
        )
    changed = other_tokenizer(known["identity"], found) + other_data(known["identity"], found)
    if changed and not accept_new_data:
        raise CheckpointError(
            f"{workdir} was trained on other data: {'; '.join(changed)}. Put back what it was, or continue "
            "knowingly with --accept_new_data"
        )
    return changed


def course(
    config: Config, known: Mapping[str, Any] | None, length: Callable[[], int], changed: list[str]
) -> Course:
    """How a run goes on.

    Its number of steps was decided when it began, and stays whatever becomes of the data; another length in
    the config makes a new number of it. Data that have changed begin at their beginning.

    Args:
        config: Of the run.
        known: Metadata of the checkpoint that is continued; None for a new run.
        length: The steps that config and data ask for.
        changed: See ``check_identity``.

    Raises:
        ConfigError: If an extension is none.
        CheckpointError: If there are new data, and no step to train on them.
    """
    if known is None:
        return Course(length())
    done, since = known["step"], known.get("data_since", 0)
    steps = known.get("steps") or known["config"]["steps"] or length()
    if _is_extended(known["config"], config):
        if config.steps is None and (since or changed):
            raise ConfigError(
                "--extend: this run's data have changed on the way, and its epochs cannot be counted: give "
                "its new length as config.steps"
            )
        longer = length()
        if longer <= steps:
            raise ConfigError(
                f"--extend: the run has {steps} steps and the config asks for {longer}: raise config.steps, "
                "or config.epochs where steps is not set"
            )
        _log.info("extended from %d to %d steps, with the schedules of a run of %d", steps, longer, longer)
        steps = longer
    if changed and done >= steps:
        raise CheckpointError(
            f"the run is finished, and of its {steps} steps none is left to train on the new data: add "
            "--extend --config.steps=..."
        )
    return Course(steps, done, True) if changed else Course(steps, since)


def _is_extended(stored: Mapping[str, Any], config: Config) -> bool:
    """Whether a checkpoint's config has another length, or other schedules."""
    now = json.loads(json.dumps(flatten(config)))
    return bool(differences(dict(stored), now).keys() & set(EXTENDABLE))


def tell_of_new_data(course: Course, changed: list[str], known: Mapping[str, Any], data: Any) -> None:
    """Says what continuing on other data means."""
    _log.warning(
        "continuing on other data, as --accept_new_data says: %s. The run keeps its %d steps and its "
        "schedules; steps %d to %d take the new data from their beginning",
        "; ".join(changed),
        course.steps,
        course.since + 1,
        course.steps,
    )
    heldout = data.fingerprint["heldout"]
    then = known["identity"]["data"]["heldout"]
    if heldout["examples"] and heldout != then:
        _log.warning(
            "the %d held-out examples are not those of before: some of them may have been trained on, and "
            "held-out losses up to step %d cannot be compared with later ones",
            heldout["examples"],
            course.since,
        )


def tell_of_cut_phase(done: int, before: Method, method: Method) -> None:
    """Says so where an extension begins inside an estimation phase that the shorter run had no use for.

    Args:
        done: Steps done.
        before: The method as the shorter run had it.
        method: As the longer one has it.
    """
    inside = method.step_kind(done + 1)[0] is Phase.ESTIMATE
    if inside and before.step_kind(done)[0] is Phase.PLAIN:
        _log.info(
            "the extension begins inside an estimation phase, which has no candidates then: the reselection "
            "that ends it replaces nothing"
        )
