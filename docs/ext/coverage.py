"""The build fails on a public name that has no docstring, or is not in the reference."""

import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import griffe

_log = logging.getLogger("mkdocs.hooks.coverage")  # its warnings fail a strict build

ROOT = Path(__file__).parents[2]

MODULES = (
    "spiel_jax",
    "spiel_jax.adapters",
    "spiel_jax.adapters.load",
    "spiel_jax.checkpoint",
    "spiel_jax.config",
    "spiel_jax.data",
    "spiel_jax.methods.method",
    "spiel_jax.methods.registry",
    "spiel_jax.models",
    "spiel_jax.training.run",
)
"""Modules whose public names are documented."""

_rendered: set[str] = set()


def on_config(config: Any, **_) -> None:
    """MkDocs calls it at the start of a build."""
    _rendered.clear()


def on_page_content(content: str, **_) -> str:
    """MkDocs calls it with the HTML of each page."""
    _rendered.update(anchors(content))
    return content


def on_post_build(**_) -> None:
    """MkDocs calls it at the end of a build: a warning for each gap."""
    for gap in gaps(MODULES, _rendered):
        _log.warning(gap)


def anchors(content: str) -> set[str]:
    """The ids in a page, which the reference has of every object that it shows."""
    return set(re.findall(r'\bid="([^"]+)"', content))


def gaps(modules: Iterable[str], rendered: set[str], root: Path = ROOT) -> Iterator[str]:
    """What is missing in the reference, a sentence each.

    Args:
        modules: Names of the modules whose public names must be there.
        rendered: The ids in all pages.
        root: Where the modules, and ``configs/``, are.
    """
    loader = griffe.GriffeLoader(search_paths=[root])
    package = loader.load("spiel_jax", try_relative_path=False)
    loader.resolve_aliases()
    shown = {found.canonical_path for path in rendered if (found := _find(package, path))}
    for name in modules:
        module = _find(package, name)
        assert module is not None, f"no module {name}"
        for member in public(module):
            if not documented(module[member]):
                yield f"{name}.{member} has no docstring"
            if module[member].canonical_path not in shown:
                yield f"{name}.{member} is in no page of docs/reference"
    for config in sorted((root / "configs").glob("*.py")):
        if f"configs.{config.stem}" not in rendered:
            yield f"configs/{config.name} is not among the reproduction records"


def _find(package: Any, path: str) -> Any:
    """The object of that dotted path; None where there is none."""
    first, _, rest = path.partition(".")
    if first != package.name:
        return None
    try:
        return package[rest] if rest else package
    except KeyError:
        return None


def public(module: griffe.Module) -> list[str]:
    """What ``__all__`` lists; without one, what is defined there and has no leading underscore."""
    if module.exports is not None:
        return [str(name) for name in module.exports]
    return [name for name, member in module.members.items() if name[0] != "_" and not member.is_alias]


def documented(member: Any) -> bool:
    """Whether an object has a docstring, and of a class every public method that it defines."""
    methods = [m for m in member.members.values() if not m.is_alias and m.is_function and m.name[0] != "_"]
    return all(one.has_docstring for one in (member, *(methods if member.is_class else ())))
