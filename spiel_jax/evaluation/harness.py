"""Benchmarks of models by lm-eval: which tasks, on which data, and where scores and samples are written."""

import datetime
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

from spiel_jax.errors import SpielError
from spiel_jax.evaluation.lm import SpielLM

TASKS = Path(__file__).parent / "tasks"
"""Where the task files are that read local data."""

LOCAL = ("mmlu", "gsm8k", "bbh", "tydiqa", "humaneval")
"""Benchmarks that are here as tasks over local files; ``local_`` stands before their names in lm-eval."""

# of a task that makes its documents itself lm-eval says how it could be told more, each time
logging.getLogger("lm_eval.api.task").addFilter(lambda record: "Custom kwargs" not in record.getMessage())

_ONE_DRAW, _DRAWS = "local_humaneval", "local_humaneval_20"
_SHOWN, _ZERO_SHOT = "local_gsm8k", "local_gsm8k_0"  # examples show answers of one line


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What to evaluate.

    Attributes:
        tasks: Names that lm-eval knows. With ``data_dir`` the names in ``LOCAL`` are those over local files.
        data_dir: Folder with the benchmarks' files.
        limit: Of documents of each task.
        num_fewshot: Examples before each; None: as the task has it.
        max_new_tokens: Of a continuation; None: as the task has it.
        paper_subsets: The SpIEL paper's subsets: 200 problems of GSM8K, 40 of each BBH task, 100 of each
            language of TyDiQA, 20 draws at temperature 0.1 for HumanEval.
        allow_code: Whether programs that the model wrote are run.
        chat: Whether prompts are written with the chat template.
        system: A system message.
        tokenizer: A place to find the tokenizer at, with which local tasks measure prompts.
    """

    tasks: Sequence[str]
    data_dir: str | None = None
    limit: float | None = None
    num_fewshot: int | None = None
    max_new_tokens: int | None = None
    paper_subsets: bool = False
    allow_code: bool = False
    chat: bool = False
    system: str | None = None
    tokenizer: str | None = None

    def names(self) -> list[str]:
        """The tasks as lm-eval knows them.

        Raises:
            SpielError: If none is named, or programs would have to be run.
        """
        if not self.tasks:
            raise SpielError("no task is named: --tasks=gsm8k,mmlu (lm-eval ls tasks shows lm-eval's own)")
        found = []
        for name in self.tasks:
            if self.data_dir is not None and name in LOCAL:
                name = f"local_{name}"
            if name == _ONE_DRAW and self.paper_subsets:
                name = _DRAWS
            if name == _SHOWN and self.num_fewshot == 0:
                name = _ZERO_SHOT
            if "humaneval" in name and not self.allow_code:
                raise SpielError(
                    f"{name} runs programs that the model writes: that takes --allow_code_execution (they "
                    "run in a sandbox, which is no wall against an attacker)"
                )
            found.append(name)
        return found

    def metadata(self) -> dict[str, Any]:
        """What the task files are told."""
        told = {
            "data_dir": self.data_dir,
            "paper": self.paper_subsets,
            "tokenizer": self.tokenizer,
            "shots": self.num_fewshot,
        }
        return {name: value for name, value in told.items() if value is not None}


def task_manager(wanted: Wanted) -> TaskManager:
    """Knows the tasks: ours, and where others are wanted lm-eval's, which take seconds to look through."""
    names = wanted.names()

    def knowing(defaults: bool) -> TaskManager:
        return TaskManager(include_path=str(TASKS), include_defaults=defaults, metadata=wanted.metadata())

    manager = knowing(defaults=False)
    if not all(manager.match_tasks([name]) for name in names):
        manager = knowing(defaults=True)
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise SpielError(
            f"unknown tasks: {', '.join(unknown)}. lm-eval ls tasks shows lm-eval's; with --data_dir there "
            f"are {', '.join(LOCAL)} over local files"
        )
    return manager


def check(wanted: Wanted) -> None:
    """Makes sure that all tasks are known and their data can be read, before anything is computed.

    Raises:
        SpielError: If not.
    """
    task_manager(wanted).load(wanted.names())


def scores(lm: SpielLM, wanted: Wanted, *, cache: Path | None = None) -> dict[str, Any]:
    """What ``lm_eval.simple_evaluate`` says of a model.

    Args:
        lm: The model.
        wanted: The tasks.
        cache: A file in which answers are kept: the same evaluation goes on where it was interrupted.

    Raises:
        SpielError: If a task is not known, or its data are not there.
    """
    names, manager = wanted.names(), task_manager(wanted)
    own = all(name.startswith("local_") for name in names)
    evaluate: Any = lm_eval.simple_evaluate  # its decorator hides what it takes
    found = evaluate(
        model=lm,
        tasks=names,
        num_fewshot=None if own else wanted.num_fewshot,
        limit=wanted.limit,
        use_cache=None if cache is None else str(cache),
        task_manager=manager,
        gen_kwargs=None if wanted.max_new_tokens is None else {"max_gen_toks": wanted.max_new_tokens},
        apply_chat_template=wanted.chat,
        system_instruction=wanted.system,
        confirm_run_unsafe_code=wanted.allow_code,
        bootstrap_iters=1000,
    )
    if found is None:
        raise SpielError("lm-eval gave no results")
    return dict(found)


def write(folder: Path, label: str, results: Mapping[str, Any]) -> Path:
    """Writes scores as JSON and each task's samples as JSONL; the path of the former."""
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    name = re.sub(r"[^\w.-]+", "-", label).strip("-")
    for task, samples in results.get("samples", {}).items():
        with (folder / f"samples-{name}-{task}-{now}.jsonl").open("w", encoding="utf-8") as file:
            for sample in samples:
                file.write(json.dumps(sample, default=str, ensure_ascii=False) + "\n")
    path = folder / f"scores-{name}-{now}.json"
    kept = {key: value for key, value in results.items() if key != "samples"}
    path.write_text(json.dumps(kept, default=str, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path
