"""GSM8K (arXiv 2110.14168): word problems, worked out aloud after eight examples (arXiv 2201.11903)."""

import random
import re
from typing import Any

from spiel_jax.evaluation.tasks import reading

_SUBSET = 200

EXAMPLES = (
    (
        "There are 15 trees in the grove. Grove workers will plant trees in the grove today. After they are "
        "done, there will be 21 trees. How many trees did the grove workers plant today?",
        "There are 15 trees originally. Then there were 21 trees after some more were planted. So there must "
        "have been 21 - 15 = 6. So the answer is 6.",
    ),
    (
        "If there are 3 cars in the parking lot and 2 more cars arrive, how many cars are in the parking "
        "lot?",
        "There are originally 3 cars. 2 more cars arrive. 3 + 2 = 5. So the answer is 5.",
    ),
    (
        "Leah had 32 chocolates and her sister had 42. If they ate 35, how many pieces do they have left in "
        "total?",
        "Originally, Leah had 32 chocolates. Her sister had 42. So in total they had 32 + 42 = 74. After "
        "eating 35, they had 74 - 35 = 39. So the answer is 39.",
    ),
    (
        "Jason had 20 lollipops. He gave Denny some lollipops. Now Jason has 12 lollipops. How many "
        "lollipops did Jason give to Denny?",
        "Jason started with 20 lollipops. Then he had 12 after giving some to Denny. So he gave Denny "
        "20 - 12 = 8. So the answer is 8.",
    ),
    (
        "Shawn has five toys. For Christmas, he got two toys each from his mom and dad. How many toys does "
        "he have now?",
        "Shawn started with 5 toys. If he got 2 toys each from his mom and dad, then that is 4 more toys. "
        "5 + 4 = 9. So the answer is 9.",
    ),
    (
        "There were nine computers in the server room. Five more computers were installed each day, from "
        "monday to thursday. How many computers are now in the server room?",
        "There were originally 9 computers. For each of 4 days, 5 more computers were added. So 5 * 4 = 20 "
        "computers were added. 9 + 20 is 29. So the answer is 29.",
    ),
    (
        "Michael had 58 golf balls. On tuesday, he lost 23 golf balls. On wednesday, he lost 2 more. How "
        "many golf balls did he have at the end of wednesday?",
        "Michael started with 58 golf balls. After losing 23 on tuesday, he had 58 - 23 = 35. After losing 2 "
        "more, he had 35 - 2 = 33 golf balls. So the answer is 33.",
    ),
    (
        "Olivia has $23. She bought five bagels for $3 each. How much money does she have left?",
        "Olivia had 23 dollars. 5 bagels for 3 dollars each will be 5 x 3 = 15 dollars. So she has 23 - 15 "
        "dollars left. 23 - 15 is 8. So the answer is 8.",
    ),
)


def documents(data_dir: str | None = None, shots: int = 8, paper: bool = False, **_: Any) -> dict[str, Any]:
    """The problems of ``gsm8k/test.jsonl`` of ``data_dir``; 200 of them for the paper's subset."""
    (path,) = reading.files(reading.folder(data_dir, "gsm8k"), "test.jsonl")
    with path.open(encoding="utf-8-sig") as file:
        rows = reading.read_lines(file, path, ("question", "answer"))
    if paper:
        rows = random.Random(reading.SEED).sample(rows, min(_SUBSET, len(rows)))
    shown = "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in reading.shown(EXAMPLES, shots, path))
    head = f"Answer the following questions.\n\n{shown}"
    return reading.test_split(
        [
            {
                "prompt": f"{head}Question: {row['question'].strip()}\nAnswer:",
                "answer": row["answer"].rpartition("####")[2].strip().replace(",", ""),
            }
            for row in rows
        ]
    )


def last_number(text: str) -> str:
    """The last number in a text, without separators of thousands.

    >>> last_number("so 1,250 - 50 = 1,200.00. That is it.")
    '1200.00'
    """
    numbers = re.findall(r"[-+]?\d*\.\d+|\d+", re.sub(r"(\d),(\d)", r"\1\2", text))
    return numbers[-1] if numbers else ""


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the last number that is said is the answer."""
    said, answer = last_number(results[0]), doc["answer"]
    try:
        return {"exact_match": float(float(said) == float(answer))}
    except ValueError:
        return {"exact_match": 0.0}
