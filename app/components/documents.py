"""Texts that work is done on: uploaded files, a pasted one, or those that come with the program. One choice for all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import streamlit as st

from analysis.defaults import EXCERPTS, NEW_TOKENS, PROMPT_TOKENS
from analysis.demo.presets import bundled_prose
from analysis.evaluation.lm import LmSettings
from analysis.texts.read import plain_text
from analysis.words import counted
from app import state
from app.components import uploads

if TYPE_CHECKING:
    from analysis.models.load import LoadedModel
    from analysis.texts.excerpts import Excerpt

_FILES = state.Slot[Mapping[str, str]]("documents", {})
_PASTED = state.Slot("documents_pasted", "")
_UPLOADER = state.Slot("documents_uploader", 0)


def ask(*, few: str = "") -> Mapping[str, str]:
    """Ask for texts, and return them by name; the bundled ones where none are given.

    Args:
        few: what to say where there are only the bundled ones.

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

    st.file_uploader("Text files", accept_multiple_files=True, key=key, on_change=take)
    st.text_area("Or paste one", **_PASTED.widget(), height=80, max_chars=2_000_000)
    uploads.show_refused()
    given = dict(_FILES.get())
    if (pasted := plain_text(_PASTED.get())).strip():
        given["pasted"] = pasted
    if not given:
        bundled = bundled_prose()
        st.caption(f"{counted(len(bundled), 'bundled text')}. {few}".strip())
        return bundled
    with st.container(horizontal=True, vertical_alignment="center"):
        characters = sum(map(len, given.values()))
        st.caption(f"{counted(len(given), 'text')}, {characters:,} characters.")
        st.button("Use the bundled texts", on_click=clear, icon=":material/close:", key="documents_clear")
    return given


@dataclass(frozen=True, slots=True)
class Cut:
    """How excerpts are cut from texts: how many, and how long their prompts and continuations are."""

    excerpts: int
    lm: LmSettings

    def given(self, loaded: LoadedModel, texts: Mapping[str, str]) -> tuple[Excerpt, ...]:
        """Cut the excerpts. Raises TextError where there is none."""
        from analysis.texts.excerpts import excerpts

        n_tokens = min(self.lm.n_tokens, loaded.positions)
        return excerpts(loaded.tokenizer, texts, n_tokens=n_tokens, at_most=self.excerpts)

    def planning_and_measuring(
        self, loaded: LoadedModel, texts: Mapping[str, str]
    ) -> tuple[tuple[Excerpt, ...], tuple[Excerpt, ...]]:
        """Cut excerpts to plan on, and as many others to measure on. Raises TextError where there are too few."""
        from analysis.texts.excerpts import planning_and_measuring

        n_tokens = min(self.lm.n_tokens, loaded.positions)
        return planning_and_measuring(loaded.tokenizer, texts, n_tokens=n_tokens, each=self.excerpts)


def ask_cut(key: str, *, label: str = "Excerpts") -> Cut:
    """Ask for the number and the lengths of excerpts. Raises SettingsError."""
    with st.container(horizontal=True, vertical_alignment="bottom"):
        n = st.number_input(
            label, 1, 256, EXCERPTS, key=f"{key}_excerpts", persist_state="session",
            help="Spread over the texts. Fewer than 16 say little.",
        )  # fmt: skip
        prompt = st.number_input(
            "Prompt tokens", 8, 131_072, PROMPT_TOKENS, 64, key=f"{key}_prompt", persist_state="session"
        )
        new = st.number_input("Tokens to predict", 1, 4096, NEW_TOKENS, 16, key=f"{key}_new", persist_state="session")
    return Cut(int(n), LmSettings(int(prompt), int(new)))
