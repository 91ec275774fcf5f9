r"""Openings of encyclopaedia articles, by which to see what a fine-tune forgets.

    pip download --no-deps gensim==4.4.0
    pip install mwparserfromhell
    python -m experiments.quality.encyclopaedia --wheel=$(ls gensim-4.4.0-*.whl) --out=data/wikipedia.jsonl

Reads the piece of English Wikipedia (a hundred articles, CC BY-SA) that gensim's wheel has for its tests,
and runs nothing of it. Writes a row for each article: ``title``, and ``text`` without markup.
"""

import bz2
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO
from xml.etree import ElementTree

from absl import flags

from experiments.rows import write_rows
from spiel_jax import cli
from spiel_jax.errors import SpielError

DUMP = "enwiki-latest-pages-articles"


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("wheel", None, "gensim's.", required=True, flag_values=values)
    flags.DEFINE_integer("longest", 1000, "Characters of a row.", lower_bound=1, flag_values=values)
    flags.DEFINE_string("out", None, "The .jsonl to write.", required=True, flag_values=values)


def main(options: flags.FlagValues) -> None:
    """Writes the rows."""
    found = openings(Path(options.wheel), options.longest)
    rows = ({"title": title, "text": text} for title, text in found.items())
    print(f"{write_rows(rows, Path(options.out)):,} rows: {options.out}")


def openings(wheel: Path, longest: int) -> dict[str, str]:
    """Title to the text before an article's first heading, cut after a word.

    Raises:
        SpielError: If the file is no wheel, or has no such dump or a broken one.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            dumps = [path for path in archive.namelist() if Path(path).name.startswith(DUMP)]
            if not dumps:
                raise SpielError(f"{wheel} has no {DUMP}*: expected a wheel of gensim")
            with archive.open(dumps[0]) as packed, bz2.open(packed) as dump:
                found = {title: _plain(source, longest) for title, source in _articles(dump)}
    except (OSError, EOFError, zipfile.BadZipFile, ElementTree.ParseError) as error:
        raise SpielError(f"{wheel}: {error}") from error
    return {title: text for title, text in found.items() if text}


def _articles(dump: IO[bytes]) -> Iterator[tuple[str, str]]:
    """Titles and sources of what is no redirect, of MediaWiki's export format."""
    for _, page in ElementTree.iterparse(dump):
        if page.tag.endswith("}page"):
            if page.find("{*}redirect") is None and page.findtext("{*}ns") == "0":
                yield page.findtext("{*}title", ""), page.findtext("{*}revision/{*}text", "")
            page.clear()


def _plain(source: str, longest: int) -> str:
    import mwparserfromhell

    opening = mwparserfromhell.parse(f"\n{source}".split("\n==", 1)[0])
    for note in opening.filter_tags(matches=lambda tag: tag.tag == "ref"):
        opening.remove(note)
    text = " ".join(str(opening.strip_code()).split())
    return text if len(text) <= longest else text[:longest].rsplit(" ", 1)[0]


if __name__ == "__main__":
    cli.run(main, define_flags)
