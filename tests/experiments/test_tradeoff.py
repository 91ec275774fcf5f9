"""The picture of what methods learnt against how far they moved the model."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from experiments.quality import tradeoff
from experiments.quality.svg import BLUE, GREY

DRAWN = Path(__file__).parents[2] / "docs" / "pictures" / "learnt_and_moved.svg"
SVG = "{http://www.w3.org/2000/svg}"


def run(method, seed, test, moved=None, rate=1e-3):
    found = {} if moved is None else {"elsewhere": {"data": {"divergence": moved}}}
    return {
        **{"method": method, "budget": "", "rate": rate, "seed": seed},
        **{"test": test, "heldout": [[60, test]], **found},
    }


def test_marks_stand_at_what_was_moved_and_learnt_beside_lora_of_that_seed():
    runs = [
        *(run("lora", 0, 3.3), run("lora", 1, 3.0, 0.1), run("lora", 1, 3.05, 0.05, rate=5e-4)),
        *(run("random, fixed", 0, 9.0, 0.2), run("random, fixed", 1, 3.02, 0.15)),
    ]
    drawn = ElementTree.fromstring(tradeoff.picture(runs))
    found = {
        (float(one.get("cx")), float(one.get("cy"))): (one.get("fill"), one.get("stroke"))
        for one in drawn.iter(f"{SVG}circle")
    }
    wide, high = tradeoff.WIDTH / 0.2, tradeoff.HEIGHT / 0.1
    zero = tradeoff.TOP + tradeoff.HEIGHT - 0.01 * high
    x, y = tradeoff.LEFT, zero
    want = {
        (x + 0.05 * wide, y - 0.05 * high): ("none", GREY),  # not at the best rate
        (x + 0.1 * wide, y): (GREY, GREY),
        (x + 0.15 * wide, y - 0.02 * high): (BLUE, BLUE),
    }
    for place, colours in want.items():
        (near,) = (mark for mark in found if mark == pytest.approx(place, abs=0.06))
        assert found[near] == colours
    assert len(found) == len(want)
    words = [one.text for one in drawn.iter(f"{SVG}text")]
    assert {"LoRA, rank 8", "at 0.0005", "random entries, fixed"} <= set(words)
    dashed = [one for one in drawn.iter(f"{SVG}path") if one.get("stroke-dasharray")]
    assert len(dashed) == 1  # LoRA's two rates


def test_every_run_of_the_study_lies_within_the_axes():
    drawn = ElementTree.fromstring(DRAWN.read_text(encoding="utf-8"))
    for one in drawn.iter(f"{SVG}circle"):
        assert tradeoff.LEFT < float(one.get("cx")) < tradeoff.LEFT + tradeoff.WIDTH
        assert tradeoff.TOP < float(one.get("cy")) < tradeoff.TOP + tradeoff.HEIGHT
