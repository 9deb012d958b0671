"""Records of a model that a page shows: measured here, opened from a file, or bundled with the program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import streamlit as st

from analysis.captures import Capture
from analysis.errors import RecordError, TextError
from app.components import jobs, markup, uploads
from app.engine import Engine
from app.session import Slot


class OfAModel(Protocol):
    """A record that names its model."""

    @property
    def model(self) -> str:
        """Name of the model."""


Record = TypeVar("Record", bound=OfAModel)


@dataclass(frozen=True, slots=True)
class Kind(Generic[Record]):
    """A kind of record: its name on a page, and how it is read and written."""

    key: str
    """Names it in the session, and its file."""
    noun: str
    """"front": what the page calls one."""
    read: Callable[[str], Record]
    """Text of a file -> record. Raises RecordError."""
    write: Callable[[Record], str]
    bundled: Callable[[str], Record | None]
    """Name of a model -> the record that comes with the program, if one does."""

    @property
    def own(self) -> Slot[Record | None]:
        """Record that was measured or opened in this session."""
        return Slot(self.key, None)

    def of(self, run: Capture) -> Record | None:
        """Record of the model on screen: the session's own, else the bundled one, else None."""
        own = self.own.get()
        return own if own is not None and own.model == run.model else self.bundled(run.model)


def section(kind: Kind[Record], engine: Engine, run: Capture, measure: Callable[[], jobs.Job[Record]]) -> None:
    """Draw the two ways to get a record: measure it, or open a file.

    Args:
        measure: draws the settings of a measurement and returns its job.
    """
    shown, own = kind.of(run), kind.own.get()
    if own is not None and own.model != run.model:
        st.caption(
            f"The {kind.noun} that you have is of {markup.plain(own.model)}: it is shown beside a run of that model."
        )
    left, right = st.columns([3, 2], gap="large")
    title, icon = "Measure it here", ":material/speed:"
    with left, st.expander(title, icon=icon, expanded=shown is None, key=f"measure_{kind.key}"):
        record = jobs.run(engine, measure())
        if record is not None:
            kind.own.set(record)
            st.rerun()
    with right, st.expander(f"{kind.noun.capitalize()}s as files", icon=":material/folder_open:"):
        _files(kind, shown)


def _files(kind: Kind[Record], shown: Record | None) -> None:
    """Download the record that is shown, and open another in its place."""
    if shown is not None:
        st.download_button(
            f"Download this {kind.noun}",
            kind.write(shown),
            file_name=f"{kind.key}.json",
            mime="application/json",
            icon=":material/download:",
            on_click="ignore",
        )
    file = st.file_uploader(f"Open a {kind.noun}", type="json", key=f"{kind.key}_file")
    opened = Slot(f"opened_{kind.key}", "")
    if file is not None and opened.get() != file.file_id:
        try:
            kind.own.set(kind.read(uploads.decoded(file)))
        except (RecordError, TextError) as error:
            st.error(markup.plain(str(error)), icon=":material/error:")
            return
        opened.set(file.file_id)
        st.rerun()
