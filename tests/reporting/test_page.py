import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from support.run_folders import HOSTILE, config, curves, write_lines, write_run

from spiel_jax.reporting.escaping import shown
from spiel_jax.reporting.page import page, sections
from spiel_jax.reporting.runs import read_runs

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
METHODS = ("spiel_ag", "spiel_ma", "lora", "full")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return read_runs([write_run(folder / method, method) for method in METHODS])


class Elements(HTMLParser):
    """The elements of a page with their attributes, and what is amiss."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.texts = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def outside(content):
    """Whatever a page would fetch."""
    elements = Elements(content).found
    places = [value for _, attrs in elements for name, value in attrs.items() if name in ("src", "href")]
    return [place for place in places if place and not place.startswith(("#", "data:"))] + re.findall(
        r"@import|url\((?!#)|https?://(?!www\.w3\.org)", content
    )


@pytest.mark.parametrize("number", range(len(METHODS)))
def test_a_run_of_any_method_has_a_whole_page(runs, number):
    content = page([runs[number]])
    assert outside(content) == []
    titles = [*sections([runs[number]])]
    expected = {
        "spiel_ag": ["Training", "Entries", "Where it changed", "Speed and memory"],
        "lora": ["Training", "Entries", "Where it changed", "Speed and memory"],
        "full": ["Training", "Entries", "Speed and memory"],
    }
    assert titles == expected.get(METHODS[number], expected["spiel_ag"])
    for title in (*titles, "Samples", "Configuration", f"Hello from {METHODS[number]}."):
        assert title in content
    assert ("grown at step 15" in content) == (METHODS[number] == "spiel_ag")
    assert ("Rows and columns of" in content) == METHODS[number].startswith("spiel")
    assert "nan" not in re.sub(r"<script>.*?</script>", "", content, flags=re.S).lower()


def test_several_runs_are_beside_each_other(runs):
    content = page(runs)
    assert outside(content) == []
    text = re.sub(r"<[^>]+>", " ", content)
    assert "Differences are from spiel_ag." in text
    assert re.search(r"method +spiel_ag +spiel_ma +lora +full", text)
    assert "same" in text
    assert content.count("Where it changed: ") == 3  # nothing is known of the full one
    assert text.count("Hello.") == 1  # the base model says the same


@pytest.mark.parametrize("text", [HOSTILE, "]]>", "<!--", "{{7*7}}", "a" * 20_000, "\u202eabc", "é漢😀"])
def test_whatever_a_run_says_is_text(tmp_path, text):
    name = "".join(c for c in text if c not in "\x00/\ud800")[:60]
    folder = tmp_path / name
    folder.mkdir()
    curves(folder)
    config(folder, method=text, **{"model.source": text, text: text})
    write_lines(folder / "metrics.jsonl", [{"step": 1, text: 1.0, "loss": 2.0}, {"step": 2, text: 2.0}])
    write_lines(folder / "samples.jsonl", [{"step": 0, text: text}, {"step": 2, text: text}])
    content = page(read_runs([folder]))
    assert outside(content) == []
    content.encode()
    elements = Elements(content)
    assert [tag for tag, _ in elements.found].count("script") == content.count("<script")
    allowed = [{}, {"type": "application/json"}]
    assert all(attrs in allowed for tag, attrs in elements.found if tag == "script")
    assert not any(tag == "img" or "onerror" in attrs for tag, attrs in elements.found)
    assert shown(text) in content


def test_what_is_shown_of_strange_characters():
    assert shown("a\tb\n\x1b[31m") == "a\tb\n\\x1b[31m"
    assert shown("\ud800") == r"\ud800"


def test_a_run_with_nothing_in_it_has_a_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    content = page(read_runs([tmp_path]))
    assert "metrics.jsonl holds no numbers" in content
    assert "Training</h2>" not in content


def test_charts_hold_numbers_that_json_has(runs):
    blocks = re.findall(r'<script type="application/json">(.*?)</script>', page(runs))
    assert len(blocks) > 10
    for block in blocks:
        data = json.loads(block, parse_constant=pytest.fail)
        assert len(data["box"]) == 4


PROBE = """
<script>
const errors = [];
addEventListener("error", (event) => errors.push(event.message));
addEventListener("load", () => {
  const tip = document.getElementById("tip"), told = [];
  for (const chart of document.querySelectorAll("svg.chart")) {
    const space = chart.getBoundingClientRect();
    if (!space.width) continue;
    for (const share of [0.3, 0.5, 0.8]) {
      const where = { clientX: space.left + share * space.width, clientY: space.top + 0.4 * space.height };
      chart.dispatchEvent(new PointerEvent("pointermove", where));
      if (tip.style.display === "block") told.push(tip.textContent);
    }
    chart.dispatchEvent(new PointerEvent("pointerleave"));
  }
  const dark = [];
  for (let n = 0; n < 3; n++) {
    document.getElementById("theme").click();
    dark.push(getComputedStyle(document.body).backgroundColor);
  }
  const select = document.querySelector("select.choice");
  select.selectedIndex = 1;
  select.dispatchEvent(new Event("change"));
  const seen = [...select.closest(".card").querySelectorAll(".one")].map((one) => !one.hidden);
  const wide = document.documentElement.scrollWidth - innerWidth;
  const found = { errors, told, dark, seen, wide, charts: document.querySelectorAll("svg.chart").length };
  document.body.innerHTML = "<pre id='found'></pre>";
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script>
"""


def browse(page, folder, *flags):
    """What a browser writes to its standard output and error, in a window of a laptop."""
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={folder / 'profile'}", "--window-size=1366,768", *flags, page.as_uri()]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "HOME": str(folder)}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("number", [1, 4])
def test_in_a_browser(runs, tmp_path, number):
    (plain := tmp_path / "plain.html").write_text(page(runs[:number]))
    _, console = browse(plain, tmp_path, f"--screenshot={tmp_path / 'shot.png'}")
    assert console == []
    assert (tmp_path / "shot.png").stat().st_size > 10_000
    probed = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", plain.read_text())
    (file := tmp_path / "probed.html").write_text(probed.replace("<style>", PROBE + "<style>", 1))
    shown, console = browse(file, tmp_path, "--dump-dom")
    assert console == []
    text = re.search(r'<pre id="found">(.*?)</pre>', shown, re.S)[1]
    found = json.loads(text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert found["errors"] == []
    assert found["wide"] <= 0
    assert len(found["told"]) > found["charts"] / 2
    assert any(re.search(r"optimizer step \d+\n", text) for text in found["told"])
    light, dark = found["dark"][:2]
    assert light != dark
    assert found["seen"][:2] == [False, True]
