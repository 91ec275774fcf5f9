"""Studies: what they run, in which order, what is not run again, and what they report."""

import json
import os
import subprocess
import threading
from dataclasses import replace

import pytest
from absl import flags
from support.run_cases import chat_file, tiny_config

from experiments import trials
from experiments.quality import study as studies
from experiments.quality.__main__ import define_flags, known, main
from experiments.quality.elsewhere import elsewhere
from experiments.quality.study import Candidate, Study, done, read, trial
from experiments.quality.tables import at_best, markdown, plots, validation
from experiments.quality.trial import test_loss as loss_on_the_test
from experiments.trials import Trial, outcome
from spiel_jax.config.file import load
from spiel_jax.errors import SpielError

FIXED = {"method": "random", "spiel.rate": 0.0}
STUDY = Study(
    config="configs/smollm2_135m.py",
    settings={"steps": 6},
    candidates={
        "fixed": Candidate(FIXED, (1e-3, 2e-3, 4e-3)),
        "lora": Candidate({"method": "lora"}, (1e-3, 2e-3)),
    },
    budgets={"small": {"targets.num_tunable": 1000, "lora.rank": 2}},
    seeds=(0, 1, 2),
    against="lora",
)


def stub(one, out, place):
    """Best at 2e-3; the test says half as much more, and a seed a hundredth."""
    rate, seed = one.settings["optimizer.learning_rate"], one.settings["seed"]
    if rate == 4e-3:
        return {"command": one.told(), "processor": "this", "diverged": True}
    loss = 3 + abs(rate - 2e-3) + seed / 100 - 0.5 * (one.settings["method"] == "random")
    told = {"heldout": [[0, 4.0], [6, loss]], "losses": [4.0, loss], "test": loss + 0.5}
    place = {"command": one.told(), "processor": "this"}
    return {**told, **place, "seconds_per_step": [1.0, 1.0, 2.0, 2.0], "peak_gib": 1.0}


@pytest.fixture
def results(monkeypatch, tmp_path):
    monkeypatch.setattr(studies, "outcome", stub)
    return list(done(STUDY, tmp_path))


def test_rates_are_chosen_with_the_first_seed_and_the_others_run_at_the_best(results):
    order = [(result["method"], result["rate"], result["seed"]) for result in results]
    assert order == [
        *[("fixed", rate, 0) for rate in (1e-3, 2e-3, 4e-3)],
        *[("lora", rate, 0) for rate in (1e-3, 2e-3)],
        *[(method, 2e-3, seed) for seed in (1, 2) for method in ("fixed", "lora")],
    ]
    assert validation(results[2]) == float("inf")
    assert {run["rate"] for run in at_best(results[:3])} == {2e-3}


def test_close_rates_are_run_with_all_seeds_and_the_lowest_mean_is_taken(monkeypatch, tmp_path):
    def chance(one, out, place):  # the first seed is for the other rate
        told = stub(one, out, place)
        first = one.settings["optimizer.learning_rate"] == 1e-3 and one.settings["seed"] == 0
        told["heldout"][-1][1] -= 0.0015 * first
        return told

    monkeypatch.setattr(studies, "outcome", chance)
    alone = replace(STUDY, candidates={"lora": STUDY.candidates["lora"]})
    results = list(done(alone, tmp_path))
    assert {run["rate"] for run in at_best(results)} == {1e-3}
    results = list(done(alone, tmp_path, close=0.0004))
    assert {run["rate"] for run in at_best(results)} == {1e-3}
    results = list(done(alone, tmp_path, close=0.0006))
    assert [(run["rate"], run["seed"]) for run in results[2:]] == [(1e-3, 1), (2e-3, 1), (1e-3, 2), (2e-3, 2)]
    assert {run["rate"] for run in at_best(results)} == {2e-3}
    assert {run["rate"] for run in at_best([run for run in results if run["seed"] == 0])} == {1e-3}


