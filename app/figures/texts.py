"""Figures over many texts: `head_over_texts` and `order_agreement`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from app.figures.style import (
    CONTRAST,
    FULL_GREY,
    PRIMARY,
    axis,
    correlation_axis,
    index_axis,
    level,
    literal,
    new_figure,
)

_BAND = "rgba(108,95,240,0.16)"  # PRIMARY, so pale that points on it stay readable


def head_over_texts(
    gamma: np.ndarray, gamma_skip_first: np.ndarray, names: Sequence[str], *, mean: float, low: float, high: float
) -> go.Figure:
    """Γ of one head on each of N texts, [N] each, NaN = undefined; its mean and the ends of its interval.

    gamma: of all tokens, solid; gamma_skip_first: without the first one, hollow. `mean`, `low` and `high` are of the
    former; an undefined interval is not drawn.
    """
    figure = new_figure(height=340)
    level(figure, 0, dash="solid")
    if np.isfinite([low, high]).all():
        figure.add_hrect(y0=low, y1=high, fillcolor=_BAND, line_width=0, layer="below", name="95 % interval",
                         showlegend=True)  # fmt: skip
    if np.isfinite(mean):
        level(figure, mean, "mean", color=PRIMARY, dash="dash", width=2)
    hollow = dict(size=8, color=FULL_GREY, symbol="circle-open", line_width=2)
    groups = (("Γ", gamma, dict(size=9, color=PRIMARY)), ("without the first token", gamma_skip_first, hollow))
    for name, values, marker in groups:
        text = np.flatnonzero(np.isfinite(values)).tolist()
        figure.add_scatter(
            x=text, y=values[text], mode="markers", name=name, marker=marker,
            text=[literal(names[i]) for i in text],
            hovertemplate=f"text %{{x}}: %{{text}}<br>{name} %{{y:+.2f}}<extra></extra>",
        )  # fmt: skip
    figure.update_layout(
        xaxis=index_axis(len(gamma), "text", most=16),
        yaxis=correlation_axis("Γ"),
    )
    return figure


def order_agreement(texts: np.ndarray, spearman: np.ndarray, kendall: np.ndarray, *, stable: float) -> go.Figure:
    """Agreement of two halves of `texts` texts on the order of layers, [K] each; `stable` marks the level to reach."""
    figure = new_figure(height=340)
    level(figure, stable, f"stable from {stable:g} on", color=CONTRAST, dash="dash")
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
