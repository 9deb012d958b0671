"""Long work on a page: with which model, on which texts, and then a turn with the model, progress and Cancel."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import streamlit as st

from analysis.errors import ModelError, RecordError, TextError, UserError
from analysis.models.load import loading_note, model_folder, model_name
from analysis.selftest import is_synthetic
from analysis.texts import read
from app import session
from app.components import markup
from app.engine import Engine, allowed_models, check_allowed
from l2kv.errors import SpecError

if TYPE_CHECKING:
    from streamlit.runtime.uploaded_file_manager import UploadedFile

    from analysis.models.load import LoadedModel
    from analysis.plans.ablation import CausalCheck
    from analysis.plans.front import Front
    from analysis.texts.excerpts import Excerpt

OTHER = "Another model (hub id, folder or GGUF file)"
Result = TypeVar("Result")
Record = TypeVar("Record", "CausalCheck", "Front")
Progress = Callable[[int, int, str], None]
"""Called as (done, total, what is done); raises what ends the work when the user has clicked."""


def ref_of(model: str, engine: Engine | None = None) -> str | None:
    """What a model is asked for by, given its name, if it is at hand: by name, in an allowed folder, or in memory."""
    here = next((ref for ref in allowed_models() if name_of(ref) == model), None)
    resident = engine.loaded if engine else None
    return engine.ref if here is None and resident is not None and resident.name == model else here


def name_of(ref: str) -> str:
    """What a model is called that is asked for by `ref`."""
    try:
        return model_name(ref)
    except ModelError:  # a folder of several, which is refused when it is loaded
        return ref


def model_input() -> str:
    """Which model: that of the run on screen, until another is chosen; one choice on all pages. Empty if none was
    named."""
    run = session.current_run()
    if "model_choice" not in st.session_state or st.session_state.get("model_choice_of", run.model) != run.model:
        ref = allowed_models()[0] if is_synthetic(run) else ref_of(run.model)
        st.session_state["model_choice"] = ref or OTHER
        if ref is None and "/" in run.model:
            st.session_state["model_ref"] = run.model  # of the hub
    st.session_state["model_choice_of"] = run.model
    chosen = st.selectbox("Model", [*allowed_models(), OTHER], key="model_choice", persist_state="session")
    if chosen != OTHER:
        return chosen
    return st.text_input(
        "Hugging Face id, folder or GGUF file", key="model_ref", persist_state="session", placeholder="Qwen/Qwen3-0.6B",
        help="Any decoder-only model with safetensors or GGUF weights. No remote code is run. Folders must be "
        "allowed by whoever runs the app (L2KV_MODEL_DIRS).",
    )  # fmt: skip


def label(verb: str, ref: str) -> str:
    """What a button says that does something with a model: "Measure it for smollm2"."""
    return f"{verb} for {markup.plain(name_of(ref))}" if ref else verb


def texts_input() -> Mapping[str, str]:
    """The session's texts by name, the same on every page: uploaded files, and one that was pasted."""
    uploads = st.session_state.setdefault("uploads", 0)
    key = f"text_files_{uploads}"

    def upload() -> None:
        sources: dict[str, str] = {}
        for file in st.session_state[key]:
            name, number = file.name, 1
            while name in sources:  # files of several folders may have one name
                number += 1
                name = f"{file.name} ({number})"
            try:
                sources |= read.documents(file.getvalue(), file.name, name)
            except TextError as error:
                st.session_state.setdefault("refused", []).append(str(error))
        sources = {name: text for name, text in sources.items() if text.strip()}
        st.session_state["sources"] = sources

    def clear() -> None:
        st.session_state.update(sources={}, pasted="", uploads=uploads + 1)

    st.file_uploader("Text files", type="txt", accept_multiple_files=True, key=key, on_change=upload,
                     help="Of long ones, excerpts are taken.")  # fmt: skip
    refused()
    pasted = st.text_area(
        "And, or, a long text", key="pasted", persist_state="session", height=120, max_chars=4_000_000,
        placeholder="Paste a text of some thousand words.",
    )  # fmt: skip
    given = dict(st.session_state.get("sources", {}))
    if pasted.strip():
        given["pasted"] = read.plain_text(pasted)
    if given:
        names = ", ".join(markup.plain(name) for name in list(given)[:6]) + (", …" if len(given) > 6 else "")
        with st.container(horizontal=True, vertical_alignment="center"):
            st.caption(
                f"{len(given)} text{'s' * (len(given) != 1)}, {sum(map(len, given.values())):,} characters: {names}"
            )
            st.button("Clear", icon=":material/close:", type="tertiary", on_click=clear)
    return given


