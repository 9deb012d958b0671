"""Another run beside the one on screen: another model, another text, another training step."""

from __future__ import annotations

import numpy as np
import streamlit as st

from analysis.comparing import Comparison, compare
from analysis.errors import RecordError
from app import library, state
from app.components import markup, one_head, uploads
from app.components.charts import page_is_dark, show
from app.report.chapters import of_comparison

_LONGEST = 40  # letters of a run's name in a title


def draw() -> None:
    """Choose the other run, and show both head by head, or as wholes where their heads are not the same."""
    shown = state.run_id()
    others = {entry.id: entry for entry in library.entries("run") if entry.id != shown}
    if state.OTHER_RUN.get() not in others:
        state.OTHER_RUN.drop()
    left, right = st.columns([3, 2], gap="medium", vertical_alignment="bottom")

    def called(id: str) -> str:
        return f"{others[id].model}: {others[id].name}, {others[id].about}" if id else "no other run"

    with left:
        st.selectbox("Compare with", ["", *others], format_func=called, **state.OTHER_RUN.widget())
    with right:
        _open()
    if not (other := state.OTHER_RUN.get()):
        st.caption("Runs of all models are listed. *New run* in the header makes another.")
        return
    comparison = _compared(other, shown, _names(other, shown))
    compared = of_comparison(comparison, dark=page_is_dark())
    for words in compared.words:
        st.markdown(markup.plain(words))
    heads = compared.drawings[0].table or _gammas(comparison)
    columns = st.columns(len(compared.drawings), gap="medium")
    for i, (column, drawing) in enumerate(zip(columns, compared.drawings, strict=True)):
        with column:
            st.markdown(f"**{markup.plain(drawing.title)}**")
            table = compared.table if drawing is compared.drawings[-1] else heads
            caption = markup.plain(drawing.caption)
            key = f"compared_{i}"
            file = one_head.file_name(key, *comparison.names)
            show(drawing.figure, key=key, alt=drawing.alt, caption=caption, table=table, file=file)
    st.table({markup.plain(title): list(column) for title, column in (compared.table or {}).items()}, hide_index=True)


def _gammas(comparison: Comparison) -> dict[str, np.ndarray]:
    """Γ of every head of both, a row for each."""
    means = [means.mean.ravel() for means in comparison.means]
    return {
        "run": np.repeat(np.array(comparison.names), [len(values) for values in means]),
        "Γ": np.concatenate(means),
    }


def _open() -> None:
    def opened() -> None:
        if (file := st.session_state["other_run_file"]) is None:
            return
        try:
            entry = uploads.opened(file, library.WORKSPACE.add_file)
        except RecordError as error:
            uploads.refuse(str(error))
            return
        if entry.kind == "run":
            state.OTHER_RUN.set(entry.id)
        else:
            uploads.refuse(f"{file.name} is a {entry.kind}, not a run.")

    st.file_uploader("Or open a saved run", type="safetensors", key="other_run_file", on_change=opened)
    uploads.show_refused()


def _names(other: str, shown: str) -> tuple[str, ...]:
    """Names of two runs, short enough for a legend; with the models where these differ."""
    both = [(library.find(id), which) for id, which in ((other, "the other"), (shown, "on screen"))]
    models = {entry.model for entry, _ in both if entry}
    return tuple(
        f"{entry.model} " * (len(models) > 1)
        + f"“{entry.name if len(entry.name) <= _LONGEST else entry.name[: _LONGEST - 1] + '…'}” ({which})"
        for entry, which in both
        if entry
    )


@library.remembered
def _compared(other: str, shown: str, names: tuple[str, ...]) -> Comparison:
    return compare(*(library.study_of_run(id, "next token") for id in (other, shown)), names=names)
