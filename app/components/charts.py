"""Charts on a page, each with its caption, its alternative text, and its numbers and picture as files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import plotly.graph_objects as go
import streamlit as st

from analysis.records import json_text
from app import address, state
from app.components import markup

Table = Mapping[str, Iterable[Any]]
"""Columns by name, of one length."""

# Few buttons, and none that saves a nameless picture: *Data* has one with a name.
_CONFIG = {
    "displaylogo": False,
    "modeBarButtonsToRemove": ["toImage", "zoomIn2d", "zoomOut2d", "autoScale2d", "select2d", "lasso2d"],
}
LONGEST_WAIT = 10.0  # seconds, for a browser to draw its first chart
_FIRST_CHART = st.components.v2.component(
    "first_chart",
    html="<span></span>",
    js=f"""
export default function ({{ setTriggerValue }}) {{
  const began = performance.now()
  let timer
  const look = () => {{
    const drawn = document.querySelector(".js-plotly-plot .main-svg, [data-testid=stEChartsChart] canvas")
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
_PICTURE = st.components.v2.component(
    "picture",
    html='<button type="button">PNG</button>',
    css="""
button { font: 0.875rem var(--st-font); color: var(--st-text-color); width: 100%;
  background: var(--st-background-color);
  border: 1px solid var(--st-border-color); border-radius: var(--st-button-radius); padding: 0.55rem 0.75rem;
  cursor: pointer; }
button:hover, button:focus-visible { color: var(--st-primary-color); border-color: var(--st-primary-color); }
""",
    js="""
const SCALE = 2
export default function ({ data, parentElement }) {
  parentElement.querySelector("button").onclick = async () => {
    const chart = document.querySelector(`.st-key-${CSS.escape(data.chart)}`)
    const parts = [...chart.querySelectorAll(".main-svg, [data-testid=stEChartsChart] canvas")]
    if (!parts.length) return
    const frame = chart.querySelector(".svg-container, [data-testid=stEChartsChart]").getBoundingClientRect()
    const canvas = document.createElement("canvas")
    canvas.width = SCALE * frame.width
    canvas.height = SCALE * frame.height
    const pen = canvas.getContext("2d")
    pen.scale(SCALE, SCALE)
    pen.fillStyle = getComputedStyle(document.querySelector("[data-testid=stApp]")).backgroundColor
    pen.fillRect(0, 0, frame.width, frame.height)
    for (const part of parts) {
      const at = part.getBoundingClientRect()
      let image = part
      if (part.tagName !== "CANVAS") {
        image = new Image(at.width, at.height)
        const text = new XMLSerializer().serializeToString(part)
        image.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(text)
        await image.decode()
      }
      pen.drawImage(image, at.left - frame.left, at.top - frame.top, at.width, at.height)
    }
    const link = document.createElement("a")
    link.href = canvas.toDataURL("image/png")
    link.download = data.name
    link.click()
  }
}
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


def page_is_dark() -> bool:
    """Tell whether the reader's page is: maps are as clear as the page at 0."""
    return st.context.theme.type == "dark"


def show(
    figure: go.Figure,
    *,
    key: str,
    alt: str,
    caption: str,
    table: Table | None = None,
    file: str = "",
    on_head: Callable[[int, int], None] | None = None,
) -> None:
    """Draw a figure. `on_head(layer, head)` is called when a head in it is clicked."""

    def clicked() -> None:
        points = st.session_state[key].selection.points
        if points and on_head is not None:  # a second click deselects: ignore it
            on_head(*map(int, points[0]["customdata"]))

    # A callback, so that the choice is known before the page is drawn.
    st.plotly_chart(
        figure, key=key, alt=alt, config=_CONFIG, selection_mode="points",
        on_select="ignore" if on_head is None else clicked,
    )  # fmt: skip
    explain(key, alt=alt, caption=caption, table=table, file=file)


def explain(key: str, *, alt: str, caption: str, table: Table | None, file: str = "") -> None:
    """Write below the chart of that key its caption, and offer its numbers and its picture as files.

    Args:
        file: name of the files without their ends; the key by default.
    """
    with st.container(horizontal=True, vertical_alignment="top", gap="small", key=f"explain_{key}"):
        st.caption(caption, width="stretch")
        if table is None:
            return
        with st.popover(
            "Data", type="tertiary", icon=":material/download:", key=f"{key}_data", on_change="rerun"
        ) as of:
            if of.open:
                _data(key, alt, caption, table, file or key)


def _data(key: str, alt: str, caption: str, table: Table, file: str) -> None:
    import pandas

    columns = {name: list(column) for name, column in table.items()}
    told = {"chart": alt, "about": markup.unmarked(caption), "of": address.params(), "numbers": columns}
    frame = pandas.DataFrame(columns)
    with st.container(horizontal=True):
        for kind, make, mime in (
            ("CSV", lambda: frame.to_csv(index=False), "text/csv"),
            ("JSON", lambda: json_text(told), "application/json"),
        ):
            name = f"{file}.{kind.lower()}"
            st.download_button(kind, make, name, mime, key=f"{key}_{kind}", on_click="ignore")
        _PICTURE(key=f"{key}_png", data={"chart": key, "name": f"{file}.png"}, width="content")
    st.dataframe(frame, hide_index=True, key=f"{key}_table", width=640)
