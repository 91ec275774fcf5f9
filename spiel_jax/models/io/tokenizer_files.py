"""Tokenizers from the files of a model folder, and what is wrong with them if they give none."""

import importlib.util
import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from spiel_jax.data.stops import add_stops
from spiel_jax.errors import MissingExtra, SpielError
from spiel_jax.models.config_keys import shown
from spiel_jax.models.io.json_files import read_json
from spiel_jax.models.io.messages import pointer_hint

_JSON = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "source.spm")
_LENGTH = 500  # of another library's message


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder. No code that lies there is run.

    Raises:
        MissingExtra: If a package is needed that is not installed; the file and the package are named.
        SpielError: If there is none, or it cannot be read; the file is named where one is to blame.
    """
    try:
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # files can hold anything, and Rust's panics are no Exception
        raise _explained(folder, error) from error
    add_stops(found, _stops(folder))
    return found


def _stops(folder: Path) -> list[int]:
    """What the model's files say that ends a text; none where they do not."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        if path.is_file():
            said = read_json(path).get("eos_token_id")
            ids = said if isinstance(said, list) else [] if said is None else [said]
            if not all(type(token) is int for token in ids):
                raise SpielError(
                    f"{path}: eos_token_id must be the number of a token or a list of such, got {shown(said)}"
                )
            return ids
    return []


def _explained(folder: Path, error: BaseException) -> SpielError:
    if "trust_remote_code" in str(error):
        return SpielError(
            f"the tokenizer of {folder} is a program that lies there (auto_map in tokenizer_config.json), "
            "which is not run: put a tokenizer.json there, or name another source of it (model.tokenizer)"
        )
    files = [name for name in _JSON if (folder / name).is_file()]
    for name in (*files, *_SENTENCEPIECE):
        if hint := pointer_hint(folder / name):
            return SpielError(f"{folder / name}{hint}")
    for name in files:
        if problem := _broken(folder / name):
            return SpielError(f"{folder / name} {problem}: no tokenizer can be read from it")
    if "tokenizer.json" not in files and (missing := _missing_package(folder)):
        return missing
    found = [*files, *(name for name in _SENTENCEPIECE if (folder / name).is_file())]
    what = f"from {', '.join(found)} in {folder}" if found else f"from {folder}, which has no file of one"
    message = " ".join(str(error).split())
    return SpielError(
        f"no tokenizer can be read {what} ({type(error).__name__}: {message[:_LENGTH]}): put the model's "
        "tokenizer.json there, or name another source of it (model.tokenizer)"
    )


def _broken(path: Path) -> str | None:
    """What is wrong with a file that should hold a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        return f"is not valid JSON ({error})"
    except OSError as error:
        return f"cannot be read ({error})"
    return None if isinstance(value, dict) else f"must hold a JSON object, not {type(value).__name__}"


def _missing_package(folder: Path) -> MissingExtra | None:
    """Which package the folder's own format of a tokenizer needs, if it is not installed."""
    for name in _SENTENCEPIECE:
        if (folder / name).is_file():
            with open(folder / name, "rb") as file:
                proto = file.read(1) == b"\n"  # the pieces of a SentencePiece model; tiktoken's are text
            package = "sentencepiece" if proto else "tiktoken"
            break
    else:
        others = {"tekken.json": "mistral_common", "*.tiktoken": "tiktoken"}
        paths = {path: package for glob, package in others.items() for path in sorted(folder.glob(glob))}
        if not paths:
            return None
        (path, package), *_ = paths.items()
        name = path.name
    if importlib.util.find_spec(package) is not None:
        return None
    wanted = '"spiel_jax[sentencepiece]"' if package == "sentencepiece" else package.replace("_", "-")
    return MissingExtra(
        f"{folder / name} is a tokenizer that takes the package {package} to read, which is not installed: "
        f"pip install {wanted}; or put the model's tokenizer.json beside it"
    )
