"""Sources of long work: the model, the texts, and how they are cut. One choice for all pages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import streamlit as st

from analysis.errors import ModelError, TextError
from analysis.models.load import model_name
from analysis.selftest import is_synthetic
from analysis.texts.read import plain_text
from app import session
from app.components import markup, uploads
from app.engine import Engine, allowed_models

if TYPE_CHECKING:
    from analysis.models.load import LoadedModel
    from analysis.texts.excerpts import Excerpt

OTHER = "Another model (hub id, folder or GGUF file)"


def ref_of(model: str, engine: Engine | None = None) -> str | None:
    """Find the reference of a named model that is available: a name, an allowed folder, or the one in memory."""
    here = next((ref for ref in allowed_models() if name_of(ref) == model), None)
    if here is None and engine is not None and engine.loaded is not None and engine.loaded.name == model:
        return engine.ref
    return here


def name_of(ref: str) -> str:
    """Name of the model with a reference."""
    try:
        return model_name(ref)
    except ModelError:  # a folder of several, which is refused when it is loaded
        return ref


def label(verb: str, ref: str) -> str:
    """Label a button that uses a model: "Measure it for smollm2"."""
    return f"{verb} for {markup.plain(name_of(ref))}" if ref else verb


def model_input() -> str:
    """Ask for a model; the default is that of the run on screen. Empty if none was named."""
    run = session.current_run()
    if not session.MODEL.held() or session.MODEL_CHOSEN_FOR.get() not in ("", run.model):
        ref = allowed_models()[0] if is_synthetic(run) else ref_of(run.model)
        session.MODEL.set(ref or OTHER)
        if ref is None and "/" in run.model:
            session.MODEL_REF.set(run.model)  # of the hub
    session.MODEL_CHOSEN_FOR.set(run.model)
    chosen: str = st.selectbox("Model", [*allowed_models(), OTHER], **session.MODEL.widget())
    if chosen != OTHER:
        return chosen
    named: str = st.text_input(
        "Hugging Face id, folder or GGUF file", **session.MODEL_REF.widget(), placeholder="Qwen/Qwen3-0.6B",
        help="Any decoder-only model with safetensors or GGUF weights. No remote code is run. Folders must be "
        "allowed by whoever runs the app (L2KV_MODEL_DIRS).",
    )  # fmt: skip
    return named


def texts_input() -> Mapping[str, str]:
    """Ask for texts, and return them by name: uploaded files and a pasted one."""
    uploader = session.UPLOADS.get()
    key = f"text_files_{uploader}"

    def clear() -> None:
        session.FILES.drop()
        session.PASTED.set("")
        session.UPLOADS.set(uploader + 1)

    st.file_uploader(
        "Text files", type="txt", accept_multiple_files=True, key=key, help="Of long ones, excerpts are taken.",
        on_change=lambda: session.FILES.set(uploads.documents_of(st.session_state[key])),
    )  # fmt: skip
    uploads.show_refused()
    pasted = st.text_area(
        "Or paste a long text", **session.PASTED.widget(), height=120, max_chars=4_000_000,
        placeholder="Paste a text of some thousand words.",
    )  # fmt: skip
    given = dict(session.FILES.get())
    if pasted.strip():
        given["pasted"] = plain_text(pasted)
    if given:
        names = ", ".join(markup.plain(name) for name in list(given)[:6]) + (", …" if len(given) > 6 else "")
        with st.container(horizontal=True, vertical_alignment="center"):
            st.caption(f"{markup.counted(len(given), 'text')}, {sum(map(len, given.values())):,} characters: {names}")
            st.button("Clear", icon=":material/close:", type="tertiary", on_click=clear)
    return given


@dataclass(frozen=True, slots=True)
class Continued:
    """Settings of excerpts: the tokens of a prompt, and those to predict after it."""

    texts: int
    prompt_tokens: int
    new_tokens: int

    def excerpts(self, loaded: LoadedModel, texts: Mapping[str, str]) -> tuple[Excerpt, ...]:
        """Cut as many excerpts as asked for, or as the texts allow. Raises TextError if there is none."""
        from analysis.texts.excerpts import excerpts

        return noted(loaded, excerpts(loaded.tokenizer, texts, n_tokens=self._size(loaded), at_most=self.texts))

    def planning_and_measuring(
        self, loaded: LoadedModel, texts: Mapping[str, str]
    ) -> tuple[tuple[Excerpt, ...], tuple[Excerpt, ...]]:
        """Cut excerpts to plan on and as many others to measure on. Raises TextError if there are too few."""
        from analysis.texts.excerpts import planning_and_measuring

        both = planning_and_measuring(loaded.tokenizer, texts, n_tokens=self._size(loaded), each=self.texts)
        noted(loaded, (*both[0], *both[1]))
        return both

    def _size(self, loaded: LoadedModel) -> int:
        """Number of tokens an excerpt should have."""
        from analysis.texts.excerpts import SPARE

        size = self.prompt_tokens + self.new_tokens
        if size > loaded.positions:
            raise TextError(
                f"{loaded.name} was trained on {loaded.positions:,} tokens at once, and {size:,} are asked for. "
                "Choose a shorter prompt."
            )
        return size + SPARE


def continued_input(label: str, help_text: str) -> Continued:
    """Ask for the number and the lengths of excerpts."""
    with st.container(horizontal=True, vertical_alignment="bottom"):
        texts = st.number_input(label, 1, 256, **session.EXCERPTS.widget(), help=help_text)
        prompt = st.number_input("Prompt tokens", 8, 131_072, step=64, **session.PROMPT_TOKENS.widget())
        new = st.number_input("Tokens to predict", 1, 4096, step=16, **session.PREDICTED_TOKENS.widget())
    return Continued(int(texts), int(prompt), int(new))


def noted(loaded: LoadedModel, given: tuple[Excerpt, ...]) -> tuple[Excerpt, ...]:
    """Return excerpts, and note remarks on their special tokens, which `jobs.run` shows beside the result."""
    from analysis.texts.tokens import notes_of

    session.NOTES.set(tuple(notes_of(loaded.tokenizer, (excerpt.text for excerpt in given))))
    return given
