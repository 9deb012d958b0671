"""What methods score: against the bytes they hold, by position in the text, and by length and depth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from app.figures.style import (
    BELOW,
    COLORS,
    FULL_GREY,
    GRID,
    MARKERS,
    UNDEFINED,
    axis,
    color_scale,
    colorbar,
    error_bars,
    level,
    literal,
    new_figure,
    reads_black,
)

_STEEP = 4  # times the lowest score that the highest may be on a linear axis
_ASIDE = 0.012  # of the largest x, from one line to the next
_SAME = 0.01  # share by which places that count as one may differ
_ACROSS = 3  # panels side by side
_CELL, _BETWEEN = 30, 64  # px: height of a cell, and of the lengths below a panel and the title above the next


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """Means of a method at K places, with the ends of their intervals. Arrays [K]; NaN is undefined."""

    x: np.ndarray
    """MiB held, or positions."""
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    names: tuple[str, ...]
    """K names of what was measured at each place, such as "low norm 0.5"."""


def score_by_bytes(lines: Mapping[str, Curve], *, full: Curve | None, score: str, most: float | None) -> go.Figure:
    """The bytes that a cache holds (x) against its score (y): a line for each method, the full cache in grey.

    Methods that hold the same bytes are drawn side by side, so that no interval hides another.

    Args:
        full: the full cache, at one place; None where it was not measured.
        score: title of the axis, with the unit.
        most: the highest possible score, where they begin at 0; inf for 0 and up, None for the scores that there are.
    """
    figure = new_figure(height=440, legend=BELOW)
    if full is not None:
        if np.isfinite(full.mean[0]):
            level(figure, float(full.mean[0]))
        _draw(figure, "full cache", full, "%{customdata:.2f} MiB", color=FULL_GREY, symbol="x", size=13)
    apart = _apart([*lines.values(), *([full] if full else [])])
    for i, (name, line, style) in enumerate(_styled(lines, 13)):
        _draw(figure, name, line, "%{customdata:.2f} MiB", aside=apart * (i - (len(lines) - 1) / 2), **style)
    return figure.update_layout(
        xaxis=axis("keys and values held, MiB", rangemode="tozero"),
        yaxis=axis(score, **_scale(lines, most)),
        hoverdistance=15,
    )


def score_by_position(lines: Mapping[str, Curve], *, full: Curve | None, score: str, most: float | None) -> go.Figure:
    """The position of tokens in their texts (x) against how they are predicted (y): a line for each method.

    Arguments as in `score_by_bytes`.
    """
    figure = new_figure(height=400, legend=BELOW)
    if full is not None:
        _draw(figure, "full cache", full, "from position %{customdata:d}", color=FULL_GREY, symbol="x", size=7)
    for name, line, style in _styled(lines, 10):
        _draw(figure, name, line, "from position %{customdata:d}", **style)
    return figure.update_layout(
        xaxis=axis("position of the token", tickformat="d"), yaxis=axis(score, **_scale(lines, most))
    )


def length_depth_maps(
    panels: Mapping[str, np.ndarray],
    *,
    lengths: Sequence[float],
    depths: Sequence[float],
    samples: np.ndarray,
    dark: bool = False,
) -> go.Figure:
    """The share found by length of the prompt (x) and depth (y, 0 at the top): a panel for each method, scale 0 to 1.

    Args:
        panels: [D, N] shares of 0 to 1 by method; NaN is undefined, and shown as a dash.
        lengths: N numbers of tokens.
        depths: D shares of the text before what is hidden.
        samples: [D, N] numbers of samples behind each share.
        dark: whether the page is.
    """
    rows = max(-(-len(panels) // _ACROSS), 1)
    height = rows * _CELL * len(depths) + (rows - 1) * _BETWEEN
    figure = new_figure(height=height + 76, margin=dict(l=56, r=8, t=28, b=48, pad=0), plot_bgcolor=GRID)
    scale = color_scale("kept", dark=dark)
    figure.set_subplots(
        rows=rows, cols=_ACROSS, subplot_titles=[literal(name) for name in panels],
        horizontal_spacing=0.06, vertical_spacing=_BETWEEN / height if rows > 1 else 0,
    )  # fmt: skip
    figure.update_annotations(font_size=14)
    across, down = [f"{length:,.0f}" for length in lengths], [f"{100 * depth:g} %" for depth in depths]
    ends = dict(type="category", showgrid=False, fixedrange=True, tickangle=0, ticks="")
    for i, (name, values) in enumerate(panels.items()):
        place = dict(row=i // _ACROSS + 1, col=i % _ACROSS + 1)
        for trace in _cells(name, values, across, down, samples, reads_black(scale, values)):
            figure.add_trace(trace, **place)
        first, last = i % _ACROSS == 0, i + _ACROSS >= len(panels)
        figure.update_xaxes(axis("tokens" if last else "", **ends), **place)
        figure.update_yaxes(axis("depth" if first else "", autorange="reversed", showticklabels=first, **ends), **place)
    bar = dict(tickformat=".0%", nticks=5, len=min(height, 240), lenmode="pixels", y=1, yanchor="top")
    return figure.update_layout(coloraxis=dict(cmin=0, cmax=1, colorscale=scale, colorbar=colorbar("found", **bar)))


def _cells(
    name: str,
    values: np.ndarray,
    across: Sequence[str],
    down: Sequence[str],
    samples: np.ndarray,
    black: np.ndarray,
) -> Iterator[go.Heatmap | go.Scatter]:
    """The cells of a panel, and what is written in them; undefined ones are grey, with a dash in the page's colour."""
    undefined = ~np.isfinite(values)
    grid: dict[str, Any] = dict(x=across, y=down, xgap=1, ygap=1, hoverongaps=False)
    yield go.Heatmap(
        z=values, coloraxis="coloraxis", customdata=samples, **grid,
        hovertemplate=f"{literal(name)}<br>%{{x}} tokens, depth %{{y}}<br>%{{z:.0%}} of %{{customdata}} found"
        "<extra></extra>",
    )  # fmt: skip
    yield go.Heatmap(
        z=np.where(undefined, 0.0, np.nan), colorscale=[[0, UNDEFINED], [1, UNDEFINED]], showscale=False, **grid,
        hovertemplate=f"{literal(name)}<br>%{{x}} tokens, depth %{{y}}<br>undefined<extra></extra>",
    )  # fmt: skip
    for cells, color in ((~undefined, np.where(black, "#000000", "#FFFFFF")), (undefined, None)):
        depth, length = (index.tolist() for index in np.nonzero(cells))
        yield go.Scatter(
            x=[across[n] for n in length], y=[down[d] for d in depth], mode="text", hoverinfo="skip", showlegend=False,
            text=["–" if color is None else f"{value:.0%}" for value in values[cells]],
            textfont=dict(size=12, color=None if color is None else color[cells].tolist()),
        )  # fmt: skip


