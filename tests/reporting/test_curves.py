import numpy as np
import pytest
from support.run_folders import curves, write_lines

from spiel_jax.reporting.curves import POINTS, cohort_table, survivals, training_charts
from spiel_jax.reporting.lines import read_lines, series
from spiel_jax.reporting.runs import Run


def run_of(folder, name="run"):
    found = series(read_lines(folder / "metrics.jsonl")[0])
    return Run(name, {}, found, series(read_lines(folder / "timing.jsonl")[0]), [], None, [])


def test_survival_is_that_of_the_cohorts(tmp_path):
    curves(tmp_path, rate=0.3)  # the same share of every cohort is dropped each time
    run = run_of(tmp_path)
    steps, firsts, shares = cohort_table(run)
    assert steps.tolist() == firsts == [5, 15, 25, 35, 45, 55]
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    found = survivals(run)
    assert list(found) == [5, 15, 25, 35, 45]  # the last was seen once
    for ages, left, _ in found.values():
        np.testing.assert_allclose(left, 100 * 0.7 ** (ages / 10))


def test_cohorts_that_an_extension_joined_are_joined_throughout(tmp_path):
    lines = [
        {"step": 5, "since/5": 1.0},
        {"step": 15, "since/5": 0.8, "since/15": 0.2},
        {"step": 25, "since/5": 0.7, "since/15": 0.1, "since/25": 0.2},
        {"step": 35, "since/5": 0.75, "since/25": 0.25},  # 5 and 15, 25 and 35
        {"step": 45, "since/5": 0.6, "since/25": 0.2, "since/45": 0.2},
    ]
    write_lines(tmp_path / "metrics.jsonl", lines)
    steps, firsts, shares = cohort_table(run_of(tmp_path))
    assert (steps.tolist(), firsts) == ([5, 15, 25, 35, 45], [5, 25, 45])
    expected = [[1, 0, 0], [1, 0, 0], [0.8, 0.2, 0], [0.75, 0.25, 0], [0.6, 0.2, 0.2]]
    np.testing.assert_allclose(shares, expected)


def test_a_long_curve_keeps_its_spikes(tmp_path):
    lines = [{"step": n, "learning_rate": float(n == 7777)} for n in range(20_000)]
    write_lines(tmp_path / "metrics.jsonl", lines)
    (chart,) = training_charts([run_of(tmp_path)])
    (line,) = chart.lines
    assert line.x.size <= POINTS
    assert line.y.max() == 1.0
    assert line.x[np.argmax(line.y)] == 7777


def test_what_is_not_finite_is_a_gap_and_spoils_no_mean(tmp_path):
    lines = [{"step": n, "loss": "nan" if n == 50 else 2.0} for n in range(90)]
    write_lines(tmp_path / "metrics.jsonl", lines)
    (chart,) = training_charts([run_of(tmp_path)])
    each, smooth = chart.lines
    assert np.isnan(each.y).sum() == 1
    assert np.isfinite(smooth.y).all()
    assert smooth.y == pytest.approx(2.0)


def test_other_numbers_have_a_chart_each(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", [{"step": 3, "mmlu/acc": 0.25}, {"step": 6, "mmlu/acc": 0.5}])
    (chart,) = training_charts([run_of(tmp_path)])
    assert (chart.title, chart.lines[0].y.tolist()) == ("mmlu/acc", [0.25, 0.5])
