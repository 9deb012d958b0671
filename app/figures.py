"""Figures of the app: numpy arrays in, `plotly.graph_objects.Figure` out.

Knows the encodings (which colour means what, which scale is shown) and Plotly's traps. Does not know
Streamlit, models, captures, the reader's theme or which head is chosen: a figure that changed with the choice
would lose the selection that made it. L layers, H query heads, T tokens, all 0-based. Backgrounds are
transparent and ordinary text has no colour of its own, so light and dark are the page's business; the page
also draws headings and captions.
"""

import html
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

PRIMARY = "#6C5FF0"  # low norm kept, compressed; at least 4:1 on white and on #0e1117
PALER = ("rgba(108,95,240,0.5)", "rgba(108,95,240,0.25)")  # PRIMARY, for a second and third compressed cache
CONTRAST = "#E8710A"  # its opposite: high norm kept, the sink, a limit
FULL_GREY = "#8A8F98"  # the full cache, chance, the ideal: what things are compared with
UNDEFINED = "rgba(138,143,152,0.35)"
CLEAR = "rgba(0,0,0,0)"
GRID = "rgba(138,143,152,0.22)"

# Purple and orange stay apart in every common colour blindness. Alike ends, so that -1 and +1 weigh the same.
DIVERGING = [[0.0, "#4A38C9"], [0.25, "#8F84EC"], [0.5, "#ECEAF1"], [0.75, "#EE9A50"], [1.0, "#B34D04"]]
# One hue, the one that means "bad" in DIVERGING: side by side, purple must not say two opposite things.
SEQUENTIAL = [[0.0, "#F5EFE9"], [0.5, "#EE9A50"], [1.0, "#A34503"]]
# Viridis without its ends, which drown in a white or in a dark page.
LAYERS = [[0.0, "#5B5BB5"], [0.33, "#2C8C9B"], [0.67, "#3BB273"], [1.0, "#C9C22B"]]

MOST_POINTS = 4000  # SVG markers a browser still pans smoothly
MOST_SAMPLES = 500  # points of a line: more than a screen has use for
DECADES = 6  # depth of a logarithmic attention axis below its largest value
LONGEST_LABEL = 40


# --------------------------------------------------------------------------------------- maps of layer x head