def _styled(lines: Mapping[str, Curve], largest: int) -> Iterator[tuple[str, Curve, dict[str, Any]]]:
    """Each line with a colour and a marker by its place: it looks the same in every figure of the same lines.

    Later markers are smaller, since they are drawn over earlier ones and equal scores are common.
    """
    for i, (name, line) in enumerate(lines.items()):
        yield (
            name,
            line,
            dict(color=COLORS[i % len(COLORS)], symbol=MARKERS[i % len(MARKERS)], size=max(largest - 2 * i, 6)),
        )


def _scale(lines: Mapping[str, Curve], most: float | None) -> dict[str, Any]:
    """Options of an axis from 0 to `most`; without one, logarithmic where high scores would press the others flat."""
    if most is not None:
        return dict(range=[-0.03 * most, 1.03 * most]) if np.isfinite(most) else dict(rangemode="tozero")
    means = np.concatenate([line.mean for line in lines.values()] or [np.ones(1)])
    means = means[np.isfinite(means)]
    if not len(means) or means.min() <= 0 or means.max() < _STEEP * means.min():
        return {}
    ticks = [digit * 10.0**power for power in range(-3, 7) for digit in (1, 2, 5)]
    return dict(type="log", tickvals=ticks, ticktext=[f"{tick:,g}" for tick in ticks])


def _apart(lines: Sequence[Curve]) -> float:
    """Distance on the x axis between lines that share a place, nearly; 0 where none do."""
    x = np.sort(np.concatenate([line.x for line in lines] or [np.zeros(0)]))
    return _ASIDE * x[-1] if (np.diff(x) <= _SAME * x[1:]).any() else 0.0


def _draw(
    figure: go.Figure, name: str, line: Curve, place: str, *, color: str, symbol: str, size: int, aside: float = 0.0
) -> None:
    """Add a line with its intervals; its name says at how many places it is undefined, since nothing is drawn there.

    Args:
        place: what the hover says of the place, `line.x`, which is "%{customdata}".
        aside: how far from its places it is drawn.
    """
    undefined = int((~np.isfinite(line.mean)).sum())
    told = f"{literal(name)} (undefined at {undefined} of {len(line.mean)})" if undefined else literal(name)
    notes = [
        f"{literal(each)}<br>{mean:.3f}" + (f", 95 % {low:.3f} to {high:.3f}" if np.isfinite(low) else ", no interval")
        for each, mean, low, high in zip(line.names, line.mean, line.low, line.high, strict=True)
    ]
    figure.add_scatter(
        x=line.x + aside, y=line.mean, customdata=line.x, mode="lines+markers", name=told,
        line=dict(color=color, width=2), marker=dict(size=size, symbol=symbol),
        text=notes, hovertemplate=f"%{{text}}<br>{place}<extra></extra>",
        error_y=error_bars(line.mean, line.low, line.high, color=color) | dict(thickness=1, width=3),
    )  # fmt: skip
