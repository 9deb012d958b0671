"""Maps of layer x head, layer 0 at the top: `head_map`, which is clickable, and `ratio_map`."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from app.figures.style import (
    CLEAR,
    FULL_GREY,
    GRID,
    OF_HEAD,
    UNDEFINED,
    as_customdata,
    color_scale,
    colorbar,
    index_axis,
    largest,
    literal,
    new_figure,
    number,
    reads_black,
)


def head_map(
    values: np.ndarray,
    *,
    title: str,
    diverging: bool,
    status: np.ndarray | None = None,
    zmin: float = 0.0,
    zmax: float | None = None,
    dark: bool = False,
) -> go.Figure:
    """One clickable cell per head.

    values [L, H], NaN = undefined; status [L, H] of str says why, and is shown where it is not "ok".
    diverging: the scale is fixed to [-1, 1]. Otherwise it runs from `zmin` to `zmax`, or to the largest value: give
    `zmax` to make two maps comparable. A click arrives with customdata (layer, head). dark: whether the page is.
    """
    low, high = (-1.0, 1.0) if diverging else (zmin, zmax or largest(values, default=1.0))
    scale = color_scale("diverging" if diverging else "sequential", dark=dark)
    figure, plot_height = _map(values.shape, "head", hoverdistance=-1)
    figure.add_heatmap(
        z=values, zmin=low, zmax=high, colorscale=scale, xgap=1, ygap=1, hoverinfo="skip",
        colorbar=colorbar(title, len=min(plot_height, 320), lenmode="pixels", y=1, yanchor="top", nticks=5),
    )  # fmt: skip
    defined = np.isfinite(values)
    if not defined.all():
        figure.add_heatmap(
            z=np.where(defined, np.nan, 0.0), colorscale=[[0, UNDEFINED], [1, UNDEFINED]],
            xgap=1, ygap=1, hoverinfo="skip", showscale=False,
        )  # fmt: skip
    pale = reads_black(scale, (np.where(defined, values, low) - low) / (high - low))
    _write(figure, _written(values, signed=diverging), pale, defined, most=12)

    # A click on a heat map does not reach Streamlit, a click on a marker does. No wider than the smallest
    # cell: the pointer is equally near to all markers that it is inside of, and would pick the wrong one of two.
    layer, head = np.indices(values.shape).reshape(2, -1)
    figure.add_scatter(
        x=head, y=layer, mode="markers", marker=dict(size=6, color=CLEAR), showlegend=False,
        customdata=as_customdata(layer, head), text=_notes(values, title, status, signed=diverging),
        hovertemplate=OF_HEAD + "%{text}<extra></extra>",
    )  # fmt: skip
    return figure


def ratio_map(ratios: np.ndarray, *, dark: bool = False) -> go.Figure:
    """Map of the keep ratio of each kv head, [L, Hkv], 0 to 1; dark: whether the page is."""
    figure, _ = _map(ratios.shape, "kv head")
    scale = color_scale("kept", dark=dark)
    figure.add_heatmap(
        z=ratios, zmin=0, zmax=1, colorscale=scale, xgap=1, ygap=1,
        colorbar=colorbar("kept", tickformat=".0%", len=1, nticks=5),
        hovertemplate="layer %{y}, kv head %{x}<br>keeps %{z:.0%}<extra></extra>",
    )  # fmt: skip
    _write(figure, _written(ratios, signed=False), reads_black(scale, ratios))
    return figure


def _map(shape: tuple[int, ...], unit: str, **layout: Any) -> tuple[go.Figure, int]:
    """An empty map, and how high its cells stand together, in pixels."""
    layers, heads = shape
    row = int(np.clip(480 // max(layers, 1), 14, 34))  # px: 32 layers without scrolling, none under 14
    height = row * layers
    lines = dict(plot_bgcolor=GRID)  # seen between the cells, which may be of the page's colour
    figure = new_figure(height=height + 56, margin=dict(l=52, r=8, t=8, b=48, pad=0), **lines, **layout)
    figure.update_xaxes(**index_axis(heads, unit, most=12))
    figure.update_yaxes(**index_axis(layers, "layer", most=height // 18), autorange=False)
    figure.update_yaxes(range=[layers - 0.5, -0.5])
    return figure, height


def _write(
    figure: go.Figure, words: np.ndarray, pale: np.ndarray, defined: np.ndarray | None = None, *, most: int = 16
) -> None:
    """Words in the cells [L, H], black on pale ones and white elsewhere; in the page's colour where undefined.

    None at all on a map of more than `most` cells a side: there is no room.
    """
    if max(words.shape) > most:
        return
    defined = np.ones(words.shape, dtype=bool) if defined is None else defined
    for members, color in ((defined & pale, "#000000"), (defined & ~pale, "#FFFFFF"), (~defined, None)):
        layer, head = np.nonzero(members)
        if len(layer):
            figure.add_scatter(
                x=head, y=layer, mode="text", text=words[members], hoverinfo="skip", showlegend=False,
                textfont=dict(size=12 if words.shape[1] <= 8 else 10, color=color),
                unselected=dict(textfont=dict(color=color or FULL_GREY)),  # a click must not fade the others
            )  # fmt: skip


def _written(values: np.ndarray, *, signed: bool) -> np.ndarray:
    """Two decimals for each cell; a dash where it is undefined."""
    return np.array([number(value, signed=signed) for value in values.ravel()], dtype=object).reshape(values.shape)


def _notes(values: np.ndarray, title: str, status: np.ndarray | None, *, signed: bool) -> list[str]:
    """Hover text of each cell: its value, and its status where that says more."""
    reasons = np.full(values.shape, "ok", dtype=object) if status is None else status
    notes = []
    for value, reason in zip(values.ravel(), map(str, reasons.ravel()), strict=True):
        note = f"{title} {number(value, signed=signed)}" if np.isfinite(value) else f"{title} undefined"
        notes.append(note if reason == "ok" else f"{note}: {literal(reason)}")
    return notes
