"""Heads: does low norm predict attention here, and in which heads?"""

from __future__ import annotations

import numpy as np
import streamlit as st

from analysis.captures import Capture
from analysis.metrics import METRICS, PROBES, HeadValues
from analysis.selftest import check, is_synthetic
from analysis.verdicts import answer, meanings
from analysis.words import signed
from app import figures, session
from app.components import choices, markup
from app.components.charts import first_is_drawn, show
from app.views import two_runs
from app.views.one_head import one_head

_FEW_TOKENS = 64
WHOSE = {
    "next token": "Of ONE query, the next token's.",
    "last queries": "Of each of the last {w} queries by itself, over the tokens before it; then their mean.",
    "all queries": "Of the attention that each token receives, the mean over all queries that see it.",
}
CAPTIONS = {  # of maps, for which a metric's own line is too short
    "gamma": "**Γ** of each head, −1 to +1. Purple: the keys of low norm get the attention, as the paper says. Orange: "
    "those of high norm do. It weighs tokens by their attention.",
    "alr": "**ALR**, the paper's figure: how much more attention is lost by evicting high norms first than by the "
    "ideal order. Pale is good. It is a sum over the tokens, so it grows with the text, and with how much there is "
    "to lose.",
    "spearman": "**Spearman's ρ** of key norm and attention. It counts every token alike, so it does not notice a "
    "sink. In layer 0 equal tokens have equal norms.",
}


def page() -> None:
    """Draw the page."""
    run = session.current_run()
    if is_synthetic(run):
        _synthetic(run)
    else:
        st.header(f"Does low norm predict attention in {markup.plain(run.model)}?")
        place = st.empty()
        _about(run)
    with st.container(horizontal=True, vertical_alignment="bottom", gap="large"):
        probe = _probe(run)
        without = st.toggle(
            "Leave out the first token (the usual sink)",
            key="skip_first",
            persist_state="session",
            help="One token often draws most of the attention. The figures and plots below are then of the others; "
            "verdicts, which weigh both, and the strip of tokens stay of all.",
        )
    skip_first = int(without)
    values = session.values_of(run, skip_first, probe)
    if not is_synthetic(run):
        place.markdown(markup.headline(answer(session.study_of_run(run, probe), probe=probe)))
    if not _maps(run, values, skip_first, probe):
        return
    layer, head = session.chosen_head(run)
    st.markdown(
        f"Open below: **layer {layer}, head {head}**, {session.verdicts_of(run, probe)[layer, head]}, "
        f"Γ {signed(values.of('gamma')[layer, head])}."
    )
    st.divider()
    one_head(run, values, skip_first, probe)
    st.divider()
    two_runs.section(run)


def _synthetic(run: Capture) -> None:
    found = check(run)
    st.header("The synthetic check: does the instrument read what is there?")
    (st.success if found.passed else st.error)(
        markup.plain(str(found)), icon=":material/check:" if found.passed else ":material/error:"
    )
    st.warning(
        "This run is synthetic: no model made it, and it says nothing of any. Its attention was made so that Γ is "
        "exactly −1 in layer 0, 0 in layer 1 and +1 in layer 2, in every head and for every query; heads differ in how "
        "the attention is spread. *Capture* leads back to a model's run.",
        icon=":material/science:",
    )


def _probe(run: Capture) -> str:
    """Whose attention Γ and ALR are of."""
    names = {probe: probe for probe in PROBES} | {"last queries": f"last {len(run.recent_positions)} queries"}
    if not run.recent_positions:  # a file of an earlier version
        del names["last queries"]
    if st.session_state.get("probe") not in names:
        st.session_state["probe"] = "next token"
    chosen = st.segmented_control(
        "Attention of", list(names), format_func=lambda name: names[name], required=True, key="probe",
        persist_state="session", help="\n".join(f"- **{names[probe]}**: {PROBES[probe]}" for probe in names),
    )  # fmt: skip
    return chosen or "next token"


