"""Texts that work is done on: uploaded files, a pasted one, or those that come with the program. One choice for all."""

from __future__ import annotations

from collections.abc import Mapping

import streamlit as st

from analysis.demo.presets import bundled_texts
from analysis.texts.read import plain_text
from analysis.words import counted
from app import state
from app.components import uploads

_FILES = state.Slot[Mapping[str, str]]("documents", {})
_PASTED = state.Slot("documents_pasted", "")
_UPLOADER = state.Slot("documents_uploader", 0)


def ask(*, few: str = "") -> Mapping[str, str]:
    """Ask for texts, and return them by name; the bundled ones where none are given.

    Args:
        few: what to say where there are only the bundled ones, which are short.

    Raises:
        TextError: a pasted text is no text.
    """
    number = _UPLOADER.get()
    key = f"documents_{number}"

    def take() -> None:
        _FILES.set(uploads.documents_of(st.session_state[key]))

    def clear() -> None:
        _FILES.drop()
        _PASTED.drop()
        _UPLOADER.set(number + 1)

    st.file_uploader("Texts (.txt)", type="txt", accept_multiple_files=True, key=key, on_change=take)
    st.text_area("Or paste one", **_PASTED.widget(), height=80, max_chars=2_000_000)
    uploads.show_refused()
    given = dict(_FILES.get())
    if (pasted := plain_text(_PASTED.get())).strip():
        given["pasted"] = pasted
    if not given:
        bundled = bundled_texts()
        st.caption(f"{counted(len(bundled), 'bundled text')}. {few}".strip())
        return bundled
    with st.container(horizontal=True, vertical_alignment="center"):
        characters = sum(map(len, given.values()))
        st.caption(f"{counted(len(given), 'text')}, {characters:,} characters.")
        st.button("Use the bundled texts", on_click=clear, icon=":material/close:", key="documents_clear")
    return given
