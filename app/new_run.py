"""The dialog "New run": a text, its tokens, memory and time, and the capture as a job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st

from analysis.demo.presets import presets
from analysis.errors import UserError
from analysis.models.memory import capture_bytes, free_bytes, usable_bytes
from analysis.texts.read import plain_text
from analysis.texts.tokens import MIN_TOKENS, tokenize
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
_UPLOADED = state.Slot[Mapping[str, str]]("new_uploaded", {})
"""Text of the file that was uploaded, by its name."""
_COUNTED_CHARACTERS = 50_000  # what follows is counted at the same rate: a live count must not stall the page


@st.dialog("New run", width="large", on_dismiss="rerun")
def dialog(engine: Engine, jobs: Jobs) -> None:
    """Ask for a text, say what its capture takes, and start it."""
    st.markdown(
        f"One pass of **{markup.plain(state.model())}** over the text records the norm of every key and the attention "
        "that it gets, in every layer and head."
    )
    texts = {preset.name: preset.text for preset in presets(state.model())} | dict(_UPLOADED.get())

    def take() -> None:
        st.session_state["new_text"] = texts.get(st.session_state["new_preset"], st.session_state["new_text"])

    def edit() -> None:
        st.session_state["new_preset"] = _OWN

    def upload() -> None:
        file = st.session_state["new_file"]
        if text := uploads.text_of(file):
            name = Path(file.name).stem
            _UPLOADED.set({name: text})
            st.session_state.update(new_text=text, new_preset=name)

    st.session_state.setdefault("new_text", next(iter(texts.values())))
    chosen = st.selectbox("Start from", [*texts, _OWN], key="new_preset", on_change=take)
    typed = st.text_area("Text", key="new_text", height=220, max_chars=2_000_000, on_change=edit)
    st.file_uploader("Or upload a text file", key="new_file", on_change=upload)
    uploads.show_refused()
    text = plain_text(typed)
    possible = _tell_size(engine, text)
    name = st.text_input("Name of the run", " ".join(text.split()[:6]) if chosen == _OWN else chosen, max_chars=200)
    if st.button("Start", type="primary", icon=":material/play_arrow:", key="start_run", disabled=not possible):
        state.follow(start(jobs, state.model_ref(), text, name))
        st.rerun()


def start(jobs: Jobs, ref: str, text: str, name: str) -> str:
    """Start the capture of a text, and return the job's id."""

    def work(loaded: LoadedModel, progress: Progress) -> str:
        from analysis.recorder import capture

        return library.WORKSPACE.add(capture(loaded, text, progress=progress), name=name).id

    return jobs.start(f"Capturing “{name}”", ref, work, kind="run").id


def _tell_size(engine: Engine, text: str) -> bool:
    """Say how many tokens a text has, and what memory and time its capture takes; tell whether it can be captured.

    A model that has to be fetched first tells it then.
    """
    if not text.strip():
        st.error("There is no text to capture. Type one, choose one or upload one.", icon=":material/error:")
        return False
    ref = state.model_ref()
    try:
        with st.spinner("Loading the tokenizer …", show_time=True):
            found = engine.tokenizer_and_config(ref)
        if found is None:
            st.caption("Tokens, memory and time are told once the model is here.")
            return True
        tokenizer, config = found
        sample = text[:_COUNTED_CHARACTERS]
        tokens = tokenize(tokenizer, sample)
        n = len(tokens) * len(text) // len(sample)
        resident = engine.loaded if engine.ref == ref else None
        device: Any = resident.device if resident else "cpu"
        needed = capture_bytes(config, n, itemsize=resident.model.dtype.itemsize if resident else 4)
        notes: Sequence[str] = tokens.notes
        if not MIN_TOKENS <= n < (getattr(config, "max_position_embeddings", None) or inf) or needed > usable_bytes(
            device
        ):
            notes = _checked(engine, ref, text)
    except UserError as error:
        st.error(markup.plain(str(error)), icon=":material/error:")
        return False
    free = human_bytes(free_bytes(device))
    about = "about " if len(text) > len(sample) else ""
    length, pace = counted(n, "token"), library.pace(state.model(), config)
    st.markdown(
        f"{about}**{length}**, about **{human_bytes(needed)}** of memory beyond the model; {free} is free. It takes "
        f"{pace.told(pace.capture(n))}."
    )
    for note in notes:
        st.warning(markup.plain(note), icon=":material/warning:")
    return True


def _checked(engine: Engine, ref: str, text: str) -> Sequence[str]:
    """Warnings that the capture of a text would have. Raises UserError where it can't be captured."""
    from analysis.recorder import readable

    with st.spinner("Checking …", show_time=True):
        model = engine.outline(ref)
        assert model is not None, "its tokenizer is here"
        return readable(model, text)[1]
