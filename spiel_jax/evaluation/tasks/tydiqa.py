"""TyDiQA, gold passage (arXiv 2003.05002): questions in nine languages on a passage that answers them."""

import random
import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

from spiel_jax.data.files import DataError
from spiel_jax.evaluation.tasks import reading

_SUBSET = 100  # of each language
_LONGEST = 1024  # tokens of a passage

TEMPLATES = {
    "english": (
        "Answer the following question based on the information in the given passage.",
        ("Passage:", "Question:", "Answer:"),
    ),
    "arabic": (
        "أجب على السؤال التالي بناءً على المعلومات في المقطع المعطى.",
        ("المقطع:", "السؤال:", "الإجابة:"),
    ),
    "bengali": (
        "প্রদত্ত অধ্যায়ের তথ্যের উপর ভিত্তি করে নিম্নলিখিত প্রশ্নের উত্তর দিন।",
        ("অধ্যায়:", "প্রশ্ন:", "উত্তর:"),
    ),
    "finnish": (
        "Vastaa seuraavaan kysymykseen annetun kappaleen tiedon perusteella.",
        ("Kappale:", "Kysymys:", "Vastaus:"),
    ),
    "indonesian": (
        "Jawab pertanyaan berikut berdasarkan informasi di bagian yang diberikan.",
        ("Bagian:", "Pertanyaan:", "Jawaban:"),
    ),
    "korean": (
        "주어진 문단의 정보에 기반하여 다음 질문에 답하십시오.",
        ("문단:", "질문:", "답변:"),
    ),
    "russian": (
        "Ответьте на следующий вопрос на основе информации в данном отрывке.",
        ("Отрывок:", "Вопрос:", "Ответ:"),
    ),
    "swahili": (
        "Jibu swali lifuatalo kulingana na habari kwenye kifungu kilichotolewa.",
        ("Kifungu:", "Swali:", "Jibu:"),
    ),
    "telugu": (
        "ఇచ్చిన పేరాలోని సమాచారం ఆధారంగా కింది ప్రశ్నకు సమాధానం ఇవ్వండి.",
        ("పేరా:", "ప్రశ్న:", "సమాధానం:"),
    ),
}
"""What is asked in each language, and what stands before passage, question and answer."""


def documents(
    data_dir: str | None = None,
    shots: int = 1,
    paper: bool = False,
    tokenizer: str | None = None,
    **_: Any,
) -> dict[str, Any]:
    """Published files ``tydiqa/*dev*.json`` and ``tydiqa/*train*.json`` there, languages in turn."""
    place = reading.folder(data_dir, "tydiqa")
    tests = _questions(place, "dev")
    examples = _questions(place, "train") if shots else {}
    draw, groups = random.Random(reading.SEED), []
    for language, questions in sorted(tests.items()):
        known = examples.get(language, [])
        if len(known) < shots:
            raise DataError(f"{place}: {len(known)} questions in {language} to train on, {shots} are shown")
        shown = draw.sample(known, shots)
        instruction = TEMPLATES[language][0]
        head = "\n\n".join(
            [instruction, *(_asked(language, one, tokenizer) + f" {one['answers'][0]}" for one in shown)]
        )
        groups.append(
            [
                {"prompt": f"{head}\n\n{_asked(language, one, tokenizer)}", "language": language, **one}
                for one in questions
            ]
        )
    return reading.test_split(reading.interleaved(reading.subset(groups, _SUBSET if paper else None)))


def _questions(place: Any, split: str) -> dict[str, list[dict[str, Any]]]:
    """Questions by language, which the id of each begins with."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in reading.files(place, f"*{split}*.json", f"*{split}*/*.json"):
        content = reading.read_json(path)
        try:
            paragraphs = [paragraph for one in content["data"] for paragraph in one["paragraphs"]]
            for paragraph in paragraphs:
                for question in paragraph["qas"]:
                    language = re.split(r"[-_]", question["id"])[0].lower()
                    answers = [answer["text"] for answer in question["answers"]]
                    if language in TEMPLATES and answers:
                        one = {"context": paragraph["context"], "question": question["question"]}
                        found[language].append(one | {"answers": answers})
        except (KeyError, TypeError) as error:
            raise DataError(f"{path} is no file of TyDiQA's gold passage task: no {error}") from error
    if not found:
        raise DataError(f"{place}: no questions in the languages {', '.join(TEMPLATES)} ({split})")
    return found


def _asked(language: str, one: dict[str, Any], tokenizer: str | None) -> str:
    passage, question, answer = TEMPLATES[language][1]
    context = reading.first_tokens(one["context"], _LONGEST, tokenizer)
    return f"{passage} {context}\n{question} {one['question']}\n{answer}"


def _plain(text: str) -> str:
    """As SQuAD compares answers: no case, punctuation, articles or extra spaces."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _f1(said: str, answer: str) -> float:
    """Of the words that they have in common."""
    mine, right = _plain(said).split(), _plain(answer).split()
    common = sum((Counter(mine) & Counter(right)).values())
    return 2 * common / (len(mine) + len(right)) if common else float(mine == right)


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """F1 and exact match with the nearest of the answers."""
    said = results[0].strip()

    def best(measure: Callable[[str, str], float]) -> float:
        return max(measure(said, answer) for answer in doc["answers"])

    return {"f1": best(_f1), "exact_match": best(lambda a, b: float(_plain(a) == _plain(b)))}
