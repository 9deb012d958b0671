"""Another run beside the one on screen, part of the page Heads: another model, another text, another training step."""

from __future__ import annotations

import streamlit as st

from analysis.captures import Capture, load_run
from analysis.comparing import Comparison, compare
from analysis.errors import RecordError
from analysis.studies import study_of
from app import session
from app.components import markup, uploads
from app.components.charts import show
from app.report.chapters import of_comparison


def section(run: Capture) -> None:
    """Draw the section: what to compare with, and where both have the same heads, head by head."""
    if not st.toggle("Compare with another run", key="compare", persist_state="session"):
        return
    st.subheader("Compared with another run")
    _choose(run)
    other = session.other_run()
    if other is None:
        st.info("Open another run above, or hold this one and capture the next.", icon=":material/info:")
        return
    if other is run:
        st.info(
            "This run is held: capture or open another on the page *Capture*, and see here what differs.",
            icon=":material/push_pin:",
        )
        return
    st.caption(f"The other: {_about(other)}. On screen: {_about(run)}.")
    compared = of_comparison(_compared(run, other))
    for words in compared.words:
        st.markdown(markup.plain(words))
    columns = st.columns(2, gap="large")
    for i, drawing in enumerate(compared.drawings):
        with columns[i % 2]:
            st.markdown(f"**{drawing.title}**")
            show(drawing.figure, key=f"compared_{i}", alt=drawing.alt, caption=drawing.caption, table=drawing.table)
    st.dataframe(compared.table, hide_index=True)


def _choose(run: Capture) -> None:
    def opened() -> None:
        if (file := st.session_state["other_run_file"]) is not None:
            try:
                session.compare_with(uploads.opened(file, load_run))
            except RecordError as error:
                st.session_state["other_run_refused"] = str(error)

    left, right = st.columns([3, 2], gap="large", vertical_alignment="bottom")
    with left:
        st.file_uploader("Open the other run", type="safetensors", key="other_run_file", on_change=opened)
        if refused := st.session_state.pop("other_run_refused", ""):
            st.error(markup.plain(refused), icon=":material/error:")
    with right, st.container(horizontal=True):
        st.button(
            "Hold this run", icon=":material/push_pin:", on_click=session.compare_with, args=(run,),
            help="Keep it, to compare the next one with that you capture or open.",
        )  # fmt: skip
        if not session.is_demo():
            st.button("The demo run", icon=":material/home:", on_click=session.compare_with, args=(None,))


@session.remembered
def _compared(run: Capture, other: Capture) -> Comparison:
    both = [study_of(each, probes=("next token",)) for each in (other, run)]
    return compare(*both, names=(f"{other.model} (the other)", f"{run.model} (on screen)"))


def _about(run: Capture) -> str:
    beginning = markup.plain(run.text[:60]) + (" …" if len(run.text) > 60 else "")
    return f"{run.n_tokens} tokens of “{beginning}” in {markup.plain(run.model)}"
