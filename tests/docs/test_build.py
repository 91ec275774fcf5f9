"""The documentation builds without a warning, shows every public name, and needs no network to be read."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("docs", "spiel_jax", "configs", "experiments")
FILES = ("mkdocs.yml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md")


def tool(path):
    """A module of the documentation, which is no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


coverage = tool(ROOT / "docs" / "ext" / "coverage.py")
docstrings = tool(ROOT / "docs" / "ext" / "docstrings.py")
mathml = tool(ROOT / "docs" / "ext" / "mathml.py")
picture = tool(ROOT / "docs" / "pictures" / "drop_and_grow.py")


def build(project, site):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", project / "mkdocs.yml", "-d", site]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow  # .ci/run builds the pages too
def test_pages_load_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    tags = r'<(?:script|img|iframe|source)\b[^>]*\bsrc="(?:https?:)?//|<link\b[^>]*\bhref="(?:https?:)?//'
    found = [page.name for page in pages if re.search(tags, page.read_text())]
    assert not found


@pytest.mark.slow  # .ci/run builds the pages too
def test_formulas_are_drawn(site):
    text = (site / "concepts" / "algorithm.html").read_text()
    assert text.count("<math") > 20
    assert "arithmatex" not in text
    assert not re.findall(r"\\(?:frac|beta|delta)", re.sub(r"<annotation.*?</annotation>", "", text))


@pytest.mark.slow  # .ci/run builds the pages too
def test_a_public_name_that_is_left_out_fails_the_build(tmp_path):
    for part in PARTS:
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    page = tmp_path / "docs" / "reference" / "sparse.md"
    assert "::: spiel_jax.unmerge\n" in page.read_text()
    page.write_text(page.read_text().replace("::: spiel_jax.unmerge\n", ""))
    module = tmp_path / "spiel_jax" / "sparse" / "targets.py"
    source = module.read_text()
    bare = re.sub(r'(def zeros\(.*?:\n) +""".*?"""\n', r"\1", source, flags=re.DOTALL)
    assert bare != source
    module.write_text(bare)
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert "spiel_jax.unmerge is in no page of docs/reference" in done.stderr
    assert "spiel_jax.zeros has no docstring" in done.stderr


def package(tmp_path, source, config=""):
    (tmp_path / "spiel_jax").mkdir()
    (tmp_path / "spiel_jax" / "__init__.py").write_text(source)
    (tmp_path / "configs").mkdir()
    if config:
        (tmp_path / "configs" / config).touch()
    return tmp_path


def test_gaps_of_a_small_package(tmp_path):
    source = '''
from spiel_jax.inner import told

__all__ = ["Bare", "told", "silent"]

class Bare:
    """A class with a method that says nothing."""
    def method(self): ...

def silent(): ...
def not_public(): ...
'''
    root = package(tmp_path, source, "small.py")
    (root / "spiel_jax" / "inner.py").write_text('def told():\n    """Yes."""\n')
    shown = {"spiel_jax.Bare", "spiel_jax.inner.told", "elsewhere.silent"}
    assert list(coverage.gaps(["spiel_jax"], shown, root)) == [
        "spiel_jax.Bare has no docstring",
        "spiel_jax.silent has no docstring",
        "spiel_jax.silent is in no page of docs/reference",
        "configs/small.py is not among the reproduction records",
    ]


def test_without_all_what_is_defined_is_public(tmp_path):
    source = 'import os\nfrom os import path\n\nfirst = 1\n"""Said."""\n_second = 2\n'
    root = package(tmp_path, source)
    assert list(coverage.gaps(["spiel_jax"], set(), root)) == [
        "spiel_jax.first is in no page of docs/reference"
    ]


def test_links_and_examples_of_docstrings():
    text = "As `a\n  paper <https://x.org/y>`_ and ``code`` say.\n\nExample:\n    >>> 1\n    1\n"
    assert docstrings.markdown(text) == (
        "As [a paper](https://x.org/y) and ``code`` say.\n\nExamples:\n    >>> 1\n    1\n"
    )


def test_a_formula_becomes_mathml():
    drawn = mathml.on_page_content(r'<p><span class="arithmatex">\(a &lt; \beta\)</span></p>')
    assert drawn.startswith('<p><math xmlns="http://www.w3.org/1998/Math/MathML" display="inline">')
    assert "<mo>&#x0003C;</mo>" in drawn
    assert "&#x003B2;" in drawn


def test_the_picture_is_the_one_drawn():
    drawn = ROOT / "docs" / "pictures" / "drop_and_grow.svg"
    assert drawn.read_text(encoding="utf-8") == picture.picture()
