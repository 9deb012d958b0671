"""The paper's figures: loss beyond the ideal order, a sink's key, zeroed dimensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from app.figures.style import CONTRAST, FULL_GREY, PRIMARY, axis, new_figure

_BAND = "rgba(138,143,152,0.3)"


def excess_loss(dropped: np.ndarray, best: np.ndarray, worst: np.ndarray, *, names: Sequence[str]) -> go.Figure:
    """Attention lost by norm order less that of the ideal order, [S] each, by share of tokens dropped [S].

    Two panels, each with a scale of its own, as the paper has them: on one, the best head would be a flat line.
    """
    figure = new_figure(height=340, hovermode="x unified", showlegend=False, margin=dict(l=56, r=16, t=32, b=48))
    panels = ((best, names[0], PRIMARY, "", [0.0, 0.45]), (worst, names[1], CONTRAST, "2", [0.55, 1.0]))
    for values, name, color, suffix, domain in panels:
        figure.add_scatter(
            x=100 * dropped, y=values, xaxis=f"x{suffix}", yaxis=f"y{suffix}", mode="lines",
            line=dict(color=color, width=2.5), fill="tozeroy", hovertemplate="%{y:.4f}<extra></extra>",
        )  # fmt: skip
        figure.add_annotation(
            text=name, x=domain[0], y=1.02, xref="paper", yref="paper", xanchor="left", yanchor="bottom",
            showarrow=False, font=dict(size=14),
        )  # fmt: skip
        title = dict(unifiedhovertitle=dict(text="%{x:.0f} % dropped"))
        x = axis("tokens dropped (%)", domain=domain, anchor=f"y{suffix}", range=[0, 100], dtick=25) | title
        y = axis("attention lost beyond the ideal", anchor=f"x{suffix}", rangemode="tozero")
        figure.update_layout({f"xaxis{suffix}": x, f"yaxis{suffix}": y if not suffix else y | dict(title=None)})
    return figure


def key_dimensions(sink: np.ndarray, others: np.ndarray, spread: np.ndarray, peaks: Sequence[int]) -> go.Figure:
    """Absolute values of a sink's key, bars, beside the other tokens' mean and standard deviation. [D] each."""
    dimension = np.arange(len(sink))
    figure = new_figure(height=380, hovermode="x unified", bargap=0.2)
    for name, chosen, color in (
        ("first token", ~np.isin(dimension, peaks), PRIMARY),
        ("first token, peaked dimensions", np.isin(dimension, peaks), CONTRAST),
    ):
        figure.add_bar(
            x=dimension[chosen], y=sink[chosen], name=name, marker=dict(color=color),
            hovertemplate="first token %{y:.3f}<extra></extra>",
        )  # fmt: skip
    ends = np.maximum(others - spread, 0), others + spread
    for heights, options in ((ends[1], {}), (ends[0], dict(fill="tonexty", fillcolor=_BAND, name="± one deviation"))):
        shown = dict(showlegend=bool(options), hoverinfo="skip", legendgroup="others")
        figure.add_scatter(x=dimension, y=heights, mode="lines", line=dict(width=0), **shown, **options)
    figure.add_scatter(
        x=dimension, y=others, mode="lines", name="other tokens, mean", legendgroup="others",
        line=dict(color=FULL_GREY, width=2), hovertemplate="others %{y:.3f}<extra></extra>",
    )  # fmt: skip
    figure.update_layout(
        xaxis=axis("dimension of the key", range=[-0.7, len(sink) - 0.3], showgrid=False, tickformat="d")
        | dict(unifiedhovertitle=dict(text="dimension %{x}")),
        yaxis=axis("absolute value", rangemode="tozero"),
    )
    return figure


def channel_shares(shares: Mapping[str, np.ndarray]) -> go.Figure:
    """Share that the largest 1..D channels carry together, [D] each, by name: two at most, beside an even one."""
    figure = new_figure(height=300, hovermode="x unified")
    lines = ((PRIMARY, "solid"), (CONTRAST, "dash"))
    for (name, values), (color, dash) in zip(shares.items(), lines, strict=False):
        figure.add_scatter(
            x=np.arange(1, len(values) + 1), y=values, mode="lines", name=name, hovertemplate="%{y:.1%}",
            line=dict(color=color, width=2.5, dash=dash),
        )  # fmt: skip
    n = max((len(values) for values in shares.values()), default=1)
    even = dict(x=[0, n], y=[0, 1], mode="lines", name="all alike", hoverinfo="skip")
    figure.add_scatter(**even, line=dict(color=FULL_GREY, width=1.5, dash="dot"))
    figure.update_layout(
        xaxis=axis("number of channels or directions", range=[0, n], tickformat="d"),
        yaxis=axis("share of the total", range=[0, 1.04], tickformat=".0%"),
    )
    return figure


def zeroed_dimensions(measures: Mapping[str, tuple[float | None, float, np.ndarray]]) -> go.Figure:
    """Effect of zeroing the peaked dimensions, against as many random ones: a row for each measure, shares of 0 to 1.

    measures: name -> (as it is, or None; the peaked ones zeroed; [draws] random ones zeroed).
    """
    figure = new_figure(height=120 + 70 * len(measures), margin=dict(l=56, r=24, t=8, b=48))
    columns = dict(zip(measures, range(len(measures)), strict=True))
    rng = np.random.default_rng(0)
    drawn = [(x, row + y) for name, row in columns.items() for x, y in _strip(measures[name][2], rng)]
    as_it_is = [(measure[0], columns[name]) for name, measure in measures.items() if measure[0] is not None]
    peaked = [(measure[1], columns[name]) for name, measure in measures.items()]
    for name, points, marker in (
        ("random dimensions zeroed", drawn, dict(size=8, color=FULL_GREY, opacity=0.7)),
        ("as it is", as_it_is, dict(size=14, color=PRIMARY, symbol="line-ns-open", line=dict(width=3, color=PRIMARY))),
        ("peaked dimensions zeroed", peaked, dict(size=13, color=CONTRAST, symbol="diamond")),
    ):
        x, y = np.array(points).T
        figure.add_scatter(
            x=x, y=y, mode="markers", name=name, marker=marker, hovertemplate=f"%{{x:.1%}}<extra>{name}</extra>"
        )
    ticks = dict(tickvals=list(columns.values()), ticktext=list(columns))
    figure.update_layout(
        xaxis=axis("share of the attention", tickformat=".0%", range=[-0.02, 1.02]),
        yaxis=axis("", range=[len(columns) - 0.5, -0.5], showgrid=False, fixedrange=True, **ticks),
    )
    return figure


def _strip(values: np.ndarray, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Points side by side, so that equal ones do not hide each other."""
    return list(zip(values, rng.uniform(-0.2, 0.2, len(values)), strict=True))
