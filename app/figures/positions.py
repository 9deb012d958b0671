"""Tokens of one head by position: numpy arrays in, the option of an ECharts chart out.

It is what a click on the map or a key draws anew: a browser needs a fifth of a second for as many markers in SVG.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from app.figures.style import FULL_GREY, GRID, LONGEST_LABEL, PRIMARY, QUIET, log_axis, salient

_LEFT, _RIGHT, _TOP, _BOTTOM, _BETWEEN = 84, 12, 28, 48, 28
"""Pixels around the two rows, and between them."""
_TOKENS: dict[str, dict[str, Any]] = {
    "kept": dict(color=PRIMARY, opacity=0.85),
    "evicted": dict(color="transparent", borderColor=FULL_GREY, borderWidth=1.3, opacity=0.85),
}


def norm_and_attention(
    key_norm: np.ndarray,
    attention: np.ndarray,
    labels: Sequence[str],
    *,
    kept: np.ndarray | None = None,
    first_position: int = 0,
    height: int = 340,
    dark: bool = False,
) -> dict[str, Any]:
    """Key norm above, attention below, by token position.

    key_norm, attention (a share of mass, 0..1) [T]; labels T texts, shown literally; kept: bool [T], kept solid and
    evicted hollow. Attention is logarithmic with a floor, or one sink would press all other tokens onto the axis.
    `first_position`: the position of the first token given, where sinks are left out; `dark`: whether the page is.
    """
    shown = salient(key_norm, attention)
    floor, scale = log_axis(attention)
    low = round(np.log10(floor))
    decades = int(np.ceil(scale["range"][1] - 0.2 - 1e-9)) - low
    is_kept = np.ones(len(key_norm), dtype=bool) if kept is None else np.asarray(kept, dtype=bool)
    rows = {
        name: [
            [int(i) + first_position, _literal(labels[i]), _rounded(key_norm[i]), _rounded(100 * attention[i]),
             _rounded(np.log10(max(np.nan_to_num(attention[i]), floor)))]
            for i in shown[is_kept[shown] == (name == "kept")]
        ]
        for name in _TOKENS
    }  # fmt: skip
    present = [name for name in _TOKENS if rows[name]]
    tall = (height - _TOP - _BOTTOM - _BETWEEN) // 2
    n_tokens = len(key_norm)
    pad = 0.01 * n_tokens + 0.5
    ends = dict(min=first_position - pad, max=first_position + n_tokens - 1 + pad)
    thinned = f" ({len(shown):,} of {n_tokens:,} drawn, extremes kept)" if len(shown) < n_tokens else ""
    quiet = dict(color=QUIET[dark])
    line = dict(show=True, lineStyle=dict(color=GRID))

    def axis(row: int, **options: Any) -> dict[str, Any]:
        label = quiet | dict(show=True, fontSize=11) | options.pop("axisLabel", {})
        hidden = dict(axisTick=dict(show=False), axisLine=dict(show=False))
        name = dict(nameLocation="middle", nameTextStyle=quiet)
        return dict(type="value", gridIndex=row, axisLabel=label, splitLine=line) | name | hidden | options

    return dict(
        animation=False,
        legend=dict(show=kept is not None, left=_LEFT, top=0, textStyle=quiet, data=present, itemHeight=8),
        tooltip=dict(
            formatter="position {@[0]}: <b>{b}</b><br>key norm {@[2]}<br>attention {@[3]} %"
            + ("" if kept is None else "<br>{a}"),
            confine=True, transitionDuration=0,
        ),
        grid=[
            dict(left=_LEFT, right=_RIGHT, top=_TOP + row * (tall + _BETWEEN), height=tall, outerBoundsMode="none")
            for row in (0, 1)
        ],
        xAxis=[
            axis(0, axisLabel=dict(show=False), **ends),
            axis(1, name="token position" + thinned, nameGap=28,
                 axisLabel=dict(showMinLabel=False, showMaxLabel=False), **ends),
        ],
        yAxis=[
            axis(0, name="key norm (L2)", nameGap=62, scale=True, splitNumber=4),
            axis(1, name="attention (log)", nameGap=62, axisLabel=dict(show=False), min=low, max=low + decades,
                 interval=1),
            axis(1, type="category", position="left", boundaryGap=False, data=_decades(low, decades),
                 axisLabel=dict(interval="auto"), splitLine=dict(show=False)),
        ],
        dataset=[dict(source=rows[name]) for name in present],
        series=[
            dict(type="scatter", name=name, datasetIndex=of, xAxisIndex=row, yAxisIndex=row, symbolSize=6, clip=False,
                 encode=dict(x=0, y=column, itemName=1), itemStyle=_TOKENS[name], cursor="default",
                 emphasis=dict(scale=1.5))
            for of, name in enumerate(present)
            for row, column in ((0, 2), (1, 4))
        ],
    )  # fmt: skip


def _decades(low: int, n: int) -> list[str]:
    """Names of the powers of ten from 10^low on, as shares; the first is the floor that zeros are lifted to."""
    return ["≤ " * (i == low) + f"{10.0 ** (i + 2):.{max(-i - 2, 0)}f} %" for i in range(low, low + n + 1)]


def _literal(label: str) -> str:
    """Shorten the label of a token, with nothing left that a formatter of ECharts would fill in: {b}, {@[2]}, $&."""
    short = label if len(label) <= LONGEST_LABEL else label[: LONGEST_LABEL - 1] + "…"
    return re.sub(r"[{$]", "\\g<0>\N{WORD JOINER}", short)


def _rounded(value: float) -> float | None:
    """Four digits of a number; None where it is undefined, since JSON has no NaN."""
    return float(f"{value:.4g}") if np.isfinite(value) else None
