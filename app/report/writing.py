"""A page as one file: words, Plotly figures and tables in HTML that asks nothing of any network.

For a reader who has nothing installed. All markup, style and script is in `page/`. Nothing sanitises a file that a
browser opens, so Jinja escapes every word, data goes into script elements as JSON without "<", and the page's own
policy (Content-Security-Policy) forbids it to load anything. Knows no measurement.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from app.components.markup import printable

Table = Mapping[str, Iterable[Any]]
"""Columns of a table by name, all of one length."""
MOST_ROWS = 2000  # of a table: all numbers are in the JSON

_PAGE = Path(__file__).parent / "page"
# The bundle of plotly.js that draws what the app draws, of the version that the plotly package brings, and a quarter of
# its size: `npm pack plotly.js-cartesian-dist-min@VERSION`, then gzip -9n.
_PLOTLY = _PAGE / "plotly-cartesian.min.js.gz"


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure with what it needs beside it."""

    figure: go.Figure
    alt: str  # what it is, for those who cannot see it
    caption: str
    title: str = ""
    table: Table | None = None  # its numbers: column -> values
    rows: int = 1  # that it takes, where others stand beside it


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a page. Drawings stand side by side where there is room for `columns` of them."""

    heading: str  # "" where the page's title says it
    words: tuple[str, ...] = ()  # paragraphs
    drawings: tuple[Drawing, ...] = ()
    columns: int = 1
    table: Table | None = None  # open
    code: tuple[tuple[str, str], ...] = ()  # (what it is, source)
    links: tuple[tuple[str, str], ...] = ()  # (words, file beside this page)


def document(title: str, lead: str, sections: Sequence[Section], *, data: str = "") -> str:
    """Write a page as HTML. `data` is a JSON text that its reader can save: the numbers behind it."""
    drawn = any(section.drawings for section in sections)
    page = _templates().get_template("page.html.j2")
    return page.render(title=title, lead=lead, sections=sections, data=data, plotly=_plotly() if drawn else "")


@cache
def _templates() -> Environment:
    templates = Environment(
        loader=FileSystemLoader(_PAGE),
        autoescape=True,
        finalize=_printable,  # each value, before it is escaped
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"cells": _cells, "script_json": _script_json}
    return templates


@cache
def _plotly() -> str:
    """The bundle as the page holds it, compressed, in base64."""
    return base64.b64encode(_PLOTLY.read_bytes()).decode("ascii")


def _printable(value: object) -> object:
    return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _script_json(text: str) -> str:
    """A JSON text that cannot end a script element: "<" stands in strings only, where it may be escaped.

    Written anew: Plotly escapes every slash, also those of its numbers in base64.
    """
    return json.dumps(json.loads(text), separators=(",", ":")).replace("<", "\\u003c")


@dataclass(frozen=True, slots=True)
class _Cells:
    """What a reader sees of a table, each cell with whether it is a number."""

    names: list[str]
    rows: list[list[tuple[str, bool]]]
    hidden: int  # rows left out


def _cells(table: Table) -> _Cells:
    rows = list(zip(*table.values(), strict=True))
    return _Cells(list(table), [list(map(_cell, row)) for row in rows[:MOST_ROWS]], max(len(rows) - MOST_ROWS, 0))


def _cell(value: object) -> tuple[str, bool]:
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no", False
    if isinstance(value, (int, np.integer)):
        return f"{value:,}".replace("-", "\N{MINUS SIGN}"), True
    if isinstance(value, (float, np.floating)):
        return ("–" if not np.isfinite(value) else f"{value:.4g}".replace("-", "\N{MINUS SIGN}")), True
    return str(value), False
