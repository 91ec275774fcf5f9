import json

import pytest
from support.run_cases import chat_file, run, tiny_config

from spiel_jax.adapters.load import load_run
from spiel_jax.errors import SpielError
from spiel_jax.inference.chat import reply
from spiel_jax.training.metrics import read_metrics

pytestmark = [  # lm-eval's
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture
def config(llama_folder, tmp_path):
    config = tiny_config(llama_folder, chat_file(tmp_path), "lora")  # one kind of step to compile
    config.targets.num_tunable = None
    config.lora.rank = 2
    config.steps = 4
    return config


@pytest.fixture
def tasks(config, tmp_path):
    """A tiny benchmark that the run is to be scored on."""
    pytest.importorskip("lm_eval")
    (tmp_path / "data/gsm8k").mkdir(parents=True)
    problems = [{"question": f"{n}?", "answer": f"#### {n}"} for n in range(3)]
    file = tmp_path / "data/gsm8k/test.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in problems))
    config.eval_tasks.names = ("gsm8k",)
    config.eval_tasks.data_dir = str(tmp_path / "data")
    config.eval_tasks.max_new_tokens = 4
    config.eval_tasks.limit = 2


@pytest.mark.usefixtures("tasks")
def test_scores_and_replies_are_recorded(config, tmp_path):
    config.eval_tasks.every = 3
    config.sample.prompts = ("Hi", "What?")
    config.sample.max_new_tokens = 5
    config.eval_every = 2
    run(config, tmp_path / "run")
    scored = {line["step"]: line for line in read_metrics(tmp_path / "run") if "gsm8k/exact_match" in line}
    assert scored.keys() == {3, 4}
    assert scored[4]["gsm8k/exact_match"] == 0
    lines = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4]
    assert all(line.keys() == {"step", "Hi", "What?"} for line in lines)
    tuned = load_run(tmp_path / "run")
    assert lines[-1]["Hi"] == reply(tuned.config, tuned.tuned, tuned.tokenizer, "Hi", max_new_tokens=5)


@pytest.mark.usefixtures("tasks")
def test_refused_before_training(config, tmp_path):
    config.eval_tasks.data_dir = str(tmp_path)
    with pytest.raises(SpielError, match="there is no folder gsm8k in it"):
        run(config, tmp_path / "run")
