"""Figures on a page, each with its caption, its alternative text and its numbers; the first one is drawn alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import plotly.graph_objects as go
import streamlit as st

from app import state

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
    """Tell whether the browser has drawn a chart in this session. If not, the page is run again as soon as it has.

    The library of charts takes a browser a second or more to load, and then it draws all charts it was sent before any
    is seen: so the first one is sent alone. Without a browser there is nothing to wait for, and no page waits for long.
    """
    if (sent := state.FIRST_CHART_SENT.get()) is None:
        state.FIRST_CHART_SENT.set(sent := time.monotonic())
    if state.CHART_DRAWN.get() or not _in_a_browser() or time.monotonic() - sent > LONGEST_WAIT:
        return True
    _FIRST_CHART(key="first_chart", on_drawn_change=lambda: state.CHART_DRAWN.set(True))
    return False


def _in_a_browser() -> bool:
    return "User-Agent" in st.context.headers


def show(
    figure: go.Figure,
    *,
    key: str,
    alt: str,
    caption: str,
    table: Mapping[str, Iterable[Any]] | None = None,
    on_head: Callable[[int, int], None] | None = None,
) -> None:
    """Draw a figure. `on_head(layer, head)` is called when a head in it is clicked."""

    def clicked() -> None:
        points = st.session_state[key].selection.points
        if points and on_head is not None:  # a second click deselects: ignore it
            on_head(*map(int, points[0]["customdata"]))

    # A callback, so that the choice is known before the page is drawn.
    st.plotly_chart(
        figure, key=key, alt=alt, config={"displaylogo": False}, selection_mode="points",
        on_select="ignore" if on_head is None else clicked,
    )  # fmt: skip
    st.caption(caption)
    if table is not None:
        with st.expander("The numbers", icon=":material/table:"):
            st.dataframe(table, hide_index=True, key=f"{key}_table")
