"""A continued run is the same run, or says why not; and runs that are made longer."""

import json
import logging
import shutil

import jax
import numpy as np
import pytest
from support.run_cases import chat_file, run, tiny_config

from spiel_jax.adapters.load import load_run
from spiel_jax.checkpoint import CheckpointError, read_metadata, restore_deltas
from spiel_jax.config import ConfigError
from spiel_jax.errors import SpielError
from spiel_jax.training.metrics import read_metrics


@pytest.fixture(scope="module")
def places(tmp_path_factory, llama_folder):
    """A model and data that tests may change; and a run of 6 steps on them that was stopped after 3."""
    folder = tmp_path_factory.mktemp("places")
    shutil.copytree(llama_folder, folder / "model")
    config = tiny_config(folder / "model", chat_file(folder), "spiel_ma")
    config.targets.rules = (r".*\.up_proj\.weight",)  # others only take time to compile
    config.eval_every = 2
    config.eval_batches = None
    config.checkpoint_keep_best = True
    run(config, folder / "whole")
    run(config, folder / "half", until=3)
    return folder, config


@pytest.fixture
def half(places, tmp_path):
    """The folders of model, data and a stopped run, and its config: all to be changed."""
    folder, config = places
    shutil.copytree(folder, tmp_path / "here")
    config = config.copy_and_resolve_references()
    config.model.source = str(tmp_path / "here" / "model")
    config.data.sources = (str(tmp_path / "here" / "chat.jsonl"),)
    return tmp_path / "here", config


def settings_of(folder):
    return read_metadata(folder)["config"]


def assert_same_run(one, other):
    jax.tree.map(np.testing.assert_array_equal, restore_deltas(one), restore_deltas(other))
    texts = [(folder / "metrics.jsonl").read_text() for folder in (one, other)]
    assert texts[0] == texts[1]


def test_a_best_evaluation_is_saved_although_no_checkpoint_is_due(places):
    folder = places[0] / "whole"
    losses = {line["step"]: line["heldout_loss"] for line in read_metrics(folder) if "heldout_loss" in line}
    assert list(losses) == [0, 2, 4, 6]
    assert losses[2] > losses[4]
    steps = sorted(int(path.name) for path in (folder / "checkpoints").iterdir())
    assert steps == [4, 6]
    assert read_metadata(folder, "best")["step"] == min((2, 4, 6), key=losses.get)


def test_what_lies_elsewhere_and_is_the_same_is_the_same_run(half):
    folder, config = half
    (folder / "chat.jsonl").rename(folder / "moved.jsonl")
    (folder / "model").rename(folder / "away")
    config.model.source = str(folder / "away")
    config.model.tokenizer = str(folder / "away")
    config.data.sources = ({"path": str(folder / "moved.jsonl"), "format": "messages"},)
    run(config, folder / "half")
    assert_same_run(folder / "half", folder / "whole")
    for stored in (json.loads((folder / "half" / "config.json").read_text()), settings_of(folder / "half")):
        assert stored["model.source"] == str(folder / "away")


@pytest.mark.slow
def test_relative_places_are_found_from_another_folder(half, monkeypatch):
    folder, config = half
    shutil.rmtree(folder / "half")
    monkeypatch.chdir(folder)
    config.model.source, config.data.sources = "model", ("./chat.jsonl",)
    run(config, "half", until=3)
    monkeypatch.chdir("/")
    assert load_run(folder / "half").settings["data.sources"] == [str(folder / "chat.jsonl")]
    run(config, folder / "half")
    assert_same_run(folder / "half", folder / "whole")


def rewritten(change):
    def rewrite(folder, config):
        lines = (folder / "chat.jsonl").read_text().splitlines(keepends=True)
        (folder / "chat.jsonl").write_text("".join(change(lines)))

    return rewrite


def model_config(**keys):
    def change(folder, config):
        path = folder / "model" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))

    return change


def template(folder, config):
    path = folder / "model" / "chat_template.jinja"
    path.write_text(path.read_text() + "{# another #}")


def more_heldout(folder, config):
    config.data.heldout = 9


def two_sources(folder, config):
    config.data.sources *= 2


