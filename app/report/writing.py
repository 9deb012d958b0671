"""A page as one file: words, Plotly figures and tables in HTML that asks nothing of any network.

For a reader who has nothing installed. The second place that makes HTML, after `app.components.markup`, since nothing
sanitises a file that a browser opens: every word goes through `markup.escaped`, data goes into script elements as JSON
without "<", and the page's own policy (Content-Security-Policy) forbids it to load anything. Knows no measurement.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from app.components import markup

MOST_ROWS = 2000  # of a table: all numbers are in the JSON


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure with what it needs beside it."""

    figure: go.Figure
    alt: str  # what it is, for those who cannot see it
    caption: str
    title: str = ""
    table: Mapping[str, Sequence] | None = None  # its numbers: column -> values
    rows: int = 1  # that it takes, where others stand beside it


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a page. Drawings stand side by side where there is room for `columns` of them."""

    heading: str  # "" where the page's title says it
    words: tuple[str, ...] = ()  # paragraphs
    drawings: tuple[Drawing, ...] = ()
    columns: int = 1
    table: Mapping[str, Sequence] | None = None  # open
    code: tuple[tuple[str, str], ...] = ()  # (what it is, source)
    links: tuple[tuple[str, str], ...] = ()  # (words, file beside this page)


def document(title: str, lead: str, sections: Sequence[Section], *, data: str = "") -> str:
    """The HTML of a page. `data` is a JSON text that its reader can save: the numbers behind it."""
    shown = [f'<section id="s{i}">{"".join(_section(each))}</section>' for i, each in enumerate(sections)]
    drawn = any(section.drawings for section in sections)
    parts = [
        _HEAD.format(title=markup.escaped(title), style=_STYLE),
        f"<h1>{markup.escaped(title)}</h1>",
        f'<p class="lead">{markup.escaped(lead)}</p>',
        "<noscript><p>The figures need JavaScript; the words and the tables do not.</p></noscript>" if drawn else "",
        _contents(sections) if len(sections) > 2 else "",
        *shown,
        _data(data) if data else "",
        _script(get_plotlyjs()) if drawn else "",
        _script(_PROGRAM),
        "</main></body></html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _contents(sections: Sequence[Section]) -> str:
    links = (f'<li><a href="#s{i}">{markup.escaped(each.heading)}</a></li>' for i, each in enumerate(sections))
    return f'<nav aria-label="On this page"><ul>{"".join(links)}</ul></nav>'


def _section(section: Section) -> Iterator[str]:
    if section.heading:
        yield f"<h2>{markup.escaped(section.heading)}</h2>"
    yield from (f"<p>{markup.escaped(words)}</p>" for words in section.words)
    if section.table is not None:
        yield f'<div class="scroll">{_table(section.table)}</div>'
    if section.drawings:
        yield f'<div class="drawings columns-{section.columns}">{"".join(map(_drawing, section.drawings))}</div>'
    for what, source in section.code:
        yield f"<h3>{markup.escaped(what)}</h3><pre><code>{markup.escaped(source)}</code></pre>"
    if section.links:
        items = (f'<li><a href="{markup.escaped(to)}">{markup.escaped(words)}</a></li>' for words, to in section.links)
        yield f"<ul>{''.join(items)}</ul>"


def _drawing(drawing: Drawing) -> str:
    height = int(drawing.figure.layout.height or 400)
    heading = f"<h3>{markup.escaped(drawing.title)}</h3>" if drawing.title else ""
    table = ""
    if drawing.table is not None:
        table = f'<details><summary>The numbers</summary><div class="scroll">{_table(drawing.table)}</div></details>'
    return (
        f'<figure style="grid-row: span {drawing.rows}">{heading}'
        f'<div class="plot" role="img" aria-label="{markup.escaped(drawing.alt)}" '
        f'style="height:{height}px"></div><script type="application/json">{_safe(drawing.figure.to_json())}</script>'
        f"<figcaption>{markup.escaped(drawing.caption)}</figcaption>{table}</figure>"
    )


def _table(table: Mapping[str, Sequence]) -> str:
    columns = [list(column) for column in table.values()]
    rows = list(zip(*columns, strict=True))
    head = "".join(f'<th scope="col">{markup.escaped(name)}</th>' for name in table)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows[:MOST_ROWS])
    hidden = len(rows) - MOST_ROWS
    more = f"<caption>{hidden} more rows are not shown.</caption>" if hidden > 0 else ""
    return f"<table>{more}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: object) -> str:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.number)):
        words = ("yes" if value else "no") if isinstance(value, (bool, np.bool_)) else str(value)
        return f"<td>{markup.escaped(words)}</td>"
    words = "–" if not np.isfinite(value) else f"{value:,}" if isinstance(value, (int, np.integer)) else f"{value:.4g}"
    return f'<td class="number">{words.replace("-", "−")}</td>'


def _data(data: str) -> str:
    json.loads(data)  # ours to get right: a reader could not
    return (
        '<p><button type="button" id="save">Save the numbers (JSON)</button></p>'
        f'<script type="application/json" id="data">{_safe(data)}</script>'
    )


def _safe(data: str) -> str:
    """JSON that cannot end a script element: "<" stands in strings only, where it may be escaped."""
    return data.replace("<", "\\u003c")


def _script(source: str) -> str:
    return f"<script>{source}</script>"


_HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; script-src 'unsafe-inline'; \
style-src 'unsafe-inline'; img-src data: blob:">
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<title>{title}</title><style>{style}</style></head><body><main>"""

