"""The page's address: everything that is on screen, so that a reload or a colleague's click shows the same."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

import streamlit as st

from app import library, state
from app.components import markup

_WRITTEN = state.Slot[dict[str, str]]("address_written", {})
_RECORDS = {name: name for name in ("run", "study", "plan", "results", "timeline", "story")} | {"with": "run"}
"""Parameter -> kind of the record that it names."""


def read() -> None:
    """Take over what the address says, unless it was written there last; bad parts are ignored, with a notice."""
    given = {name: st.query_params[name] for name in state.IN_ADDRESS if name in st.query_params}
    if not given or given == _WRITTEN.get():
        return
    if "model" in given and state.name_of(given["model"]) != state.model():
        state.show_model(given["model"])
    for name, text in given.items():
        _take(name, text)
    _check_fits()
    _WRITTEN.set(given)


def _take(name: str, text: str) -> None:
    slot = state.IN_ADDRESS[name]
    assert slot.param is not None
    try:
        value = slot.param.read(text)
    except ValueError as error:
        state.notice(f"The address says {name}={markup.plain(text[:40])}, which {_reason(error)}. It was ignored.")
        return
    if text and (kind := _RECORDS.get(name)):
        entry = library.find(text)
        if entry is None or entry.kind != kind:
            state.notice(
                f"The address names a {kind} that is not on this machine: {markup.plain(text[:40])}. Open its file in "
                "the header, under *Text and run*, and the link will work."
            )
            return
        if kind == "run" and name == "run" and entry.model != state.model():
            state.show_model(entry.model)
    slot.set(value)


def _check_fits() -> None:
    """Ignore, with a notice, heads and layers that the model on screen does not have."""
    run = state.run()
    if run is None:
        return
    for name, slots in (("layer and head", (state.LAYER, state.HEAD)), ("pinned", (state.PINNED,))):
        pair = state.PINNED.get() if name == "pinned" else (state.LAYER.get(), state.HEAD.get())
        if pair and not (pair[0] < run.n_layers and pair[1] < run.n_heads):
            state.notice(
                f"The address names layer {pair[0]}, head {pair[1]} ({name}); this model has {run.n_layers} layers of "
                f"{run.n_heads} heads. It was ignored."
            )
            for slot in slots:
                slot.drop()
    if beyond := [layer for layer in state.SKIP_LAYERS.get() if layer >= run.n_layers]:
        state.notice(f"The address skips layer {beyond[0]}; this model has {run.n_layers}. It was ignored.")
        state.SKIP_LAYERS.set([layer for layer in state.SKIP_LAYERS.get() if layer < run.n_layers])


def _reason(error: ValueError) -> str:
    told = str(error)
    return told if told.startswith("must") else "is not a value that it can have"


def write() -> None:
    """Write what is on screen into the address."""
    told = params()
    if told != _WRITTEN.get() or not st.query_params:
        _WRITTEN.set(told)
        st.query_params.from_dict(told)


def params(**changed: Any) -> dict[str, str]:
    """Parameters of an address that shows what is on screen, but for what is `changed`, by the names of parameters."""
    values = {name: changed.get(name, slot.get()) for name, slot in state.IN_ADDRESS.items()}
    values["model"], values["run"] = values["model"] or state.model_ref(), values["run"] or state.run_id()
    if values["over"] == "many texts":
        values["study"] = values["study"] or state.study_id()
    if values["run"] and not (state.LAYER.held() and state.HEAD.held()) and not {"layer", "head"} & set(changed):
        values["layer"], values["head"] = state.chosen_head()
    written = {}
    for name, slot in state.IN_ADDRESS.items():
        assert slot.param is not None
        text = slot.param.write(values[name])
        if slot.param.always or text != slot.param.write(slot.default):
            written[name] = text
    return written


def link(page: str, **changed: Any) -> str:
    """Address of a page that shows what is on screen, but for what is `changed`."""
    return f"/{page}?{urlencode(params(**changed))}"
