"""The header of every page: the model, the run and the compression on screen, and what the server is doing.

Every page obeys it, and settings that do not fit the model on screen can't be made in it.
"""

from __future__ import annotations

import streamlit as st

from analysis.errors import ModelError, RecordError
from analysis.models.memory import free_bytes
from analysis.words import counted, human_bytes, layers_listed
from app import address, library, new_run, state
from app.components import choices, markup, uploads
from app.components import progress as progress_bar
from app.engine import Engine
from app.jobs import Job, Jobs
from l2kv.config import layer_kinds
from l2kv.policies import POLICIES
from l2kv.spec import CompressionSpec

STYLE = """<style>
.st-key-header [data-testid="stPopover"] button { justify-content: flex-start; text-align: left; }
.st-key-header [data-testid="stPopover"] button p { overflow: hidden; display: -webkit-box; white-space: normal;
  -webkit-box-orient: vertical; -webkit-line-clamp: 2; line-height: 1.15; overflow-wrap: anywhere; }
.st-key-header [data-testid="stCaptionContainer"] p { line-height: 1.15; }
</style>"""
_OTHER = "Another model …"


def draw(engine: Engine, jobs: Jobs) -> None:
    """Draw the header, then the job that runs, then what is to be said once."""
    shown = progress_bar.current(jobs, on_done=show_result)
    st.html(STYLE)
    with st.container(horizontal=True, vertical_alignment="center", key="header", gap="small"):
        with st.popover(f":material/deployed_code: {markup.plain(state.model())}", help="Model", width=150):
            _model(engine)
        with st.popover(f":material/article: {_run_label()}", help="Text and run", width=210):
            _runs()
        if st.button("New run", icon=":material/add:", key="new_run", help="Capture a text in this model"):
            state.OPENING.set(new_run.DIALOG)
        told = in_words(state.spec())
        with st.popover(f":material/tune: {told}", help=f"Compression: {told}", width="stretch"):
            _compression(engine)
        short, whole = status(engine, jobs)
        st.caption(short, help=whole, width=190)
        with st.container(width="content"):
            _link()
    # In containers, so that what comes and goes here moves no part of the page that is drawn alone: such a part is
    # drawn where it was, and the browser shows an error in place of the page if that is no longer its place.
    with st.container():
        progress_bar.draw(shown)
    with st.container():
        for said in state.notices():
            st.warning(said, icon=":material/info:")
    if state.OPENING.take() == new_run.DIALOG:
        new_run.dialog(engine, jobs)


def no_run() -> None:
    """Say that the model on screen has no run yet, and offer to make one."""
    with st.container(horizontal=True, vertical_alignment="center", key="no_run"):
        st.markdown(
            f"There is no run of {markup.plain(state.model())} yet: one pass over a text records the norm of every key "
            "and the attention that it gets.",
            width="content",
        )
        st.button(
            "New run", icon=":material/add:", type="primary", key="first_run", on_click=state.OPENING.set,
            args=(new_run.DIALOG,),
        )  # fmt: skip


def show_result(job: Job) -> None:
    """Put on screen what a job has made."""
    if job.kind == "run":
        state.show_run(job.result)
    elif job.kind in state.IN_ADDRESS:
        state.IN_ADDRESS[job.kind].set(job.result)


def in_words(spec: CompressionSpec) -> str:
    """Describe a compression in a few words of Markdown: "low norm · keep 50 % · window 32 · skip layers 0, 1"."""
    kept = f"{spec.keep_ratio:.0%}".replace("%", " %") if spec.budget is None else counted(spec.budget, "token")
    name = POLICIES[spec.policy].in_words if spec.policy in POLICIES else spec.policy
    parts = [markup.plain(name), f"keep {kept}"]
    parts += ["a plan by kv head"] * bool(spec.head_ratios) + ["a plan by layer"] * bool(spec.layer_ratios)
    parts += [f"first {spec.protect_first}"] * bool(spec.protect_first) + [f"window {spec.protect_last}"]
    parts += [f"skip {layers_listed(spec.skip_layers)}"] * bool(spec.skip_layers)
    return " · ".join(parts)


def status(engine: Engine, jobs: Jobs) -> tuple[str, str]:
    """Say what is in memory, how much is free, and what the server is doing, in Markdown: in short, and in whole."""
    loaded = engine.loaded
    short = whole = "no model in memory"
    if loaded:
        name = markup.plain(loaded.name)
        short = f"{name} in memory"
        other = loaded.stored not in ("", loaded.dtype)
        stored = f"stored as {loaded.stored}, computed and cached in " if other else ""
        whole = f"{name} in memory, {stored}{loaded.dtype} on {loaded.device}"
    waiting = max(engine.waiting - 1, 0)
    running = sum(1 for _ in jobs.running())
    running = max(running - waiting, min(running, 1))  # previews wait, too
    busy = f" · {counted(running, 'job')} running" if running else ""
    busy += f" · {waiting} waiting" if waiting else ""
    free = human_bytes(free_bytes(loaded.device if loaded else "cpu")).replace(" ", "\N{NO-BREAK SPACE}")
    rest = f" · {free} free{busy}"
    return f":material/memory: {short}{rest}", f"{whole}{rest}"


@st.fragment
def _link() -> None:
    """Offer the address of what is on screen: it is written as it is opened, so it is that of the page as it is now."""
    with st.popover("Link", help="Link to what you see", on_change="rerun", key="link") as of:
        if of.open:
            st.code(address.here(), language=None, wrap_lines=True)
            st.caption(
                "It brings back this view on any machine that has the same records. A run or study of your own goes "
                "along as its file: *Download* it where you choose it."
            )


