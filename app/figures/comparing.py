"""Comparison of whole runs: `gamma_spread` and `verdict_bars`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go

from app.figures.style import CONTRAST, LONGEST_NAME, PRIMARY, ZERO_LINE, axis, correlation_axis, literal, new_figure

_SIDES = (PRIMARY, CONTRAST)


def gamma_spread(gammas: Mapping[str, np.ndarray]) -> go.Figure:
    """Γ of all heads of each run, any shapes: every head a point beside a box of quartiles. NaN is left out."""
    figure = new_figure(height=360, showlegend=False)
    for i, (name, values) in enumerate(gammas.items()):
        color = _SIDES[i % len(_SIDES)]
        figure.add_box(
            y=values[np.isfinite(values)], name=literal(name), boxpoints="all", jitter=0.5, pointpos=-1.6,
            marker=dict(color=color, size=6, opacity=0.7), line=dict(color=color), hoverinfo="y",
        )  # fmt: skip
    figure.update_layout(xaxis=axis("", showgrid=False), yaxis=correlation_axis("Γ", **ZERO_LINE))
    return figure


def verdict_bars(counts: Mapping[str, Mapping[str, int]]) -> go.Figure:
    """Shares of each run's heads by verdict. counts: run -> verdict -> number of heads."""
    figure = new_figure(height=360, barmode="group", bargap=0.3)
    for i, (name, of) in enumerate(counts.items()):
        total = max(sum(of.values()), 1)
        figure.add_bar(
            x=[count / total for count in of.values()], y=list(of), orientation="h",
            name=literal(name, longest=LONGEST_NAME), marker=dict(color=_SIDES[i % len(_SIDES)]),
            customdata=list(of.values()), hovertemplate="%{y}: %{customdata} heads, %{x:.0%}<extra></extra>",
        )  # fmt: skip
    figure.update_layout(
        xaxis=axis("share of the heads", tickformat=".0%", rangemode="tozero"),
        yaxis=axis("", autorange="reversed", showgrid=False),
    )
    return figure
