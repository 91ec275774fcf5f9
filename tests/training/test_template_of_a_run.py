"""A run keeps its chat template and its date, for when it is continued and for generation."""

import datetime

import pytest
from support import run_cases

from spiel_jax.adapters.load import load_run
from spiel_jax.checkpoint import read_metadata
from spiel_jax.config import check_config
from spiel_jax.data.templates import ChatTemplate, TemplateError
from spiel_jax.training import run as training

DATED = (
    "{{ strftime_now('%d %b %Y') }}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def on(monkeypatch):
    """Lets a run start on a day."""

    def start(day):
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return datetime.datetime.fromisoformat(day)

        monkeypatch.setattr(training.datetime, "datetime", Clock)

    return start


@pytest.fixture
def config(llama_folder, tmp_path):
    (tmp_path / "dated.jinja").write_text(DATED)
    config = run_cases.tiny_config(llama_folder, run_cases.chat_file(tmp_path), "lora")
    config.targets.num_tunable, config.lora.rank = None, 2
    config.data.chat_template = str(tmp_path / "dated.jinja")
    config.steps, config.checkpoint_every = 3, 1
    return config


def test_date_and_template_are_kept(config, tmp_path, on):
    on("2024-02-29")
    run_cases.run(config, tmp_path / "run", until=1)
    metadata = read_metadata(tmp_path / "run")
    assert metadata["date"] == "2024-02-29T00:00:00"
    assert metadata["chat_template"] == DATED
    (tmp_path / "dated.jinja").unlink()
    run = load_run(tmp_path / "run")
    asked = ChatTemplate(run.tokenizer, run.date).write([{"role": "user", "content": "a"}], prompt=True)
    assert asked == "29 Feb 2024<|im_start|>user\na<|im_end|><|im_start|>assistant\n"


@pytest.mark.slow
def test_a_run_that_is_continued_keeps_its_day(config, tmp_path, on):
    on("2024-02-29")
    run_cases.run(config, tmp_path / "whole")
    run_cases.run(config, tmp_path / "parts", until=1)
    on("2025-12-31")
    run_cases.run(config, tmp_path / "parts")
    assert run_cases.losses(tmp_path / "parts") == run_cases.losses(tmp_path / "whole")


def test_a_template_that_is_not_there(llama_folder, tmp_path):
    config = run_cases.tiny_config(llama_folder, "x.jsonl")
    config.data.chat_template = str(tmp_path / "absent.jinja")
    with pytest.raises(TemplateError, match=r"no chat template can be read from .*absent\.jinja"):
        check_config(config)
