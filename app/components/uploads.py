"""Files that a user brings and takes along: uploads read, or refused in a sentence, and things saved for download."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import streamlit as st

from analysis.errors import TextError
from analysis.texts import read
from app import session
from app.components import markup

if TYPE_CHECKING:
    from streamlit.runtime.uploaded_file_manager import UploadedFile

Thing = TypeVar("Thing")


def decoded(file: UploadedFile) -> str:
    """The text of an uploaded file. Raises TextError, as `analysis.texts.read.decoded`."""
    return read.decoded(file.getvalue(), file.name)


def text_of(file: UploadedFile | None) -> str:
    """`decoded`, or nothing where there is no file, or none that can be: then `show_refused` says why."""
    try:
        return decoded(file) if file is not None else ""
    except TextError as error:
        refuse(str(error))
        return ""


def documents_of(files: list[UploadedFile]) -> dict[str, str]:
    """The texts in uploaded files, name -> text; what cannot be read is refused, and `show_refused` says why."""
    texts: dict[str, str] = {}
    for file in files:
        name, number = file.name, 1
        while name in texts:  # files of several folders may have one name
            number += 1
            name = f"{file.name} ({number})"
        try:
            texts |= read.documents(file.getvalue(), file.name, name)
        except TextError as error:
            refuse(str(error))
    return {name: text for name, text in texts.items() if text.strip()}


def refuse(reason: str) -> None:
    """Have `show_refused` say why a file was refused. For callbacks, which cannot draw where it belongs."""
    session.REFUSED.set((*session.REFUSED.get(), reason))


def show_refused() -> None:
    """Draw why files were refused, once."""
    for reason in session.REFUSED.take():
        st.error(markup.plain(reason), icon=":material/error:")


def opened(file: UploadedFile, load: Callable[[Path], Thing]) -> Thing:
    """What an uploaded file holds, by what reads such a file from disk. Raises as that, RecordError."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / Path(file.name).name
        path.write_bytes(file.getvalue())
        return load(path)


def saved(thing: Thing, save: Callable[[Thing, Path], Path]) -> bytes:
    """What to download, by what writes such a thing to disk."""
    with tempfile.TemporaryDirectory() as folder:
        return save(thing, Path(folder) / "saved.safetensors").read_bytes()
