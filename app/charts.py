"""A figure on a page: its caption, its text for those who cannot see it, and its numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import plotly.graph_objects as go
import streamlit as st


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
