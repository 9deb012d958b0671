"""The dialog "New run": a text, its tokens, memory and time, and the capture as a job."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from analysis.demo.presets import presets
from analysis.errors import UserError
from analysis.models.memory import capture_bytes, free_bytes
from analysis.texts.read import plain_text
from analysis.texts.tokens import tokenize
from analysis.words import counted, human_bytes
from app import library, state
from app.components import markup, uploads
from app.engine import Engine
from app.jobs import Jobs

if TYPE_CHECKING:
    from analysis.models.load import LoadedModel
    from analysis.progress import Progress

DIALOG = "new run"
_OWN = "My own text"
_COUNTED_CHARACTERS = 50_000  # what follows is counted at the same rate: a live count must not stall the page


@st.dialog("New run", width="large", on_dismiss="rerun")
def dialog(engine: Engine, jobs: Jobs) -> None:
    """Ask for a text, say what its capture takes, and start it."""
    st.markdown(
        f"One pass of **{markup.plain(state.model())}** over the text records the norm of every key and the attention "
        "that it gets, in every layer and head."
    )
    texts = {preset.name: preset.text for preset in presets(state.model())}

    def take() -> None:
        st.session_state["new_text"] = texts.get(st.session_state["new_preset"], st.session_state.get("new_text", ""))

    def upload() -> None:
        if text := uploads.text_of(st.session_state["new_file"]):
            st.session_state.update(new_text=text, new_preset=_OWN)

    st.session_state.setdefault("new_text", next(iter(texts.values())))
    st.selectbox("Start from", [*texts, _OWN], key="new_preset", on_change=take)
    typed = st.text_area("Text", key="new_text", height=220, max_chars=2_000_000)
    st.file_uploader("Or upload a .txt file", type="txt", key="new_file", on_change=upload)
    uploads.show_refused()
    text = plain_text(typed)
    _tell_size(engine, text)
    chosen = st.session_state.get("new_preset", _OWN)
    default = chosen if text == texts.get(chosen) else " ".join(text.split()[:6])
    name = st.text_input("Name of the run", default, max_chars=200)
    # Never disabled: a text is sent when its field loses focus, so a button that waited for one would look broken.
    if st.button("Start", type="primary", icon=":material/play_arrow:", key="start_run"):
        if not text.strip():
            st.error("There is no text to capture. Type one, choose one or upload one.", icon=":material/error:")
            return
        state.follow(start(jobs, state.model_ref(), text, name))
        st.rerun()


def start(jobs: Jobs, ref: str, text: str, name: str) -> str:
    """Start the capture of a text, and return the job's id."""

    def work(loaded: LoadedModel, progress: Progress) -> str:
        from analysis.recorder import capture

        return library.WORKSPACE.add(capture(loaded, text, progress=progress), name=name).id

    return jobs.start(f"Capturing “{name}”", ref, work, kind="run").id


def _tell_size(engine: Engine, text: str) -> None:
    """Say how many tokens a text has, and what memory and time its capture takes, where the tokenizer is here."""
    if not text.strip():
        return
    ref = state.model_ref()
    try:
        with st.spinner("Loading the tokenizer …", show_time=True):
            found = engine.tokenizer_and_config(ref)
        if found is None:
            st.caption("Tokens, memory and time are told once the model is here.")
            return
        tokenizer, config = found
        sample = text[:_COUNTED_CHARACTERS]
        tokens = tokenize(tokenizer, sample)
    except UserError as error:
        st.warning(markup.plain(str(error)), icon=":material/warning:")
        return
    n = len(tokens) * len(text) // len(sample)
    resident = engine.loaded if engine.ref == ref else None
    needed = capture_bytes(config, n, itemsize=resident.model.dtype.itemsize if resident else 4)
    free = human_bytes(free_bytes(resident.device if resident else "cpu"))
    about = "about " if len(text) > len(sample) else ""
    length, pace = counted(n, "token"), library.pace(state.model(), config)
    st.markdown(
        f"{about}**{length}**, about **{human_bytes(needed)}** of memory beyond the model; {free} is free. It takes "
        f"{pace.told(pace.capture(n))}."
    )
    for note in tokens.notes:
        st.caption(markup.plain(note))
    limit = getattr(config, "max_position_embeddings", None)
    if limit and n >= limit:
        st.warning(f"The model was trained on up to {limit:,} tokens; beyond them expect it to fail.")
