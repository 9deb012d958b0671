"""Capture: which model, which text; then one run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from analysis.captures import Capture, load_run, save_run
from analysis.demo.presets import BUNDLED_RUNS, demo_model, presets
from analysis.errors import RecordError, UserError
from analysis.models.memory import capture_bytes
from analysis.progress import Progress
from analysis.selftest import synthetic_run
from analysis.texts.read import plain_text
from analysis.texts.tokens import tokenize
from analysis.words import human_bytes
from app import session
from app.components import jobs, markup, sources, uploads
from app.components.jobs import Job
from app.engine import Engine

if TYPE_CHECKING:
    from streamlit.navigation.page import Page as StreamlitPage

    from analysis.models.load import LoadedModel

OWN = "My own text"
_COUNTED_CHARACTERS = 50_000  # what follows is counted at the same rate: a live count must not stall the page


def page(engine: Engine, heads_page: StreamlitPage) -> None:
    """Draw the page; a run that is done, or opened, is shown on `heads_page`."""
    st.header("Capture a text in a model")
    st.markdown(
        "One forward pass records the norm of every key and the attention it gets, in every layer and head. Then the "
        "page *Heads* answers whether low norm predicts attention **in this model**."
    )
    left, right = st.columns([2, 3], gap="large")
    with left:
        ref = sources.model_input()
    with right:
        text = _text_input(ref)
    with left:
        _count(engine, ref, text)
        _run(engine, ref, text, heads_page)
    st.divider()
    _files(heads_page)


def _text_input(ref: str) -> str:
    texts = {preset.name: preset.text for preset in presets(sources.name_of(ref))}

    def take() -> None:
        if (name := st.session_state["preset"]) in texts:
            st.session_state["text"] = texts[name]

    def upload() -> None:
        if text := uploads.text_of(st.session_state["text_file"]):
            st.session_state.update(text=text, preset=OWN)

    st.session_state.setdefault("text", next(iter(texts.values())))
    if st.session_state.get("preset") not in (None, *texts, OWN):  # one of another model
        st.session_state["preset"] = OWN
    st.selectbox("Start from", [*texts, OWN], key="preset", persist_state="session", on_change=take)
    with st.expander("Or upload a .txt file", icon=":material/upload_file:"):
        st.file_uploader("Text file", type="txt", key="text_file", on_change=upload, label_visibility="collapsed")
    uploads.show_refused()
    typed = st.text_area(
        "Text",
        key="text",
        persist_state="session",
        height=260,
        max_chars=2_000_000,
        on_change=lambda: st.session_state.update(preset=OWN),
    )
    return plain_text(typed)


def _count(engine: Engine, ref: str, text: str) -> None:
    """The token count and the memory that the run will take, where the tokenizer is at hand."""
    if not text.strip() or not ref:
        return
    with st.spinner("Loading the tokenizer …", show_time=True):
        found = engine.tokenizer_and_config(ref)
    if found is None:
        st.caption("Tokens and memory are counted once the model is here.")
        return
    tokenizer, config = found
    try:
        sample = text[:_COUNTED_CHARACTERS]
        tokens = tokenize(tokenizer, sample)
    except UserError as error:
        st.warning(markup.plain(str(error)), icon=":material/warning:")
        return
    counted = len(tokens)
    n = counted * len(text) // len(sample)
    resident = engine.loaded if engine.ref == ref else None
    needed = capture_bytes(config, n, itemsize=resident.model.dtype.itemsize if resident else 4)
    limit = getattr(config, "max_position_embeddings", None)
    about = "about " if n > counted else ""
    st.markdown(f"{about}**{n:,} tokens**, about **{human_bytes(needed)}** of memory beyond the model.")
    for note in tokens.notes:
        st.caption(markup.plain(note))
    if limit and n >= limit:
        st.warning(
            f"The model was trained on up to {limit:,} tokens; beyond them expect it to fail. Time grows with the "
            "square of the length.",
            icon=":material/warning:",
        )


def _run(engine: Engine, ref: str, text: str, heads_page: StreamlitPage) -> None:
    def captured(loaded: LoadedModel, progress: Progress) -> Capture:
        from analysis.recorder import capture

        return capture(loaded, text, progress=progress)

    cancelled = "The text and the run on screen before are as they were."
    run = jobs.run(engine, Job("run_capture", "Run", ref, captured, cancelled=cancelled, done=""))
    if run is not None:
        session.show_run(run)
        st.switch_page(heads_page)


def _files(heads_page: StreamlitPage) -> None:
    """Runs as files: this one to keep, another to look at."""
    st.subheader("Runs as files")
    left, right = st.columns(2, gap="large")
    with left:
        run = session.current_run()
        st.markdown(f"On screen: {run.n_tokens} tokens in {markup.plain(run.model)}.")
        with st.container(horizontal=True):
            st.download_button(
                "Download this run",
                data=lambda: uploads.saved(run, save_run),
                file_name="run.safetensors",
                icon=":material/download:",
                on_click="ignore",
            )
            for model in BUNDLED_RUNS:
                demo = None if model == demo_model() else session.bundled_run(model)
                if (demo is None and session.is_demo()) or demo is run:
                    continue
                st.button(f"Open the run of {model}", icon=":material/home:", on_click=session.show_run, args=(demo,))
        st.caption("The file holds the text. `python -m analysis capture` writes the same kind.")
        if st.button("Open the synthetic check", icon=":material/science:"):
            session.show_run(synthetic_run())
            st.switch_page(heads_page)
        st.caption("A run of no model, whose Γ are known to be −1, 0 and +1: does this instrument read what is there?")
    with right:
        file = st.file_uploader("Open a saved run", type="safetensors", key="run_file")
        if file is not None and st.session_state.get("opened") != file.file_id:
            try:
                session.show_run(uploads.opened(file, load_run))
            except RecordError as error:
                st.error(markup.plain(str(error)), icon=":material/error:")
                return
            st.session_state["opened"] = file.file_id
            st.switch_page(heads_page)