_STYLE = """
:root { --ink: #1b1d23; --soft: #5a6070; --page: #ffffff; --line: #d9dbe1; --panel: #f4f4f8; --accent: #5546db; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #f1f2f5; --soft: #a6acb9; --page: #0e1117; --line: #343945; --panel: #191d26; --accent: #a79df5; }
}
@media print { :root { --ink: #000; --soft: #444; --page: #fff; --line: #bbb; --panel: #fff; --accent: #000; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .8rem; }
h2 { font-size: 1.35rem; margin: 3rem 0 .6rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p, ul { max-width: 48rem; white-space: pre-line; }
.lead { font-size: 1.2rem; }
a { color: var(--accent); }
nav ul { columns: 16rem; padding-left: 1.2rem; font-size: .95rem; }
.drawings { display: grid; gap: 1rem 2rem; align-items: start; }
.columns-2 { grid-template-columns: repeat(auto-fit, minmax(min(27rem, 100%), 1fr)); }
figure { margin: .6rem 0; min-width: 0; }
.plot { width: 100%; }
figcaption, details, caption { color: var(--soft); font-size: .9rem; max-width: 48rem; }
details { margin-top: .4rem; }
summary { cursor: pointer; }
.scroll { overflow: auto; max-height: 26rem; }
table { overflow-wrap: break-word; border-collapse: collapse; font-size: .88rem; color: var(--ink);
  font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--line); white-space: pre-wrap; }
th { position: sticky; top: 0; background: var(--page); }
.number { text-align: right; }
pre { background: var(--panel); padding: .8rem 1rem; border-radius: 6px; overflow: auto; font-size: .85rem; }
button { font: inherit; padding: .4rem .9rem; color: var(--ink); background: var(--panel); cursor: pointer;
  border: 1px solid var(--line); border-radius: 6px; }
@media print {
  main { max-width: none; padding: 0; }
  nav, button, .modebar { display: none !important; }
  figure, table, pre { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
}
"""

# Ordinary text of a figure has no colour of its own: it takes the page's, and follows it.
_PROGRAM = """
"use strict";
const ink = () => getComputedStyle(document.documentElement).getPropertyValue("--ink").trim();
const plots = [...document.querySelectorAll(".plot")];
for (const plot of plots) {
  const { data, layout } = JSON.parse(plot.nextElementSibling.textContent);
  layout.font = { ...layout.font, color: ink(), family: "system-ui, sans-serif" };
  Plotly.newPlot(plot, data, layout, { responsive: true, displaylogo: false });
}
const paint = color => plots.forEach(plot => Plotly.relayout(plot, { "font.color": color }));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => paint(ink()));
addEventListener("beforeprint", () => paint("#000"));
addEventListener("afterprint", () => paint(ink()));
document.getElementById("save")?.addEventListener("click", () => {
  const blob = new Blob([document.getElementById("data").textContent], { type: "application/json" });
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = "numbers.json";
  link.click();
  URL.revokeObjectURL(link.href);
});
"""