def head_map(
    values: np.ndarray,
    *,
    title: str,
    diverging: bool,
    status: np.ndarray | None = None,
    zmax: float | None = None,
) -> go.Figure:
    """One clickable cell per head, layer 0 at the top.

    values [L, H], NaN = undefined; status [L, H] of str says why, and is shown where it is not "ok".
    diverging: the scale is fixed to [-1, 1]. Otherwise it runs from 0 to `zmax`, or to the largest value: give
    `zmax` to make two maps comparable. A click arrives with customdata (layer, head).
    """
    n_layers, n_heads = values.shape
    low, high = (-1.0, 1.0) if diverging else (0.0, zmax or _largest(values, default=1.0))
    scale = DIVERGING if diverging else SEQUENTIAL
    row = int(np.clip(480 // max(n_layers, 1), 14, 34))  # px: 32 layers without scrolling, none under 14
    plot_height = row * n_layers

    figure = _figure(height=plot_height + 56, hoverdistance=-1, margin=dict(l=52, r=8, t=8, b=48))
    figure.add_heatmap(
        z=values, zmin=low, zmax=high, colorscale=scale, xgap=1, ygap=1, hoverinfo="skip",
        colorbar=_colorbar(title, len=min(plot_height, 320), lenmode="pixels", y=1, yanchor="top", nticks=5),
    )  # fmt: skip
    undefined = ~np.isfinite(values)
    if undefined.any():
        figure.add_heatmap(
            z=np.where(undefined, 0.0, np.nan), colorscale=[[0, UNDEFINED], [1, UNDEFINED]],
            xgap=1, ygap=1, hoverinfo="skip", showscale=False,
        )  # fmt: skip
    if n_layers <= 12 and n_heads <= 12:
        figure.add_traces(list(_cell_numbers(values, scale, low, high, signed=diverging)))

    # A click on a heat map does not reach Streamlit, a click on a marker does. No wider than the smallest
    # cell: the pointer is equally near to all markers that it is inside of, and would pick the wrong one of two.
    layer, head = np.indices(values.shape).reshape(2, -1)
    figure.add_scatter(
        x=head, y=layer, mode="markers", marker=dict(size=6, color=CLEAR), showlegend=False,
        customdata=_heads(layer, head), text=_cell_notes(values, title, status, signed=diverging),
        hovertemplate="layer %{customdata[0]}, head %{customdata[1]}<br>%{text}<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(**_index_axis(n_heads, "head", most=12))
    figure.update_yaxes(**_index_axis(n_layers, "layer", most=plot_height // 18), autorange=False)
    figure.update_yaxes(range=[n_layers - 0.5, -0.5])
    return figure


def _cell_numbers(values: np.ndarray, scale: list, low: float, high: float, *, signed: bool) -> Iterator[go.Scatter]:
    """Two decimals in every cell, black or white, whichever reads better on it; a dash on undefined cells."""
    layer, head = np.indices(values.shape).reshape(2, -1)
    flat = values.ravel()
    defined = np.isfinite(flat)
    fraction = np.clip((np.where(defined, flat, low) - low) / (high - low), 0, 1)
    pale = _luminance(sample_colorscale(scale, fraction, colortype="tuple")) > 0.179  # where both read alike
    groups = ((defined & pale, "#000000"), (defined & ~pale, "#FFFFFF"), (~defined, None))
    for members, color in groups:
        if members.any():
            font = dict(size=12 if values.shape[1] <= 8 else 10, color=color)
            yield go.Scatter(
                x=head[members], y=layer[members], mode="text", textfont=font, showlegend=False,
                text=[_number(value, signed=signed) for value in flat[members]], hoverinfo="skip",
                unselected=dict(textfont=dict(color=color or FULL_GREY)),  # a click must not fade the others
            )  # fmt: skip


def _cell_notes(values: np.ndarray, title: str, status: np.ndarray | None, *, signed: bool) -> list[str]:
    """Hover text of each cell: its value, and its status where that says more."""
    reasons = np.full(values.shape, "ok", dtype=object) if status is None else status
    notes = []
    for value, reason in zip(values.ravel(), reasons.ravel(), strict=True):
        reason = str(reason)
        note = f"{title} {_number(value, signed=signed)}" if np.isfinite(value) else f"{title} undefined"
        notes.append(note if reason == "ok" else f"{note}: {_literal(reason)}")
    return notes


def head_quadrant(
    gamma: np.ndarray,
    gamma_without_sink: np.ndarray,
    sink_share: np.ndarray,
    *,
    status: np.ndarray | None = None,
) -> go.Figure:
    """All heads by Γ with the sink (x) and without it (y); size = sink_share (0..1), colour = layer.

    All arrays [L, H]. Heads with either Γ undefined are left out. A click arrives with customdata (layer,
    head).
    """
    n_layers = len(gamma)
    layer, head = np.nonzero(np.isfinite(gamma) & np.isfinite(gamma_without_sink))
    share = np.nan_to_num(sink_share[layer, head])
    order = np.argsort(-share, kind="stable")  # small discs are drawn last, over the large ones
    layer, head, share = layer[order], head[order], np.clip(share[order], 0, 1)
    reasons = [""] * len(layer) if status is None else [str(reason) for reason in status[layer, head]]

    figure = _figure(height=480, margin=dict(l=56, r=8, t=28, b=64))
    figure.add_scatter(
        x=gamma[layer, head], y=gamma_without_sink[layer, head], mode="markers", showlegend=False,
        cliponaxis=False, customdata=_heads(layer, head),
        text=[f"{part:.0%}" + (f"<br>{_literal(why)}" if why not in ("", "ok") else "")
              for part, why in zip(share, reasons, strict=True)],
        marker=dict(
            size=7 + 21 * np.sqrt(share), opacity=0.8, line=dict(width=1, color=FULL_GREY),
            color=layer, cmin=0, cmax=max(n_layers - 1, 1), colorscale=LAYERS,
            colorbar=_colorbar("layer", tickvals=_ticks(n_layers, most=8)),
        ),
        hovertemplate="layer %{customdata[0]}, head %{customdata[1]}"
        "<br>Γ with sink %{x:+.2f}, without %{y:+.2f}<br>sink share %{text}<extra></extra>",
    )  # fmt: skip
    edge = 1.05
    for x, y, name in (  # written outside the square, since points crowd its corners
        (-edge, -edge, "↙ follows the paper"),
        (-edge, edge, "↖ sink only"),
        (edge, edge, "mirror: keep HIGH norms ↗"),
        (edge, -edge, "sink hides it ↘"),
    ):
        figure.add_annotation(
            x=x, y=y, xanchor="left" if x < 0 else "right", yanchor="top" if y < 0 else "bottom",
            text=f"<i>{name}</i>", showarrow=False,
        )  # fmt: skip
    for axis, title in (("x", "Γ with the sink"), ("y", "Γ without the sink")):
        ticks = dict(tickvals=[-1, -0.5, 0, 0.5, 1], ticktext=["−1", "−0.5", "0", "+0.5", "+1"])
        zero = dict(zeroline=True, zerolinecolor=FULL_GREY)
        figure.update_layout({f"{axis}axis": _axis(title, range=[-edge, edge], **ticks, **zero)})
    figure.update_xaxes(ticklabelstandoff=16)  # room for the lower pair of names
    return figure


# --------------------------------------------------------------------------------------- one head, its tokens


def norm_and_attention(
    key_norm: np.ndarray,
    attention: np.ndarray,
    labels: Sequence[str],
    *,
    kept: np.ndarray | None = None,
    attention_label: str = "attention",
    first_position: int = 0,
) -> go.Figure:
    """Key norm above, attention below, by token position.

    key_norm, attention (a share of mass, 0..1) [T]; labels T texts, shown literally; kept: bool [T], kept
    solid and evicted hollow. Attention is logarithmic with a floor, or one sink would press all other tokens
    onto the axis. `first_position`: the position of the first token given, where sinks are left out.
    """
    shown = _salient(key_norm, attention)
    floor, scale = _log_axis(attention)
    position = np.asarray(shown + first_position, dtype=np.int32)
    rows = (("y", key_norm), ("y2", np.maximum(np.nan_to_num(attention), floor)))

    figure = _figure(height=430)
    for name, chosen, marker in _kept_and_evicted(kept, shown):
        index = shown[chosen]
        for row, heights in rows:
            figure.add_scatter(
                x=position[chosen], y=heights[index].astype(np.float32), yaxis=row, mode="markers",
                marker=marker, name=name, legendgroup=name, showlegend=kept is not None and row == "y",
                **_token_hover(key_norm, attention, labels, index),
                hovertemplate=f"position %{{x}}: %{{text}}<br>key norm %{{customdata[0]:.4g}}<br>"
                f"{attention_label} %{{customdata[1]:.2p}}{name and f'<br>{name}'}<extra></extra>",
            )  # fmt: skip
    n_tokens = len(key_norm)
    thinned = f" ({len(shown):,} of {n_tokens:,} drawn, extremes kept)" if len(shown) < n_tokens else ""
    last = first_position + n_tokens - 1
    pad = 0.5 + 0.01 * n_tokens
    span = [first_position - pad, last + pad]
    figure.update_layout(
        xaxis=_axis("token position" + thinned, anchor="y2", range=span, tickformat="d"),
        yaxis=_axis("key norm (L2)", domain=[0.54, 1.0]),
        yaxis2=_axis(f"{attention_label} (log)", domain=[0.0, 0.46], **scale),
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
    shown = _salient(key_norm, attention)
    floor, scale = _log_axis(attention)
    is_first = shown + first_position == 0
    figure = _figure(height=420, margin=dict(l=56, r=8, t=32, b=48))
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
    stated = "undefined" if rho is None or not np.isfinite(rho) else f"= {_number(rho, signed=True)}"
    # Above the plot, under the legend: inside, one corner or another belongs to the points.
    figure.add_annotation(text=f"Spearman ρ {stated}, n = {n}", showarrow=False, xref="paper", yref="paper",
                          x=0, y=1, xanchor="left", yanchor="bottom", font=dict(size=14))  # fmt: skip
    figure.update_layout(xaxis=_axis("key norm (L2)"), yaxis=_axis("attention (log)", **scale), legend_y=1.09)
    return figure


def _kept_and_evicted(kept: np.ndarray | None, shown: np.ndarray) -> list[tuple[str, np.ndarray, dict]]:
    """(name, mask over `shown`, marker) for each group of tokens that has members."""
    solid = dict(color=PRIMARY, size=6, opacity=0.85)
    hollow = dict(color=FULL_GREY, size=6, opacity=0.75, symbol="circle-open")
    if kept is None:
        return [("", np.ones(len(shown), dtype=bool), solid)]
    mask = np.asarray(kept, dtype=bool)[shown]
    return [group for group in (("kept", mask, solid), ("evicted", ~mask, hollow)) if group[1].any()]


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
    return dict(text=[_literal(labels[i]) for i in index], customdata=exact)


def loss_curves(
    fraction_dropped: np.ndarray, curves: dict[str, np.ndarray], *, keep_ratio: float | None = None
) -> go.Figure:
    """Attention lost against tokens evicted.

    fraction_dropped [n + 1] from 0 to 1; each curve [n + 1], a share of mass (0..1), under one of the names
    "low norm kept", "high norm kept", "ideal", "chance". keep_ratio draws a line and states each loss there.
    """
    styles = {
        "low norm kept": dict(color=PRIMARY, width=3),
        "high norm kept": dict(color=CONTRAST, width=2.5),
        "ideal": dict(color=FULL_GREY, width=1.5, dash="dash"),
        "chance": dict(color=FULL_GREY, width=1.5, dash="dot"),
    }
    n_points = len(fraction_dropped)
    sampled = np.unique(np.linspace(0, n_points - 1, min(n_points, MOST_SAMPLES)).round().astype(int))
    evicted = 100 * np.asarray(fraction_dropped, dtype=float)

    figure = _figure(height=400, hovermode="x unified", margin=dict(l=56, r=24, t=8, b=48))
    if keep_ratio is not None:
        # The last point not beyond the line: m = n - ceil(keep_ratio * n) tokens, what the method evicts.
        at = max(int(np.searchsorted(evicted, 100 * (1 - keep_ratio) + 1e-9, side="right")) - 1, 0)
        figure.add_vline(x=100 * (1 - keep_ratio), line=dict(color=FULL_GREY, width=1.5, dash="dot"))
        figure.update_layout(legend_title_text=f"lost at {100 * (1 - keep_ratio):.3g} % evicted: ")
    for name in (name for name in styles if name in curves):
        lost = np.asarray(curves[name], dtype=float)
        stated = "" if keep_ratio is None else f" {lost[at]:.1%}"
        figure.add_scatter(
            x=evicted[sampled].astype(np.float32), y=lost[sampled].astype(np.float32), mode="lines",
            line=styles[name], name=name + stated, hovertemplate=f"{name}: %{{y:.1%}}<extra></extra>",
        )  # fmt: skip
        if keep_ratio is not None:
            dot = dict(color=styles[name]["color"], size=9)
            figure.add_scatter(x=evicted[[at]], y=lost[[at]], mode="markers", marker=dot, showlegend=False,
                               hoverinfo="skip")  # fmt: skip
    figure.update_layout(
        xaxis=_axis(
            "tokens evicted (%)",
            range=[0, 100],
            dtick=25,
            unifiedhovertitle=dict(text="%{x:.1f} % of the tokens evicted"),
        ),
        yaxis=_axis("attention lost (share of mass)", range=[-0.02, 1.04], tickformat=".0%", dtick=0.25),
    )
    return figure


def pooled_map(pooled: np.ndarray, *, tokens_per_bin: int, n_tokens: int) -> go.Figure:
    """Where each query looks, query 0 at the top.

    pooled [P, P]: row = query bin, column = key bin, each row sums to about 1. A bin holds `tokens_per_bin`
    tokens, the last one what is left of `n_tokens`.
    """
    n_bins = len(pooled)
    share = np.asarray(pooled, dtype=np.float32)
    visible = np.tri(n_bins, dtype=bool)  # a key later than the query cannot be seen: a gap, not a zero
    root = np.where(visible, np.sqrt(np.maximum(np.nan_to_num(share), 0)), np.nan).astype(np.float32)
    top = max(_largest(root, default=0.0), 1e-3)
    ticks = np.linspace(0, top, 5)
    starts = tokens_per_bin * np.arange(n_bins)
    ends = np.minimum(starts + tokens_per_bin, n_tokens) - 1
    bounds = zip(starts, ends, strict=True)
    spans = [f"{start}" if start == end else f"{start}–{end}" for start, end in bounds]
    # Category axes, since their names come through the hover: a string per bin and not one per cell.
    axis = dict(type="category", tickangle=0, showgrid=False, fixedrange=True, constrain="domain")
    marks = np.arange(0, n_bins, max(1, -(-n_bins // 8)))
    axis |= dict(tickvals=marks.tolist(), ticktext=[str(starts[mark]) for mark in marks])

    figure = _figure(height=480)
    figure.add_heatmap(
        z=root, x=spans, y=spans, zmin=0, zmax=top, colorscale="Viridis", customdata=share, hoverongaps=False,
        colorbar=_colorbar("attention share (√ scale)", len=280, lenmode="pixels", y=1, yanchor="top",
                           tickvals=ticks.tolist(), ticktext=[f"{100 * tick**2:.3g} %" for tick in ticks]),
        hovertemplate="query tokens %{y}<br>key tokens %{x}"
        "<br>%{customdata:.2%} of the attention<extra></extra>",
    )  # fmt: skip
    figure.update_layout(
        xaxis=_axis("key position (token)", range=[-0.5, n_bins - 0.5], **axis),
        yaxis=_axis(
            "query position (token)", range=[n_bins - 0.5, -0.5], scaleanchor="x", constraintoward="top", **axis
        ),
    )
    return figure


# -------------------------------------------------------------------------------------------------- per layer


def layer_alr(ratio: np.ndarray, per_layer: np.ndarray, *, threshold: float, skipped: Sequence[int] = ()) -> go.Figure:
    """ALR over chance: 0 ideal, 1 chance, 2 worst. ratio [L, H] per head, per_layer [L], `skipped` shaded."""
    n_layers, _ = ratio.shape
    layer, head = np.nonzero(np.isfinite(ratio))
    figure = _figure(height=380)
    for skip in skipped:
        figure.add_vrect(x0=skip - 0.5, x1=skip + 0.5, fillcolor=GRID, line_width=0, layer="below")
    # Named in the legend: a name beside its line would lie under the points.
    limits = ((1.0, "chance", FULL_GREY, "dot"), (threshold, f"threshold {threshold:.2f}", CONTRAST, "dash"))
    for height, name, color, dash in limits:
        line = dict(color=color, width=1.5, dash=dash)
        figure.add_hline(y=height, line=line, name=name, showlegend=True)
    figure.add_scatter(
        x=layer, y=ratio[layer, head], mode="markers", name="head", customdata=_heads(layer, head),
        marker=dict(size=6, color=PRIMARY, opacity=0.6),
        hovertemplate="layer %{customdata[0]}, head %{customdata[1]}<br>ALR / chance %{y:.2f}<extra></extra>",
    )  # fmt: skip
    figure.add_scatter(
        x=np.arange(n_layers), y=per_layer, mode="markers", name="layer",
        marker=dict(size=12, color=PRIMARY, symbol="diamond", line=dict(width=1.5, color="white")),
        hovertemplate="layer %{x}<br>ALR / chance %{y:.2f}<extra></extra>",
    )  # fmt: skip
    figure.update_layout(
        xaxis=_index_axis(n_layers, "layer", most=16),
        yaxis=_axis("ALR / chance", range=[-0.05, 2.05], dtick=0.5),
    )
    return figure


def kept_by_layer(kept: dict[str, np.ndarray], *, seen: int) -> go.Figure:
    """Tokens held per layer, a bar per column of `kept` (name -> [L]); a line marks the `seen` tokens.

    "full cache" is grey, every other column the primary colour, paler from the second on.
    """
    n_layers = max((len(held) for held in kept.values()), default=0)
    figure = _figure(height=320, barmode="group", bargap=0.25, hovermode="x unified")
    columns = iter((PRIMARY, *PALER))
    for name, held in kept.items():
        color = FULL_GREY if name == "full cache" else next(columns, PALER[-1])
        figure.add_bar(x=np.arange(len(held)), y=held, name=_literal(name), marker=dict(color=color),
                       hovertemplate="%{y:,} tokens")  # fmt: skip
    figure.add_hline(y=seen, line=dict(color=FULL_GREY, width=1.5, dash="dot"))
    figure.update_layout(
        xaxis=_index_axis(n_layers, "layer", most=16) | dict(unifiedhovertitle=dict(text="layer %{x}")),
        yaxis=_axis(f"tokens held, of {seen:,} seen", range=[0, 1.06 * max(seen, 1)], tickformat=",d"),
    )
    return figure


# ---------------------------------------------------------------------------------------------- shared by all


def _figure(*, height: int, **layout: Any) -> go.Figure:
    """An empty figure with what all share. The empty template keeps out 7 kB of another theme."""
    shared = dict(
        template=go.layout.Template(),
        height=height,
        margin=dict(l=56, r=8, t=8, b=48),
        paper_bgcolor=CLEAR,
        plot_bgcolor=CLEAR,
        hovermode="closest",
        legend=dict(orientation="h", x=0, xanchor="left", y=1.02, yanchor="bottom", title_text=""),
    )
    return go.Figure(layout=shared | layout)


def _axis(title: str, **options: Any) -> dict[str, Any]:
    grid = dict(showgrid=True, gridcolor=GRID, zeroline=False)
    return dict(title=dict(text=title, standoff=10), automargin=True) | grid | options


def _index_axis(count: int, title: str, *, most: int) -> dict[str, Any]:
    """An axis of layers or heads 0..count-1: whole cells, no zoom by accident, at most `most` numbers."""
    ticks = dict(tickvals=_ticks(count, most=most), tickangle=0)
    return _axis(title, range=[-0.5, count - 0.5], showgrid=False, fixedrange=True, **ticks)


def _ticks(count: int, *, most: int) -> list[int]:
    """0, step, 2 * step, ... below count: the smallest step of 1, 2, 4, 8, ... that leaves at most `most`."""
    step = 1
    while -(-count // step) > max(most, 1):
        step *= 2
    return list(range(0, count, step))


def _colorbar(title: str, **options: Any) -> dict[str, Any]:
    side = "right" if len(title) > 2 else "top"  # a lone Γ must not lie on its side
    return dict(title=dict(text=title, side=side), thickness=10, xpad=6, outlinewidth=0) | options


def _log_axis(attention: np.ndarray) -> tuple[float, dict[str, Any]]:
    """The floor that zeros are lifted to, a power of ten, and a logarithmic axis from there to the top."""
    positive = attention[np.isfinite(attention) & (attention > 0)]
    top = float(positive.max(initial=0)) or 1.0
    lowest = max(float(positive.min(initial=top)), top * 10.0**-DECADES)
    exponent = int(np.floor(np.log10(lowest) + 1e-9))
    ceiling = max(np.log10(top), exponent + 1)
    span = [exponent - 0.15, ceiling + 0.2]
    decades = range(exponent, int(np.floor(span[1])) + 1)
    texts = [f"{10.0 ** (decade + 2):.{max(-decade - 2, 0)}f} %" for decade in decades]
    texts[0] = f"≤ {texts[0]}"  # the floor: what lies below it is drawn on it
    options = dict(range=span, tickvals=[10.0**decade for decade in decades])
    options |= dict(type="log", ticktext=texts)
    return 10.0**exponent, options


def _salient(*series: np.ndarray) -> np.ndarray:
    """Ascending indices of the tokens to draw: all, or in a long text both ends and every stretch's extremes.

    Every n-th token would drop the sinks and the norms that stand out, which are what one looks for.
    """
    n_tokens = len(series[0])
    if n_tokens <= MOST_POINTS:
        return np.arange(n_tokens)
    chosen = [0, n_tokens - 1]
    for stretch in np.array_split(np.arange(n_tokens), (MOST_POINTS - 2) // (2 * len(series))):
        for values in series:
            within = np.nan_to_num(values[stretch])
            chosen += [stretch[within.argmin()], stretch[within.argmax()]]
    return np.unique(chosen)


def _heads(layer: np.ndarray, head: np.ndarray) -> list[list[int]]:
    """customdata (layer, head) as plain lists: what a click brings back is then a list, not a typed array."""
    return np.stack([layer, head], axis=1).tolist()


def _literal(text: str) -> str:
    """Any text, so that Plotly shows it as it stands: no tags, no entities, no TeX.

    Plotly knows &lt; &gt; &amp; and numbers but not &quot;, so quotes stay as they are.
    """
    short = text if len(text) <= LONGEST_LABEL else text[: LONGEST_LABEL - 1] + "…"
    return html.escape(short, quote=False).replace("$", "&#36;")


def _number(value: float, *, signed: bool) -> str:
    """Two decimals with a true minus, never a minus zero; an undefined number is a dash."""
    if not np.isfinite(value):
        return "–"
    rounded = round(float(value), 2) + 0.0
    return f"{rounded:{'+' if signed else ''}.2f}".replace("-", "−")


def _largest(values: np.ndarray, *, default: float) -> float:
    """The largest finite value, or `default` where there is none above zero."""
    return max(float(values[np.isfinite(values)].max(initial=0)), 0.0) or default


def _luminance(colors: list[tuple[float, float, float]]) -> np.ndarray:
    """WCAG relative luminance of sRGB colours, each channel 0..1."""
    channels = np.asarray(colors, dtype=float)
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return linear @ np.array([0.2126, 0.7152, 0.0722])