def test_rates_beyond_are_tried_while_the_best_is_at_an_end(monkeypatch, tmp_path):
    monkeypatch.setattr(studies, "outcome", stub)
    candidates = {
        "above": Candidate(FIXED, (2.5e-4, 5e-4)),  # 2e-3 is best, and 4e-3 diverges
        "below": Candidate({"method": "lora"}, (6e-3, 1.2e-2)),
        "between": Candidate({"method": "lora"}, (1e-3, 2e-3, 3e-3)),
        "alone": Candidate({"method": "lora"}, (1e-3,)),
        "diverged": Candidate(FIXED, (4e-3,)),
    }
    found = list(done(replace(STUDY, candidates=candidates, seeds=(0,)), tmp_path, beyond=4))
    tried = {name: [run["rate"] for run in found if run["method"] == name] for name in candidates}
    assert tried == {
        "above": [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3],
        "below": [6e-3, 1.2e-2, 3e-3, 1.5e-3, 7.5e-4],
        "between": [1e-3, 2e-3, 3e-3],
        "alone": [1e-3],
        "diverged": [4e-3],
    }
    fewer = list(done(replace(STUDY, candidates=candidates, seeds=(0,)), tmp_path, beyond=1))
    assert [run["rate"] for run in fewer if run["method"] == "above"] == [2.5e-4, 5e-4, 1e-3]


def test_so_many_runs_at_a_time_as_there_are_places_and_in_the_same_order(results, monkeypatch, tmp_path):
    both, used = threading.Barrier(2, timeout=60), []

    def together(one, out, place):
        used.append(place["gpu"])
        if len(used) <= 2:
            both.wait()  # breaks unless two are here at once
        return stub(one, out, place)

    monkeypatch.setattr(studies, "outcome", together)
    places = [{"gpu": "0"}, {"gpu": "1"}]
    assert list(done(STUDY, tmp_path, places)) == results
    assert set(used[:2]) == {"0", "1"}


def test_a_run_that_fails_ends_the_study_and_none_is_begun(monkeypatch, tmp_path):
    begun = []

    def fails(one, out, place):
        begun.append(one.name)
        raise SpielError("failed")

    monkeypatch.setattr(studies, "outcome", fails)
    with pytest.raises(SpielError, match="failed"):
        list(done(STUDY, tmp_path))
    assert begun == ["fixed-small-0.001-0"]


def test_table(results):
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in markdown(results, "lora").split("\n")]
    fixed, lora = rows[2:]
    assert fixed[:4] == ["fixed small", "0.001, 0.002, 0.004", "0.002", "3"]
    assert lora[2] == "0.002 (an end)"
    assert fixed[4:] == ["2.5100 ± 0.0058", "3.0100 ± 0.0058", "-0.5000 ± 0.0000", "1.0", "1.0"]
    assert lora[5:7] == ["3.5100 ± 0.0058", "+0.0000 ± 0.0000"]


def test_no_times_of_several_kinds_of_processors(results):
    rows = markdown([{**results[0], "processor": "other"}, *results[1:]]).split("\n")[2:]
    assert [row.split("|")[-3].strip() for row in rows] == ["-", "-"]


def test_no_times_of_runs_that_were_not_alone(results):
    told = [{k: v for k, v in one.items() if k != "seconds_per_step"} for one in results]
    rows = markdown(told).split("\n")[2:]
    assert [row.split("|")[-3].strip() for row in rows] == ["-", "-"]


def test_what_it_costs_on_other_texts(results):
    def cost(seed):
        data = {"base": 2.0, "tuned": 2.1 + seed / 100, "divergence": 0.5}
        return {"data": data} if seed else {"data": data, "wikipedia": data | {"tuned": 1.9}}

    told = [
        {**run, "elsewhere": cost(run["seed"])} if run["method"] == "lora" and run["rate"] == 2e-3 else run
        for run in results
    ]
    head, _, fixed, lora = ([cell.strip() for cell in row.split("|")] for row in markdown(told).split("\n"))
    assert head[-7:-3] == ["data", "KL there", "wikipedia", "KL there"]
    assert fixed[-7:-3] == ["-"] * 4
    assert lora[-7:-3] == ["+0.1100 ± 0.0058", "0.5000 ± 0.0000", "-0.1000", "0.5000"]


