"""The page: one file that needs no other, and no network."""

import base64
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources

from spiel_jax.reporting import facts
from spiel_jax.reporting.charts import COLOURS, RAMP, Chart, Choice, Lines
from spiel_jax.reporting.curves import entry_charts, speed_charts, survival_charts, training_charts
from spiel_jax.reporting.escaping import shown
from spiel_jax.reporting.runs import Run
from spiel_jax.reporting.svg import clips, draw, tag
from spiel_jax.reporting.where import magnitudes, where

MARK = "<!doctype html><!-- spiel_jax report -->"
"""What a report begins with."""

NOTHING = "\N{EN DASH}"
"""What stands where a run has no such value."""

Charts = Sequence[Chart | Choice]


def sections(runs: Sequence[Run]) -> dict[str, Charts]:
    """The charts of a report by the title of their section; empty ones are left out."""
    entries = entry_charts(runs)
    found: dict[str, Charts] = {"Training": training_charts(runs), "Entries": entries}
    for number, run in enumerate(runs):
        sizes = None if run.changes is None else magnitudes(run.changes, number)
        own = [] if run.changes is None else where(run.changes, number)
        if len(runs) == 1:
            found["Entries"] = _there([*entries, sizes])
            found["Where it changed"] = own
        else:
            found[f"Where it changed: {run.name}"] = _there([*survival_charts(run)[:1], sizes, *own])
    found["Speed and memory"] = speed_charts(runs)
    return {title: charts for title, charts in found.items() if charts}


def _there(charts: Iterable[Chart | Choice | None]) -> Charts:
    return [chart for chart in charts if chart is not None]


def page(runs: Sequence[Run]) -> str:
    """A report on some runs as HTML."""
    body = [_top(runs), _notes(runs)]
    body.append(_tiles(runs[0]) if len(runs) == 1 else _results(runs))
    links = []
    for title, charts in sections(runs).items():
        links.append((f"s{len(links)}", title))
        body.append(tag("h2", shown(title), id=links[-1][0]))
        body.append(tag("div", *map(_card, charts), class_="charts"))
    for title, content in (("Samples", _samples(runs)), ("Configuration", _configuration(runs))):
        if content:
            links.append((f"s{len(links)}", title))
            body += [tag("h2", title, id=links[-1][0]), content]
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    return _whole(title, _header(title, runs, links), body)


def _whole(title: str, header: str, body: Iterable[str]) -> str:
    files = resources.files("spiel_jax.reporting")
    script = files.joinpath("page.js").read_text(encoding="utf-8")
    style = files.joinpath("page.css").read_text(encoding="utf-8") + _colours()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # a page that fetches nothing and runs no other script, whatever became part of it
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return "\n".join(
        [
            MARK,
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            tag("title", shown(f"{title}: spiel_jax report")),
            '<link rel="icon" href="data:,">',
            f"<style>\n{style}</style></head><body>",
            clips(),
            header,
            tag("main", *body, tag("footer", "Written by spiel_jax.report.")),
            '<div id="tip" role="status"></div>',
            f"<script>{script}</script></body></html>\n",
        ]
    )


def _colours() -> str:
    lines = [f".c{n} {{ color: light-dark({a}, {b}); }}" for n, (a, b) in enumerate(COLOURS)]
    for n, (a, b) in enumerate(RAMP):
        lines.append(f".f{n} {{ fill: light-dark({a}, {b}); }} .r{n} {{ color: light-dark({a}, {b}); }}")
    return "\n".join(lines) + "\n"


def _header(title: str, runs: Sequence[Run], links: Iterable[tuple[str, str]]) -> str:
    what = f"{runs[0].method}, {runs[0].config.get('model.source', '')}" if len(runs) == 1 else "compared"
    anchors = [
        tag("a", shown(name.partition(":")[0]), href=f"#{link}") for link, name in links if ": " not in name
    ]
    switch = tag("button", "theme", id="theme", type="button")
    return tag(
        "header",
        tag("h1", shown(title), tag("small", shown(what.strip(", ")))),
        tag("nav", *anchors, switch),
        class_="top",
    )


