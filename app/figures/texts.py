"""Figures over many texts: `head_over_texts`, `means_by_layer` and `order_agreement`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from app.figures.style import CONTRAST, FULL_GREY, PRIMARY, axis, error_bars, index_axis, literal, new_figure

_BAND = "rgba(108,95,240,0.16)"  # PRIMARY, so pale that points on it stay readable


def head_over_texts(
    with_sink: np.ndarray, without: np.ndarray, names: Sequence[str], *, mean: float, low: float, high: float
) -> go.Figure:
    """Γ of one head on each of N texts, [N] each, NaN = undefined; its mean and the ends of its interval.

    with_sink: of all tokens, solid; without: with the first one left out, hollow. `mean`, `low` and `high` are of the
    first; an undefined interval is not drawn.
    """
    figure = new_figure(height=340)
    figure.add_hline(y=0, line=dict(color=FULL_GREY, width=1.5))
    if np.isfinite([low, high]).all():
        figure.add_hrect(y0=low, y1=high, fillcolor=_BAND, line_width=0, layer="below", name="95 % interval",
                         showlegend=True)  # fmt: skip
    if np.isfinite(mean):
        line = dict(color=PRIMARY, width=2, dash="dash")
        figure.add_hline(y=mean, line=line, name="mean", showlegend=True)
    ways = (
        ("Γ", with_sink, dict(size=9, color=PRIMARY)),
        ("without the first token", without, dict(size=8, color=FULL_GREY, symbol="circle-open", line_width=2)),
    )
    for name, values, marker in ways:
        text = np.flatnonzero(np.isfinite(values))
        figure.add_scatter(
            x=text, y=values[text], mode="markers", name=name, marker=marker,
            text=[literal(names[i]) for i in text],
            hovertemplate=f"text %{{x}}: %{{text}}<br>{name} %{{y:+.2f}}<extra></extra>",
        )  # fmt: skip
    figure.update_layout(
        xaxis=index_axis(len(with_sink), "text", most=16),
        yaxis=axis(
            "Γ", range=[-1.05, 1.05], tickvals=[-1, -0.5, 0, 0.5, 1], ticktext=["−1", "−0.5", "0", "+0.5", "+1"]
        ),
    )
    return figure


def means_by_layer(mean: np.ndarray, low: np.ndarray, high: np.ndarray) -> go.Figure:
    """ALR over chance of each layer, mean and ends of its interval over texts, [L] each; NaN = undefined."""
    figure = new_figure(height=340)
    line = dict(color=FULL_GREY, width=1.5, dash="dot")
    figure.add_hline(y=1, line=line, name="chance", showlegend=True)
    layer = np.flatnonzero(np.isfinite(mean))
    figure.add_scatter(
        x=layer, y=mean[layer], mode="markers", name="layer, mean and 95 % interval",
        marker=dict(size=10, color=PRIMARY, symbol="diamond"),
        error_y=error_bars(mean[layer], low[layer], high[layer], color=PRIMARY),
        customdata=np.stack([low, high], axis=1)[layer].tolist(),
        hovertemplate="layer %{x}<br>ALR / chance %{y:.2f}, 95 % %{customdata[0]:.2f} to %{customdata[1]:.2f}"
        "<extra></extra>",
    )  # fmt: skip
    figure.update_layout(
        xaxis=index_axis(len(mean), "layer", most=16), yaxis=axis("ALR / chance", range=[-0.05, 2.05], dtick=0.5)
    )
    return figure


def order_agreement(texts: np.ndarray, spearman: np.ndarray, kendall: np.ndarray, *, stable: float) -> go.Figure:
    """How alike two halves of `texts` texts each order the layers, [K] each; `stable` marks where it is enough."""
    figure = new_figure(height=340)
    line = dict(color=CONTRAST, width=1.5, dash="dash")
    figure.add_hline(y=stable, line=line, name=f"stable from {stable:g} on", showlegend=True)
    for name, values, color, symbol, dash in (
        ("Spearman", spearman, PRIMARY, "circle", "solid"),
        ("Kendall", kendall, FULL_GREY, "square-open", "dot"),
    ):
        figure.add_scatter(
            x=texts, y=values, mode="lines+markers", name=name, line=dict(color=color, dash=dash),
            marker=dict(size=8, symbol=symbol), hovertemplate=f"{name} %{{y:.2f}}<extra></extra>",
        )  # fmt: skip
    figure.update_layout(
        hovermode="x unified",
        xaxis=axis("texts in each half", range=[0.5, max(len(texts), 1) + 0.5], tickformat="d", showgrid=False),
        yaxis=axis("agreement on the order of layers", range=[min(-0.05, np.nanmin(spearman, initial=0)), 1.05]),
    )
    return figure
