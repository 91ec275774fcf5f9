"""What every method of the trainer does, those that somebody else registers too."""

import contextlib
import io
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import toys
from support.mesh_cases import mesh_of
from support.run_cases import chat_file, run, tiny_config

from spiel_jax.adapters.load import load_run
from spiel_jax.checkpoint import restore_deltas, restore_trained
from spiel_jax.config import ConfigError, check_config, data_config
from spiel_jax.data import load_data
from spiel_jax.losses.next_token import Objective
from spiel_jax.methods.registry import build, method_class, method_names
from spiel_jax.models import open_model
from spiel_jax.optim.criteria.criterion import CRITERIA
from spiel_jax.planning.run import prepare
from spiel_jax.reporting.page import page
from spiel_jax.reporting.runs import read_runs
from spiel_jax.training.metrics import read_metrics

METHODS = [*method_names(), "strongest", "norms"]
RATE = {"full": 3e-3}
ONCE = ("gradient", "gem", "talos", "wanda", "migu", "smt")


@pytest.fixture(scope="module", autouse=True)
def somebody_elses():
    with toys.registered():
        yield


@pytest.fixture(scope="module")
def configured(llama_folder, tmp_path_factory):
    """A method's configuration: six steps, every other one of which ends with a reselection if any does."""
    data = chat_file(tmp_path_factory.mktemp("data"))

    def make(name):
        config = tiny_config(llama_folder, data, name)
        config.eval_batches = None
        config.checkpoint_every = 3
        config.micro_batch_size = 2
        config.optimizer.learning_rate = RATE.get(name, 3e-2)
        config.lora.rank = 4
        config.rosa.warmup = 2
        config.spiel.tile.columns = 1
        if name in ("structured", "smt"):
            config.targets.num_tunable = 960  # whole columns, no slot unused
        if name == "random":
            config.spiel.rate = 0.2  # it evolves
        else:
            config.spiel.first = 1.0
        if name in CRITERIA and name != "spiel_ag":  # others only take time to compile
            config.targets.rules = (r".*\.up_proj\.weight",)
        if name not in CRITERIA:
            config.targets.rules = (r".*\.(v|down)_proj\.weight",)  # (IA)^3 scales those
        config.sample.prompt, config.sample.max_new_tokens = "say tea", 2
        return config

    return make


@pytest.fixture(scope="module")
def runs(configured, tmp_path_factory):
    """A method's run, and one that was killed after step 3 and continued; each is made once."""
    made = {}

    def make(name):
        if name not in made:
            folder, config, shown = tmp_path_factory.mktemp(name), configured(name), io.StringIO()
            with contextlib.redirect_stdout(shown):
                whole = run(config, folder / "whole")
            shutil.copytree(folder / "whole", folder / "parts")
            with (folder / "parts" / "metrics.jsonl").open("a") as file:
                file.write('{"step": 9, "lo')
            run(config, folder / "parts", resume_from=3)
            made[name] = folder, config, whole, shown.getvalue()
        return made[name]

    return make


