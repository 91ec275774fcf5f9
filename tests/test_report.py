import pytest
from absl import app, flags
from support.run_folders import write_run

from spiel_jax import cli, report
from spiel_jax.errors import SpielError
from spiel_jax.reporting.page import MARK


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "mine")


def run(*arguments):
    values = flags.FlagValues()
    report.define_flags(values)
    values.set_gnu_getopt(True)
    _, *places = cli.parse(values, ["report", *map(str, arguments)])
    report.main(values, places)


def test_a_report_is_written_and_replaced(folder, tmp_path, capsys):
    out = tmp_path / "new" / "report.html"
    for _ in range(2):
        run(folder, f"--out={out}", "--weight=lm_head.weight")
        assert out.read_text().startswith(MARK)
    assert capsys.readouterr().out.splitlines()[0].startswith(f"{out}: mine; ")
    assert "Rows and columns of lm_head.weight" in out.read_text()


def test_what_cannot_be_read_is_printed(folder, tmp_path, capsys):
    (place := tmp_path / "begun").mkdir()
    (place / "config.json").write_text("{}")
    run(f"--out={tmp_path / 'a.html'}", place)
    assert capsys.readouterr().out.startswith("begun: metrics.jsonl holds no numbers")


def test_nothing_else_is_lost(folder, tmp_path):
    (file := tmp_path / "thesis.html").write_text("years of work")
    with pytest.raises(SpielError, match=r"thesis\.html is there already, and is no report"):
        run(folder, f"--out={file}")
    assert file.read_text() == "years of work"
    with pytest.raises(SpielError, match="is a folder: expected a file"):
        run(folder, f"--out={tmp_path}")
    with pytest.raises(SpielError, match=r"cannot be written: (Not a directory|File exists)"):
        run(folder, f"--out={file / 'report.html'}")


def test_no_run_is_no_report():
    with pytest.raises(app.UsageError, match="name the folders of one or more runs"):
        run("--out=report.html")