CHANGES = {
    "chat.jsonl: 80 examples then, 81 now": rewritten(lambda lines: lines + lines[:1]),
    "chat.jsonl: 80 examples then, 60 now": rewritten(lambda lines: lines[:60]),
    "chat.jsonl: 80 examples then and now, but of other tokens": rewritten(lambda lines: lines[::-1]),
    "held-out examples: 8 examples then, 9 now": more_heldout,
    "1 sources then .*chat.jsonl.*, 2 now": two_sources,
    "the chat template": template,
    "computes otherwise: rms_norm_eps: 1e-06 then, 0.001 now": model_config(rms_norm_eps=1e-3),
    "rope_theta: 10000.0 then, 500.0 now": model_config(rope_theta=500.0, rope_parameters=None),
    "num_heads: 4 then, 8 now; num_kv_heads: 2 then, 4 now": model_config(
        num_attention_heads=8, num_key_value_heads=4, head_dim=4
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_has_changed_is_refused(half, what):
    folder, config = half
    before = {path: path.read_bytes() for path in (folder / "half").rglob("*") if path.is_file()}
    CHANGES[what](folder, config)
    with pytest.raises(SpielError, match=what) as error:
        run(config, folder / "half")
    assert "\n" not in str(error.value)
    assert before == {path: path.read_bytes() for path in (folder / "half").rglob("*") if path.is_file()}


def test_a_tuned_model_is_not_used_with_another_tokenizer_or_arithmetic(half):
    folder, config = half
    before = load_run(folder / "half").tokenizer.chat_template
    template(folder, config)
    assert load_run(folder / "half", model=config.model.source).tokenizer.chat_template == before  # the run's
    model_config(rms_norm_eps=1e-3)(folder, config)
    with pytest.raises(CheckpointError, match=r"another model or tokenizer: rms_norm_eps: 1e-06 then, 0.001"):
        load_run(folder / "half", model=config.model.source)


def test_a_base_that_has_moved_is_named_anew(half):
    folder, config = half
    before = load_run(folder / "half")
    assert before.settings["model.source"] != config.model.source  # that of the other tests is there still
    (folder / "model").rename(folder / "away")
    after = load_run(folder / "half", model=str(folder / "away"))
    jax.tree.map(np.testing.assert_array_equal, before.tuned, after.tuned)
    with pytest.raises(SpielError, match=r"'away/nowhere/x' is neither .*name the place: --model="):
        load_run(folder / "half", model="away/nowhere/x")


@pytest.mark.slow
def test_other_data_are_accepted_knowingly(half, caplog, tmp_path):
    folder, config = half
    CHANGES["chat.jsonl: 80 examples then, 60 now"](folder, config)
    shutil.copytree(folder / "half", folder / "parts")
    with caplog.at_level(logging.WARNING, "spiel_jax"):
        run(config, folder / "half", accept_new_data=True)
    assert "80 examples then, 60 now" in caplog.text
    assert "keeps its 6 steps and its schedules; steps 4 to 6 take the new data" in caplog.text
    assert "the 8 held-out examples are not those of before" in caplog.text
    # later it goes on by itself, to the same end
    run(config, folder / "parts", accept_new_data=True, until=2)
    assert read_metadata(folder / "parts")["step"] == 5
    run(config, folder / "parts")
    assert_same_run(folder / "half", folder / "parts")
    with pytest.raises(AssertionError):
        assert_same_run(folder / "half", folder / "whole")
    CHANGES["chat.jsonl: 80 examples then, 81 now"](folder, config)
    with pytest.raises(CheckpointError, match=r"finished, and of its 6 steps none is left.*--extend"):
        run(config, folder / "half", accept_new_data=True)


@pytest.mark.slow
def test_the_length_in_epochs_stays_what_it_was(half, caplog):
    folder, config = half
    config.steps, config.epochs = None, 1
    shutil.rmtree(folder / "half")
    run(config, folder / "half", until=2)
    steps = read_metadata(folder / "half")["steps"]
    rewritten(lambda lines: lines[:40])(folder, config)
    assert run(config, folder / "half", accept_new_data=True).step == steps


def forget(folder, keys, config_keys):
    """As a checkpoint of an earlier version, which knew less."""
    for path in (folder / "checkpoints").glob("*/_CHECKPOINT_METADATA"):
        stored = json.loads(path.read_text())
        for key in keys:
            del stored["custom_metadata"][key]
        for key in config_keys:
            del stored["custom_metadata"]["config"][key]
        path.write_text(json.dumps(stored))
    known = json.loads((folder / "config.json").read_text())
    known = {key: value for key, value in known.items() if key not in config_keys}
    (folder / "config.json").write_text(json.dumps(known))


def test_a_damaged_newest_checkpoint_is_gone_round(half):
    folder, config = half
    shutil.copytree(folder / "whole", folder / "damaged")
    metadata = folder / "damaged" / "checkpoints" / "6" / "_CHECKPOINT_METADATA"
    metadata.write_bytes(metadata.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"checkpoint 6 .*damaged.*whole one is 4: --resume_from=4"):
        run(config, folder / "damaged")
    with pytest.raises(CheckpointError, match=r"no checkpoint 5 in .*: there are 4, 6"):
        run(config, folder / "damaged", resume_from=5)
    with pytest.raises(CheckpointError, match=r"--resume_from: .* holds no run to continue"):
        run(config, folder / "empty", resume_from=4)
    run(config, folder / "damaged", resume_from=4)
    assert_same_run(folder / "damaged", folder / "whole")
    assert (folder / "damaged" / "set_aside" / "6").is_dir()


@pytest.mark.slow  # by default of every method in tests/common/test_methods.py
def test_an_earlier_checkpoint_can_be_continued(half):
    folder, config = half
    shutil.copytree(folder / "whole", folder / "again")
    run(config, folder / "again", resume_from=4, until=1)
    assert read_metadata(folder / "again")["step"] == 5
    run(config, folder / "again")
    assert_same_run(folder / "again", folder / "whole")


def test_a_checkpoint_without_digests_is_continued_and_says_so(half, caplog):
    folder, config = half
    keys = ("identity", "steps", "data_since", "places", "date", "chat_template", "digests", "seal")
    new = (
        "data.chat_template",
        "data.on_mismatch",
        "checkpoint_keep_best",
        "skip_limit",
        "model.quantization",
    )
    forget(folder / "half", keys, new)
    config.data.sources = (str(folder / "moved.jsonl"),)
    with pytest.raises(ConfigError, match=r"data\.sources"):  # nothing tells what lies there
        run(config, folder / "half")
    metadata = read_metadata(folder / "half")["config"]
    config.data.sources = tuple(metadata["data.sources"])
    with caplog.at_level(logging.WARNING, "spiel_jax"):
        run(config, folder / "half")
    assert caplog.text.count("earlier version, without digests of its data") == 1
    assert "earlier version, without digests of its arrays" in caplog.text
    assert_same_run(folder / "half", folder / "whole")
    load_run(folder / "half")


class TestExtend:
    @pytest.fixture
    def config(self, places):
        config = places[1].copy_and_resolve_references()
        config.optimizer.schedule = "constant"
        config.optimizer.warmup = 0.0
        config.eval_every = 0
        config.eval_batches = 0
        config.steps = 2
        return config

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "method", ["lora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("spiel_ag", "spiel_ma"))]
    )
    def test_where_schedules_do_not_depend_on_the_length_it_is_the_long_run(self, config, tmp_path, method):
        config.method = method
        run(config, tmp_path / "parts")
        config.steps = 4
        run(config, tmp_path / "parts", extend=True)
        assert json.loads((tmp_path / "parts" / "config.json").read_text())["steps"] == 4
        config.steps = 8  # again, and interrupted
        run(config, tmp_path / "parts", extend=True, until=1)
        assert run(config, tmp_path / "parts", extend=True).step == 8
        assert run(config, tmp_path / "parts", extend=True).step == 8  # nothing is left
        run(config, tmp_path / "whole")
        restored = load_run(tmp_path / "whole").tuned, load_run(tmp_path / "parts").tuned
        jax.tree.map(np.testing.assert_array_equal, *restored)
        texts = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "parts")]
        assert texts[0] == texts[1]

    def test_needs_the_flag_a_run_and_more_steps(self, config, tmp_path):
        config.method, config.targets.num_tunable, config.lora.rank = "lora", None, 2  # one kind of step
        with pytest.raises(CheckpointError, match=r"--extend: .* holds no run to continue"):
            run(config, tmp_path / "run", extend=True)
        run(config, tmp_path / "run")
        config.steps = 3
        with pytest.raises(ConfigError, match=r"steps: 2 there, 3 now\nTo train this run further"):
            run(config, tmp_path / "run")
        config.batch_size = 8
        with pytest.raises(ConfigError, match=r"batch_size: 4 there, 8 now\nChoose another") as error:
            run(config, tmp_path / "run", extend=True)
        assert "steps:" not in str(error.value)
        config.batch_size, config.steps = 4, 1
        with pytest.raises(ConfigError, match="the run has 2 steps and the config asks for 1"):
            run(config, tmp_path / "run", extend=True)
        config.steps, config.optimizer.learning_rate = 2, 1e-3
        with pytest.raises(ConfigError, match=r"asks for 2: raise config.steps"):
            run(config, tmp_path / "run", extend=True)
        config.steps = 3
        run(config, tmp_path / "run", extend=True)
        rates = [line["learning_rate"] for line in read_metrics(tmp_path / "run")]
        assert rates == pytest.approx([1e-2, 1e-2, 1e-3])

    @pytest.mark.slow
    def test_a_phase_that_the_shorter_run_did_not_begin_ends_with_nothing(self, config, tmp_path, caplog):
        config.method = "spiel_ag"
        config.spiel.every, config.spiel.accumulation, config.steps = 4, 3, 6
        run(config, tmp_path)
        config.steps = 12
        with caplog.at_level(logging.INFO, "spiel_jax"):
            run(config, tmp_path, extend=True)
        assert "extended from 6 to 12 steps" in caplog.text
        assert "begins inside an estimation phase" in caplog.text
        lines = read_metrics(tmp_path)
        assert [line["step"] for line in lines if line["replaced"]] == [3, 11]

    @pytest.mark.slow
    def test_by_epochs(self, config, tmp_path):
        config.steps, config.epochs = None, 1
        config.data.packing = False
        config.batch_size = 16
        assert run(config, tmp_path).step == 4  # 72 rows
        config.epochs = 2
        assert run(config, tmp_path, extend=True).step == 9

    def test_epochs_that_end_before_entries_are_chosen_are_refused(self, config, tmp_path):
        config.steps, config.epochs, config.data.packing, config.batch_size = None, 1, False, 16
        config.method, config.spiel.accumulation = "gradient", 5
        with pytest.raises(ConfigError, match="accumulation = 5: expected at most 4, the steps there are"):
            run(config, tmp_path)
