"""The picture of the studies' methods beside LoRA."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from absl import flags

from experiments.quality import picture, svg, tradeoff
from experiments.quality.tables import beside

DRAWN = Path(__file__).parents[2] / "docs" / "pictures"


def run(method, seed, test, rate=1e-3):
    return {
        **{"method": method, "budget": "", "rate": rate, "seed": seed},
        **{"test": test, "heldout": [[60, test]]},
    }


def circles(drawn):
    """Horizontal place, and what fills it."""
    found = ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}circle")
    return [(float(one.get("cx")), one.get("fill")) for one in found]


def test_a_mark_stands_at_the_mean_difference_and_is_hollow_of_one_seed():
    lora = [run("lora", 0, 3.0), run("lora", 1, 3.2)]
    runs = [*lora, run("random, fixed", 0, 3.02), run("random, fixed", 1, 3.26), run("full", 0, 2.99)]
    (full, hollow), (random, filled) = circles(picture.picture({"long": runs}))
    per_loss = picture.WIDTH / (picture.HIGHEST - picture.LOWEST)
    zero = picture.LEFT - picture.LOWEST * per_loss
    assert full == pytest.approx(zero - 0.01 * per_loss, abs=0.06)  # four digits are written
    assert random == pytest.approx(zero + 0.04 * per_loss, abs=0.06)
    assert (hollow, filled) == ("none", svg.BLUE)


def test_what_lies_beyond_the_scale_is_a_number_at_the_edge():
    runs = [run("lora", 0, 3.0), run("ia3", 0, 3.3), run("full", 0, 2.5)]
    drawn = picture.picture({"finnish": runs})
    assert not circles(drawn)
    assert re.findall(r">([^<]*[←→][^<]*)<", drawn) == ["← \u22120.50", "+0.30 →"]


def test_seeds_that_lora_has_not_run_do_not_count():
    lora = [run("lora", 0, 3.0)]
    assert beside([run("full", 0, 3.5), run("full", 1, 9.0)], lora) == [0.5]


@pytest.mark.parametrize(
    ("module", "name"), [(picture, "which_method.svg"), (tradeoff, "learnt_and_moved.svg")]
)
def test_that_of_the_documentation_is_the_one_drawn(tmp_path, module, name):
    values = flags.FlagValues()
    module.define_flags(values)
    values(["command", f"--out={tmp_path / name}"])
    module.main(values)
    assert (tmp_path / name).read_text(encoding="utf-8") == (DRAWN / name).read_text(encoding="utf-8")


def test_every_method_of_the_study_of_all_is_in_it_and_each_was_measured():
    told = {
        name: {one["method"] for one in json.loads((picture.RESULTS / f"{name}.json").read_text())["runs"]}
        for name in picture.STUDIES
    }
    variants = {"random, evolving + lora", "lift, every 10", "gradient of three batches, fixed"}
    drawn = set(picture.METHODS)
    assert told["chitchat"] - variants - {"lora"} <= drawn
    assert drawn <= set.union(*told.values())
