"""Widgets for the settings of a task, made from its dataclass: a new task needs no page of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any

import streamlit as st

from analysis.errors import SettingsError
from analysis.evaluation.settings import Setting, check_settings, settings_of
from app import library
from app.components import uploads

_FILES = ("path", "questions")
"""Settings that name a file: they are asked for as uploads, so a page opens no file of the server."""


def ask(kind: type, *, key: str) -> object:
    """Ask for the settings of a dataclass, and make them.

    Raises:
        SettingsError: a value is none that it can have; the message says which.
    """
    settings = settings_of(kind)
    given: dict[str, Any] = {}
    columns = st.columns(2) if len(settings) > 1 else [st.container()]
    for i, setting in enumerate(settings):
        with columns[i % len(columns)]:
            given[setting.name] = _ask(setting, f"{key}_{setting.name}")
    made: object = kind(**given)
    check_settings(made)
    return made


def _ask(setting: Setting, key: str) -> Any:
    label, default = setting.name.replace("_", " ").capitalize(), setting.default
    if setting.name in _FILES:
        return _file(label, setting.about, key)
    if setting.choices is not None and setting.several:
        return tuple(st.multiselect(label, list(setting.choices), list(default), help=setting.about, key=key))
    if setting.choices is not None:
        names = [*([default] if default not in setting.choices else []), *setting.choices]
        return st.selectbox(
            label, names, names.index(default), format_func=lambda name: name or "its own", help=setting.about, key=key
        )
    if setting.several:
        told = st.text_input(label, ", ".join(f"{one:g}" for one in default), help=setting.about, key=key)
        return _list(setting, told)
    if setting.kind is bool:
        return st.toggle(label, default, help=setting.about, key=key)
    if setting.kind in (int, float):
        least, most = (
            setting.kind(end) if isfinite(end) else None for end in (setting.bounds.least, setting.bounds.most)
        )
        return st.number_input(label, least, most, default, help=setting.about, key=key)
    return st.text_input(label, default, help=setting.about, key=key)


def _list(setting: Setting, text: str) -> tuple[Any, ...]:
    """Read numbers with commas. Raises SettingsError."""
    convert: Callable[[str], Any] = setting.kind
    try:
        values = tuple(convert(word) for word in text.replace(",", " ").split())
    except ValueError:
        raise SettingsError(f"{setting.name} must be numbers such as 400, 1000; got {text!r:.60}") from None
    if not values:
        raise SettingsError(f"{setting.name} is empty: give one number at least")
    return values


def _file(label: str, about: str, key: str) -> str:
    """Ask for a file, and return where it is kept: by its content, so that the same file is the same setting."""
    file = st.file_uploader(label, help=about, key=key)
    if file is None:
        return ""
    return str(kept(file.getvalue(), file.name))


def kept(content: bytes, name: str) -> Path:
    """Keep an uploaded file in the workspace's folder `uploads`, under the digest of its content."""
    folder = library.WORKSPACE.folder / "uploads" / hashlib.sha256(content).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / uploads.safe_name(name)
    if not path.exists():
        path.write_bytes(content)
    return path
