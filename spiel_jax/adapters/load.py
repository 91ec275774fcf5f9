"""The model that a run has trained: a checkpoint put on its base."""

import contextlib
import datetime
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from transformers import PreTrainedTokenizerBase

from spiel_jax.adapters.identity import identity, other_model, other_tokenizer
from spiel_jax.adapters.requantizing import Loss, requantized
from spiel_jax.checkpoint import CheckpointError, Step, read_metadata, restore_trained, stored_targets
from spiel_jax.config import unflatten
from spiel_jax.data.templates import use_template
from spiel_jax.errors import NotFoundError
from spiel_jax.methods.registry import build
from spiel_jax.models import ModelConfig
from spiel_jax.models.io.fingerprint import differing, fingerprint
from spiel_jax.models.io.loading import open_model
from spiel_jax.models.io.tokenizer_places import open_tokenizer
from spiel_jax.models.storage import kind_named
from spiel_jax.ops.stored import is_writable


@dataclass(frozen=True)
class LoadedRun:
    """A fine-tuned model, as a run's checkpoint has it.

    Attributes:
        step: Optimizer steps done.
        settings: The run's configuration, dotted key to value.
        config: The model's shape.
        base: The base model's parameters, quantised as in the run; None where they were not asked for.
        tuned: The fine-tuned ones; those that were not tuned are those of ``base``.
        tokenizer: The one it was trained with, its chat template among it.
        lost: What merging into quantised weights has lost; None: nothing was, as they are arrays.
        date: The run's, which a chat template that asks for the date is told; None for a run of an earlier
            version, which kept none.
    """

    step: int
    settings: dict[str, Any]
    config: ModelConfig
    base: dict[str, Any] | None
    tuned: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    date: datetime.datetime | None = None
    lost: Loss | None = None


def load_run(
    directory: str | Path,
    step: Step = None,
    *,
    keep_base: bool = False,
    unmerged: bool = False,
    merge_back: bool = False,
    model: str | None = None,
    tokenizer: str | None = None,
) -> LoadedRun:
    """Loads the model that a run has trained, ready to be used.

    Without ``keep_base`` deltas or adapters are merged into the base in place: one copy of the model is held.

    Args:
        directory: The run's folder (``--workdir``).
        step: Which checkpoint; None for the newest, "best" for the lowest held-out loss.
        keep_base: Whether to hold the base model beside the tuned one.
        unmerged: Whether weights that are quantised stay so, with sparse deltas beside them: as small as in
            training, and the same numbers. (Those of other methods are merged.) Otherwise tuned weights are
            merged into arrays.
        merge_back: Whether the tuned weights of a run on a quantised base are quantised again. That loses a
            part of what was trained, which ``lost`` measures.
        model: Where the base model is now (see ``open_model``); None: where it was.
        tokenizer: Where the tokenizer is now, if not with the model; None: where it was.

    Raises:
        CheckpointError: If there is no such checkpoint, or the base model or the tokenizer is not the one it
            was trained with; what differs is named.
        NotFoundError: If the base model is not there.
        SpielError: If the base model is damaged; if it is to be merged back into, and is not quantised.
    """
    metadata = read_metadata(directory, step)
    settings = metadata["config"]
    dtype = jnp.dtype(settings["model.dtype"])
    name = settings["model.source"] if model is None else model
    with _says_how_to_name("model"):
        source = open_model(name, preset=settings["model.preset"] if model is None else None)
    named = settings["model.tokenizer"] if tokenizer is None else tokenizer
    with _says_how_to_name("tokenizer"):
        read = source.tokenizer() if named is None else open_tokenizer(named)
    if "chat_template" in metadata:  # earlier versions had no other than the tokenizer's
        use_template(read, metadata["chat_template"])
    date = datetime.datetime.fromisoformat(metadata["date"]) if "date" in metadata else None
    _check_identity(directory, metadata, identity(source.config, read))
    config = unflatten(settings)
    method = build(config, source.config, 1, stored_targets(metadata))  # the length means nothing
    trained = restore_trained(directory, metadata["step"])
    changed, base = method.changed(trained), None
    if changed is not None or keep_base or merge_back:
        storage = kind_named(config.model.quantization)
        requantize = config.model.requantize
        base = source.load(dtype, seed=settings["seed"], storage=storage, requantize=requantize)
        _check_base(
            f"{directory} was trained on another base model than {name}", metadata["fingerprint"], base
        )
    if changed is None:
        tuned = method.merge({}, trained)
    else:
        assert base is not None
        before = {name: base[name] for name in changed & base.keys()}
        in_place = not (keep_base or merge_back) and all(map(is_writable, before.values()))
        together = method.beside if unmerged and not merge_back else method.merge
        tuned = base | jax.jit(together, donate_argnums=0 if in_place else ())(before, trained)
    lost = None
    if merge_back:
        tuned, lost = requantized(base or {}, tuned)
    kept = base if keep_base else None
    return LoadedRun(metadata["step"], settings, source.config, kept, tuned, read, date, lost)


@contextlib.contextmanager
def _says_how_to_name(what: str) -> Iterator[None]:
    """If nothing is in a place, the error says how to name another."""
    try:
        yield
    except NotFoundError as error:
        raise NotFoundError(f"{error}. If it lies elsewhere now, name the place: --{what}=...") from error


def _check_identity(directory: str | Path, metadata: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    stored = metadata.get("identity")
    if stored is None:  # of an earlier version
        return
    if changed := other_model(stored, found) + other_tokenizer(stored, found):
        raise CheckpointError(
            f"{directory} was trained with another model or tokenizer: {'; '.join(changed)}. Put back "
            "what it was, or name the right ones (--model, --tokenizer)"
        )


def _check_base(problem: str, expected: Mapping[str, str], base: dict[str, Any]) -> None:
    found = fingerprint(base)
    if names := differing(expected, found):
        lines = [f"  {name}: {expected.get(name)} then, {found.get(name)} now" for name in names[:5]]
        more = [f"  and {len(names) - 5} more"] if len(names) > 5 else []
        raise CheckpointError("\n".join([f"{problem}; these tensors differ:", *lines, *more]))
