"""``python -m spiel_jax.evaluate``: of runs, adapters and models; on meshes; interrupted."""

import json
import re
import runpy
import sys

import pytest

pytest.importorskip("lm_eval")

from absl import app, flags
from support.exports import adapter_of_kind, origin_of
from support.saved_runs import save_run

from spiel_jax.adapters import write_adapter
from spiel_jax.errors import SpielError
from spiel_jax.evaluate import define_flags, main
from spiel_jax.evaluation import lm
from spiel_jax.evaluation.harness import TASKS, Wanted, task_manager
from spiel_jax.models import open_model

pytestmark = [  # lm-eval's
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


OF = {"sparse": {}, "lora": {"uneven": False}}
"""Options of an adapter of a kind."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three problems of GSM8K, three questions of MMLU, and a file of other texts."""
    place = tmp_path_factory.mktemp("data")
    for folder in ("gsm8k", "mmlu/dev", "mmlu/test"):
        (place / folder).mkdir(parents=True)
    problems = [{"question": f"{n} " * n, "answer": f"#### {n}"} for n in range(1, 4)]
    (place / "gsm8k/test.jsonl").write_text("".join(json.dumps(one) + "\n" for one in problems))
    rows = "".join(f"{n} + 1?,one,two,three,four,{n}\n" for n in range(3))
    for split in ("dev", "test"):
        (place / f"mmlu/{split}/sums_{split}.csv").write_text(rows)
    (place / "texts.txt").write_text("It rains in Spain.\n\nAnd elsewhere, too.\n")
    return place


def evaluate(data, out, *arguments, tasks="gsm8k", limit=3):
    """Runs the command; the table as {(task, metric): cells}, and what was said by label and document."""
    options = flags.FlagValues()
    define_flags(options)
    command = [f"--tasks={tasks}", f"--data_dir={data}", f"--limit={limit}", "--num_fewshot=0"]
    assert options(["evaluate", *command, "--max_new_tokens=7", f"--output={out}", *arguments]) == [
        "evaluate"
    ]
    main(options)
    lines = (out / "table.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    table = {tuple(row[:2]): dict(zip(cells[0][2:], row[2:], strict=True)) for row in cells[2:]}
    said = {}
    for path in sorted(out.glob("samples-*.jsonl")):
        label = re.sub(r"samples-(.*)-local_\w+-[-\d]+\.jsonl", r"\1", path.name)
        for line in map(json.loads, path.read_text().splitlines()):
            said[label, line["doc_id"]] = line["resps"]
    return table, said


@pytest.mark.parametrize(("shots", "stop"), [(None, "\n"), (3, "\n"), (0, "Question:")])
def test_without_examples_an_answer_may_have_several_lines(data, shots, stop):
    wanted = Wanted(tasks=["gsm8k"], data_dir=str(data), num_fewshot=shots)
    (task,) = task_manager(wanted).load(wanted.names())["tasks"].values()
    assert task.config.generation_kwargs["until"] == [stop]
    prompt = task.doc_to_text(next(iter(task.test_docs())))
    assert prompt.count("Answer:") == 1 + (8 if shots is None else shots)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, llama_folder):
    return save_run(tmp_path_factory.mktemp("nf4"), llama_folder, quantization="nf4")


@pytest.fixture(scope="module")
def quantized_scores(quantized, data, tmp_path_factory):
    return evaluate(data, tmp_path_factory.mktemp("out"), f"--checkpoint={quantized}", tasks="gsm8k,mmlu")


class TestRuns:
    @pytest.mark.slow
    def test_beside_its_base(self, llama_folder, data, tmp_path):
        run = save_run(tmp_path / "run", llama_folder)
        texts = f"--texts={data / 'texts.txt'}"
        table, said = evaluate(data, tmp_path, f"--checkpoint={run}", "--base", "--forgetting", texts)
        assert list(table["gsm8k_0", "exact_match"]) == ["n", "base", "step 3", "difference"]
        assert table["gsm8k_0", "exact_match"]["n"] == "3"
        loss, divergence = (table["other texts", what] for what in ("loss", "KL from the base"))
        assert float(loss["difference"]) == pytest.approx(
            float(loss["step 3"]) - float(loss["base"]), abs=2e-4
        )
        assert float(divergence["base"]) == 0
        assert float(divergence["step 3"]) > 0.1
        assert said.keys() == {(label, n) for label in ("base", "step-3") for n in range(3)}
        assert any(said["base", n] != said["step-3", n] for n in range(3))
        plain, alone = evaluate(data, tmp_path / "model", f"--model={llama_folder}", "--dtype=float32")
        assert [*alone.values()] == [said["base", n] for n in range(3)]
        assert "difference" not in plain["gsm8k_0", "exact_match"]

    @pytest.mark.slow
    def test_quantized_and_not_merged(self, quantized, quantized_scores, data, tmp_path):
        found = evaluate(data, tmp_path, f"--checkpoint={quantized}", "--nomerge", tasks="gsm8k,mmlu")
        assert found == quantized_scores

    @pytest.mark.slow
    @pytest.mark.parametrize("arguments", [["--mesh=fsdp=2,tensor=2"], ["--mesh=data=2,fsdp=4", "--nomerge"]])
    def test_on_a_mesh(self, quantized, quantized_scores, data, tmp_path, arguments):
        table, said = evaluate(data, tmp_path, f"--checkpoint={quantized}", *arguments, tasks="gsm8k,mmlu")
        assert table == quantized_scores[0]
        assert said.keys() == quantized_scores[1].keys()

    @pytest.mark.slow
    @pytest.mark.parametrize("method", ["lora", "ia3", "full"])
    def test_other_methods(self, method, llama_folder, data, tmp_path):
        run = save_run(tmp_path / "run", llama_folder, method)
        table, _ = evaluate(data, tmp_path, f"--checkpoint={run}", "--base", "--forgetting")
        assert float(table["other texts", "KL from the base"]["step 3"]) > 0


@pytest.mark.parametrize(
    ("kind", "form"), [("sparse", "native"), pytest.param("lora", "peft", marks=pytest.mark.slow)]
)
def test_adapters(kind, form, llama_folder, data, tmp_path):
    config = open_model(str(llama_folder)).config
    write_adapter(adapter_of_kind(kind, config, origin_of(llama_folder), **OF[kind]), tmp_path / "mine", form)
    model = (f"--model={llama_folder}", f"--adapter={tmp_path / 'mine'}")
    table, said = evaluate(data, tmp_path / "both", *model, "--base", "--forgetting")
    assert float(table["other texts", "KL from the base"][str(tmp_path / "mine")]) > 0
    assert {label for label, _ in said} > {"base"}
    _, alone = evaluate(data, tmp_path / "one", *model)
    assert alone == {key: text for key, text in said.items() if key[0] != "base"}


def test_an_interrupted_evaluation_goes_on(llama_folder, data, tmp_path, monkeypatch):
    asked = []

    def continuations(served, requests, *, done, **_):
        asked.append(len(requests))
        for number in range(len(requests)):
            if len(asked) == 1 and number == 2:
                raise KeyboardInterrupt
            done(number, [97 + number])

    monkeypatch.setattr(lm, "continuations", continuations)
    with pytest.raises(KeyboardInterrupt):
        evaluate(data, tmp_path, f"--model={llama_folder}")
    evaluate(data, tmp_path, f"--model={llama_folder}")
    evaluate(data, tmp_path, f"--model={llama_folder}")
    assert asked == [3, 1]
    evaluate(data, tmp_path, f"--model={llama_folder}", "--dtype=float32")  # another model
    assert asked == [3, 1, 3]


@pytest.mark.slow
def test_the_command_line_of_the_harness(llama_folder, data, tmp_path, monkeypatch):
    command = ["lm-eval", "run", "--model", "spiel_jax", "--tasks", "local_gsm8k", "--limit", "3"]
    command += ["--model_args", f"model={llama_folder},dtype=float32", "--include_path", str(TASKS)]
    command += ["--metadata", json.dumps({"data_dir": str(data), "shots": 0}), "--log_samples"]
    command += ["--gen_kwargs", "max_gen_toks=7", "--output_path", str(tmp_path / "theirs")]
    monkeypatch.setattr(sys, "argv", command)
    runpy.run_module("spiel_jax.evaluation", run_name="__main__")
    (file,) = (tmp_path / "theirs").rglob("samples_*.jsonl")
    found = {one["doc_id"]: one["resps"] for one in map(json.loads, file.read_text().splitlines())}
    _, said = evaluate(data, tmp_path / "ours", f"--model={llama_folder}", "--dtype=float32")
    assert found == {number: text for (_, number), text in said.items()}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--model=m", "--step=3"], "--step is for a run"),
        (["--model=m", "--base"], "--base compares with a base"),
        (["--model=m", "--nomerge"], "--nomerge is for a run"),
        (["--checkpoint=r", "--adapter=a"], "--adapter goes with --model"),
        (["--checkpoint=r", "--dtype=float32"], "--dtype is of --model alone"),
        (["--model=m", "--any_base"], "--any_base goes with --adapter"),
        (["--model=m", "--texts=x"], "--texts goes with --forgetting"),
        (["--model=m", "--system=x"], "--system goes with --chat"),
        (["--model=m", "--tasks="], "nothing to evaluate"),
        ([], "give --checkpoint=DIR"),
    ],
)
def test_contradictions_are_refused(data, tmp_path, arguments, match):
    with pytest.raises(app.UsageError, match=match):
        evaluate(data, tmp_path, *arguments)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--tasks=humaneval"], "--allow_code_execution"),
        (["--tasks=bbh"], "there is no folder bbh"),
        (["--mesh=foo=2"], "mesh axis foo: expected some of data, fsdp, tensor"),
        pytest.param(["--tasks=nothing"], "unknown tasks: nothing", marks=pytest.mark.slow),
    ],
)
def test_refused_before_anything_is_loaded(data, tmp_path, arguments, match):
    with pytest.raises(SpielError, match=match):
        evaluate(data, tmp_path, "--model=/nowhere", *arguments)
