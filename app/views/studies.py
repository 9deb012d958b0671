"""Studies in the making and as files, part of the page Texts: run, cancelled, gone on with, downloaded and opened."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import streamlit as st

from analysis.defaults import EXCERPT_TOKENS, STUDY_EXCERPTS
from analysis.errors import RecordError
from analysis.progress import Progress
from analysis.studies import Study, load_study, save_study
from app import session
from app.components import jobs, markup, sources, uploads
from app.components.jobs import Job
from app.engine import Engine

if TYPE_CHECKING:
    from analysis.models.load import LoadedModel


@dataclass(frozen=True, slots=True)
class _Task:
    """What to study; the file that it is kept in goes by it, so the same task goes on where it was stopped."""

    ref: str
    sources: tuple[tuple[str, str], ...]
    n_tokens: int
    at_most: int

    @property
    def path(self) -> Path:
        if "study_folder" not in st.session_state:
            st.session_state["study_folder"] = tempfile.TemporaryDirectory()  # goes with the session
        folder = st.session_state["study_folder"]
        name = hashlib.sha256(repr(self).encode("utf-8", "surrogatepass")).hexdigest()[:32]
        return Path(folder.name) / f"{name}.safetensors"


def run(engine: Engine) -> None:
    """Draw the controls of a study, and do it; what is done so far is put on screen."""
    st.subheader("Study your own texts")
    ref = sources.model_input()
    texts = sources.texts_input()
    with st.container(horizontal=True, vertical_alignment="bottom"):
        n_tokens = st.number_input(
            "Tokens an excerpt", 16, 131_072, EXCERPT_TOKENS, 64, key="excerpt_tokens", persist_state="session",
            help="At most what the model was trained on. Shorter texts are left out.",
        )  # fmt: skip
        at_most = st.number_input(
            "Excerpts at most", 1, 1000, STUDY_EXCERPTS, 8, key="excerpts", persist_state="session",
            help="Spread over each text, and over all of them: excerpts of many texts say more than as many of one.",
        )  # fmt: skip
    task = _Task(ref, tuple(texts.items()), int(n_tokens), int(at_most))
    begun = task.path in st.session_state.get("unfinished_studies", ())
    job = Job(
        "run_study",
        "Go on" if begun else sources.label("Measure it", ref),
        ref,
        lambda loaded, progress: _study(loaded, task, progress),
        missing="" if texts else "Upload texts or paste a long one first.",
        cancelled="What was done is kept: press *Go on* to do the rest." if begun else "Nothing was done yet.",
    )
    if done := jobs.run(engine, job):
        session.show_study(done)
        st.rerun()


def _study(loaded: LoadedModel, task: _Task, progress: Progress) -> Study:
    from analysis.studies import study
    from analysis.texts.excerpts import excerpts

    most = loaded.positions - 1  # one for the next token
    texts = excerpts(loaded.tokenizer, dict(task.sources), n_tokens=min(task.n_tokens, most), at_most=task.at_most)
    sources.noted(loaded, texts)
    unfinished = st.session_state.setdefault("unfinished_studies", set())

    def on_text(found: Study) -> None:
        session.show_study(found)  # at every text: a click may end this here
        unfinished.add(task.path)
        if found.complete:
            unfinished.remove(task.path)

    return study(loaded, texts, task.path, on_text=on_text, progress=progress)


def files(study: Study | None) -> None:
    """Draw what downloads the study on screen, and what opens another."""
    st.subheader("Studies as files")
    if study is not None:
        with st.container(horizontal=True):
            st.download_button(
                "Download this study",
                data=lambda: uploads.saved(study, save_study),
                file_name="study.safetensors",
                icon=":material/download:",
                on_click="ignore",
            )
            if session.STUDY.get():
                st.button(
                    "Back to the bundled study", icon=":material/home:", on_click=session.show_study, args=(None,)
                )
    file = st.file_uploader("Open a saved study", type="safetensors", key="study_file")
    st.caption(
        "A study holds the figures of every head on every text, and no text. `python -m analysis study` writes the "
        "same kind, and goes on with one that was stopped."
    )
    if file is not None and st.session_state.get("opened_study") != file.file_id:
        try:
            opened = uploads.opened(file, load_study)
        except RecordError as error:
            st.error(markup.plain(str(error)), icon=":material/error:")
            return
        st.session_state["opened_study"] = file.file_id
        session.show_study(opened)
        st.rerun()
