"""Figures of plans: `ratio_map` and `direction_map` of kv heads, and `front`, what each way to spend bytes costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from app.figures.style import (
    CONTRAST,
    DIVERGING,
    FULL_GREY,
    PRIMARY,
    axis,
    colorbar,
    error_bars,
    index_axis,
    literal,
    new_figure,
)

KEPT = [[0.0, "#EFEDFB"], [0.5, "#A79DF5"], [1.0, "#4A38C9"]]  # kept is purple, everywhere
PALE = 0.77  # of KEPT, below which black reads better on it than white
_LOW, _HIGH = DIVERGING[0][1], DIVERGING[-1][1]  # as in maps of Γ
_MOST_WRITTEN = 16  # a side: larger maps have no room for a number in each cell

# Lines of a front: kinds are told apart by dash and filling, those of a kind by colour and marker.
_DASHES = {"uniform": "dash", "plan": "solid", "baseline": "dot"}
_COLORS = {
    "uniform": (PRIMARY, CONTRAST, "#2C8C9B"),
    "plan": ("#3E7CD6", "#B8456F", "#2C8C9B", "#A08A00", PRIMARY, "#8A5A2B", "#D98C00", "#E05299"),
    "baseline": (FULL_GREY,),
}
_MARKERS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "star", "pentagon", "x")


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """One way to spend the bytes, at K budgets by rising bytes. Arrays [K]."""

    mib: np.ndarray  # of the cache
    change: np.ndarray  # of the negative log likelihood, nats a token against the full cache
    low: np.ndarray  # ends of its interval
    high: np.ndarray
    keep: np.ndarray  # the budget asked for, 0 to 1
    kind: str  # "uniform", "plan" or "baseline"


def ratio_map(ratios: np.ndarray) -> go.Figure:
    """The share of the tokens that each kv head keeps, [L, Hkv], 0 to 1. Layer 0 at the top."""
    figure = _map(ratios.shape)
    figure.add_heatmap(
        z=ratios, zmin=0, zmax=1, colorscale=KEPT, xgap=1, ygap=1,
        colorbar=colorbar("kept", tickformat=".0%", len=1, nticks=5),
        hovertemplate="layer %{y}, kv head %{x}<br>keeps %{z:.0%}<extra></extra>",
    )  # fmt: skip
    _write(figure, np.vectorize("{:.2f}".format)(ratios), ratios < PALE)
    return figure


def direction_map(high: np.ndarray) -> go.Figure:
    """Which norms stay in each kv head, [L, Hkv] bool: True high ones, False low ones. Layer 0 at the top."""
    words = np.where(high, "high", "low")
    figure = _map(high.shape)
    figure.add_heatmap(
        z=high.astype(np.int8), zmin=0, zmax=1, xgap=1, ygap=1, text=words,
        colorscale=[[0.0, _LOW], [0.5, _LOW], [0.5, _HIGH], [1.0, _HIGH]],
        colorbar=colorbar("stays", tickvals=[0.25, 0.75], ticktext=["low", "high"], len=1),
        hovertemplate="layer %{y}, kv head %{x}<br>%{text} norms stay<extra></extra>",
    )  # fmt: skip
    _write(figure, words, np.zeros(high.shape, dtype=bool))
    return figure


def front(lines: Mapping[str, Line], *, full_mib: float, shown: Collection[str] | None = None) -> go.Figure:
    """The bytes of the cache (x) against what it costs in prediction (y), a line a way, with intervals.

    Plans are solid with filled markers, uniform ways dashed and hollow, baselines dotted grey; the full cache is a
    grey cross at no change. Only the lines `shown` are drawn; a line looks the same whichever they are.
    """
    figure = new_figure(height=560, legend=dict(orientation="h", x=0, y=-0.16, yanchor="top", title_text=""))
    figure.add_hline(y=0, line=dict(color=FULL_GREY, width=1.5, dash="dot"))
    drawn = Counter()
    for name, line in lines.items():
        place, colors = drawn[line.kind], _COLORS[line.kind]
        color, symbol = colors[place % len(colors)], _MARKERS[place % len(_MARKERS)]
        drawn[line.kind] += 1
        if shown is not None and name not in shown:
            continue
        figure.add_scatter(
            x=line.mib, y=line.change, mode="lines+markers", name=literal(name),
            line=dict(color=color, width=2, dash=_DASHES[line.kind]),
            marker=dict(size=9, symbol=symbol if line.kind == "plan" else f"{symbol}-open", line_width=1.5),
            error_y=error_bars(line.change, line.low, line.high, color=color) | dict(thickness=1, width=3),
            customdata=np.stack([line.keep, line.low, line.high], axis=1).tolist(),
            hovertemplate=f"{literal(name)}, keep %{{customdata[0]:.0%}}<br>%{{x:.2f}} MiB<br>NLL %{{y:+.3f}}, "
            "95 % %{customdata[1]:+.3f} to %{customdata[2]:+.3f}<extra></extra>",
        )  # fmt: skip
    figure.add_scatter(
        x=[full_mib], y=[0], mode="markers", name="full cache", marker=dict(size=13, color=FULL_GREY, symbol="x"),
        hovertemplate="full cache<br>%{x:.2f} MiB<extra></extra>",
    )  # fmt: skip
    figure.update_layout(
        xaxis=axis("cache, MiB", rangemode="tozero"), yaxis=axis("NLL change, nats a token"), hoverdistance=15
    )
    return figure


def _map(shape: tuple[int, int]) -> go.Figure:
    layers, heads = shape
    height = int(np.clip(480 // max(layers, 1), 14, 34)) * layers
    figure = new_figure(height=height + 56, margin=dict(l=52, r=8, t=8, b=48))
    figure.update_xaxes(**index_axis(heads, "kv head", most=12))
    figure.update_yaxes(**index_axis(layers, "layer", most=max(height // 18, 1)), autorange=False)
    figure.update_yaxes(range=[layers - 0.5, -0.5])
    return figure


def _write(figure: go.Figure, words: np.ndarray, pale: np.ndarray) -> None:
    """A word in each cell, black where the cell is pale and white elsewhere; none where there is no room."""
    if max(words.shape) > _MOST_WRITTEN:
        return
    for members, color in ((pale, "#000000"), (~pale, "#FFFFFF")):
        layer, head = np.nonzero(members)
        figure.add_scatter(
            x=head, y=layer, mode="text", text=words[layer, head], textfont=dict(size=12, color=color),
            hoverinfo="skip", showlegend=False,
        )  # fmt: skip
