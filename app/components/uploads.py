"""Uploads, read or refused in a sentence, and downloads."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import streamlit as st

from analysis.errors import TextError
from analysis.texts import read
from app import state
from app.components import markup

if TYPE_CHECKING:
    from streamlit.runtime.uploaded_file_manager import UploadedFile

Thing = TypeVar("Thing")


def decoded(file: UploadedFile) -> str:
    """Decode an uploaded text file. Raises TextError, as `analysis.texts.read.decoded`."""
    return read.decoded(file.getvalue(), file.name)


def text_of(file: UploadedFile | None) -> str:
    """Decode an uploaded file if there is one; empty if not, or if it is refused (see `show_refused`)."""
    try:
        return decoded(file) if file is not None else ""
    except TextError as error:
        refuse(str(error))
        return ""


def documents_of(files: list[UploadedFile]) -> dict[str, str]:
    """Read the texts in uploaded files, by name; unreadable files are refused (see `show_refused`)."""
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
    """Note why a file was refused, for `show_refused`: callbacks cannot draw in the right place."""
    state.REFUSED.set((*state.REFUSED.get(), reason))


def show_refused() -> None:
    """Draw, once, why files were refused."""
    for reason in state.REFUSED.take():
        st.error(markup.plain(reason), icon=":material/error:")


def opened(file: UploadedFile, load: Callable[[Path], Thing]) -> Thing:
    """Read an uploaded file with a function that reads from disk. Raises RecordError, as that does."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / Path(file.name).name
        path.write_bytes(file.getvalue())
        return load(path)


def saved(thing: Thing, save: Callable[[Thing, Path], Path]) -> bytes:
    """Make the bytes of a download with a function that writes to disk."""
    with tempfile.TemporaryDirectory() as folder:
        return save(thing, Path(folder) / "saved.safetensors").read_bytes()


def safe_name(name: str) -> str:
    """The name of an uploaded file without anything that leads elsewhere."""
    return re.sub(r"[^\w.\-]", "_", Path(name).name)[-80:].lstrip(".") or "file"
