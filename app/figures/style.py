"""Style of all figures: colours and their meanings, axes, safe labels, thinning. Knows Plotly's traps."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas  # noqa: F401 - whole, before any figure: Plotly takes what another session's thread has half imported
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

PRIMARY = "#6C5FF0"  # low norm kept, compressed; at least 4:1 on white and on #0e1117
CONTRAST = "#E8710A"  # its opposite: high norm kept, the sink, a limit
FULL_GREY = "#8A8F98"  # the full cache, chance, the ideal: what things are compared with
UNDEFINED = "rgba(138,143,152,0.5)"
CLEAR = "rgba(0,0,0,0)"
GRID = "rgba(138,143,152,0.22)"
QUIET = {False: "#5A5E68", True: "#B4B8C2"}  # of numbers on axes, by whether the page is dark: contrast 4.5 or more

Rgb = tuple[int, int, int]
# Purple and orange stay apart in every common colour blindness. Each by whether the page is dark.
PURPLE: dict[bool, Rgb] = {False: (74, 56, 201), True: (169, 159, 255)}
ORANGE: dict[bool, Rgb] = {False: (179, 77, 4), True: (255, 176, 102)}
PAGE: dict[bool, Rgb] = {False: (255, 255, 255), True: (23, 22, 20)}
# Viridis without its ends, which drown in a white or in a dark page.
LAYERS = [[0.0, "#5B5BB5"], [0.33, "#2C8C9B"], [0.67, "#3BB273"], [1.0, "#C9C22B"]]

# Lines that stand side by side: a colour and a marker each, so that colour never tells them apart alone.
COLORS = (PRIMARY, CONTRAST, "#2C8C9B", "#B8456F", "#A08A00", "#3E7CD6", "#8A5A2B", "#E05299")
MARKERS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "star", "pentagon", "x")
BELOW = dict(orientation="h", x=0, y=-0.16, yanchor="top", title_text="")  # a legend of many lines, under the axis

MOST_POINTS = 4000  # SVG markers a browser still pans smoothly
MOST_SAMPLES = 500  # points of a line: more than a screen has use for
OF_HEAD = "layer %{customdata[0]}, head %{customdata[1]}<br>"  # hover text begins so, over `as_customdata`
ZERO_LINE = dict(zeroline=True, zerolinecolor=FULL_GREY)
DECADES = 6  # depth of a logarithmic attention axis below its largest value
LONGEST_LABEL, LONGEST_NAME = 40, 64  # letters of a token, and of a run in a legend or along an axis


def new_figure(*, height: int, **layout: Any) -> go.Figure:
    """Make an empty figure in the common style. The empty template avoids 7 kB of another theme."""
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


def color_scale(kind: Literal["diverging", "sequential", "kept"], *, dark: bool) -> list[list[Any]]:
    """Colours of a map, those of the page at 0.

    One hue for what is lost, that of the bad end of the diverging one, and the other for what is kept: side by side,
    purple must not say two opposite things.
    """
    purple, page, orange = (f"rgb{color[dark]}" for color in (PURPLE, PAGE, ORANGE))
    if kind == "diverging":
        return [[0.0, purple], [0.5, page], [1.0, orange]]
    return [[0.0, page], [1.0, purple if kind == "kept" else orange]]


def reads_black(scale: list[list[Any]], share: np.ndarray) -> np.ndarray:
    """Whether black reads better than white at places of a scale, 0..1, of any shape; NaN counts as 0."""
    places = np.clip(np.nan_to_num(share), 0, 1)
    colors = sample_colorscale(scale, places.ravel(), colortype="tuple")
    return (luminance(colors) > 0.179).reshape(places.shape)  # where both read alike


def luminance(colors: Sequence[tuple[float, ...]]) -> np.ndarray:
    """WCAG relative luminance of sRGB colours, each channel 0..1."""
    channels = np.asarray(colors, dtype=float).reshape(-1, 3)
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return np.asarray(linear @ np.array([0.2126, 0.7152, 0.0722]))


def axis(title: str, **options: Any) -> dict[str, Any]:
    """An axis with grid lines and a title; `options` are Plotly's."""
    grid = dict(showgrid=True, gridcolor=GRID, zeroline=False)
    return dict(title=dict(text=title, standoff=10), automargin=True) | grid | options


