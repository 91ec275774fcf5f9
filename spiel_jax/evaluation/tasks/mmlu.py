"""MMLU (arXiv 2009.03300): questions with four answers, the examples of a subject before each."""

import csv
from pathlib import Path
from typing import Any

from spiel_jax.data.files import DataError
from spiel_jax.evaluation.tasks import reading

_LETTERS = "ABCD"
_SHOTS = 5
_LONGEST = 2048  # tokens of a prompt; examples are left out beyond


def documents(
    data_dir: str | None = None, shots: int | None = None, tokenizer: str | None = None, **_: Any
) -> dict[str, Any]:
    """The questions of all subjects in turn; ``mmlu/dev/*.csv`` and ``mmlu/test/*.csv`` of ``data_dir``."""
    place = reading.folder(data_dir, "mmlu")
    groups = []
    for path in reading.files(place / "test", "*.csv"):
        subject = path.stem.removesuffix("_test")
        examples = []
        if shots != 0:
            (dev,) = reading.files(place / "dev", f"{subject}.csv", f"{subject}_dev.csv")[:1]
            there = _rows(dev)
            examples = there[:_SHOTS] if shots is None else reading.shown(there, shots, dev)
        groups.append([_document(subject, examples, row, tokenizer) for row in _rows(path)])
    return reading.test_split(reading.interleaved(groups))


def _rows(path: Path) -> list[tuple[str, list[str], int]]:
    """Question, choices and number of the right one; with a header or without, the answer 0-3 or A-D."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = [row for row in csv.reader(file) if row]
    if rows and rows[0][0].strip().lower() == "question" and rows[0][-1].strip().lower() == "answer":
        rows = rows[1:]
    found = []
    for number, row in enumerate(rows, 1):
        answer = row[-1].strip().upper()
        if len(row) != 6 or len(answer) != 1 or answer not in "0123" + _LETTERS:
            raise DataError(
                f"{path}, row {number}: expected a question, four choices and the answer (0 to 3, or A to D)"
            )
        found.append(
            (row[0].strip(), row[1:5], "0123".find(answer) if answer.isdigit() else _LETTERS.find(answer))
        )
    return found


def _asked(question: str, choices: list[str]) -> str:
    lines = [question, *(f"{letter}. {choice}" for letter, choice in zip(_LETTERS, choices, strict=True))]
    return "\n".join([*lines, "Answer:"])


def _document(subject: str, examples: list, row: tuple, tokenizer: str | None) -> dict[str, Any]:
    question, choices, answer = row
    name = subject.replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about {name}.\n\n"
    for count in range(len(examples), -1, -1):
        shown = "".join(f"{_asked(q, c)} {_LETTERS[a]}\n\n" for q, c, a in examples[:count])
        prompt = head + shown + _asked(question, choices)
        if reading.token_count(prompt, tokenizer) <= _LONGEST:
            break
    return {"prompt": prompt, "answer": answer, "subject": subject}
