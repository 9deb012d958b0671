"""Figures per layer: `layer_alr`, `means_by_layer` and `layer_costs`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from app.figures.style import (
    CONTRAST,
    FULL_GREY,
    GRID,
    OF_HEAD,
    PRIMARY,
    as_customdata,
    axis,
    error_bars,
    index_axis,
    level,
    new_figure,
    normalised_alr_axis,
)


def layer_alr(
    by_head: np.ndarray, by_layer: np.ndarray, *, threshold: float | None, skipped: Sequence[int] = ()
) -> go.Figure:
    """Normalised ALR: 0 ideal, 1 random, 2 reversed. by_head [L, H], by_layer [L], `skipped` shaded.

    `threshold` is drawn where the rule that suggests layers has one.
    """
    n_layers, _ = by_head.shape
    layer, head = np.nonzero(np.isfinite(by_head))
    figure = new_figure(height=380)
    for skip in skipped:
        figure.add_vrect(x0=skip - 0.5, x1=skip + 0.5, fillcolor=GRID, line_width=0, layer="below")
    level(figure, 1, "chance")
    if threshold is not None:
        level(figure, threshold, f"threshold {threshold:.2f}", color=CONTRAST, dash="dash")
    figure.add_scatter(
        x=layer, y=by_head[layer, head], mode="markers", name="head", customdata=as_customdata(layer, head),
        marker=dict(size=6, color=PRIMARY, opacity=0.6),
        hovertemplate=OF_HEAD + "normalised ALR %{y:.2f}<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=np.arange(n_layers), y=by_layer, mode="markers", name="layer",
        marker=dict(size=12, color=PRIMARY, symbol="diamond", line=dict(width=1.5, color="white")),
        hovertemplate="layer %{x}<br>normalised ALR %{y:.2f}<extra></extra>",
    )  # fmt: skip
    return figure.update_layout(xaxis=index_axis(n_layers, "layer", most=16), yaxis=normalised_alr_axis())


def means_by_layer(mean: np.ndarray, low: np.ndarray, high: np.ndarray) -> go.Figure:
    """Normalised ALR of each layer, mean and ends of its interval over texts, [L] each; NaN = undefined."""
    figure = new_figure(height=340)
    level(figure, 1, "chance")
    layer = np.flatnonzero(np.isfinite(mean))
    figure.add_scatter(
        x=layer, y=mean[layer], mode="markers", name="layer, mean and 95 % interval",
        marker=dict(size=10, color=PRIMARY, symbol="diamond"),
        error_y=error_bars(mean[layer], low[layer], high[layer], color=PRIMARY),
        customdata=np.stack([low, high], axis=1)[layer].tolist(),
        hovertemplate="layer %{x}<br>normalised ALR %{y:.2f}, 95 % %{customdata[0]:.2f} to %{customdata[1]:.2f}"
        "<extra></extra>",
    )  # fmt: skip
    return figure.update_layout(xaxis=index_axis(len(mean), "layer", most=16), yaxis=normalised_alr_axis())


def layer_costs(
    layers: Sequence[int],
    normalised_alr: np.ndarray,
    alr_ends: tuple[np.ndarray, np.ndarray],
    change: np.ndarray,
    change_ends: tuple[np.ndarray, np.ndarray],
) -> go.Figure:
    """What compressing one layer alone costs (up) against its normalised ALR (across): a numbered point a layer.

    layers: K of them; normalised_alr and change (nats/token) [K], means over texts; each with the ends of its interval.
    """
    bars = dict(thickness=1, width=4)
    figure = new_figure(height=420)
    level(figure, 0)
    figure.add_vline(x=1, line=dict(color=FULL_GREY, width=1.5, dash="dot"), name="chance", showlegend=True)
    figure.add_scatter(
        x=normalised_alr, y=change, mode="markers+text", text=[str(layer) for layer in layers], showlegend=False,
        textfont=dict(color="white", size=12), marker=dict(size=20, color=PRIMARY),
        error_x=error_bars(normalised_alr, *alr_ends, color=PRIMARY) | bars,
        error_y=error_bars(change, *change_ends, color=PRIMARY) | bars,
        customdata=np.stack(change_ends, axis=1).tolist(),
        hovertemplate="layer %{text}<br>normalised ALR %{x:.2f}<br>NLL %{y:+.4f}, 95 % %{customdata[0]:+.4f} to "
        "%{customdata[1]:+.4f}<extra></extra>",
    )  # fmt: skip
    figure.update_layout(xaxis=axis("normalised ALR"), yaxis=axis("NLL change, nats/token"))
    return figure
