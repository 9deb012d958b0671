"""Two runs beside each other (`gamma_against`, `gamma_spread`, `verdict_bars`)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go

from app.figures.style import (
    CONTRAST,
    FULL_GREY,
    LAYERS,
    PRIMARY,
    as_customdata,
    axis,
    colorbar,
    literal,
    new_figure,
    tick_values,
)

_SIDES = (PRIMARY, CONTRAST)
_SIGNED = dict(
    range=[-1.05, 1.05], tickvals=[-1, -0.5, 0, 0.5, 1], ticktext=["−1", "−0.5", "0", "+0.5", "+1"],
    zeroline=True, zerolinecolor=FULL_GREY,
)  # fmt: skip


def gamma_against(first: np.ndarray, second: np.ndarray, *, names: tuple[str, str]) -> go.Figure:
    """Γ of every head in one run (x) against that in another (y), [L, H] each; colour = layer. NaN is left out."""
    layer, head = np.nonzero(np.isfinite(first) & np.isfinite(second))
    n_layers = len(first)
    figure = new_figure(height=480)
    figure.add_shape(type="line", x0=-1, y0=-1, x1=1, y1=1, line=dict(color=FULL_GREY, width=1.5, dash="dot"))
    figure.add_scatter(
        x=first[layer, head], y=second[layer, head], mode="markers", cliponaxis=False, showlegend=False,
        customdata=as_customdata(layer, head),
        marker=dict(
            size=11, opacity=0.85, line=dict(width=1, color=FULL_GREY), color=layer, cmin=0,
            cmax=max(n_layers - 1, 1), colorscale=LAYERS,
            colorbar=colorbar("layer", tickvals=tick_values(n_layers, most=8)),
        ),
        hovertemplate="layer %{customdata[0]}, head %{customdata[1]}<br>Γ %{x:+.2f}, then %{y:+.2f}<extra></extra>",
    )  # fmt: skip
    figure.update_layout(
        xaxis=axis(f"Γ, {literal(names[0])}", **_SIGNED), yaxis=axis(f"Γ, {literal(names[1])}", **_SIGNED)
    )
    return figure


def gamma_spread(gammas: Mapping[str, np.ndarray]) -> go.Figure:
    """Γ of all heads of each run, any shapes: every head a point beside a box of quartiles. NaN is left out."""
    figure = new_figure(height=360, showlegend=False)
    for i, (name, values) in enumerate(gammas.items()):
        color = _SIDES[i % len(_SIDES)]
        figure.add_box(
            y=values[np.isfinite(values)], name=literal(name), boxpoints="all", jitter=0.5, pointpos=-1.6,
            marker=dict(color=color, size=6, opacity=0.7), line=dict(color=color), hoverinfo="y",
        )  # fmt: skip
    figure.update_layout(xaxis=axis("", showgrid=False), yaxis=axis("Γ", **_SIGNED))
    return figure


def verdict_bars(counts: Mapping[str, Mapping[str, int]]) -> go.Figure:
    """How many heads of each run have each verdict, as shares of its heads. counts: run -> verdict -> heads."""
    figure = new_figure(height=360, barmode="group", bargap=0.3)
    for i, (name, of) in enumerate(counts.items()):
        total = max(sum(of.values()), 1)
        figure.add_bar(
            x=[count / total for count in of.values()], y=list(of), orientation="h", name=literal(name),
            marker=dict(color=_SIDES[i % len(_SIDES)]), customdata=list(of.values()),
            hovertemplate="%{y}: %{customdata} heads, %{x:.0%}<extra></extra>",
        )  # fmt: skip
    figure.update_layout(
        xaxis=axis("share of the heads", tickformat=".0%", rangemode="tozero"),
        yaxis=axis("", autorange="reversed", showgrid=False),
    )
    return figure
