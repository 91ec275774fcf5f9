"""Models on the Hugging Face hub: a repository, a folder or GGUF file in it, a revision."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub

from spiel_jax.errors import NotFoundError
from spiel_jax.models.io.messages import told
from spiel_jax.models.io.parts import first_name

_ID = re.compile(
    r"(?P<repository>[\w-][\w.-]*/[\w.-]+)(?P<inside>(?:/[\w.-]+)*)(?:@(?P<revision>[\w.-]+(?:/[\w.-]+)*))?"
)
_FILES = ("*.json", "*.safetensors", "tokenizer.*", "*.model", "*.tiktoken", "vocab.txt", "merges.txt")
_TEMPLATES = "*.jinja"  # those that have names lie in a folder of their own


@dataclass(frozen=True)
class HubId:
    """What a hub id names.

    Attributes:
        repository: ``org/name``.
        inside: A folder or a GGUF file in it; empty: the whole of it.
        revision: A branch, a tag or a commit; None: the main branch.
    """

    repository: str
    inside: str = ""
    revision: str | None = None

    def __str__(self) -> str:
        inside = f"/{self.inside}" if self.inside else ""
        return f"{self.repository}{inside}" + (f"@{self.revision}" if self.revision else "")

    def download(self, cache_dir: str | Path | None = None, *, only: Sequence[str] | None = None) -> Path:
        """The folder or file in the hub's cache; downloads what is not there yet.

        Args:
            cache_dir: Where it goes; None: the hub's own cache.
            only: Patterns of the files that are wanted, of a GGUF file the first part; None: a whole model.

        Raises:
            NotFoundError: If it is not to be had.
        """
        path, inside, unwanted = self.inside, f"{self.inside}/" if self.inside else "", None
        if path.endswith(".gguf") and only is not None:
            path = str(PurePosixPath(path).with_name(first_name(path)))
            wanted = [path]
        elif path.endswith(".gguf"):
            wanted = [re.sub(r"-\d{5}-of-", "-*-of-", path)]  # all parts of a split file
        elif only is not None:
            wanted = [inside + pattern for pattern in only]
        else:
            wanted = [inside + pattern for pattern in (*_FILES, _TEMPLATES)]
            # in folders of it are other models, and other formats of the same weights
            unwanted = [f"{inside}*/{pattern}" for pattern in _FILES] + [f"{inside}consolidated*"]
        snapshot = self._ask(
            huggingface_hub.snapshot_download,
            self.repository,
            revision=self.revision,
            cache_dir=cache_dir,
            allow_patterns=wanted,
            ignore_patterns=unwanted,
        )
        if not os.path.exists(found := Path(snapshot, path)):
            raise NotFoundError(f"{str(self)!r}: {self.repository} has no {path} (looked in {snapshot})")
        return found

    def config_file(self) -> Path:
        """Its config.json alone; see ``download``."""
        return Path(
            self._ask(
                huggingface_hub.hf_hub_download,
                self.repository,
                "config.json",
                subfolder=self.inside or None,
                revision=self.revision,
            )
        )

    def _ask(self, call: Callable[..., Any], *args: Any, **options: Any) -> str:
        try:
            return call(*args, **options)
        except Exception as error:  # the hub's own, those of its cache, of the network, of the file system
            raise NotFoundError(
                f"{str(self)!r} is neither a local path nor to be had from the Hugging Face hub: "
                f"{told(error)}"
            ) from error


def hub_id(source: str) -> HubId | None:
    """What a source names on the hub; None if it can be no id.

    >>> hub_id("org/name/folder@v1")
    HubId(repository='org/name', inside='folder', revision='v1')
    >>> hub_id("./folder") is None
    True
    """
    match = _ID.fullmatch(source)
    if match is None:
        return None
    found = HubId(match["repository"], match["inside"].strip("/"), match["revision"])
    steps = f"{found.inside}/{found.revision}".split("/")
    # a folder of that name is here: what is meant is below it
    local = found.inside and os.path.isdir(found.repository)
    if local or found.repository.endswith(".gguf") or not {".", ".."}.isdisjoint(steps):
        return None
    return found