def _model(engine: Engine) -> None:
    """Choose the model: one that is at hand, one of which there are records, or any other."""
    here: dict[str, str] = {}
    for model in engine.known_models(library.WORKSPACE.models()):
        here.setdefault(state.name_of(model), model)
    known = here | {entry.model: entry.model for entry in library.entries("run") if entry.model not in here}
    known.setdefault(state.model(), state.model_ref())
    names = [*known, _OTHER]
    chosen = st.radio("Model", names, index=names.index(state.model()), key=f"model_choice_{state.model()}")
    if chosen != _OTHER:
        if chosen != state.model():
            _use(engine, known[chosen])
        return
    with st.form("model_other_form", border=False):  # so that Enter sends it
        ref = st.text_input(
            "Hub id, folder or GGUF file",
            placeholder="Qwen/Qwen3-0.6B",
            help="Any decoder-only model with safetensors or GGUF weights. No remote code is run.",
            key="model_other",
        )
        if st.form_submit_button("Use this model", type="primary", key="use_model") and ref.strip():
            _use(engine, ref.strip())


def _use(engine: Engine, ref: str) -> None:
    """Put a model on screen, or say why it can't be; then the one before stays."""
    try:
        with st.spinner("Looking at its config …", show_time=True):
            state.choose_model(ref, engine.check)
    except ModelError as error:
        st.error(f"{markup.plain(str(error))} {markup.plain(state.model())} stays.", icon=":material/error:")
        return
    st.rerun()


def _run_label() -> str:
    """What the run on screen is, then its name: a long one is cut at its end, and no number is."""
    if (entry := library.find(state.run_id())) is None:
        return "No run yet"
    about = entry.about.replace(" ", "\N{NO-BREAK SPACE}")
    return f"{about} · {markup.plain(entry.name)}"


def _runs() -> None:
    """Choose, open, rename, delete and download runs of the model on screen."""
    entries = {entry.id: entry for entry in library.entries("run", model=state.model())}
    if entries:
        ids = list(entries)
        shown = state.run_id()
        chosen = st.selectbox(
            f"Runs of {markup.plain(state.model())}, newest first",
            ids,
            index=ids.index(shown),
            format_func=lambda id: f"{entries[id].name}, {entries[id].about}",
            key=f"run_choice_{shown}",
        )
        if chosen != shown:
            state.show_run(chosen)
            st.rerun()
        _manage(shown)
    file = st.file_uploader("Open a file: a run, study, plan or results", key="open_file")
    if file is not None and st.session_state.get("opened_file") != file.file_id:
        st.session_state["opened_file"] = file.file_id
        try:
            entry = uploads.opened(file, library.WORKSPACE.add_file)
        except RecordError as error:
            st.error(markup.plain(str(error)), icon=":material/error:")
            return
        state.show_model(entry.model)
        if entry.kind in state.IN_ADDRESS:
            state.IN_ADDRESS[entry.kind].set(entry.id)
        st.rerun()


def _manage(id: str) -> None:
    entry = library.find(id)
    assert entry is not None
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.download_button(
            "Download",
            data=lambda: library.path_of(id).read_bytes(),
            file_name=f"{id}.safetensors",
            icon=":material/download:",
            on_click="ignore",
            key="run_download",
        )
        if library.is_bundled(id):
            return
        if st.button("Delete", icon=":material/delete:", key="run_delete"):
            library.WORKSPACE.delete(id)
            state.RUN.drop()
            st.rerun()
    name = st.text_input("Name", entry.name, max_chars=200, key=f"run_name_{id}")
    if name.strip() and name != entry.name:
        library.WORKSPACE.rename(id, name)
        st.rerun()


def _compression(engine: Engine) -> None:
    """Set the compression that every page obeys."""
    if (plan := state.plan()) is not None:
        st.info(f"A plan is in force: {markup.plain(plan.note or in_words(plan.spec))}", icon=":material/route:")
        if st.button("Use the settings below instead", key="drop_plan"):
            state.PLAN.drop()
            st.rerun()
        return
    offered = choices.policies()
    if state.POLICY.get() not in offered:
        state.POLICY.drop()
    st.selectbox(
        "Policy", list(offered), format_func=lambda name: offered[name].title,
        help=choices.explained(offered), **state.POLICY.widget(),
    )  # fmt: skip
    st.slider(
        "Keep ratio", 0.05, 1.0, step=0.05, **state.KEEP_RATIO.widget(),
        help="Share of the tokens seen that each head keeps. 1 is the full cache.",
    )  # fmt: skip
    left, right = st.columns(2)
    left.number_input(
        "Recent window", 0, 4096, step=8, **state.PROTECT_LAST.widget(),
        help="The latest tokens, which are never evicted. The paper has none.",
    )  # fmt: skip
    right.number_input(
        "First tokens", 0, 4096, step=1, **state.PROTECT_FIRST.widget(),
        help="Tokens at the beginning that are never evicted: the attention sink.",
    )  # fmt: skip
    full = _full_layers(engine)
    if full is None:
        st.caption("Layers to skip can be chosen once the model or a run of it is here.")
        return
    state.SKIP_LAYERS.set([layer for layer in state.SKIP_LAYERS.get() if layer in full])
    st.multiselect(
        "Skipped layers", full, **state.SKIP_LAYERS.widget(), placeholder="None: every layer is compressed",
        help="Layers that keep everything, counted from 0. The page Tune suggests some.",
    )  # fmt: skip


def _full_layers(engine: Engine) -> list[int] | None:
    """Layers of the model on screen that can be compressed; None where nothing tells."""
    if run := state.run():
        return [layer for layer, kind in enumerate(run.layer_kinds) if kind == "full"]
    try:
        config = engine.config(state.model_ref())
    except ModelError:
        return None
    return None if config is None else [i for i, kind in enumerate(layer_kinds(config)) if kind == "full_attention"]
