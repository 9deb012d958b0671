"""One token of a recorded generation: where it was evicted and when, and the attention that it got."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from app.figures.style import CONTRAST, FULL_GREY, PRIMARY, axis, color_scale, colorbar, index_axis, new_figure

_HELD, _EVICTED = "●", "×"  # so that not colour alone tells them apart


def evictions_by_head(
    layers: Sequence[int], heads: Sequence[int], after: np.ndarray, *, span: tuple[int, int], dark: bool = False
) -> go.Figure:
    """Map of the heads that hold a token in the end, and of when the others evicted it; layers from left to right.

    layers, heads: numbers of the layer and the kv head of each of K heads; after [K]: tokens read when it evicted the
    token, NaN where it never did; span: the fewest and the most tokens read; dark: whether the page is.
    """
    columns, rows = sorted(set(layers)), 1 + max(heads)
    evicted, held = np.full((2, rows, len(columns)), np.nan)
    for layer, head, read in zip(layers, heads, after, strict=True):
        (held if np.isnan(read) else evicted)[head, columns.index(layer)] = 1.0 if np.isnan(read) else read
    names = [str(layer) for layer in columns]
    place = "layer %{x}, kv head %{y}<br>"
    low, high = span
    figure = new_figure(height=max(150, 90 + 18 * rows))
    figure.add_heatmap(
        z=held, x=names, colorscale=[[0, PRIMARY], [1, PRIMARY]], showscale=False, xgap=1, ygap=1, hoverongaps=False,
        text=np.where(np.isnan(held), "", _HELD), texttemplate="%{text}", textfont=dict(color="white"),
        hovertemplate=place + "held to the end<extra></extra>",
    )  # fmt: skip
    figure.add_heatmap(
        z=evicted, x=names, zmin=low, zmax=high, colorscale=color_scale("sequential", dark=dark), reversescale=True,
        xgap=1, ygap=1, hoverongaps=False,
        text=np.where(np.isnan(evicted), "", _EVICTED), texttemplate="%{text}",
        colorbar=colorbar("tokens read", len=1, tickvals=[low, high], tickformat="d"),
        hovertemplate=place + "evicted after %{z:,.0f} tokens<extra></extra>",
    )  # fmt: skip
    figure.update_layout(
        xaxis=axis("layer", type="category", showgrid=False, fixedrange=True, nticks=16, tickangle=0),
        yaxis=index_axis(rows, "kv head", most=12),
    )
    return figure


def attention_by_step(read: np.ndarray, attention: np.ndarray, holding: np.ndarray, *, n_heads: int) -> go.Figure:
    """Attention to a token after so many tokens read, the mean over all heads, and the share of heads that hold it.

    read, attention, holding [S]; holding: number of heads of `n_heads`.
    """
    figure = new_figure(height=240, hovermode="x unified", margin=dict(l=64, r=64, t=8, b=48))
    figure.add_scatter(
        x=read, y=attention.astype(np.float32), name="attention", mode="lines+markers",
        line=dict(color=CONTRAST, width=2), marker=dict(size=4),
        hovertemplate="%{y:.3%} of a head's attention<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=read, y=holding / n_heads, name="heads that hold it", mode="lines", yaxis="y2",
        line=dict(color=PRIMARY, width=2, shape="hv", dash="dash"), customdata=holding,
        hovertemplate=f"%{{customdata}} of {n_heads} kv heads hold it<extra></extra>",
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
