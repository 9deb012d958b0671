"""Maps of layer x head, clickable: `head_map` and `head_quadrant`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from app.figures.style import (
    CLEAR,
    DIVERGING,
    FULL_GREY,
    LAYERS,
    SEQUENTIAL,
    UNDEFINED,
    as_customdata,
    axis,
    colorbar,
    index_axis,
    largest,
    literal,
    new_figure,
    number,
    tick_values,
)


def head_map(
    values: np.ndarray,
    *,
    title: str,
    diverging: bool,
    status: np.ndarray | None = None,
    zmax: float | None = None,
) -> go.Figure:
    """One clickable cell per head, layer 0 at the top.

    values [L, H], NaN = undefined; status [L, H] of str says why, and is shown where it is not "ok".
    diverging: the scale is fixed to [-1, 1]. Otherwise it runs from 0 to `zmax`, or to the largest value: give
    `zmax` to make two maps comparable. A click arrives with customdata (layer, head).
    """
    n_layers, n_heads = values.shape
    low, high = (-1.0, 1.0) if diverging else (0.0, zmax or largest(values, default=1.0))
    scale = DIVERGING if diverging else SEQUENTIAL
    row = int(np.clip(480 // max(n_layers, 1), 14, 34))  # px: 32 layers without scrolling, none under 14
    plot_height = row * n_layers

    figure = new_figure(height=plot_height + 56, hoverdistance=-1, margin=dict(l=52, r=8, t=8, b=48))
    figure.add_heatmap(
        z=values, zmin=low, zmax=high, colorscale=scale, xgap=1, ygap=1, hoverinfo="skip",
        colorbar=colorbar(title, len=min(plot_height, 320), lenmode="pixels", y=1, yanchor="top", nticks=5),
    )  # fmt: skip
    undefined = ~np.isfinite(values)
    if undefined.any():
        figure.add_heatmap(
            z=np.where(undefined, 0.0, np.nan), colorscale=[[0, UNDEFINED], [1, UNDEFINED]],
            xgap=1, ygap=1, hoverinfo="skip", showscale=False,
        )  # fmt: skip
    if n_layers <= 12 and n_heads <= 12:
        figure.add_traces(list(_cell_numbers(values, scale, low, high, signed=diverging)))

    # A click on a heat map does not reach Streamlit, a click on a marker does. No wider than the smallest
    # cell: the pointer is equally near to all markers that it is inside of, and would pick the wrong one of two.
    layer, head = np.indices(values.shape).reshape(2, -1)
    figure.add_scatter(
        x=head, y=layer, mode="markers", marker=dict(size=6, color=CLEAR), showlegend=False,
        customdata=as_customdata(layer, head), text=_cell_notes(values, title, status, signed=diverging),
        hovertemplate="layer %{customdata[0]}, head %{customdata[1]}<br>%{text}<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(**index_axis(n_heads, "head", most=12))
    figure.update_yaxes(**index_axis(n_layers, "layer", most=plot_height // 18), autorange=False)
    figure.update_yaxes(range=[n_layers - 0.5, -0.5])
    return figure


def _cell_numbers(values: np.ndarray, scale: list, low: float, high: float, *, signed: bool) -> Iterator[go.Scatter]:
    """Two decimals in every cell, black or white, whichever reads better on it; a dash on undefined cells."""
    layer, head = np.indices(values.shape).reshape(2, -1)
    flat = values.ravel()
    defined = np.isfinite(flat)
    fraction = np.clip((np.where(defined, flat, low) - low) / (high - low), 0, 1)
    pale = _luminance(sample_colorscale(scale, fraction, colortype="tuple")) > 0.179  # where both read alike
    groups = ((defined & pale, "#000000"), (defined & ~pale, "#FFFFFF"), (~defined, None))
    for members, color in groups:
        if members.any():
            font = dict(size=12 if values.shape[1] <= 8 else 10, color=color)
            yield go.Scatter(
                x=head[members], y=layer[members], mode="text", textfont=font, showlegend=False,
                text=[number(value, signed=signed) for value in flat[members]], hoverinfo="skip",
                unselected=dict(textfont=dict(color=color or FULL_GREY)),  # a click must not fade the others
            )  # fmt: skip


def _cell_notes(values: np.ndarray, title: str, status: np.ndarray | None, *, signed: bool) -> list[str]:
    """Hover text of each cell: its value, and its status where that says more."""
    reasons = np.full(values.shape, "ok", dtype=object) if status is None else status
    notes = []
    for value, reason in zip(values.ravel(), reasons.ravel(), strict=True):
        reason = str(reason)
        note = f"{title} {number(value, signed=signed)}" if np.isfinite(value) else f"{title} undefined"
        notes.append(note if reason == "ok" else f"{note}: {literal(reason)}")
    return notes


def head_quadrant(
    gamma: np.ndarray,
    gamma_skip_first: np.ndarray,
    sink_share: np.ndarray,
    *,
    status: np.ndarray | None = None,
) -> go.Figure:
    """All heads by Γ with the sink (x) and without it (y); size = sink_share (0..1), colour = layer.

    All arrays [L, H]. Heads with either Γ undefined are left out. A click arrives with customdata (layer,
    head).
    """
    n_layers = len(gamma)
    layer, head = np.nonzero(np.isfinite(gamma) & np.isfinite(gamma_skip_first))
    share = np.nan_to_num(sink_share[layer, head])
    order = np.argsort(-share, kind="stable")  # small discs are drawn last, over the large ones
    layer, head, share = layer[order], head[order], np.clip(share[order], 0, 1)
    reasons = [""] * len(layer) if status is None else [str(reason) for reason in status[layer, head]]

    figure = new_figure(height=480, margin=dict(l=56, r=8, t=28, b=64))
    figure.add_scatter(
        x=gamma[layer, head], y=gamma_skip_first[layer, head], mode="markers", showlegend=False,
        cliponaxis=False, customdata=as_customdata(layer, head),
        text=[f"{part:.0%}" + (f"<br>{literal(why)}" if why not in ("", "ok") else "")
              for part, why in zip(share, reasons, strict=True)],
        marker=dict(
            size=7 + 21 * np.sqrt(share), opacity=0.8, line=dict(width=1, color=FULL_GREY),
            color=layer, cmin=0, cmax=max(n_layers - 1, 1), colorscale=LAYERS,
            colorbar=colorbar("layer", tickvals=tick_values(n_layers, most=8)),
        ),
        hovertemplate="layer %{customdata[0]}, head %{customdata[1]}"
        "<br>Γ with sink %{x:+.2f}, without %{y:+.2f}<br>sink share %{text}<extra></extra>",
    )  # fmt: skip
    edge = 1.05
    for x, y, name in (  # written outside the square, since points crowd its corners
        (-edge, -edge, "↙ follows the paper"),
        (-edge, edge, "↖ sink only"),
        (edge, edge, "mirror: keep HIGH norms ↗"),
        (edge, -edge, "sink hides it ↘"),
    ):
        figure.add_annotation(
            x=x, y=y, xanchor="left" if x < 0 else "right", yanchor="top" if y < 0 else "bottom",
            text=f"<i>{name}</i>", showarrow=False,
        )  # fmt: skip
    for name, title in (("x", "Γ with the sink"), ("y", "Γ without the sink")):
        ticks = dict(tickvals=[-1, -0.5, 0, 0.5, 1], ticktext=["−1", "−0.5", "0", "+0.5", "+1"])
        zero = dict(zeroline=True, zerolinecolor=FULL_GREY)
        figure.update_layout({f"{name}axis": axis(title, range=[-edge, edge], **ticks, **zero)})
    figure.update_xaxes(ticklabelstandoff=16)  # room for the lower pair of names
    return figure


def _luminance(colors: list[tuple[float, float, float]]) -> np.ndarray:
    """WCAG relative luminance of sRGB colours, each channel 0..1."""
    channels = np.asarray(colors, dtype=float)
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return linear @ np.array([0.2126, 0.7152, 0.0722])