def _top(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return ""
    return tag("p", *(_swatched(run.name, number) for number, run in enumerate(runs)), class_="legend")


def _swatched(name: str, colour: int, style: str = "line") -> str:
    swatch = tag("i", class_=f"swatch {style} c{colour % len(COLOURS)}")
    return tag("span", swatch, shown(name))


def _notes(runs: Sequence[Run]) -> str:
    told = [(run.name, note) for run in runs for note in run.notes]
    if not told:
        return ""
    lines = [tag("li", shown(note if len(runs) == 1 else f"{name}: {note}")) for name, note in told]
    return tag("div", tag("ul", *lines), class_="notes")


def _tiles(run: Run) -> str:
    found = {fact.name: (fact, values[0]) for fact, values in facts.results([run])}
    before = found.pop("held-out loss before training", None)
    if found.get("lowest held-out", (None, 0))[1] == found.get("held-out loss", (None, 0))[1]:
        found.pop("lowest held-out", None)
    if not found.get("skipped steps", (None, 0))[1]:
        found.pop("skipped steps", None)
    tiles = []
    for name, (fact, value) in found.items():
        more = ""
        if name == "held-out loss" and before is not None:
            more = f"{fact.written(before[1])} before training"
        tiles.append(
            tag(
                "div",
                tag("div", shown(name), class_="name"),
                tag("div", shown(fact.written(value)), class_="value"),
                tag("div", shown(more), class_="more") if more else "",
                class_="fact",
            )
        )
    return tag("div", *tiles, class_="facts")


def _results(runs: Sequence[Run]) -> str:
    """What all came to, and how much that is more than of the first."""
    rows = []
    for fact, values in facts.results(runs):
        cells = []
        for number, value in enumerate(values):
            text = fact.written(value) if math.isfinite(value) else NOTHING
            more = "" if number == 0 else facts.difference(fact, value, values[0])
            how = "more"
            if fact.better and more not in ("", "same"):
                how += " good" if (value > values[0]) == (fact.better > 0) else " bad"
            cells.append(
                tag(
                    "td", shown(text), tag("span", shown(more), class_=how) if number else "", class_="number"
                )
            )
        rows.append(tag("tr", tag("th", shown(fact.name), scope="row"), *cells))
    note = f"Differences are from {runs[0].name}."
    told = tag("p", shown(note), class_="note")
    return tag("div", _run_table("", runs, rows), told, class_="card wide results")


def _run_table(label: str, runs: Sequence[Run], rows: Iterable[str]) -> str:
    heads = [
        tag(
            "th",
            tag("span", _swatched(run.name, number), class_="run"),
            scope="col",
            class_="number" if not label else None,
        )
        for number, run in enumerate(runs)
    ]
    head = tag("thead", tag("tr", tag("th", label, scope="col"), *heads))
    return tag("div", tag("table", head, tag("tbody", *rows)), class_="scroll")


def _card(chart: Chart | Choice) -> str:
    ones = list(chart.charts.values()) if isinstance(chart, Choice) else [chart]
    shape = ["card", *(name for name in ("wide", "tall") if getattr(ones[0], name))]
    if isinstance(chart, Chart):
        return tag("section", _head(chart), draw(chart), class_=" ".join(shape))
    options = [tag("option", shown(name)) for name in chart.charts]
    select = tag("select", *options, class_="choice", aria_label=chart.label)
    content = [tag("div", _head(one), draw(one), class_="one") for one in ones]
    return tag("section", select if len(options) > 1 else "", *content, class_=" ".join(shape))


def _head(chart: Chart) -> str:
    note = tag("p", shown(chart.note), class_="note") if chart.note else ""
    return tag("h3", shown(chart.title)) + note + (_legend(chart) if isinstance(chart, Lines) else "")


def _legend(chart: Lines) -> str:
    listed = [line for line in chart.lines if line.listed]
    if len(listed) < 2:
        return ""
    entries = [_swatched(line.name, int(line.colour), line.style) for line in listed]
    return tag("div", *entries, class_="legend")


def _samples(runs: Sequence[Run]) -> str:
    """Of each prompt, what the base model and each run said in the end, and what they said before."""
    prompts = dict.fromkeys(reply.prompt for run in runs for reply in run.replies)
    return "".join(_sample(prompt, runs) for prompt in prompts)


def _sample(prompt: str, runs: Sequence[Run]) -> str:
    rows, base = [], set()
    for number, run in enumerate(runs):
        replies = [reply for reply in run.replies if reply.prompt == prompt]
        for reply in replies:
            if reply.step == 0 and reply.text in base:
                continue
            base |= {reply.text} if reply.step == 0 else set()
            who = tag("span", "base model") if reply.step == 0 else _swatched(run.name, number)
            step = "" if reply.step == 0 else f"step {reply.step:,}"
            text = tag("div", shown(reply.text), class_="reply", dir="auto")
            rows.append(tag("tr", tag("th", who, scope="row"), tag("td", step), tag("td", text)))
    asked = tag("div", shown(prompt), class_="prompt", dir="auto")
    return tag("section", asked, tag("table", tag("tbody", *rows)), class_="card wide samples")


def _configuration(runs: Sequence[Run]) -> str:
    found = facts.configs(runs)
    if not found:
        return ""
    if len(runs) > 1:
        different = facts.differing(found)
        if different:
            shown_first = tag("section", _config_table(different, runs), class_="card wide")
        else:
            shown_first = tag("p", "The configurations are the same.")
        rest = {key: values for key, values in found.items() if key not in different}
        return shown_first + _folded(f"{len(rest)} keys that are the same", _config_table(rest, runs[:1]))
    usual = facts.usual()
    changed = {key: values for key, values in found.items() if values[0] != usual.get(key)}
    rest = {key: values for key, values in found.items() if key not in changed}
    first = tag("section", _config_table(changed, runs), class_="card wide") if changed else ""
    return first + _folded(f"{len(rest)} keys with their defaults", _config_table(rest, runs))


def _folded(title: str, content: str) -> str:
    return tag("details", tag("summary", shown(title)), content)


def _config_table(found: Mapping[str, Sequence[str | None]], runs: Sequence[Run]) -> str:
    rows = [
        tag(
            "tr",
            tag("th", tag("code", shown(key)), scope="row"),
            *(
                tag("td", NOTHING if value is None else shown(value), class_="code")
                for value in values[: len(runs)]
            ),
        )
        for key, values in found.items()
    ]
    if len(runs) == 1:
        return tag("table", tag("tbody", *rows))
    return _run_table("key", runs, rows)
