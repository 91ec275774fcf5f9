"""The README's examples with other people's models run, and learn."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
SECTION = re.split(r"^##+ ", README.partition("\n### Other people's models\n")[2], flags=re.MULTILINE)[0]
BLOCKS = dict(re.findall(r"With (Flax \w+|modules)[^`]*```python\n(.*?)```", SECTION, re.DOTALL))


def test_every_block_is_run():
    assert list(BLOCKS) == ["Flax NNX", "Flax Linen", "modules"]
    assert SECTION.count("```python") == 3


@pytest.mark.parametrize("name", BLOCKS)
def test_examples_run_and_learn(name, capsys):
    exec(compile(BLOCKS[name], "README.md", "exec"), {"__name__": "example"})
    before, after = map(float, capsys.readouterr().out.split(" -> "))
    assert after < before / 5
