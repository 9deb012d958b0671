"""Clicks on the cells of a map (`figures.heat`), and the box around the open one, which moves before the answer comes.

The chart's own selection waits for 150 ms, and knows no arrow keys, links or second clicks.
"""

from __future__ import annotations

from collections.abc import Callable

import streamlit as st

from app.figures.heat import FRAME, Head

_LISTENER = st.components.v2.component(
    "cells",
    html="<span></span>",
    js="""
export default function ({ data, setTriggerValue }) {
  const box = (layer, head) => {
    document.documentElement.style.setProperty("--l2kv-layer", layer)
    document.documentElement.style.setProperty("--l2kv-head", head)
  }
  const click = event => {
    const chart = event.target.closest?.(`.st-key-${data.chart} [data-testid=stEChartsChart]`)
    if (!chart) return
    const at = chart.getBoundingClientRect(), { left, right, top, bottom } = data.frame, [layers, heads] = data.shape
    const layer = Math.floor(layers * (event.clientY - at.top - top) / (at.height - top - bottom))
    const head = Math.floor(heads * (event.clientX - at.left - left) / (at.width - left - right))
    if (layer < 0 || layer >= layers || head < 0 || head >= heads) return
    box(layer, head)
    setTriggerValue("cell", [layer, head])
  }
  box(...data.open)
  document.addEventListener("click", click)
  return () => document.removeEventListener("click", click)
}
""",
)


def listen(chart: str, open: Head, shape: Head, on_cell: Callable[[int, int], None]) -> None:
    """Listen to clicks on the map of a key.

    Args:
        open: cell that has the box.
        shape: layers and heads of the map.
        on_cell: called with the layer and head that are clicked.
    """

    def clicked() -> None:
        if cell := st.session_state["cells"].get("cell"):
            on_cell(*map(int, cell))

    data = {"chart": chart, "open": open, "shape": shape, "frame": FRAME}
    _LISTENER(key="cells", data=data, on_cell_change=clicked)
