"""One token of a recorded generation: where it was evicted and when, and the attention that it got."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from analysis.timelines import COMPRESSED, Timeline
from app.figures.style import CONTRAST, FULL_GREY, PRIMARY, SEQUENTIAL, axis, colorbar, index_axis, new_figure

_HELD, _EVICTED = "●", "×"  # so that not colour alone tells them apart


def evictions_by_head(timeline: Timeline, token: int) -> go.Figure:
    """Map of the heads that hold a token in the end, and of when the others evicted it; layers from left to right."""
    layers, heads = sorted(set(timeline.layers)), 1 + max(timeline.heads)
    after = np.full((heads, len(layers)), np.nan)
    held = np.full((heads, len(layers)), np.nan)
    for k, (layer, head) in enumerate(zip(timeline.layers, timeline.heads, strict=True)):
        step, column = timeline.evicted[k, token], layers.index(layer)
        if step:
            after[head, column] = timeline.seen[step]
        else:
            held[head, column] = 1.0
    names = [str(layer) for layer in layers]
    place = "layer %{x}, kv head %{y}<br>"
    figure = new_figure(height=max(150, 90 + 18 * heads))
    figure.add_heatmap(
        z=held, x=names, colorscale=[[0, PRIMARY], [1, PRIMARY]], showscale=False, xgap=1, ygap=1, hoverongaps=False,
        text=np.where(np.isnan(held), "", _HELD), texttemplate="%{text}", textfont=dict(color="white"),
        hovertemplate=place + "held to the end<extra></extra>",
    )  # fmt: skip
    low, high = float(timeline.seen[COMPRESSED]), float(timeline.seen[-1])
    figure.add_heatmap(
        z=after, x=names, zmin=low, zmax=high, colorscale=SEQUENTIAL, reversescale=True, xgap=1, ygap=1,
        hoverongaps=False,
        text=np.where(np.isnan(after), "", _EVICTED), texttemplate="%{text}",
        colorbar=colorbar("tokens read", len=1, tickvals=[low, high], tickformat="d"),
        hovertemplate=place + "evicted after %{z:,.0f} tokens<extra></extra>",
    )  # fmt: skip
    figure.update_layout(
        xaxis=axis("layer", type="category", showgrid=False, fixedrange=True, nticks=16, tickangle=0),
        yaxis=index_axis(heads, "kv head", most=12),
    )
    return figure


def attention_by_step(timeline: Timeline, token: int) -> go.Figure:
    """Attention to a token at each step, the mean over all heads, and the share of heads that hold it."""
    steps = np.arange(COMPRESSED, len(timeline.seen))
    first = max(int(timeline.arrived[token]), COMPRESSED)
    rows = (steps - COMPRESSED) // timeline.steps_per_row
    read = timeline.seen[steps]
    shown = steps >= first
    attention = timeline.attention[rows, token]
    holding = np.array(
        [(timeline.evicted[:, token] == 0).sum() + (timeline.evicted[:, token] > step).sum() for step in steps]
    )
    figure = new_figure(height=240, hovermode="x unified", margin=dict(l=64, r=64, t=8, b=48))
    figure.add_scatter(
        x=read[shown], y=attention[shown].astype(np.float32), name="attention", mode="lines+markers",
        line=dict(color=CONTRAST, width=2), marker=dict(size=4),
        hovertemplate="%{y:.3%} of a head's attention<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=read[shown], y=holding[shown] / timeline.n_heads, name="heads that hold it", mode="lines", yaxis="y2",
        line=dict(color=PRIMARY, width=2, shape="hv", dash="dash"), customdata=holding[shown],
        hovertemplate=f"%{{customdata}} of {timeline.n_heads} heads hold it<extra></extra>",
    )  # fmt: skip
    figure.update_layout(
        xaxis=axis("tokens read", tickformat="d"),
        yaxis=axis("mean attention", rangemode="tozero", tickformat=".2~%"),
        yaxis2=axis(
            "heads that hold it",
            overlaying="y",
            side="right",
            range=[0, 1.05],
            dtick=0.5,
            tickformat=".0%",
            showgrid=False,
        ),
    )
    return figure


def nats_by_token(without: Sequence[float], with_them: Sequence[float], labels: Sequence[str]) -> go.Figure:
    """NLL of each token of the continuation, as recorded and with tokens pinned."""
    at = np.arange(len(without))
    figure = new_figure(height=240, hovermode="x unified")
    for name, nats, style in (
        ("as recorded", without, dict(color=FULL_GREY, width=2, dash="dot")),
        ("with the tokens pinned", with_them, dict(color=PRIMARY, width=2)),
    ):
        figure.add_scatter(
            x=at, y=np.asarray(nats, np.float32), name=name, mode="lines+markers", line=style, marker=dict(size=4),
            text=labels, hovertemplate="%{text}: %{y:.3f} nats<extra></extra>",
        )  # fmt: skip
    figure.update_layout(
        xaxis=axis("token of the continuation", tickformat="d"), yaxis=axis("NLL (nats)", rangemode="tozero")
    )
    return figure
