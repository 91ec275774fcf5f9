import gzip
import json

import pytest

pytest.importorskip("datasets")

from spiel_jax.data.files import DataError
from spiel_jax.evaluation.tasks import bbh, gsm8k, humaneval, mmlu, tydiqa


@pytest.fixture
def data(tmp_path):
    """The five benchmarks, two or three documents each, in their published formats."""
    place = tmp_path / "data"
    for folder in ("mmlu/dev", "mmlu/test", "gsm8k", "bbh/tasks", "bbh/cot-prompts", "humaneval", "tydiqa"):
        (place / folder).mkdir(parents=True)
    row = "{n} + 1?,one,two,three,four,{answer}\n"
    (place / "mmlu/dev/moral_sums_dev.csv").write_text(
        "".join(row.format(n=n, answer=n) for n in range(3))  # our copies' numbers, without a header
    )
    (place / "mmlu/test/moral_sums_test.csv").write_text(row.format(n=0, answer="A"))
    (place / "mmlu/dev/art.csv").write_text("question,a,b,c,d,answer\n" + row.format(n=7, answer="B"))
    (place / "mmlu/test/art.csv").write_text(
        "question,a,b,c,d,answer\n" + "".join(row.format(n=n, answer=3) for n in range(2))
    )
    problems = [{"question": f"{n}?", "answer": f"So.\n#### {n},000"} for n in range(1, 4)]
    (place / "gsm8k/test.jsonl").write_text("".join(json.dumps(one) + "\n" for one in problems))
    for task, target in (("navigate", "Yes"), ("brackets", "} )")):
        examples = [{"input": f"{task} {n}", "target": target} for n in range(2)]
        (place / f"bbh/tasks/{task}.json").write_text(json.dumps({"canary": "x", "examples": examples}))
        shots = "\n\n".join(f"Q: {n}\nA: Let's think. So the answer is {n}." for n in range(3))
        (place / f"bbh/cot-prompts/{task}.txt").write_text(f"canary\n-----\nTell {task}.\n\n{shots}\n")
    problem = {
        "task_id": "HumanEval/0",
        "prompt": "def add(a, b):\n",
        "canonical_solution": "    return a + b\n",
        "test": "def check(f):\n    assert f(1, 2) == 3\n",
        "entry_point": "add",
    }
    with gzip.open(place / "humaneval/HumanEval.jsonl.gz", "wt") as file:
        file.write(json.dumps(problem) + "\n")
    for split in ("train", "dev"):
        paragraphs = [
            {
                "context": f"{language} passage",
                "qas": [
                    {"id": f"{language}-{split}-{n}", "question": f"{n}?", "answers": [{"text": f"The {n}"}]}
                    for n in range(2)
                ],
            }
            for language in ("english", "finnish")
        ]
        content = {"version": "1.1", "data": [{"paragraphs": paragraphs}]}
        (place / f"tydiqa/tydiqa-goldp-v1.1-{split}.json").write_text(json.dumps(content))
    return place


class TestPrompts:
    def test_mmlu(self, data):
        docs = mmlu.documents(data)["test"].to_list()
        assert [doc["subject"] for doc in docs] == ["art", "moral_sums", "art"]  # in turn
        assert [doc["answer"] for doc in docs] == [3, 0, 3]
        assert docs[1]["prompt"] == (
            "The following are multiple choice questions (with answers) about moral sums.\n\n"
            "0 + 1?\nA. one\nB. two\nC. three\nD. four\nAnswer: A\n\n"
            "1 + 1?\nA. one\nB. two\nC. three\nD. four\nAnswer: B\n\n"
            "2 + 1?\nA. one\nB. two\nC. three\nD. four\nAnswer: C\n\n"
            "0 + 1?\nA. one\nB. two\nC. three\nD. four\nAnswer:"
        )
        assert mmlu.documents(data, shots=0)["test"][1]["prompt"].count("Answer:") == 1

    def test_gsm8k(self, data):
        docs = gsm8k.documents(data, paper=True)["test"].to_list()
        assert {doc["answer"] for doc in docs} == {"1000", "2000", "3000"}
        assert docs[0]["prompt"].count("Question:") == 9
        assert docs[0]["prompt"].endswith("Answer:")

    def test_bbh(self, data):
        docs = bbh.documents(data, shots=2)["test"].to_list()
        assert [doc["task"] for doc in docs] == ["brackets", "navigate"] * 2
        assert docs[1]["prompt"] == (
            "Tell navigate.\n\nQ: 0\nA: Let's think. So the answer is 0.\n\nQ: 1\nA: Let's think. "
            "So the answer is 1.\n\nQ: navigate 0\nA:"
        )

    def test_tydiqa(self, data):
        docs = tydiqa.documents(data)["test"].to_list()
        assert [doc["language"] for doc in docs] == ["english", "finnish"] * 2
        assert docs[0]["prompt"].startswith("Answer the following question based on the information")
        assert docs[0]["prompt"].endswith("Passage: english passage\nQuestion: 0?\nAnswer:")
        assert docs[0]["prompt"].count("Answer: The") == 1
        assert docs[1]["prompt"].endswith("Kappale: finnish passage\nKysymys: 0?\nVastaus:")

    def test_humaneval(self, data):
        (doc,) = humaneval.documents(data)["test"].to_list()
        assert doc["prompt"] == "def add(a, b):\n"


