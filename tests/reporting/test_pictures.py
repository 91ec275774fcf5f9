import io

import pytest
from support.run_folders import write_run

from spiel_jax.errors import MissingExtra, SpielError
from spiel_jax.reporting.charts import Choice
from spiel_jax.reporting.page import sections
from spiel_jax.reporting.pictures import picture, write_pictures
from spiel_jax.reporting.runs import read_runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return read_runs([write_run(folder / name, name) for name in ("spiel_ag", "lora")])


def test_every_kind_of_chart_is_a_picture(runs):
    pytest.importorskip("matplotlib")
    charts = [chart for section in sections(runs).values() for chart in section]
    ones = [next(iter(c.charts.values())) if isinstance(c, Choice) else c for c in charts]
    kinds = {type(chart): chart for chart in ones}
    assert len(kinds) == 4
    for chart in kinds.values():
        picture(chart).savefig(file := io.BytesIO())
        assert file.getvalue().startswith(b"\x89PNG")


@pytest.mark.slow
def test_every_chart_is_a_picture(runs, tmp_path):
    pytest.importorskip("matplotlib")
    written = write_pictures(runs[:1], tmp_path / "new")
    names = {path.stem for path in written}
    assert len(names) == len(written)
    assert {"loss", "survival_of_entries_by_age", "entries_per_row", "magnitudes_of_the_deltas"} <= names
    assert "rows_and_columns_of_lm_head.weight" in names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


@pytest.mark.slow
def test_runs_have_pictures_of_their_own(runs, tmp_path):
    pytest.importorskip("matplotlib")
    names = {path.stem for path in write_pictures(runs, tmp_path)}
    assert {"held-out_loss".replace("-", "_"), "spiel_ag_entries_per_row"} <= names


def test_without_matplotlib_the_extra_is_named(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r'pip install "spiel_jax\[report\]"'):
        write_pictures(runs, tmp_path)


def test_a_folder_that_cannot_be_written(runs, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("")
    with pytest.raises(SpielError, match=r"--png=.*file cannot be written: File exists"):
        write_pictures(runs, tmp_path / "file")
