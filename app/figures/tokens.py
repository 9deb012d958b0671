"""One head over the tokens of a text: norms, attention, loss curves, the attention map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from app.figures.style import (
    CONTRAST,
    FULL_GREY,
    MOST_SAMPLES,
    PRIMARY,
    ZERO_LINE,
    axis,
    color_scale,
    colorbar,
    correlation_axis,
    largest,
    literal,
    log_axis,
    new_figure,
    number,
    salient,
)


def norm_and_attention(
    key_norm: np.ndarray, attention: np.ndarray, labels: Sequence[str], *, attention_label: str = "attention"
) -> go.Figure:
    """Key norm above, attention below, by token position: for a report; a page draws it by `positions`.

    key_norm, attention (a share of mass, 0..1) [T]; labels T texts, shown literally. Attention is logarithmic with a
    floor, or one sink would press all other tokens onto the axis.
    """
    shown = salient(key_norm, attention)
    floor, scale = log_axis(attention)
    n_tokens = len(key_norm)
    # A fixed margin: automatic ones draw every marker twice.
    figure = new_figure(height=430, margin=dict(l=84, r=8, t=28, b=48))
    for row, heights in (("y", key_norm), ("y2", np.maximum(np.nan_to_num(attention), floor))):
        figure.add_scatter(
            x=shown.astype(np.int32), y=heights[shown].astype(np.float32), yaxis=row, mode="markers",
            marker=dict(color=PRIMARY, size=6, opacity=0.85), name="", showlegend=False,
            **_token_hover(key_norm, attention, labels, shown),
            hovertemplate=f"position %{{x}}: %{{text}}<br>key norm %{{customdata[0]:.4g}}<br>"
            f"{attention_label} %{{customdata[1]:.2p}}<extra></extra>",
        )  # fmt: skip
    thinned = f" ({len(shown):,} of {n_tokens:,} drawn, extremes kept)" if len(shown) < n_tokens else ""
    pad = 0.5 + 0.01 * n_tokens
    span = [-pad, n_tokens - 1 + pad]
    figure.update_layout(
        xaxis=axis("token position" + thinned, anchor="y2", range=span, tickformat="d", automargin=False),
        yaxis=axis("key norm (L2)", domain=[0.54, 1.0], automargin=False),
        yaxis2=axis(f"{attention_label} (log)", domain=[0.0, 0.46], automargin=False, **scale),
    )
    return figure


def norm_attention_scatter(
    key_norm: np.ndarray,
    attention: np.ndarray,
    labels: Sequence[str],
    *,
    rho: float | None,
    n: int,
    first_position: int = 0,
) -> go.Figure:
    """Attention against key norm, one point per token. Arguments as in `norm_and_attention`.

    rho, n: Spearman's correlation (None = undefined) and the number of tokens it is computed from. The first
    token (position 0, the usual sink) has a marker of its own.
    """
    shown = salient(key_norm, attention)
    floor, scale = log_axis(attention)
    is_first = shown + first_position == 0
    figure = new_figure(height=420, margin=dict(l=56, r=8, t=32, b=48))
    for name, chosen, marker in (
        ("other tokens", ~is_first, dict(color=PRIMARY, size=6, opacity=0.65)),
        ("first token (position 0)", is_first, dict(color=CONTRAST, size=13, symbol="diamond")),
    ):
        index = shown[chosen]
        if not len(index):
            continue
        figure.add_scatter(
            x=key_norm[index].astype(np.float32), mode="markers", marker=marker, name=name,
            y=np.maximum(np.nan_to_num(attention[index]), floor).astype(np.float32),
            **_token_hover(key_norm, attention, labels, index, position=index + first_position),
            hovertemplate="position %{customdata[2]}: %{text}<br>key norm %{customdata[0]:.4g}<br>"
            "attention %{customdata[1]:.2p}<extra></extra>",
        )  # fmt: skip
    stated = "undefined" if rho is None or not np.isfinite(rho) else f"= {number(rho, signed=True)}"
    # Above the plot, under the legend: inside, one corner or another belongs to the points.
    figure.add_annotation(
        text=f"Spearman ρ {stated}, all queries, n = {n}", showarrow=False, xref="paper", yref="paper",
        x=0, y=1, xanchor="left", yanchor="bottom", font=dict(size=14),
    )  # fmt: skip
    figure.update_layout(xaxis=axis("key norm (L2)"), yaxis=axis("attention (log)", **scale), legend_y=1.09)
    return figure


def gamma_by_query(
    gamma: np.ndarray,
    labels: Sequence[str],
    *,
    first_position: int,
    next_token: float,
    next_label: str,
    marked: int | None = None,
) -> go.Figure:
    """Γ of one head for each of the last queries, and for the next token after them. -1 to +1, whatever they are.

    gamma [W], NaN = undefined; labels W texts, shown literally; first_position: where the first of them stands; marked:
    the position of the query that is looked at.
    """
    position = np.arange(first_position, first_position + len(gamma))
    end = first_position + len(gamma)
    figure = new_figure(height=250, margin=dict(l=56, r=8, t=8, b=48))
    groups = (
        (f"the last {len(gamma)} queries", position, gamma, labels, dict(color=PRIMARY, size=9, opacity=0.85)),
        ("the next token", [end], [next_token], [next_label], dict(color=CONTRAST, size=13, symbol="diamond")),
    )
    for name, x, y, texts, marker in groups:
        if len(x):
            figure.add_scatter(
                x=np.asarray(x, dtype=np.int32), y=np.asarray(y, dtype=np.float32), mode="markers", name=name,
                marker=marker, cliponaxis=False, text=[literal(text) for text in texts],
                hovertemplate="query at position %{x}: %{text}<br>Γ %{y:+.2f}<extra></extra>",
            )  # fmt: skip
    if np.isfinite(gamma).any():
        mean = float(np.nanmean(gamma))
        ends = dict(x=[first_position - 0.5, end - 0.5], y=[mean, mean], hoverinfo="skip")
        line = dict(color=PRIMARY, width=1.5, dash="dot")
        figure.add_scatter(**ends, mode="lines", line=line, name=f"their mean, {number(mean, signed=True)}")
    if marked is not None:
        figure.add_vline(x=marked, line=dict(color=FULL_GREY, width=1.5, dash="dot"))
    span = [first_position - 0.75, end + 0.75]
    figure.update_layout(
        xaxis=axis("position of the query", range=span, tickformat="d", showgrid=False),
        yaxis=correlation_axis("Γ", fixedrange=True, zerolinewidth=1.5, **ZERO_LINE),
    )
    return figure


def _token_hover(
    key_norm: np.ndarray,
    attention: np.ndarray,
    labels: Sequence[str],
    index: np.ndarray,
    position: np.ndarray | None = None,
) -> dict[str, Any]:
    """Text and customdata (norm, attention, maybe position) of the tokens in `index`: true, not floored."""
    columns = [key_norm[index], attention[index]] + ([] if position is None else [position])
    exact = np.stack(columns, axis=1).astype(np.float32)
    return dict(text=[literal(labels[i]) for i in index], customdata=exact)


def loss_curves(
    fraction_dropped: np.ndarray,
    curves: dict[str, np.ndarray],
    *,
    keep_ratio: float | None = None,
    lost: float | None = None,
) -> go.Figure:
    """Attention lost against tokens evicted.

    fraction_dropped [n + 1] rises from 0, to 1 or to what may be evicted; each curve [n + 1], a share of mass (0..1),
    under one of the names "keep low norm", "keep high norm", "ideal order", "random order". keep_ratio draws a line and
    states what is lost there, or where nothing more may be evicted; `lost` marks there what a compression loses.
    """
    styles = {
        "keep low norm": dict(color=PRIMARY, width=3),
        "keep high norm": dict(color=CONTRAST, width=2.5),
        "ideal order": dict(color=FULL_GREY, width=1.5, dash="dash"),
        "random order": dict(color=FULL_GREY, width=1.5, dash="dot"),
    }
    n_points = len(fraction_dropped)
    sampled = np.unique(np.linspace(0, n_points - 1, min(n_points, MOST_SAMPLES)).round().astype(int))
    evicted = 100 * np.asarray(fraction_dropped, dtype=float)

    figure = new_figure(height=400, hovermode="x unified", margin=dict(l=56, r=24, t=8, b=48))
    if keep_ratio is not None:
        # The last point not beyond the line: m = n - ceil(keep_ratio * n) tokens, what the method evicts.
        at = max(int(np.searchsorted(evicted, 100 * (1 - keep_ratio) + 1e-9, side="right")) - 1, 0)
        figure.add_vline(x=100 * (1 - keep_ratio), line=dict(color=FULL_GREY, width=1.5, dash="dot"))
        figure.update_layout(legend_title_text=f"with {evicted[at]:.3g} % of the tokens evicted ")
    for name in (name for name in styles if name in curves):
        losses = np.asarray(curves[name], dtype=float)
        stated = "" if keep_ratio is None else f": {losses[at]:.1%} lost"
        figure.add_scatter(
            x=evicted[sampled].astype(np.float32), y=losses[sampled].astype(np.float32), mode="lines",
            line=styles[name], name=name + stated, hovertemplate=f"{name}: %{{y:.1%}} lost<extra></extra>",
        )  # fmt: skip
        if keep_ratio is not None:
            dot = dict(color=styles[name]["color"], size=9)
            figure.add_scatter(x=evicted[[at]], y=losses[[at]], mode="markers", marker=dot, showlegend=False,
                               hoverinfo="skip")  # fmt: skip
    if keep_ratio is not None and lost is not None:
        marker = dict(color=PRIMARY, size=15, symbol="circle-open", line=dict(width=3))
        name = f"my settings: {lost:.1%} lost"
        figure.add_scatter(x=[evicted[at]], y=[lost], mode="markers", marker=marker, name=name, hoverinfo="skip")
    figure.update_layout(
        xaxis=axis(
            "tokens evicted (%)",
            range=[0, 100],
            dtick=25,
            unifiedhovertitle=dict(text="%{x:.1f} % of the tokens evicted"),
        ),
        yaxis=axis("attention lost (share of mass)", range=[-0.02, 1.04], tickformat=".0%", dtick=0.25),
    )
    return figure


def pooled_map(pooled: np.ndarray, *, tokens_per_bin: int, n_tokens: int, dark: bool = False) -> go.Figure:
    """Attention map, pooled: where each query looks, query 0 at the top.

    pooled [P, P]: row = query bin, column = key bin, each row sums to about 1; NaN is left out.
    A bin holds `tokens_per_bin` tokens, the last one what is left of `n_tokens`. dark: whether the page is.
    """
    n_bins = len(pooled)
    share = np.asarray(pooled, dtype=np.float32)
    visible = np.tri(n_bins, dtype=bool)  # a key later than the query cannot be seen: a gap, not a zero
    root = np.where(visible, np.sqrt(np.maximum(share, 0)), np.nan).astype(np.float32)
    top = max(largest(root, default=0.0), 1e-3)
    ticks = np.linspace(0, top, 5)
    starts = tokens_per_bin * np.arange(n_bins)
    ends = np.minimum(starts + tokens_per_bin, n_tokens) - 1
    edges = zip(starts, ends, strict=True)
    spans = [f"{start}" if start == end else f"{start}–{end}" for start, end in edges]
    # Category axes, since their names come through the hover: a string per bin and not one per cell.
    bounds = dict(type="category", tickangle=0, showgrid=False, fixedrange=True, constrain="domain")
    marks = np.arange(0, n_bins, max(1, -(-n_bins // 8)))
    bounds |= dict(tickvals=marks.tolist(), ticktext=[str(starts[mark]) for mark in marks])

    figure = new_figure(height=480)
    figure.add_heatmap(
        z=root, x=spans, y=spans, zmin=0, zmax=top, colorscale=color_scale("sequential", dark=dark), customdata=share,
        hoverongaps=False,
        colorbar=colorbar("attention share (√ scale)", len=280, lenmode="pixels", y=1, yanchor="top",
                           tickvals=ticks.tolist(), ticktext=[f"{100 * tick**2:.3g} %" for tick in ticks]),
        hovertemplate="query tokens %{y}<br>key tokens %{x}"
        "<br>%{customdata:.2%} of the attention<extra></extra>",
    )  # fmt: skip
    figure.update_layout(
        xaxis=axis("key position (token)", range=[-0.5, n_bins - 0.5], **bounds),
        yaxis=axis(
            "query position (token)", range=[n_bins - 0.5, -0.5], scaleanchor="x", constraintoward="top", **bounds
        ),
    )
    return figure