class TestScores:
    @pytest.mark.parametrize(
        ("said", "right"),
        [(" 2 + 3 = 5. So the answer is 1,000.", 1), ("1000.0", 1), ("It is 999", 0), ("none", 0), ("", 0)],
    )
    def test_gsm8k(self, said, right):
        assert gsm8k.score({"answer": "1000"}, [said]) == {"exact_match": right}

    @pytest.mark.parametrize(
        ("said", "target", "right"),
        [
            ("So the answer is (B).", "(B)", 1),
            ("the answer is yes. Q: more? The answer is no.", "Yes", 1),
            ("Yes", "Yes", 1),
            ("the answer is (C).", "(B)", 0),
            ("So the answer is } ).", "} )", 1),
            ("So the answer is ] ).", "} )", 0),
        ],
    )
    def test_bbh(self, said, target, right):
        assert bbh.score({"answer": target}, [said]) == {"exact_match": right}

    def test_tydiqa(self):
        doc = {"answers": ["The Red Sea", "Sea"]}
        assert tydiqa.score(doc, [" the red sea."]) == {"f1": 1.0, "exact_match": 1.0}
        assert tydiqa.score(doc, ["red water"]) == {"f1": pytest.approx(0.5), "exact_match": 0.0}
        assert tydiqa.score(doc, [""]) == {"f1": 0.0, "exact_match": 0.0}

    def test_humaneval(self, data):
        (doc,) = humaneval.documents(data)["test"].to_list()
        replies = humaneval.all_of_them([["    return a + b\n", "    return a - b\n"]], [doc])[0]
        assert humaneval.score(doc, replies) == {"pass_at_1": 0.5}


class TestRefused:
    @pytest.mark.parametrize("task", [mmlu, gsm8k, bbh, humaneval, tydiqa])
    def test_no_data(self, task, tmp_path):
        with pytest.raises(DataError, match="needs --data_dir"):
            task.documents()
        with pytest.raises(DataError, match="there is no folder"):
            task.documents(tmp_path)

    @pytest.mark.parametrize("task", [mmlu, gsm8k, bbh, humaneval, tydiqa])
    def test_more_examples_than_there_are(self, data, task):
        with pytest.raises(DataError, match=r"9 examples are asked for .*, [01358] are there|9 are shown"):
            task.documents(data, shots=9)

    @pytest.mark.parametrize(
        ("task", "file", "content", "match"),
        [
            (mmlu, "mmlu/test/art.csv", "a,b,c,d,e,X\n", "art.csv, row 1: expected a question, four choices"),
            (
                gsm8k,
                "gsm8k/test.jsonl",
                '{"question": 1}\n',
                "test.jsonl, line 1: .* question, answer",
            ),
            (bbh, "bbh/tasks/navigate.json", "[]", "navigate.json: expected examples"),
            (bbh, "bbh/tasks/navigate.json", "{", "navigate.json cannot be read as JSON"),
            (tydiqa, "tydiqa/x-dev.json", '{"data": [{}]}', "x-dev.json is no file of TyDiQA"),
        ],
    )
    def test_broken(self, data, task, file, content, match):
        (data / file).write_text(content)
        with pytest.raises(DataError, match=match):
            task.documents(data)
