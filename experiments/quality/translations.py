r"""Interface texts of a program with their translations, as instructions: text far from English pretraining.

    pip download --no-deps gramps==6.0.8
    python -m experiments.quality.translations --wheel=gramps-6.0.8-py3-none-any.whl --language=fi \
        --instruction="Translate to Finnish." --out=data/gramps_fi.jsonl

Reads the compiled catalogues (gettext's .mo) of that language in a wheel, and runs nothing of it. Writes a
row for each text of at least ``--shortest`` characters: ``instruction``, ``input`` and ``output``, in an
order drawn by ``--seed``: in a catalogue neighbours are alike, and no part of the rows is like the rest.
"""

import gettext
import io
import random
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from absl import flags

from experiments.rows import write_rows
from spiel_jax import cli
from spiel_jax.errors import SpielError

LARGEST = 1 << 26  # bytes of a catalogue: 64 MiB


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("wheel", None, "A wheel with catalogues.", required=True, flag_values=values)
    flags.DEFINE_string("language", None, "As its folder is called: fi.", required=True, flag_values=values)
    flags.DEFINE_string("instruction", "Translate.", "What each row asks.", flag_values=values)
    flags.DEFINE_integer("shortest", 20, "Characters.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("seed", 0, "Draws the order of the rows.", flag_values=values)
    flags.DEFINE_string("out", None, "The .jsonl to write.", required=True, flag_values=values)


def main(options: flags.FlagValues) -> None:
    """Writes the rows."""
    pairs = list(translations(Path(options.wheel), options.language, options.shortest).items())
    random.Random(options.seed).shuffle(pairs)
    rows = (
        {"instruction": options.instruction, "input": text, "output": translated}
        for text, translated in pairs
    )
    print(f"{write_rows(rows, Path(options.out)):,} rows: {options.out}")


def translations(wheel: Path, language: str, shortest: int) -> dict[str, str]:
    """Text to its translation, in alphabetical order; what stands untranslated is left out.

    Raises:
        SpielError: If the file is no wheel, has no catalogue of the language, or a broken one.
    """
    found: dict[str, str] = {}
    try:
        with zipfile.ZipFile(wheel) as archive:
            paths = [path for path in archive.namelist() if path.endswith(".mo")]
            languages = {path: PurePosixPath(path).parts[-3] for path in paths if path.count("/") >= 2}
            for path in languages:
                if languages[path] == language:
                    if archive.getinfo(path).file_size > LARGEST:
                        raise SpielError(f"{wheel}: {path} has over {LARGEST:,} bytes")
                    found |= dict(_pairs(archive.read(path), shortest))
    except SpielError:  # which is a ValueError
        raise
    except (OSError, zipfile.BadZipFile, struct.error, ValueError, LookupError) as error:
        raise SpielError(f"{wheel}: {error}") from error
    if not found:
        known = ", ".join(sorted(set(languages.values()))) or "no catalogue"
        raise SpielError(f"--language={language}: no translations of it in {wheel}, which has {known}")
    return dict(sorted(found.items()))


def _pairs(catalogue: bytes, shortest: int) -> Iterator[tuple[str, str]]:
    """Of a compiled catalogue, but for plurals, and texts told apart by a context."""
    known = gettext.GNUTranslations(io.BytesIO(catalogue))
    # there is no public way to list what a catalogue has
    for text, translated in vars(known)["_catalog"].items():
        single = isinstance(text, str) and "\x04" not in text
        if single and len(text) >= shortest and translated not in ("", text):
            yield text, translated


if __name__ == "__main__":
    cli.run(main, define_flags)
