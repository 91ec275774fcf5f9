"""BIG-Bench Hard (arXiv 2210.09261): 27 tasks, worked out aloud after three examples each."""

import re
from pathlib import Path
from typing import Any

from spiel_jax.data.files import DataError
from spiel_jax.evaluation.tasks import reading

_SUBSET = 40  # of each task


def documents(data_dir: str | None = None, shots: int = 3, paper: bool = False, **_: Any) -> dict[str, Any]:
    """``bbh/tasks/*.json`` and ``bbh/cot-prompts/*.txt`` of ``data_dir``, the tasks in turn.

    A copy of the published repository has the tasks in ``bbh/bbh``: that is found too.
    """
    place = reading.folder(data_dir, "bbh")
    tasks = place / "tasks" if (place / "tasks").is_dir() else place / "bbh"
    groups = []
    for path in reading.files(tasks, "*.json"):
        content = reading.read_json(path)
        examples = content.get("examples") if isinstance(content, dict) else None
        if not examples or not all({"input", "target"} <= set(one) for one in examples):
            raise DataError(f"{path}: expected examples, each with input and target")
        (prompt,) = reading.files(place / "cot-prompts", f"{path.stem}.txt")
        head = _prompt(prompt, shots)
        groups.append(
            [
                {
                    "prompt": f"{head}\n\nQ: {one['input']}\nA:",
                    "answer": str(one["target"]),
                    "task": path.stem,
                }
                for one in examples
            ]
        )
    return reading.test_split(reading.interleaved(reading.subset(groups, _SUBSET if paper else None)))


def _prompt(path: Path, shots: int) -> str:
    """The description of a task and its examples; a line of dashes ends what is no part of them."""
    text = path.read_text(encoding="utf-8")
    text = text.rpartition("-----")[2].strip() if "-----" in text else text.strip()
    head, *examples = re.split(r"\n\n(?=Q: )", text)
    return "\n\n".join([head.strip(), *reading.shown(examples, shots, path)])


def answer(text: str) -> str:
    """What a text says is the answer.

    >>> answer("Since 0 is not 1, the answer is (B). Q: And now?")
    '(B)'
    """
    found = re.search(r"[tT]he answer is (.*?)\.", text)
    return found[1].strip() if found else text.strip()


def _plain(text: str) -> str:
    return re.sub(r"[^\w\s]", "", text).lower().strip()


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the answer is the target, but for case and punctuation."""
    said, target = answer(results[0]), doc["answer"]
    same = _plain(said) == _plain(target) if _plain(target) else said == target  # of brackets nothing is left
    return {"exact_match": float(same)}
