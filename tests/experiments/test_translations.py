"""Rows of translations, read from a wheel's catalogues."""

import json
import struct
import zipfile

import pytest
from absl import flags

from experiments.quality.translations import define_flags, main, translations
from spiel_jax.errors import SpielError


def catalogue(pairs: dict[str, str]) -> bytes:
    """A compiled catalogue, as GNU gettext's manual has it (section "The Format of GNU MO Files")."""
    texts = [b"", *(text.encode() for text in sorted(pairs))]
    translated = [
        b"Content-Type: text/plain; charset=UTF-8\n",
        *(pairs[text].encode() for text in sorted(pairs)),
    ]
    tables, strings, start = b"", b"", 28 + 16 * len(texts)
    for words in (texts, translated):
        for word in words:
            tables += struct.pack("<II", len(word), start + len(strings))
            strings += word + b"\0"
    header = struct.pack("<7I", 0x950412DE, 0, len(texts), 28, 28 + 8 * len(texts), 0, 0)
    return header + tables + strings


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "some-1.0-py3-none-any.whl"
    pairs = {
        "Where was she born?": "Missä hän syntyi?",
        "Open": "Avaa",
        "Not translated yet": "",
        "The same in both": "The same in both",
        "menu\x04Open the family tree": "Avaa sukupuu",
        "one person is shown\0many persons are shown": "yksi\0monta",
    }
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("some/locale/fi/LC_MESSAGES/some.mo", catalogue(pairs))
        archive.writestr("some/locale/sv/LC_MESSAGES/some.mo", catalogue({"Open the door": "Öppna dörren"}))
        archive.writestr("some/locale/ga/LC_MESSAGES/some.mo", b"no catalogue at all")
        archive.writestr("some/__init__.py", "raise RuntimeError")
    return path


def test_texts_long_enough_that_have_one_translation(wheel):
    assert translations(wheel, "fi", 10) == {"Where was she born?": "Missä hän syntyi?"}
    assert translations(wheel, "fi", 4) == {"Open": "Avaa", "Where was she born?": "Missä hän syntyi?"}


def test_the_command_writes_a_row_of_each(wheel, tmp_path, capsys):
    out = tmp_path / "new" / "fi.jsonl"
    options = flags.FlagValues()
    define_flags(options)
    told = ["--language=fi", "--instruction=In Finnish.", "--shortest=10"]
    options(["translations", f"--wheel={wheel}", f"--out={out}", *told])
    main(options)
    row = {"instruction": "In Finnish.", "input": "Where was she born?", "output": "Missä hän syntyi?"}
    assert [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] == [row]
    assert "1 rows" in capsys.readouterr().out


def test_the_order_is_of_the_seed_alone(tmp_path):
    wheel = tmp_path / "many-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        pairs = {f"text {index:02}": f"teksti {index:02}" for index in range(50)}
        archive.writestr("many/locale/fi/LC_MESSAGES/many.mo", catalogue(pairs))

    def inputs(seed: int) -> list[str]:
        options, out = flags.FlagValues(), tmp_path / "fi.jsonl"
        define_flags(options)
        told = [f"--wheel={wheel}", "--language=fi", "--shortest=1", f"--seed={seed}", f"--out={out}"]
        options(["translations", *told])
        main(options)
        return [json.loads(line)["input"] for line in out.read_text(encoding="utf-8").splitlines()]

    first = inputs(0)
    assert sorted(first) == list(pairs)
    assert first not in (list(pairs), inputs(1))
    assert first == inputs(0)


@pytest.mark.parametrize(
    ("language", "told"),
    [("de", "no translations of it in .* which has fi, ga, sv"), ("ga", "Bad magic number")],
)
def test_what_is_not_there_is_named(wheel, language, told):
    with pytest.raises(SpielError, match=told):
        translations(wheel, language, 1)


def test_what_is_too_large_is_not_read(wheel, monkeypatch):
    monkeypatch.setattr("experiments.quality.translations.LARGEST", 10)
    with pytest.raises(SpielError, match=r"^\S+some-1\.0\S+: some/locale/fi\S+ has over 10 bytes"):
        translations(wheel, "fi", 1)


def test_a_file_that_is_no_wheel_is_named(tmp_path):
    (tmp_path / "some.whl").write_text("text")
    with pytest.raises(SpielError, match=r"some\.whl: File is not a zip file"):
        translations(tmp_path / "some.whl", "fi", 1)
    with pytest.raises(SpielError, match="No such file"):
        translations(tmp_path / "none.whl", "fi", 1)
