"""Figures per layer: `layer_alr`, `layer_costs` and `kept_by_layer`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from app.figures.style import (
    CONTRAST,
    FULL_GREY,
    GRID,
    PALER,
    PRIMARY,
    as_customdata,
    axis,
    error_bars,
    index_axis,
    literal,
    new_figure,
)


def layer_alr(
    ratio: np.ndarray, per_layer: np.ndarray, *, threshold: float | None, skipped: Sequence[int] = ()
) -> go.Figure:
    """ALR over chance: 0 ideal, 1 chance, 2 worst. ratio [L, H] per head, per_layer [L], `skipped` shaded.

    `threshold` is drawn where the rule that suggests layers has one.
    """
    n_layers, _ = ratio.shape
    layer, head = np.nonzero(np.isfinite(ratio))
    figure = new_figure(height=380)
    for skip in skipped:
        figure.add_vrect(x0=skip - 0.5, x1=skip + 0.5, fillcolor=GRID, line_width=0, layer="below")
    # Named in the legend: a name beside its line would lie under the points.
    limits = [(1.0, "chance", FULL_GREY, "dot")]
    if threshold is not None:
        limits.append((threshold, f"threshold {threshold:.2f}", CONTRAST, "dash"))
    for height, name, color, dash in limits:
        line = dict(color=color, width=1.5, dash=dash)
        figure.add_hline(y=height, line=line, name=name, showlegend=True)
    figure.add_scatter(
        x=layer, y=ratio[layer, head], mode="markers", name="head", customdata=as_customdata(layer, head),
        marker=dict(size=6, color=PRIMARY, opacity=0.6),
        hovertemplate="layer %{customdata[0]}, head %{customdata[1]}<br>ALR / chance %{y:.2f}<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=np.arange(n_layers), y=per_layer, mode="markers", name="layer",
        marker=dict(size=12, color=PRIMARY, symbol="diamond", line=dict(width=1.5, color="white")),
        hovertemplate="layer %{x}<br>ALR / chance %{y:.2f}<extra></extra>",
    )  # fmt: skip
    figure.update_layout(
        xaxis=index_axis(n_layers, "layer", most=16),
        yaxis=axis("ALR / chance", range=[-0.05, 2.05], dtick=0.5),
    )
    return figure


def layer_costs(
    layers: Sequence[int],
    ratio: np.ndarray,
    ratio_ends: tuple[np.ndarray, np.ndarray],
    change: np.ndarray,
    change_ends: tuple[np.ndarray, np.ndarray],
) -> go.Figure:
    """What compressing one layer alone costs (up) against its ALR over chance (across): a numbered point a layer.

    layers: K of them; ratio and change (nats a token) [K], means over texts; each with the ends of its interval.
    """
    bars = dict(thickness=1, width=4)
    figure = new_figure(height=420)
    figure.add_hline(y=0, line=dict(color=FULL_GREY, width=1.5, dash="dot"))
    figure.add_vline(x=1, line=dict(color=FULL_GREY, width=1.5, dash="dot"), name="chance", showlegend=True)
    figure.add_scatter(
        x=ratio, y=change, mode="markers+text", text=[str(layer) for layer in layers], showlegend=False,
        textfont=dict(color="white", size=12), marker=dict(size=20, color=PRIMARY),
        error_x=error_bars(ratio, *ratio_ends, color=PRIMARY) | bars,
        error_y=error_bars(change, *change_ends, color=PRIMARY) | bars,
        customdata=np.stack(change_ends, axis=1).tolist(),
        hovertemplate="layer %{text}<br>ALR / chance %{x:.2f}<br>NLL %{y:+.4f}, 95 % %{customdata[0]:+.4f} to "
        "%{customdata[1]:+.4f}<extra></extra>",
    )  # fmt: skip
    figure.update_layout(xaxis=axis("ALR / chance"), yaxis=axis("NLL change, nats a token"))
    return figure


def kept_by_layer(kept: dict[str, np.ndarray], *, seen: int) -> go.Figure:
    """Tokens held per layer, a bar per column of `kept` (name -> [L]); a line marks the `seen` tokens.

    "full cache" is grey, every other column the primary colour, paler from the second on.
    """
    n_layers = max((len(held) for held in kept.values()), default=0)
    figure = new_figure(height=320, barmode="group", bargap=0.25, hovermode="x unified")
    columns = iter((PRIMARY, *PALER))
    for name, held in kept.items():
        color = FULL_GREY if name == "full cache" else next(columns, PALER[-1])
        figure.add_bar(x=np.arange(len(held)), y=held, name=literal(name), marker=dict(color=color),
                       hovertemplate="%{y:,} tokens")  # fmt: skip
    figure.add_hline(y=seen, line=dict(color=FULL_GREY, width=1.5, dash="dot"))
    figure.update_layout(
        xaxis=index_axis(n_layers, "layer", most=16) | dict(unifiedhovertitle=dict(text="layer %{x}")),
        yaxis=axis(f"tokens held, of {seen:,} seen", range=[0, 1.06 * max(seen, 1)], tickformat=",d"),
    )
    return figure
