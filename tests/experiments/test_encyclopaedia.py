"""Openings of articles, read from a wheel's dump."""

import bz2
import json
import zipfile

import pytest
from absl import flags

from experiments.quality.encyclopaedia import define_flags, main, openings
from spiel_jax.errors import SpielError

PAGE = "<page><title>{}</title><ns>{}</ns>{}<revision><id>1</id><text>{}</text></revision></page>"
TEA = """{{Infobox drink|name=Tea}}'''Tea''' is a [[Drink|beverage]]&lt;ref&gt;A [[book]].&lt;/ref&gt;
made of ''leaves''.

== History ==
It is old."""
PAGES = (
    PAGE.format("Tea", 0, "", TEA),
    PAGE.format("Cha", 0, '<redirect title="Tea" />', "#REDIRECT [[Tea]]"),
    PAGE.format("Talk:Tea", 1, "", "I like it."),
    PAGE.format("Nothing", 0, "", "== A heading ==\nfirst."),
)


def wheel_of(path, dump: bytes):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("gensim/test/test_data/enwiki-latest-pages-articles1.xml-p1-shortened.bz2", dump)
        archive.writestr("gensim/__init__.py", "raise RuntimeError")
    return path


@pytest.fixture
def wheel(tmp_path):
    source = f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.8/">{"".join(PAGES)}</mediawiki>'
    return wheel_of(tmp_path / "gensim.whl", bz2.compress(source.encode()))


def test_openings_have_no_markup_and_no_notes(wheel):
    assert openings(wheel, 100) == {"Tea": "Tea is a beverage made of leaves."}


def test_they_are_cut_after_a_word(wheel):
    assert openings(wheel, 15) == {"Tea": "Tea is a"}


def test_the_command_writes_a_row_of_each(wheel, tmp_path, capsys):
    options, out = flags.FlagValues(), tmp_path / "new" / "texts.jsonl"
    define_flags(options)
    options(["encyclopaedia", f"--wheel={wheel}", f"--out={out}"])
    main(options)
    row = {"title": "Tea", "text": "Tea is a beverage made of leaves."}
    assert [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] == [row]
    assert "1 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("dump", "told"),
    [(b"no bz2", "Invalid data stream"), (bz2.compress(b"<page><page>"), "no element found")],
)
def test_a_broken_dump_is_named(tmp_path, dump, told):
    with pytest.raises(SpielError, match=told):
        openings(wheel_of(tmp_path / "some.whl", dump), 100)


def test_another_wheel_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "some.whl", "w") as archive:
        archive.writestr("some/__init__.py", "")
    with pytest.raises(SpielError, match=r"some\.whl has no enwiki"):
        openings(tmp_path / "some.whl", 100)
    (tmp_path / "other.whl").write_text("text")
    with pytest.raises(SpielError, match=r"other\.whl: File is not a zip file"):
        openings(tmp_path / "other.whl", 100)
