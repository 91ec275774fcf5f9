"""What ``python -m spiel_jax.evaluate`` does."""

import contextlib
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from spiel_jax.adapters.adapted import load_adapters
from spiel_jax.adapters.load import load_run
from spiel_jax.distributed import processes
from spiel_jax.distributed.mesh import MESH_AXES, make_mesh
from spiel_jax.errors import SpielError
from spiel_jax.evaluation import forgetting as forgotten
from spiel_jax.evaluation.harness import Wanted, check, scores, write
from spiel_jax.evaluation.lm import SpielLM
from spiel_jax.evaluation.score_table import Score, numbers, table
from spiel_jax.inference.served import Served, on_host
from spiel_jax.models.io.fingerprint import arithmetic, fingerprint
from spiel_jax.models.io.loading import open_model
from spiel_jax.models.io.tokenizer_places import open_tokenizer
from spiel_jax.places import local_path, remembered


def evaluate(
    *,
    checkpoint: str | None = None,
    step: Any = None,
    model: str | None = None,
    tokenizer: str | None = None,
    adapter: str | None = None,
    any_base: bool = False,
    dtype: str = "bfloat16",
    base: bool = False,
    merge: bool = True,
    tasks: Sequence[str] = (),
    data_dir: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    max_new_tokens: int | None = None,
    paper_subsets: bool = False,
    chat: bool = False,
    system: str | None = None,
    allow_code_execution: bool = False,
    forgetting: bool = False,
    texts: str | None = None,
    output: str | None = None,
    mesh: dict[str, int] | None = None,
    memory: int | None = None,
    progress: bool = True,
) -> str:
    """Evaluates as the command's flags of these names say; the table that it prints.

    Raises:
        SpielError: If a model cannot be loaded, a task is not known, or its data are not there.
    """
    wanted = Wanted(
        tasks=tasks,
        data_dir=None if data_dir is None else str(local_path(data_dir, "--data_dir").absolute()),
        limit=limit,
        num_fewshot=num_fewshot,
        max_new_tokens=max_new_tokens,
        paper_subsets=paper_subsets,
        allow_code=allow_code_execution,
        chat=chat,
        system=system,
    )
    if tasks:
        check(wanted)  # before a model is loaded
    written = forgotten.texts_for(texts, data_dir) if forgetting else []
    devices = None if mesh is None else _devices(mesh)
    folder = _folder(checkpoint, output)
    with contextlib.nullcontext() if devices is None else on_host():
        if checkpoint is None:
            models, read = _named(model, tokenizer, adapter, any_base, dtype, base or forgetting)
            source = remembered(tokenizer or str(model))
        else:
            models, read, source = _run(checkpoint, step, model, tokenizer, base or forgetting, merge)
    if devices is not None:
        models = {label: served.spread(devices) for label, served in models.items()}
    wanted = replace(wanted, tokenizer=source)
    bars = progress and processes.is_first()
    columns: dict[str, dict] = {label: {} for label in models if base or label != "base" or forgetting}
    with contextlib.nullcontext() if devices is None else jax.set_mesh(devices):
        for label, served in models.items():
            if tasks and (base or label != "base"):
                lm = SpielLM(served, read, name=label, memory=memory, progress=bars)
                columns[label] = _scored(lm, label, wanted, folder)
        if forgetting:
            before, after = models.values()
            others = [read.encode(text) for text in written]
            found = forgotten.forgetting(before, after, others, progress=bars)
            for label, rows in zip(models, found.columns("other texts"), strict=True):
                columns[label] = columns[label] | rows
    shown = table(columns)
    if processes.is_first():
        print(shown)
        (folder / "table.md").write_text(shown + "\n", encoding="utf-8")
    return shown


def _devices(sizes: dict[str, int]) -> Mesh:
    if unknown := sorted(sizes.keys() - set(MESH_AXES)):
        raise SpielError(f"mesh axis {', '.join(unknown)}: expected some of {', '.join(MESH_AXES)}")
    return make_mesh(dict.fromkeys(MESH_AXES, 1) | sizes)


def _scored(lm: SpielLM, label: str, wanted: Wanted, folder: Path) -> dict[tuple[str, str], Score]:
    """A model's column of the table; says what it took, and where all of it is written."""
    began = time.perf_counter()
    # several processes would have to find the same there, or wait for each other
    cache = _cache(folder, lm.served, wanted) if jax.process_count() == 1 else None
    found = scores(lm, wanted, cache=cache)
    found["seconds"], found["programs"] = time.perf_counter() - began, len(lm.programs)
    if processes.is_first():
        place = write(folder, label, found)
        print(f"[{label}] {found['seconds']:.0f} s, {len(lm.programs)} compiled programs; {place}")
    return numbers(found)


def _named(
    model: str | None, tokenizer: str | None, adapter: str | None, any_base: bool, dtype: str, base: bool
) -> tuple[dict[str, Served], Any]:
    """A model that is named, with an adapter or without: the models by their label, and the tokenizer."""
    assert model is not None
    if adapter is None:
        source = open_model(model)
        read = source.tokenizer() if tokenizer is None else open_tokenizer(tokenizer)
        return {model: Served(source.config, source.load(dtype, progress=False))}, read
    found = load_adapters(
        [adapter], model, tokenizer=tokenizer, check=not any_base, keep_base=base, in_place=not base
    )
    labels = {"base": None, adapter: adapter} if base else {adapter: adapter}
    models = {label: Served(found.config, found.weights.use(name)) for label, name in labels.items()}
    return models, found.tokenizer


def _run(
    checkpoint: str, step: Any, model: str | None, tokenizer: str | None, base: bool, merge: bool
) -> tuple[dict[str, Served], Any, str | None]:
    """What a run has trained: the models by their label, the tokenizer, and where that can be found again."""
    run = load_run(checkpoint, step, keep_base=base, unmerged=not merge, model=model, tokenizer=tokenizer)
    where = tokenizer or model or run.settings["model.tokenizer"] or run.settings["model.source"]
    models = {f"step {run.step}": Served(run.config, run.tuned)}
    if run.base is not None:
        models = {"base": Served(run.config, run.base)} | models
    return models, run.tokenizer, None if where is None else remembered(where)


def _folder(checkpoint: str | None, output: str | None) -> Path:
    run = Path() if checkpoint is None else local_path(checkpoint, "--checkpoint")
    folder = run / "evaluations" if output is None else local_path(output, "--output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpielError(f"--output {folder}: no folder can be made there: {error}") from error
    return folder


def _cache(folder: Path, served: Served, wanted: Wanted) -> Path:
    """A file that is of this model and these prompts alone, so that no other's answers are taken."""
    parts = [fingerprint(served.params), arithmetic(served.config), wanted.chat, wanted.system]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    return folder / "cache" / key