def correlation_axis(title: str, **options: Any) -> dict[str, Any]:
    """An axis of Γ or a correlation: -1 to +1, whatever the data reach."""
    ticks = dict(tickvals=[-1, -0.5, 0, 0.5, 1], ticktext=["−1", "−0.5", "0", "+0.5", "+1"])
    return axis(title, range=[-1.05, 1.05], **ticks, **options)


def normalised_alr_axis() -> dict[str, Any]:
    """Axis of the normalised ALR: 0 ideal, 1 random, 2 reversed."""
    return axis("normalised ALR", range=[-0.05, 2.05], dtick=0.5)


def index_axis(count: int, title: str, *, most: int) -> dict[str, Any]:
    """An axis of layers or heads 0..count-1: whole cells, no zoom by accident, at most `most` numbers."""
    ticks = dict(tickvals=tick_values(count, most=most), tickangle=0)
    return axis(title, range=[-0.5, count - 0.5], showgrid=False, fixedrange=True, **ticks)


def tick_values(count: int, *, most: int) -> list[int]:
    """0, step, 2 * step, ... below count: the smallest step of 1, 2, 4, 8, ... that leaves at most `most`."""
    step = 1
    while -(-count // step) > max(most, 1):
        step *= 2
    return list(range(0, count, step))


def colorbar(title: str, **options: Any) -> dict[str, Any]:
    """A narrow colour bar; `options` are Plotly's."""
    side = "right" if len(title) > 2 else "top"  # a lone Γ must not lie on its side
    return dict(title=dict(text=title, side=side), thickness=10, xpad=6, outlinewidth=0) | options


def level(
    figure: go.Figure, y: float, name: str = "", *, color: str = FULL_GREY, dash: str = "dot", width: float = 1.5
) -> None:
    """Draw a level line across a figure; its name is in the legend, since beside the line it would lie under points."""
    named = dict(name=name, showlegend=True) if name else {}
    figure.add_hline(y=y, line=dict(color=color, width=width, dash=dash), **named)


def log_axis(attention: np.ndarray) -> tuple[float, dict[str, Any]]:
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
    return 10.0**exponent, dict(type="log", range=span, tickvals=[10.0**d for d in decades], ticktext=texts)


def salient(*series: np.ndarray) -> np.ndarray:
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


def as_customdata(layer: np.ndarray, head: np.ndarray) -> list[list[int]]:
    """customdata (layer, head) as plain lists: what a click brings back is then a list, not a typed array."""
    return [[int(i), int(h)] for i, h in zip(layer, head, strict=True)]


def error_bars(mean: np.ndarray, low: np.ndarray, high: np.ndarray, *, color: str) -> dict[str, Any]:
    """Make bars from `low` to `high` around `mean`, [K] each; none where an end is undefined."""
    above, below = (np.nan_to_num(np.maximum(end, 0)) for end in (high - mean, mean - low))
    return dict(type="data", symmetric=False, array=above, arrayminus=below, color=color, thickness=1.5, width=5)


def literal(text: str, *, longest: int = LONGEST_LABEL) -> str:
    """Escape any text for Plotly: no tags, no entities, no TeX.

    Plotly knows &lt; &gt; &amp; and numbers but not &quot;, so quotes stay as they are.
    """
    short = text if len(text) <= longest else text[: longest - 1] + "…"
    return html.escape(short, quote=False).replace("$", "&#36;")


def number(value: float, *, signed: bool) -> str:
    """Write a number with two decimals and a true minus, never a minus zero; a dash if undefined."""
    if not np.isfinite(value):
        return "–"
    rounded = round(float(value), 2) + 0.0
    return f"{rounded:{'+' if signed else ''}.2f}".replace("-", "−")


def largest(values: np.ndarray, *, default: float) -> float:
    """Largest finite value, or `default` if none is above zero."""
    return max(float(values[np.isfinite(values)].max(initial=0)), 0.0) or default