def _about(run: Capture) -> None:
    source = "A run that comes with the app" if session.is_bundled() else "Your run"
    beginning = markup.plain(run.text[:80]) + (" …" if len(run.text) > 80 else "")
    st.caption(
        f"{source}: {run.n_tokens} tokens of “{beginning}” in {markup.plain(run.architecture)}, {run.n_layers} layers, "
        f"{run.n_heads} query heads on {run.n_kv_heads} kv heads, {_dtypes(run)}. The answer is of the "
        f"attention chosen below; the next token is “{markup.plain(markup.visible(run.probe_label))}”. One query is an "
        "anecdote, and so is one text: capture your own on the page *Capture*, take many on *Texts*."
    )
    if run.n_tokens < _FEW_TOKENS:
        st.warning(f"{run.n_tokens} tokens say little: take a text of some hundred.", icon=":material/warning:")
    for warning in run.warnings:
        st.warning(markup.plain(warning), icon=":material/warning:")


def _dtypes(run: Capture) -> str:
    """What the run was computed in, and how the weights are stored where that is another type."""
    other = f" (weights stored as {markup.plain(run.stored)})" if run.stored not in ("", run.dtype) else ""
    return f"{markup.plain(run.dtype)}{other}"


def _maps(run: Capture, values: HeadValues, skip_first: int, probe: str) -> bool:
    """Draw them. False where so far it is the first one only, and nothing should follow."""
    whose = WHOSE[probe].format(w=len(run.recent_positions))
    left, right = st.columns([3, 2], gap="large")
    with left:
        offered = choices.metrics()
        which = st.selectbox(
            "Map of", list(offered), format_func=lambda name: offered[name].title, key="map",
            persist_state="session", help=choices.explained(offered),
        )  # fmt: skip
        of = offered[which]
        show(
            figures.head_map(
                values.of(which),
                title=of.title,
                diverging=of.diverging,
                status=values.status_of(which),
                zmin=of.low or 0.0,
                zmax=of.high,
            ),
            key=f"map_{which}_{skip_first}_{probe}",
            alt=f"Map of {of.title} by layer and head",
            caption=f"{CAPTIONS.get(which, f'**{of.title}**: {of.about}.')} {whose} Rows are layers, columns query "
            "heads. Click a cell to open that head.",
            on_head=session.choose_head,
        )
    if not first_is_drawn():
        return False
    with left:
        _all_heads(run, values, probe)
    with right:
        st.markdown("**With and without the first token**")
        gamma, without = (session.values_of(run, 0, probe).of(name) for name in ("gamma", "gamma_skip_first"))
        show(
            figures.head_quadrant(gamma, without, values.of("sink_share"), status=session.verdicts_of(run, probe)),
            key=f"quadrant_{probe}",
            alt="All heads by Γ with the first token and without it",
            caption="Every head by Γ with the first token (across) and without it (up); size is the first token's "
            f"share of the attention. Heads in which the others get next to none are not drawn. Lower left follows the "
            f"paper. {whose} Click a head to open it.",
            on_head=session.choose_head,
        )
    return True


def _all_heads(run: Capture, values: HeadValues, probe: str) -> None:
    verdict = session.verdicts_of(run, probe)
    layer, head = np.indices(verdict.shape).reshape(2, -1)
    with st.expander("All heads as a table", icon=":material/table:"):

        def chosen() -> None:
            if rows := st.session_state["all_heads"].selection.rows:
                session.choose_head(int(layer[rows[0]]), int(head[rows[0]]))

        st.dataframe(
            {
                "layer": layer,
                "head": head,
                "kv head": head * run.n_kv_heads // run.n_heads,
            }
            | {METRICS[name].title: values.of(name).ravel() for name in values.names}
            | {"verdict": verdict.ravel().astype(str), "status": values.status_of("gamma").ravel().astype(str)},
            hide_index=True,
            key="all_heads",
            on_select=chosen,
            selection_mode="single-row",
        )
        st.caption(" · ".join(f"**{name}**: {markup.plain(meaning)}" for name, meaning in meanings(1).items()))
