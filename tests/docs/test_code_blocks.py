"""The code in the README and in docs/ does what it shows.

A block marked ``python`` is run; one marked ``py`` is a fragment.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def blocks(path):
    """The code of a page, without what it includes from elsewhere."""
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


LEARN = ["README.md", "docs/howto/other_models.md"]  # their blocks print a loss before and after
COUNT = {"README.md": 1, "docs/howto/other_models.md": 3, "docs/howto/restore.md": 1}
LEARNING = [(page, number) for page in LEARN for number in range(COUNT[page])]


def run(page, number):
    code = blocks(ROOT / page)[number]
    exec(compile(code, f"{page}, block {number}", "exec"), {"__name__": "example"})


def test_every_block_is_run():
    found = {str(page.relative_to(ROOT)): len(blocks(page)) for page in [ROOT / "README.md", *PAGES]}
    assert {page: count for page, count in found.items() if count} == COUNT


@pytest.mark.parametrize(("page", "number"), LEARNING)
def test_code_runs_and_learns(page, number, capsys):
    run(page, number)
    before, after = map(float, capsys.readouterr().out.split(" -> "))
    assert after < before / 5


@pytest.mark.slow
def test_a_model_is_opened_as_shown():
    run("docs/howto/restore.md", 0)
