"""The Pareto front: `front`, of `Line`s."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from app.figures.style import (
    BELOW,
    CONTRAST,
    FULL_GREY,
    MARKERS,
    PRIMARY,
    axis,
    error_bars,
    level,
    literal,
    new_figure,
)

# Lines of a Pareto front: kinds are told apart by dash and filling, those of a kind by colour and marker.
_DASHES = {"uniform": "dash", "plan": "solid", "baseline": "dot"}
_TOWERS = 1.5
"""Times the highest plan, from which on a line is out of view."""
_COLORS = {
    "uniform": (PRIMARY, CONTRAST, "#2C8C9B"),
    "plan": ("#3E7CD6", "#B8456F", "#2C8C9B", "#A08A00", PRIMARY, "#8A5A2B", "#D98C00", "#E05299"),
    "baseline": (FULL_GREY,),
}


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """One allocation strategy at K budgets, by rising bytes. Arrays [K]."""

    mib: np.ndarray  # of the cache
    change: np.ndarray  # of the negative log likelihood against the full cache, nats/token
    low: np.ndarray  # ends of its interval
    high: np.ndarray
    keep_ratio: np.ndarray  # the budget asked for, 0 to 1
    kind: str  # "uniform", "plan" or "baseline"


def front(lines: Mapping[str, Line], *, full_mib: float, intervals: Collection[str] | None = None) -> go.Figure:
    """The bytes of the cache (x) against what it costs in prediction (y), a line for each strategy, with the
    intervals of the lines named, by default of all: those of a dozen strategies hide one another.

    Plans are solid with filled markers, uniform strategies dashed and hollow, baselines dotted grey; the full cache is
    a grey cross at no change. Lines that tower over the plans leave the view, which says so: a double click shows them.
    """
    figure = new_figure(height=560, legend=BELOW)
    level(figure, 0)
    drawn: Counter[str] = Counter()
    for name, line in lines.items():
        place, colors = drawn[line.kind], _COLORS[line.kind]
        color, symbol = colors[place % len(colors)], MARKERS[place % len(MARKERS)]
        drawn[line.kind] += 1
        figure.add_scatter(
            x=line.mib, y=line.change, mode="lines+markers", name=literal(name),
            line=dict(color=color, width=2, dash=_DASHES[line.kind]),
            marker=dict(size=9, symbol=symbol if line.kind == "plan" else f"{symbol}-open", line_width=1.5),
            error_y=error_bars(line.change, line.low, line.high, color=color) | dict(thickness=1, width=3)
            if intervals is None or name in intervals
            else None,
            customdata=np.stack([line.keep_ratio, line.low, line.high], axis=1).tolist(),
            hovertemplate=f"{literal(name)}, keep %{{customdata[0]:.0%}}<br>%{{x:.2f}} MiB<br>NLL %{{y:+.3f}}, "
            "95 % %{customdata[1]:+.3f} to %{customdata[2]:+.3f}<extra></extra>",
        )  # fmt: skip
    figure.add_scatter(
        x=[full_mib], y=[0], mode="markers", name="full cache", marker=dict(size=13, color=FULL_GREY, symbol="x"),
        hovertemplate="full cache<br>%{x:.2f} MiB<extra></extra>",
    )  # fmt: skip
    figure.update_layout(
        xaxis=axis("cache, MiB", rangemode="tozero"), yaxis=axis("NLL change, nats/token"), hoverdistance=15
    )
    if above := _towering(lines):
        low, high = _ends(line for name, line in lines.items() if name not in above)
        figure.update_yaxes(range=[min(low, 0) - 0.05 * (high - low), high + 0.1 * (high - low)])
        figure.add_annotation(
            x=1, y=1, xref="paper", yref="paper", xanchor="right", yanchor="top", showarrow=False,
            text=f"↑ {', '.join(map(literal, above))} (double-click)",
        )  # fmt: skip
    return figure


def _towering(lines: Mapping[str, Line]) -> list[str]:
    """Names of the lines that squash all plans where they are in view."""
    plans = [line for line in lines.values() if line.kind == "plan"]
    if not plans:
        return []
    _, high = _ends(plans)
    return [name for name, line in lines.items() if np.nanmax(line.change) > _TOWERS * high > 0]


def _ends(lines: Iterable[Line]) -> tuple[float, float]:
    """Lowest and highest end of intervals, or value where there is no interval."""
    values = np.concatenate([part for line in lines for part in (line.change, line.low, line.high)])
    return float(np.nanmin(values)), float(np.nanmax(values))
