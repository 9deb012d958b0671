"""Long work with a model, on a page: its button, its turn, its progress, Cancel, and the message at its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import streamlit as st

from analysis.errors import UserError
from analysis.progress import Progress
from app import session
from app.components import markup
from app.engine import Engine
from l2kv.errors import SpecError

if TYPE_CHECKING:
    from analysis.models.load import LoadedModel

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Job(Generic[Result]):
    """Long work with a model, before it has begun."""

    id: str
    """Names the job in the session, and its button."""
    label: str
    """What its button says."""
    ref: str
    """What the model is asked for by; empty where the user has named none."""
    work: Callable[[LoadedModel, Progress], Result]
    """Does it, and tells its progress, which raises to cancel."""
    estimate: str = ""
    """What it will take, in Markdown, said before it begins."""
    missing: str = ""
    """Why it cannot begin, if it cannot."""
    cancelled: str = ""
    """What to say after the user has cancelled."""
    done: str = "Done: it is shown above."
    """What to say after it is done, if anything."""

    def perform(self, engine: Engine, progress: Progress) -> Result:
        """Wait for a turn with the model, and do the work. Draws nothing. Raises errors that the user can fix."""
        with engine.lend(self.ref, progress) as loaded:
            return self.work(loaded, progress)


def told(done: int, total: int, what: str) -> str:
    """Say how far work is: "3 of 24 texts", or `what` alone for a stage of unknown length (a total of 0)."""
    return f"{done:,} of {total:,} {what}" if total else what


def run(engine: Engine, job: Job[Result]) -> Result | None:
    """Draw the job's button, and on a click run the job, with progress and Cancel.

    Returns the job's result, or None if it was not started or failed. The page takes the result and is run again
    (`st.rerun`), and then says that it is done.
    """
    cancelled, finished = session.Slot(f"{job.id}_cancelled", False), session.Slot(f"{job.id}_done", False)
    if job.estimate:
        st.caption(job.estimate)
    buttons = st.container(horizontal=True, vertical_alignment="center")
    if not buttons.button(job.label, type="primary", icon=":material/play_arrow:", key=job.id):
        if cancelled.take():
            st.info(f"Cancelled. {job.cancelled}", icon=":material/cancel:")
        if job.done and finished.take():
            st.toast(job.done, icon=":material/check:")  # wherever the reader has scrolled to
            for note in session.NOTES.take():
                st.info(markup.plain(note), icon=":material/info:")
        return None
    if job.missing or not job.ref:
        st.error(job.missing or "Give the id or the folder of a model first.", icon=":material/error:")
        return None
    # A click ends this script at its next st.* call, which is in the progress after each step.
    cancel = buttons.empty()
    cancel.button("Cancel", icon=":material/cancel:", key=f"{job.id}_cancel", on_click=cancelled.set, args=(True,))
    bar = st.progress(0.0, "Looking for the model …")

    def show(done: int, total: int, what: str) -> None:
        bar.progress(min(done / total, 1.0) if total else 0.0, markup.plain(told(done, total, what)))

    try:
        result = job.perform(engine, show)
    except (UserError, SpecError) as error:  # a SpecError: settings that do not fit this model
        st.error(markup.plain(str(error)), icon=":material/error:")
        result = None
    bar.empty()
    cancel.empty()
    finished.set(result is not None)
    return result
