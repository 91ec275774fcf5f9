"""What is said of what a run reads."""

import json
import logging
import shutil

import pytest
from support.run_cases import chat_file, run, tiny_config

from spiel_jax.adapters import adapter_of_run, base_of_run, write_adapter
from spiel_jax.adapters.load import load_run
from spiel_jax.checkpoint import CheckpointError, read_metadata
from spiel_jax.data.templates import ChatTemplate
from spiel_jax.errors import NotFoundError
from spiel_jax.models import open_tokenizer
from spiel_jax.training.inputs import warn_of_positions


def test_rows_longer_than_the_model_knows_positions_are_warned_of(caplog):
    with caplog.at_level(logging.WARNING, "spiel_jax"):
        warn_of_positions(128, 128)
        assert not caplog.records
        warn_of_positions(256, 128)
    assert "data.sequence_length is 256, and the model knows 128 positions" in caplog.text


@pytest.mark.slow
def test_a_run_with_a_tokenizer_of_another_place(llama_folder, tmp_path):
    """A folder of its files alone, that moves; with templates of several names."""
    place = tmp_path / "tokenizer"
    tokenizer = open_tokenizer(str(llama_folder))
    templates = {"default": tokenizer.chat_template, "tool_use": f"[tools]{tokenizer.chat_template}"}
    tokenizer.chat_template = templates
    tokenizer.save_pretrained(place)
    config = tiny_config(llama_folder, chat_file(tmp_path), "random")
    config.model.tokenizer, config.steps = str(place), 1
    run(config, tmp_path / "run")
    assert read_metadata(tmp_path / "run")["chat_template"] == templates

    shutil.move(place, tmp_path / "moved")
    with pytest.raises(NotFoundError, match=r"no tokenizer at .*name the place: --tokenizer=\.\.\."):
        load_run(tmp_path / "run")
    moved = str(tmp_path / "moved")
    loaded = load_run(tmp_path / "run", tokenizer=moved)
    assert ChatTemplate(loaded.tokenizer).write([], [{"name": "f"}]).startswith("[tools]")
    base = base_of_run(tmp_path / "run", tokenizer=moved)
    out = write_adapter(adapter_of_run(tmp_path / "run"), tmp_path / "out", "merged", base=base)
    assert open_tokenizer(str(out)).chat_template == templates

    said = json.loads((tmp_path / "moved" / "tokenizer.json").read_text())
    said["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    (tmp_path / "moved" / "tokenizer.json").write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match="trained with another model or tokenizer"):
        load_run(tmp_path / "run", tokenizer=moved)