def test_what_was_done_elsewhere_is_not_done_again(results, monkeypatch, tmp_path):
    begun = []

    def counted(one, out, place):
        begun.append(one.name)
        return stub(one, out, place)

    monkeypatch.setattr(studies, "outcome", counted)
    (tmp_path / "results.json").write_text(json.dumps({"runs": results[:-2]}))
    assert list(done(STUDY, tmp_path, known=known(str(tmp_path / "results.json")))) == results
    assert begun == ["fixed-small-0.002-2", "lora-small-0.002-2"]
    assert known(None) == {}


@pytest.mark.parametrize("content", ["[1", "{}", '{"runs": [{"rate": 1}]}', '{"runs": [1]}'])
def test_results_that_are_none(content, tmp_path):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(SpielError, match=r"--known=.*is no results\.json"):
        known(str(tmp_path / "results.json"))


def test_plots(results, tmp_path):
    plots(results, tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"rates.png", "training.png"}


def test_a_method_is_given_what_it_knows():
    fixed, lora = (trial(STUDY, name, "small", 1e-3, 5) for name in ("fixed", "lora"))
    assert fixed.settings == {
        "steps": 6,
        "targets.num_tunable": 1000,
        **FIXED,
        "optimizer.learning_rate": 1e-3,
        "seed": 5,
    }
    assert lora.settings == {
        "steps": 6,
        "lora.rank": 2,
        "method": "lora",
        "optimizer.learning_rate": 1e-3,
        "seed": 5,
    }
    assert (fixed.name, lora.name) == ("fixed-small-0.001-5", "lora-small-0.001-5")


def test_other_rates_are_multiples_of_the_rate():
    candidate = Candidate({"method": "lora"}, (1e-3,), {"optimizer.weight_decay": 0.3})
    found = trial(Study("", {}, {"one": candidate}), "one", "", 2e-3, 0)
    assert found.settings["optimizer.weight_decay"] == 6e-4


def test_the_runs_of_the_repository_s_studies_would_be_accepted():
    for path in (trials.ROOT / "experiments/quality/studies").glob("*.py"):
        found = read(str(path))
        for name, budget in studies.runs_of(found):
            one = trial(found, name, budget, 1e-3, 0)
            given = {key: [str(value)] for key, value in one.settings.items()}
            assert load(str(trials.ROOT / one.config), given).method == one.settings["method"]


def test_no_study(tmp_path):
    with pytest.raises(SpielError, match="no such file"):
        read(str(tmp_path / "none.py"))
    (tmp_path / "other.py").write_text("def get_study():\n    return 1\n")
    with pytest.raises(SpielError, match="expected a Study"):
        read(str(tmp_path / "other.py"))


@pytest.fixture
def process(monkeypatch):
    """A trainer that leaves what is asked of it; the statuses to end with are popped."""
    statuses, calls = [], []

    def run(command, *, env, **options):
        calls.append((command, env))
        folder = trials.Path(next(word for word in command if "--workdir=" in word).partition("=")[2])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").write_text('{"step": 0, "heldout_loss": 4.0}\n{"step": 1, "loss": 3.5}\n')
        (folder / "timing.jsonl").write_text('{"step": 1, "seconds_per_step": 0.5}\n')
        return subprocess.CompletedProcess(command, statuses.pop(), "peak memory   1.50 GiB", "the reason")

    monkeypatch.setattr(subprocess, "run", run)
    return statuses, calls


ONE = Trial("one", "configs/smollm2_135m.py", {"seed": 1})


def test_what_is_done_is_not_done_again(process, tmp_path):
    statuses, calls = process
    statuses.append(0)
    first = outcome(ONE, tmp_path)
    assert first == {
        "command": "python -m spiel_jax.train --config=configs/smollm2_135m.py --workdir=runs/one "
        "--config.seed=1",
        "processor": trials.processor(),
        "heldout": [[0, 4.0]],
        "losses": [3.5],
        "seconds_per_step": [0.5],
        "peak_gib": 1.5,
    }
    assert outcome(ONE, tmp_path) == first
    assert len(calls) == 1
    other = Trial("one", ONE.config, {"seed": 2})
    with pytest.raises(SpielError, match=r"has a run of\n.*seed=1\nand not of\n.*seed=2"):
        outcome(other, tmp_path)