@dataclass(frozen=True, slots=True)
class Continued:
    """How texts are continued: each excerpt is a prompt, and tokens to predict after it."""

    texts: int
    prompt_tokens: int
    new_tokens: int

    def excerpts(self, loaded: LoadedModel, texts: Mapping[str, str]) -> tuple[Excerpt, ...]:
        """As many excerpts as are asked for, if the texts hold as many. Raises TextError where there are none."""
        from analysis.texts.excerpts import excerpts

        return told(loaded, excerpts(loaded.tokenizer, texts, n_tokens=self._size(loaded), at_most=self.texts))

    def planning_and_measuring(
        self, loaded: LoadedModel, texts: Mapping[str, str]
    ) -> tuple[tuple[Excerpt, ...], tuple[Excerpt, ...]]:
        """As many excerpts to plan on, and as many others to measure on. Raises TextError where there are none."""
        from analysis.texts.excerpts import planning_and_measuring

        both = planning_and_measuring(loaded.tokenizer, texts, n_tokens=self._size(loaded), each=self.texts)
        told(loaded, (*both[0], *both[1]))
        return both

    def _size(self, loaded: LoadedModel) -> int:
        """Tokens to ask of an excerpt."""
        from analysis.texts.excerpts import SPARE

        size = self.prompt_tokens + self.new_tokens
        if size > loaded.positions:
            raise TextError(
                f"{loaded.name} was trained on {loaded.positions:,} tokens at once, and {size:,} are asked for: take a "
                "shorter prompt."
            )
        return size + SPARE


def continued_input(label: str, help_text: str) -> Continued:
    """How many texts, and how long; the same on every page."""
    with st.container(horizontal=True, vertical_alignment="bottom"):
        texts = st.number_input(label, 1, 256, 16, key="continued", persist_state="session", help=help_text)
        prompt = st.number_input("Prompt tokens", 8, 131_072, 384, 64, key="prompt_tokens", persist_state="session")
        new = st.number_input("Tokens to predict", 1, 4096, 32, 16, key="predicted", persist_state="session")
    return Continued(int(texts), int(prompt), int(new))


def told(loaded: LoadedModel, given: tuple[Excerpt, ...]) -> tuple[Excerpt, ...]:
    """The excerpts; what the user should know of their special tokens is said beside the result, by `run`."""
    from analysis.texts.tokens import notes_of

    st.session_state["notes"] = notes_of(loaded.tokenizer, (excerpt.text for excerpt in given))
    return given


def decoded(file: UploadedFile) -> str:
    """The text of an uploaded file. Raises TextError, as `analysis.texts.read.decoded`."""
    return read.decoded(file.getvalue(), file.name)


def text_of(file: UploadedFile | None) -> str:
    """`decoded`, or nothing where there is no file, or none that can be: then `refused` says why."""
    try:
        return decoded(file) if file is not None else ""
    except TextError as error:
        st.session_state.setdefault("refused", []).append(str(error))
        return ""


def refused() -> None:
    """Draw why `text_of` had to refuse a file."""
    for error in st.session_state.pop("refused", ()):
        st.error(markup.plain(error), icon=":material/error:")


