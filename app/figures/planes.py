"""Heads as points by two numbers, colour = layer: `head_quadrant`, `gamma_against` and `factor_plane`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from app.figures.style import (
    FULL_GREY,
    LAYERS,
    LONGEST_NAME,
    OF_HEAD,
    ZERO_LINE,
    as_customdata,
    axis,
    colorbar,
    correlation_axis,
    literal,
    new_figure,
    tick_values,
)

_MARGIN = dict(l=56, r=8, t=28, b=64)  # room for names outside the square, since points crowd its corners


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
    share = np.clip(np.nan_to_num(sink_share), 0, 1)
    text = np.vectorize("{:.0%}".format, otypes=[object])(share)
    if status is not None:
        said = status.astype(str)
        text += np.where(said == "ok", "", "<br>" + np.vectorize(literal, otypes=[object])(said))
    figure = new_figure(height=480, margin=_MARGIN)
    hover = "Γ with sink %{x:+.2f}, without %{y:+.2f}<br>sink share %{text}"
    figure.add_trace(_heads(gamma, gamma_skip_first, hover, text=text, size=7 + 21 * np.sqrt(share)))
    edge = 1.05
    for x, y, name in (
        (-edge, -edge, "↙ follows the paper"),
        (-edge, edge, "↖ sink only"),
        (edge, edge, "mirror: keep HIGH norms ↗"),
        (edge, -edge, "sink hides it ↘"),
    ):
        figure.add_annotation(
            x=x, y=y, xanchor="left" if x < 0 else "right", yanchor="top" if y < 0 else "bottom",
            text=f"<i>{name}</i>", showarrow=False,
        )  # fmt: skip
    figure.update_layout(
        xaxis=correlation_axis("Γ with the sink", **ZERO_LINE),
        yaxis=correlation_axis("Γ without the sink", **ZERO_LINE),
    )
    figure.update_xaxes(ticklabelstandoff=16)  # room for the lower pair of names
    return figure


def gamma_against(first: np.ndarray, second: np.ndarray, *, names: Sequence[str]) -> go.Figure:
    """Γ of every head in one run (x) against that in another (y), [L, H] each. Undefined heads are left out."""
    figure = new_figure(height=480)
    _add_diagonal(figure, -1)
    figure.add_trace(_heads(first, second, "Γ %{x:+.2f}, then %{y:+.2f}"))
    x, y = (correlation_axis(f"Γ, {literal(name, longest=LONGEST_NAME)}", **ZERO_LINE) for name in names)
    return figure.update_layout(xaxis=x, yaxis=y)


def factor_plane(without_length: np.ndarray, without_direction: np.ndarray) -> go.Figure:
    """How far attention moves when all keys are equally long (x), and when all point alike (y); [L, H], 0 to 1.

    Above the diagonal the direction makes the attention, below it the length. Undefined heads are left out.
    """
    figure = new_figure(height=480, margin=_MARGIN)
    _add_diagonal(figure, 0)
    hover = "moved by equal lengths %{x:.0%}<br>moved by equal directions %{y:.0%}"
    figure.add_trace(_heads(without_length, without_direction, hover))
    for x, y, name in ((0, 1, "↖ the direction makes it"), (1, 0, "the length makes it ↘")):
        figure.add_annotation(
            x=x, y=y, xanchor="right" if x else "left", yanchor="top" if x else "bottom", yshift=-4 if x else 6,
            text=f"<i>{name}</i>", showarrow=False,
        )  # fmt: skip
    scale = dict(range=[-0.03, 1.03], tickformat=".0%", dtick=0.25)
    figure.update_layout(
        xaxis=axis("attention moved when all keys are equally long", ticklabelstandoff=16, **scale),
        yaxis=axis("… when all point alike", **scale),
    )
    return figure


def _add_diagonal(figure: go.Figure, low: float) -> None:
    figure.add_shape(type="line", x0=low, y0=low, x1=1, y1=1, line=dict(color=FULL_GREY, width=1.5, dash="dot"))


def _heads(
    x: np.ndarray, y: np.ndarray, hover: str, *, text: np.ndarray | None = None, size: np.ndarray | None = None
) -> go.Scatter:
    """A point for each head at which x and y are defined. All arrays [L, H]; size in px."""
    layer, head = np.nonzero(np.isfinite(x) & np.isfinite(y))
    if size is not None:
        order = np.argsort(-size[layer, head], kind="stable")  # small discs are drawn last, over the large ones
        layer, head = layer[order], head[order]
    n_layers = len(x)
    return go.Scatter(
        x=x[layer, head], y=y[layer, head], mode="markers", cliponaxis=False, showlegend=False,
        text=None if text is None else text[layer, head], customdata=as_customdata(layer, head),
        marker=dict(
            size=11 if size is None else size[layer, head], opacity=0.8, line=dict(width=1, color=FULL_GREY),
            color=layer, cmin=0, cmax=max(n_layers - 1, 1), colorscale=LAYERS,
            colorbar=colorbar("layer", tickvals=tick_values(n_layers, most=8)),
        ),
        hovertemplate=f"{OF_HEAD}{hover}<extra></extra>",
    )  # fmt: skip