SLOW = (
    "magnitude",
    "gradient",
    "gem",
    "talos",
    "wanda",
    "migu",
    "lift",
    "rosa",
    "structured",
    "smt",
    "spiel_ma_adam",
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in METHODS],
    scope="module",
)  # all tests of a method after each other
class TestMethods:
    def test_learns(self, name, runs):
        _, _, whole, shown = runs(name)
        assert [step for step, _ in whole.heldout] == [0, 6]
        assert whole.heldout[-1][1] < whole.heldout[0][1] - 0.05
        assert " tuned: " in shown
        assert ("  base: " in shown) == method_class(name).keeps_base

    def test_a_continued_run_is_the_uninterrupted_one(self, name, runs):
        folder, *_ = runs(name)
        one, other = ((folder / part / "metrics.jsonl").read_bytes() for part in ("whole", "parts"))
        assert one == other
        jax.tree.map(
            np.testing.assert_array_equal,
            restore_trained(folder / "whole"),
            restore_trained(folder / "parts"),
        )

    def test_a_checkpoint_holds_what_is_trained_and_not_the_base(self, name, runs):
        folder, config, *_ = runs(name)
        held = {path.name for path in (folder / "whole" / "checkpoints" / "6").iterdir() if path.is_dir()}
        assert {part for part in held if not part.startswith("_")} == {
            "deltas" if name in CRITERIA else "trainable",
            "optimizer",
        }
        trained = sum(np.size(leaf) for leaf in jax.tree.leaves(restore_trained(folder / "whole")))
        base = sum(p.size for p in open_model(config.model.source).load("float32", progress=False).values())
        assert trained < base or name == "full"

    def test_the_restored_model_has_the_loss_of_the_run(self, name, runs):
        folder, config, whole, _ = runs(name)
        loaded = load_run(folder / "whole", keep_base=True)
        source = open_model(config.model.source)
        jax.tree.map(np.testing.assert_array_equal, loaded.base, source.load("float32", progress=False))
        batches = load_data(data_config(config), loaded.tokenizer).heldout_batches(2)
        objective = jax.jit(Objective(loaded.config, "none", 64))
        loss = sum(objective(loaded.tuned, batch) for batch in batches)
        loss = loss / sum(batch["weights"].sum() for batch in batches)
        assert float(loss) == pytest.approx(whole.heldout[-1][1], rel=1e-5)

    def test_can_be_reported(self, name, runs):
        folder, *_ = runs(name)
        (whole,) = read_runs([folder / "whole"])
        trained = jax.tree.leaves(restore_trained(folder / "whole"))
        if name in CRITERIA:
            trained = trained[::2]  # of positions and values
        assert (whole.notes, whole.steps) == ([], 6)
        assert whole.changes.count == sum(np.size(leaf) for leaf in trained)
        assert [(reply.step, reply.prompt) for reply in whole.replies[-1:]] == [(6, "say tea")]
        assert len(whole.replies) == 1 + method_class(name).keeps_base
        shares = [one.values[-1] for one in whole.cohorts.values() if one.steps[-1] == 6]
        aged = name in CRITERIA and name not in ("spiel_ma", "magnitude", "structured", *ONCE)
        assert sum(shares) == pytest.approx(float(aged))
        titles = re.findall("<h2[^>]*>(.*?)</h2>", page([whole]))
        assert titles[:1] + titles[-3:] == ["Training", "Speed and memory", "Samples", "Configuration"]
        # of what is neither deltas alone nor one kind of matrices a report has the count only
        assert ("Where it changed" in titles) == (name not in ("full", "norms", "rosa"))

    def test_can_be_planned(self, name, configured):
        config, mesh = configured(name), mesh_of(2, 2, 1)
        model = open_model(config.model.source).config
        planned = prepare(config, model, mesh)
        method = build(config, model, config.steps)
        assert {*planned.kinds.values()} == {method.step_kind(step) for step in range(1, 7)}
        held = planned.held()
        assert held["deltas"] > 0
        assert held["optimizer"] > 0
        assert (held["weights"] > 0) == method.keeps_base
        for leaf in jax.tree.leaves(planned.state):
            assert leaf.sharding.mesh == mesh
            leaf.sharding.shard_shape(leaf.shape)  # raises where it does not divide

    def test_a_bad_learning_rate_is_refused(self, name, configured):
        config = configured(name)
        check_config(config)
        config.optimizer.learning_rate = float("nan")
        with pytest.raises(ConfigError, match=r"config\.optimizer\.learning_rate = nan: expected more"):
            check_config(config)


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        *[(name, "spiel.every", 0, "spiel.every = 0: expected at least 1") for name in CRITERIA],
        *[(name, "targets.density", 0.1, "density or num_tunable, one of them") for name in CRITERIA],
        *[
            (name, "spiel.parity", "reference", "method = .*: expected a method of SpIEL")
            for name in ("random", "magnitude", "gradient", "lift", "gem", "wanda")
        ],
        ("spiel_ag", "spiel.candidate_ratio", 0.0, "candidate_ratio = 0.0: expected more than 0"),
        ("spiel_ma", "spiel.score", "sum", "score = 'sum': expected one of product, minimum"),
        ("magnitude", "spiel.magnitude", "both", "magnitude = 'both': expected one of largest, smallest"),
        ("lift", "spiel.filter_rank", 0, "filter_rank = 0: expected at least 1"),
        ("lora", "lora.rank", 0, "lora.rank = 0: expected at least 1"),
        ("lora", "lora.dropout", 1.0, "lora.dropout = 1.0: expected 0 or more and less than 1"),
        ("sgd", "seed", 0, "method = 'sgd': expected one of spiel_ag, .*, strongest, .*, norms"),
    ],
)
def test_what_a_method_cannot_use_is_refused(configured, name, key, value, message):
    config = configured(name)
    with config.ignore_type():
        config.update_from_flattened_dict({key: value})
    with pytest.raises(ConfigError, match=message):
        check_config(config)


def replaced(folder):
    return {line["step"]: line["replaced"] for line in read_metrics(folder) if line.get("replaced")}


@pytest.mark.parametrize("name", ["spiel_ag", "spiel_ma", "strongest", "random"])
def test_entries_evolve_where_they_should(name, runs):
    found = replaced(runs(name)[0] / "whole")
    assert list(found) == [2, 4, 6]
    assert found[2] == pytest.approx(0.2 if name == "random" else 1.0, abs=0.02)
    assert found[4] == pytest.approx(0.2, abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", ONCE)
def test_the_entries_are_chosen_once(name, runs):
    """Entries begin at random, so that of what is chosen as much was active as of all."""
    folder, config, *_ = runs(name)
    params = open_model(config.model.source).load(jnp.float32, progress=False)
    deltas = restore_deltas(folder / "whole")
    density = sum(delta.indices.size for delta in deltas.values()) / sum(params[of].size for of in deltas)
    found = replaced(folder / "whole")
    assert list(found) == [2]
    assert found[2] == pytest.approx(1 - density, abs=0.04)


@pytest.mark.slow
def test_what_is_principal_is_looked_for_again_and_mostly_stays(runs):
    found = replaced(runs("lift")[0] / "whole")
    assert set(found) <= {2, 4, 6}
    assert 0 < sum(found.values()) < 1.5


@pytest.mark.slow
def test_the_largest_weights_are_chosen_at_the_start(runs):
    folder, config, *_ = runs("magnitude")
    assert replaced(folder / "whole") == {}
    params = open_model(config.model.source).load(jnp.float32, progress=False)
    for name, delta in restore_deltas(folder / "whole").items():
        for weight, indices in zip(np.abs(np.asarray(params[name])), delta.indices, strict=True):
            least = weight.ravel()[np.asarray(indices)].min()
            assert (weight > least).sum() < indices.size
