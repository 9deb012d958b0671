"""A figure on a page: its caption, its text for those who cannot see it, and its numbers. And which is drawn first."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import plotly.graph_objects as go
import streamlit as st

LONGEST_WAIT = 10.0  # seconds, for a browser to draw its first chart
_FIRST_CHART = st.components.v2.component(
    "first_chart",
    html="<span></span>",
    js=f"""
export default function ({{ setTriggerValue }}) {{
  const began = performance.now()
  let timer
  const look = () => {{
    const drawn = document.querySelector(".js-plotly-plot .main-svg")
    if (drawn || performance.now() - began > {1000 * LONGEST_WAIT}) {{
      requestAnimationFrame(() => setTimeout(() => setTriggerValue("drawn", true)))  // it has been seen by then
    }} else {{
      timer = setTimeout(look, 20)
    }}
  }}
  look()
  return () => clearTimeout(timer)
}}
""",
)


def first_is_drawn() -> bool:
    """Whether the browser has drawn a chart in this session. If not, the page is run again as soon as it has.

    The library of charts takes a browser a second or more to load, and then it draws all charts it was sent before any
    is seen: so the first one is sent alone. Without a browser there is nothing to wait for, and no page waits for long.
    """
    waiting_since = st.session_state.setdefault("first_chart_sent", time.monotonic())
    if "chart_drawn" in st.session_state or not _in_a_browser() or time.monotonic() - waiting_since > LONGEST_WAIT:
        return True
    _FIRST_CHART(key="first_chart", on_drawn_change=lambda: st.session_state.update(chart_drawn=True))
    return False


def _in_a_browser() -> bool:
    return "User-Agent" in st.context.headers


def show(
    figure: go.Figure,
    *,
    key: str,
    alt: str,
    caption: str,
    table: Mapping[str, Any] | None = None,
    on_head: Callable[[int, int], None] | None = None,
) -> None:
    """Draw a figure. `on_head(layer, head)` is called when a head in it is clicked."""
    selecting = {}
    if on_head is not None:
        # A callback, so that the choice is known before the page is drawn. A second click deselects: ignore it.
        def clicked() -> None:
            points = st.session_state[key].selection.points
            if points:
                layer, head = points[0]["customdata"]
                on_head(int(layer), int(head))

        selecting = {"on_select": clicked, "selection_mode": "points"}
    st.plotly_chart(figure, key=key, alt=alt, config={"displaylogo": False}, **selecting)
    st.caption(caption)
    if table is not None:
        with st.expander("The numbers", icon=":material/table:"):
            st.dataframe(table, hide_index=True, key=f"{key}_table")
