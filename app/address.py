"""The page's address: everything that is on screen, so that a reload or a colleague's click shows the same."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

import streamlit as st

from analysis.errors import ModelError
from app import library, state
from app.components import markup
from app.engine import Engine
from l2kv.config import kv_heads_by_layer

_WRITTEN = state.Slot[dict[str, str]]("address_written", {})
_RECORDS = {name: name for name in ("run", "study", "plan", "results", "timeline", "story")}
_RECORDS |= {"with": "run", "and": "results", "told": "story"}
"""Parameter -> kind of the record that it names."""
_OF_ANY_MODEL = ("with",)  # parameters whose record may be of another model than the one on screen


def read(engine: Engine) -> None:
    """Take over what the address says, unless it was written there last; bad parts are ignored, with a notice."""
    given = {name: st.query_params[name] for name in state.IN_ADDRESS if name in st.query_params}
    if not given or given == _WRITTEN.get():
        return
    _WRITTEN.set(given)
    for name, text in _with_model(engine, given).items():
        _take(name, text)
    _check_fits(engine)


def _with_model(engine: Engine, given: dict[str, str]) -> dict[str, str]:
    """Put the model of an address on screen, and return what else is to be taken over.

    Of a model that can't be had this is nothing that belongs to a model, unless a run that is here tells of another.
    """
    ref = given.pop("model", "").strip()
    if ref and state.name_of(ref) != state.model():
        try:
            state.choose_model(ref, engine.check)
        except ModelError as error:
            state.notice(
                f"The address names the model {markup.plain(ref[:60])}, which cannot be used: "
                f"{markup.plain(str(error))} {markup.plain(state.model())} stays on screen."
            )
            if not (entry := library.find(given.get("run", ""))) or entry.kind != "run":
                return {name: text for name, text in given.items() if state.IN_ADDRESS[name] not in state.OF_MODEL}
    return given


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
                "the header, by the button with the name of the run (:material/article:), and the link will work."
            )
            return
        if name == "run" and entry.model != state.model():
            state.show_model(entry.model)
        elif entry.model != state.model() and name not in _OF_ANY_MODEL:
            state.notice(
                f"The address names a {kind} of {markup.plain(entry.model)}, and {markup.plain(state.model())} is on "
                "screen. It was ignored."
            )
            return
    slot.set(value)


def _check_fits(engine: Engine) -> None:
    """Ignore, with a notice, heads and layers that the model on screen does not have."""
    if (sizes := _sizes(engine)) is None:
        return
    n_layers, n_heads, n_kv_heads = sizes
    for slot, told, n in ((state.LAYER, "layer {0}; this model has {1} layers", n_layers),
                          (state.HEAD, "head {0}; this model has {1} heads in a layer", n_heads)):  # fmt: skip
        if slot.get() >= n:
            state.notice(f"The address names {told.format(slot.get(), n)}. It was ignored.")
            slot.drop()
    if (pinned := state.PINNED.get()) and not (pinned[0] < n_layers and pinned[1] < n_heads):
        state.notice(
            f"The address names layer {pinned[0]}, head {pinned[1]} (pinned); this model has {n_layers} layers of "
            f"{n_heads} heads. It was ignored."
        )
        state.PINNED.drop()
    for listed, told, n in (
        (state.SKIP_LAYERS, "skips layer {0}; this model has {1}", n_layers),
        (state.ONLY_KV, "names kv head {0}; this model has {1} in a layer", n_kv_heads),
    ):
        if beyond := [one for one in listed.get() if one >= n]:
            state.notice(f"The address {told.format(beyond[0], n)}. It was ignored.")
            listed.set([one for one in listed.get() if one < n])


def _sizes(engine: Engine) -> tuple[int, int, int] | None:
    """Numbers of layers, heads and kv heads of the model on screen; None where nothing here tells."""
    if run := state.run():
        return run.n_layers, run.n_heads, run.n_kv_heads
    try:
        config = engine.config(state.model_ref())
    except ModelError:  # of a record
        return None
    if config is None:
        return None
    n_layers = config.num_hidden_layers
    return n_layers, config.num_attention_heads, max(kv_heads_by_layer(config, n_layers))


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
    values["over"], values["study"] = changed.get("over", state.over()), values["study"] or state.study_id()
    if values["run"] and not (state.LAYER.held() and state.HEAD.held()) and not {"layer", "head"} & set(changed):
        values["layer"], values["head"] = state.chosen_head()
    written = {}
    for name, slot in state.IN_ADDRESS.items():
        assert slot.param is not None
        text = slot.param.write(values[name])
        if slot.param.always or text != slot.param.write(slot.default):
            written[name] = text
    return written


def here() -> str:
    """The whole address of what is on screen."""
    return f"{st.context.url or ''}?{urlencode(params())}"


def link(page: str, **changed: Any) -> str:
    """Address of a page that shows what is on screen, but for what is `changed`."""
    return f"/{page}?{urlencode(params(**changed))}"
