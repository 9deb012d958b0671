"""The map of layer x head that is clicked: numpy arrays in, the option of an ECharts heat map out.

Its frame is fixed, so that the cell under a click is known (`components.cells`); Plotly draws maps to be looked at
(`maps`). The cell at 0 of a diverging scale, and the lowest of a sequential one, is as clear as the page behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from app.figures.style import (
    GRID,
    ORANGE,
    PAGE,
    PURPLE,
    QUIET,
    UNDEFINED,
    Rgb,
    color_scale,
    largest,
    number,
    reads_black,
)

Head = tuple[int, int]
"""(layer, query head)."""

_STEPS = 20  # of a scale from the clear end to the full colour
_INK = {False: "#14161D", True: "#FAFAFA"}
FRAME = dict(left=38, right=6, top=22, bottom=58)
"""Pixels of a map around its cells."""
_MOST_WRITTEN = 12  # heads or layers of a map in whose cells there is room for numbers
_FADED = 0.12


@dataclass(frozen=True, slots=True)
class Scale:
    """Colours of a map: what they stand for, and their ends."""

    title: str
    low: float = 0.0
    high: float | None = None
    """None: the largest value of the map."""
    diverging: bool = False
    """From -1 to 1, whatever the values are, with 0 as clear as the page."""
    percent: bool = False
    """Whether values are written as shares."""


def clickable_map(
    values: np.ndarray,
    scale: Scale,
    *,
    kv_heads: int,
    names: np.ndarray,
    notes: np.ndarray,
    shown: np.ndarray | None = None,
    skipped: Mapping[int, str] | None = None,
    dark: bool = False,
) -> dict[str, Any]:
    """Map of values [L, H], layer 0 at the top.

    Args:
        values: NaN is undefined, and grey.
        kv_heads: number of kv heads: lines part their groups of query heads.
        names: [L, H] of str, the places of the heads, no two alike.
        notes: [L, H] of str, what to add to the value when the pointer is over a cell.
        shown: [L, H] bool, cells that are not faded; all by default.
        skipped: layers of which there is nothing to tell, with what is written across their cells.
        dark: whether the page behind it is.
    """
    layers, heads = values.shape
    low, high = _ends(values, scale)
    kept = np.ones(values.shape, dtype=bool) if shown is None else shown
    room = max(layers, heads) <= _MOST_WRITTEN
    cells = [
        _cell(cell, str(names[cell]), scale, float(values[cell]), str(notes[cell]), bool(kept[cell]))
        for cell in np.ndindex(layers, heads)
    ]
    if room:
        colors = color_scale("diverging" if scale.diverging else "sequential", dark=dark)
        for cell, black in zip(cells, reads_black(colors, (values - low) / (high - low)).ravel(), strict=True):
            cell["label"] = dict(color="#000000" if black else "#FFFFFF")
    for layer, word in (skipped or {}).items():
        row = cells[layer * heads : (layer + 1) * heads]
        for cell in row:
            cell["label"] = dict(show=False)
        row[heads // 2]["label"] = dict(show=True, formatter=word, color=QUIET[dark])
    groups = dict(show=kv_heads > 1, interval=0, lineStyle=dict(color=_INK[dark], opacity=0.55, width=1.5))
    return dict(
        animation=False,
        grid=FRAME | dict(containLabel=False, outerBoundsMode="none"),
        xAxis=[
            _axis(heads, dark, name="query head", nameLocation="middle", nameGap=20),
            _axis(kv_heads, dark, "KV ", position="top", splitLine=groups, z=3),
        ],
        yAxis=_axis(layers, dark, inverse=True, name="layer", nameLocation="start", nameGap=6, every=layers <= 32),
        tooltip=dict(formatter="<b>{b}</b><br>{@[3]}", confine=True, transitionDuration=0),
        visualMap=dict(
            type="continuous", min=low, max=high, dimension=2, seriesIndex=0, calculable=False, orient="horizontal",
            left="center", bottom=0, itemWidth=10, itemHeight=150, hoverLink=False,
            text=[_written(high, scale, end=True), _written(low, scale, end=True)], textStyle=dict(color=QUIET[dark]),
            inRange=dict(color=_colours(scale.diverging, dark)),
            controller=dict(inRange=dict(color=_colours(scale.diverging, dark, page=PAGE[dark]))),  # it can't be clear
        ),
        series=[
            dict(
                type="heatmap", name=scale.title, data=cells, cursor="pointer", progressive=0,
                itemStyle=dict(borderColor=GRID, borderWidth=0.5),
                emphasis=dict(itemStyle=dict(borderColor=_INK[dark], borderWidth=1)),
                label=dict(show=room, formatter="{@[4]}", fontSize=11, textBorderWidth=0),
            ),
        ],
    )  # fmt: skip


def _axis(n: int, dark: bool, prefix: str = "", *, every: bool = False, **options: Any) -> dict[str, Any]:
    """An axis of n layers or heads, each a category, with a label for every one or for as many as there is room for."""
    quiet = dict(color=QUIET[dark])
    hidden = dict(axisTick=dict(show=False), axisLine=dict(show=False), splitLine=dict(show=False))
    label = quiet | dict(fontSize=11, interval=0 if every else "auto")
    names = [f"{prefix}{i}" for i in range(n)]
    return dict(type="category", data=names, axisLabel=label, nameTextStyle=quiet) | hidden | options


def map_height(layers: int) -> int:
    """Height of a map in pixels: 32 layers are seen without scrolling, and no row is under 9 pixels."""
    return int(np.clip(470 // max(layers, 1), 9, 44)) * layers + 80


def outlines(shape: Head, pinned: Head | None = None) -> str:
    """HTML of boxes around the open cell of a map [L, H] and the pinned one, for an element that lies over the chart.

    They are no part of the chart, which would be sent and drawn anew for each cell that is opened. The open cell is
    that of the CSS variables --l2kv-layer and --l2kv-head.
    """
    opened = _outline("var(--l2kv-layer)", "var(--l2kv-head)", "solid", shape)
    return (_outline(*pinned, "dashed", shape) if pinned else "") + opened


def _outline(layer: int | str, head: int | str, border: str, shape: Head) -> str:
    layers, heads = shape
    across = f"(100% - {FRAME['left'] + FRAME['right']}px) / {heads}"
    down = (map_height(layers) - FRAME["top"] - FRAME["bottom"]) / layers
    return (
        f'<div style="left: calc({FRAME["left"]}px + {across} * {head}); width: calc({across}); '
        f"top: calc({FRAME['top']}px + {down:.6f}px * {layer}); height: {down:.6f}px; "
        f'border: 2.5px {border}"></div>'
    )


def _ends(values: np.ndarray, scale: Scale) -> tuple[float, float]:
    if scale.diverging:
        return -1.0, 1.0
    high = scale.high if scale.high is not None else largest(values, default=scale.low + 1.0)
    return scale.low, max(high, scale.low + 1e-9)


def _cell(cell: tuple[int, ...], name: str, scale: Scale, value: float, note: str, shown: bool) -> dict[str, Any]:
    layer, head = cell
    defined = bool(np.isfinite(value))
    written = _written(value, scale)
    told = f"{scale.title} {written if defined else 'undefined'}" + (f": {note}" if note else "")
    made: dict[str, Any] = dict(name=name, value=[head, layer, float(value) if defined else 0.0, told, written])
    style: dict[str, Any] = {} if shown else dict(opacity=_FADED)
    if not defined:
        made["visualMap"], style["color"] = False, UNDEFINED
    return made | (dict(itemStyle=style) if style else {})


def _written(value: float, scale: Scale, *, end: bool = False) -> str:
    if scale.percent and np.isfinite(value):
        return f"{value:.0%}" if end else f"{value:.1%}"
    return number(value, signed=scale.diverging)


def _colours(diverging: bool, dark: bool, *, page: Rgb | None = None) -> list[str]:
    """Colours of a scale in even steps: ever more of one hue over the page, or over its colour where it is given."""
    purple, orange = PURPLE[dark], ORANGE[dark]
    steps = [(orange, step / _STEPS) for step in range(_STEPS + 1)]
    if diverging:
        steps = [(purple, step / _STEPS) for step in range(_STEPS, 0, -1)] + steps
    if page is None:
        return [f"rgba({red},{green},{blue},{share:g})" for (red, green, blue), share in steps]
    return [f"rgb{_mixed(hue, page, share)}" for hue, share in steps]


def _mixed(hue: Rgb, page: Rgb, share: float) -> Rgb:
    """A share of one colour over another."""
    red, green, blue = (round(share * over + (1 - share) * under) for over, under in zip(hue, page, strict=True))
    return red, green, blue
