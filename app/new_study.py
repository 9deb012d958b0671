"""The dialog "Study more texts": texts, how they are cut, the time it takes, and the study as a job that can resume."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import streamlit as st

from analysis.defaults import EXCERPT_TOKENS, STUDY_EXCERPTS
from analysis.errors import RecordError, TextError, UserError
from analysis.studies import load_study
from analysis.words import counted
from analysis.workspace import digest_of_file
from app import library, state
from app.components import documents, markup
from app.engine import Engine
from app.jobs import Job, Jobs

if TYPE_CHECKING:
    from analysis.models.load import LoadedModel

_CHARACTERS_A_TOKEN = 4
_SHORT = 128  # tokens of an excerpt of texts that have no longer one


@dataclass(frozen=True, slots=True)
class _Asked:
    """What to study. The unfinished file goes by it, so the same again continues where it was stopped."""

    model: str
    texts: tuple[tuple[str, str], ...]
    n_tokens: int
    at_most: int

    @property
    def path(self) -> Path:
        texts = [(name, hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()) for name, text in self.texts]
        return library.WORKSPACE.unfinished(
            {"study": self.model, "texts": texts, "tokens": self.n_tokens, "at_most": self.at_most}
        )

    @property
    def done(self) -> int:
        """Number of texts that are done already."""
        try:
            return len(load_study(self.path).names) if self.path.exists() else 0
        except RecordError:  # of an earlier version, say: it is made again
            self.path.unlink()
            return 0


@st.dialog("Study more texts", width="large", on_dismiss="rerun")
def dialog(engine: Engine, jobs: Jobs) -> None:
    """Ask for texts, say what their study takes, and start it."""
    st.markdown(
        f"**{markup.plain(state.model())}** reads each excerpt once. A study keeps the numbers of every head on "
        "every text, and no text. Excerpts of many texts say more than as many of one."
    )
    try:
        texts = documents.ask(few="They are short: your own say more.")
    except TextError as error:
        st.error(markup.plain(str(error)), icon=":material/error:")
        return
    with st.container(horizontal=True, vertical_alignment="bottom"):
        usual = EXCERPT_TOKENS if max(map(len, texts.values())) >= _CHARACTERS_A_TOKEN * EXCERPT_TOKENS else _SHORT
        n_tokens = st.number_input(
            "Tokens of an excerpt", 16, 131_072, usual, 64, key=f"study_tokens_{usual}",
            help="At most what the model was trained on. Shorter texts are left out.",
        )  # fmt: skip
        at_most = st.number_input("Excerpts at most", 1, 1000, STUDY_EXCERPTS, 8, key="study_excerpts")
    name = st.text_input("Name of the study", _name(texts), max_chars=200)
    asked = _Asked(state.model(), tuple(texts.items()), int(n_tokens), int(at_most))
    if not (expected := _expected(asked)):
        st.warning(
            f"None of the texts has about {n_tokens:,} tokens: give longer ones, or ask for fewer.",
            icon=":material/warning:",
        )
        return
    done = asked.done
    st.markdown(
        f"About **{counted(expected, 'excerpt')}** of {n_tokens:,} tokens{_time(expected - done, int(n_tokens))}."
    )
    _note_special_tokens(engine, texts)
    if st.button(f"Continue ({done} done)" if done else "Start", type="primary", icon=":material/play_arrow:"):
        state.OVER.set("many texts")
        state.follow(start(jobs, state.model_ref(), asked, name))
        st.rerun()


def start(jobs: Jobs, ref: str, asked: _Asked, name: str) -> str:
    """Start a study, and return the job's id. What is done when it is cancelled is kept as a study of fewer texts."""

    def work(loaded: LoadedModel, job: Job) -> str:
        from analysis.studies import study
        from analysis.texts.excerpts import excerpts

        size = min(asked.n_tokens, loaded.positions - 1)  # one for the next token
        given = excerpts(loaded.tokenizer, dict(asked.texts), n_tokens=size, at_most=asked.at_most)
        part = digest_of_file(asked.path) if asked.path.exists() else ""
        try:
            complete = study(loaded, given, asked.path, progress=job).complete
        finally:
            id = job.result = library.WORKSPACE.add_file(asked.path, name=name).id if asked.path.exists() else ""
            if part not in ("", id):
                library.WORKSPACE.delete(part)
        if complete:
            asked.path.unlink()
        return id

    return jobs.start(f"Studying “{name}”", ref, work, kind="study").id


def _name(texts: Mapping[str, str]) -> str:
    first = next(iter(texts), "Study")
    return f"{first} and {len(texts) - 1} more" if len(texts) > 1 else first


def _expected(asked: _Asked) -> int:
    """About how many excerpts the texts have."""
    found = sum(len(text) // (asked.n_tokens * _CHARACTERS_A_TOKEN) for _, text in asked.texts)
    return min(found, asked.at_most)


def _time(excerpts: int, n_tokens: int) -> str:
    """About how long it takes; empty where there is no run of the model."""
    run = state.run()
    if run is None:
        return ""
    pace = library.pace(run.model, run)
    return f"; that takes {pace.told(excerpts * pace.capture(n_tokens))}"


def _note_special_tokens(engine: Engine, texts: Mapping[str, str]) -> None:
    from analysis.texts.tokens import notes_of

    try:
        found = engine.tokenizer_and_config(state.model_ref())
        for note in notes_of(found[0], iter(texts.values())) if found else ():
            st.caption(markup.plain(note))
    except UserError as error:
        st.warning(markup.plain(str(error)), icon=":material/warning:")