def opened(file: UploadedFile, load: Callable[[Path], Result]) -> Result:
    """What an uploaded file holds, by what reads such a file from disk. Raises as that, RecordError."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / Path(file.name).name
        path.write_bytes(file.getvalue())
        return load(path)


def saved(thing: Result, save: Callable[[Result, Path], Path]) -> bytes:
    """What to download, by what writes such a thing to disk."""
    with tempfile.TemporaryDirectory() as folder:
        return save(thing, Path(folder) / "saved.safetensors").read_bytes()


def of_another(shown: str, key: str, model: str) -> None:
    """Say so where what the session holds under `key` is of another model than the run on screen, and not shown."""
    own = st.session_state.get(key)
    if own is not None and own.model != model:
        st.caption(f"{shown} that you have is of {markup.plain(own.model)}: it is shown beside a run of that model.")


def record_files(shown: Record | None, what: str, key: str, read: Callable[[str], Record]) -> None:
    """Download the record that is shown, and open another in its place, `key` of the session. `read` may refuse it."""
    if shown is not None:
        st.download_button(
            f"Download this {what}",
            shown.to_json(),
            file_name=f"{key}.json",
            mime="application/json",
            icon=":material/download:",
            on_click="ignore",
        )
    file = st.file_uploader(f"Open a {what}", type="json", key=f"{key}_file")
    if file is not None and st.session_state.get(f"opened_{key}") != file.file_id:
        try:
            st.session_state[key] = read(decoded(file))
        except (RecordError, TextError) as error:
            st.error(markup.plain(str(error)), icon=":material/error:")
            return
        st.session_state[f"opened_{key}"] = file.file_id
        st.rerun()


def run(
    engine: Engine,
    ref: str,
    label: str,
    work: Callable[[LoadedModel, Progress], Result],
    *,
    key: str,
    cancelled: str,
    missing: str = "",
    done: str = "Done: it is shown above.",
) -> Result | None:
    """A button that has `work` done with the model `ref`; what it gives, or None where it was not pressed or failed.

    The page takes the result and is run again (`st.rerun`), and then says that it is done.

    Args:
        cancelled: what to say on the page after the user has cancelled.
        missing: why it cannot begin, if it cannot.
        done: what to say on the page after the work is done, if anything.
    """
    buttons = st.container(horizontal=True, vertical_alignment="center")
    started = buttons.button(label, type="primary", icon=":material/play_arrow:", key=key)
    if not started:
        if st.session_state.pop(f"{key}_cancelled", False):
            st.info(f"Cancelled. {cancelled}", icon=":material/cancel:")
        if done and st.session_state.pop(f"{key}_done", False):
            st.toast(done, icon=":material/check:")  # wherever the reader has scrolled to
            for note in st.session_state.pop("notes", ()):
                st.info(markup.plain(note), icon=":material/info:")
        return None
    if missing or not ref:
        st.error(missing or "Give the id or the folder of a model first.", icon=":material/error:")
        return None
    # A click ends this script at its next st.* call, which is in the progress after each step.
    cancel = buttons.empty()
    cancel.button("Cancel", icon=":material/cancel:", key=f"{key}_cancel",
                  on_click=lambda: st.session_state.update({f"{key}_cancelled": True}))  # fmt: skip
    bar = st.progress(0.0, "Looking for the model …")
    try:
        ref = check_allowed(ref)
        # Fetched, or refused, before anyone has to wait for it.
        model_folder(ref, on_fetch=lambda what, done, total: bar.progress(min(done / total, 1.0), f"{what} …"))
        with engine.turn(
            ref,
            on_wait=lambda ahead: bar.progress(0.0, f"Waiting: {ahead} ahead of you"),
            on_load=lambda: bar.progress(0.0, f"Loading {markup.plain(ref)} … {markup.plain(loading_note(ref))}"),
        ) as loaded:
            bar.progress(0.0, "Running …")
            result = work(loaded, lambda done, total, what: bar.progress(min(done / total, 1.0), markup.plain(what)))
    except (UserError, SpecError) as error:  # a SpecError: settings that do not fit this model
        st.error(markup.plain(str(error)), icon=":material/error:")
        result = None
    bar.empty()
    cancel.empty()
    st.session_state[f"{key}_done"] = result is not None
    return result