def test_a_process_has_the_variables_of_its_place(process, tmp_path):
    statuses, calls = process
    statuses.append(0)
    outcome(ONE, tmp_path, {"CUDA_VISIBLE_DEVICES": "3"})
    ((_, environment),) = calls
    assert environment["CUDA_VISIBLE_DEVICES"] == "3"
    assert environment["PATH"] == os.environ["PATH"]


def test_what_was_stopped_goes_on_and_what_failed_is_told(process, tmp_path):
    statuses, _ = process
    statuses += [0, 1, trials.STOPPED]
    with pytest.raises(SpielError, match="one was stopped"):
        outcome(ONE, tmp_path)
    with pytest.raises(SpielError, match="one failed:\nthe reason"):
        outcome(ONE, tmp_path)
    assert outcome(ONE, tmp_path)["peak_gib"] == 1.5


def test_a_run_that_diverged_has_no_more(process, tmp_path):
    process[0].append(1)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "measured.json").write_text(json.dumps({"diverged": True}))
    assert outcome(ONE, tmp_path).keys() == {"command", "processor", "diverged"}


def test_a_run_that_was_killed_after_its_test_is_done_again(process, tmp_path):
    process[0].extend([0, -9])
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "measured.json").write_text(json.dumps({"test": 3.0}))
    with pytest.raises(SpielError, match="one failed"):
        outcome(ONE, tmp_path)
    assert outcome(ONE, tmp_path)["test"] == 3.0


def test_a_run_that_is_not_there_costs_nothing_that_is_known(tmp_path):
    assert elsewhere(tmp_path / "none", ["data"]) == {}
    (tmp_path / "one" / "checkpoints").mkdir(parents=True)
    (tmp_path / "texts").write_text("It rains.")
    with pytest.raises(SpielError, match=r"one: .*checkpoint"):
        elsewhere(tmp_path / "one", [str(tmp_path / "texts")])
    with pytest.raises(SpielError, match=r"no humaneval"):
        elsewhere(tmp_path / "one", [str(tmp_path)])
    (tmp_path / "one" / "elsewhere.json").write_text('{"data": {"base": 2.0}}')
    assert elsewhere(tmp_path / "one", ["some/data"]) == {"data": {"base": 2.0}}
    with pytest.raises(SpielError, match=r"some/data and .*/data\.jsonl have the same name"):
        elsewhere(tmp_path / "one", ["some/data", "data.jsonl"])


def test_texts_that_are_not_there_are_refused_before_any_run(tmp_path):
    options = flags.FlagValues()
    define_flags(options)
    study = f"--study={trials.ROOT / 'experiments/quality/studies/chitchat.py'}"
    options(
        ["quality", study, f"--out={tmp_path / 'out'}", f"--elsewhere={tmp_path},{tmp_path / 'none.jsonl'}"]
    )
    with pytest.raises(SpielError, match=r"--elsewhere: there is no .*none\.jsonl"):
        main(options)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_test_is_what_the_run_did_not_evaluate(tmp_path, llama_folder):
    """Of the same text, so that both losses must be near; and of other batches, so that they differ."""
    config = tiny_config(llama_folder, chat_file(tmp_path), "random")
    config.data.heldout, config.eval_batches, config.steps = 32, 1, 2
    summary = trials_run(config, tmp_path / "run")
    found = loss_on_the_test(config, tmp_path / "run")
    assert found != summary
    assert found == pytest.approx(summary, rel=0.1)
    (tmp_path / "data" / "gsm8k").mkdir(parents=True)
    (tmp_path / "data" / "gsm8k" / "test.jsonl").write_text('{"question": "say tea", "answer": "tea"}\n')
    (tmp_path / "more.jsonl").write_text('{"text": "Tea is a drink."}\n')
    data, more = str(tmp_path / "data"), str(tmp_path / "more.jsonl")
    first = elsewhere(tmp_path / "run", [data])
    both = elsewhere(tmp_path / "run", [data, more])
    assert both.keys() == {"data", "more"}
    assert both["data"] == first["data"] != both["more"]
    for found in both.values():
        assert found.keys() == {"base", "tuned", "divergence", "agreement", "tokens"}
        assert found["divergence"] > 0


def trials_run(config, workdir):
    from spiel_jax.training.run import run

    return run(config, workdir, progress=False).heldout[-1][1]
