"""Plan: where a cache's bytes should go. Made from the run on screen, measured on other texts, and what it saves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import streamlit as st

from analysis.captures import Capture
from analysis.errors import RecordError, SettingsError
from analysis.plans.allocation import AllocationPlan
from analysis.plans.curves import BY_NORM, curves_of
from analysis.plans.skip import Plan
from analysis.plans.strategies import STRATEGIES, plan, title_of
from analysis.studies import Study
from analysis.words import counted
from app import figures, session
from app.components import choices, controls, markup, uploads
from app.components.charts import show
from app.engine import Engine
from app.views import export, front, savings

if TYPE_CHECKING:
    from streamlit.navigation.page import Page as StreamlitPage

_OWN = "as the method has it"


def page(engine: Engine, generate_page: StreamlitPage) -> None:
    """Draw the page; a plan can be tried on `generate_page`."""
    run = session.current_run()
    st.header(f"Where should the bytes of {markup.plain(run.model)}'s cache go?")
    front.answer(run)
    st.markdown(
        "One ratio for all heads is the simplest budget. But some heads lose much by it and others nothing, so a plan "
        "gives each its own. Whether that pays is measured below, on texts that the plan has not seen."
    )
    _in_use()
    if run.cache_shape.layers:
        plan = _make(run)
        if plan is not None:
            _take_along(run, plan, generate_page)
    else:
        st.info(
            "Every layer of this model has a sliding window: its cache is bounded already, and none of it is "
            "compressed. There is nothing to plan.",
            icon=":material/info:",
        )
    st.divider()
    front.section(engine, run, generate_page)
    st.divider()
    savings.section(engine, run)


def _in_use() -> None:
    """The plan of the session, and how to bring one in."""
    if plan := session.plan_in_use():
        with st.container(border=True, horizontal=True, vertical_alignment="center"):
            note = f" ({markup.plain(plan.note)})" if plan.note else ""
            st.markdown(
                f":material/check_circle: **In use on Generate**: {controls.in_words(plan.spec)}{note}, for "
                f"{markup.plain(plan.model)}."
            )
            st.button("Drop it", icon=":material/close:", on_click=session.use_plan, args=(None,))


def _make(run: Capture) -> Plan | None:
    """A plan from the loss curves of the run on screen; None where there can be none."""
    st.subheader("Make a plan from the run on screen")
    with st.container(horizontal=True, vertical_alignment="bottom"):
        controls.ratio_input()
        controls.protect_last_input()
        policy = st.selectbox(
            "Which norms stay", (_OWN, *BY_NORM), format_func=controls.title, key="plan_policy",
            persist_state="session", help="By head: in each the direction that loses less here.",
        )  # fmt: skip
    with st.container(horizontal=True, vertical_alignment="bottom"):
        offered = choices.strategies()
        strategy = st.selectbox(
            "Method", list(offered), index=list(offered).index("by_head"), format_func=title_of, key="plan_strategy",
            persist_state="session", help=choices.explained(offered),
        )  # fmt: skip
    spec = controls.current_spec()
    try:
        measured = _measured(run, spec.protect_last, strategy)
        plan = _plan(measured, spec.protect_last, spec.keep_ratio, strategy, None if policy == _OWN else policy)
    except SettingsError as error:
        st.warning(f"There is no such plan: {markup.plain(str(error))}.", icon=":material/warning:")
        return None
    _expected(measured, plan)
    _maps(plan)
    of = (
        f"{counted(len(measured.names), 'text')} of a study"
        if isinstance(measured, Study)
        else f"{run.n_tokens} tokens of one text"
    )
    note = f"{title_of(strategy)}, from {of}"
    return Plan(run.model, plan.to_spec(), note=note)


def _measured(run: Capture, protect_last: int, strategy: str) -> Capture | Study:
    """The study of the model on screen, where there is one with loss curves that are enough; else the run."""
    study = session.current_study()
    alike = study is not None and (study.model, study.layer_kinds) == (run.model, run.layer_kinds)
    if study is None or not alike or study.curves is None or study.protect_last != protect_last:
        return run
    return run if STRATEGIES[strategy].needs_captures else study


@session.remembered
def _plan(
    measured: Capture | Study, protect_last: int, keep_ratio: float, strategy: str, policy: str | None
) -> AllocationPlan:
    curves = curves_of(measured) if isinstance(measured, Study) else session.curves_of(measured, protect_last)
    return plan(curves, keep_ratio, strategy, policy=policy)


def _expected(measured: Capture | Study, plan: AllocationPlan) -> None:
    if np.isnan(plan.expected_loss):
        st.markdown("It reads no norms, so nothing is known of what it would lose.")
        return
    if isinstance(measured, Study):
        texts = counted(len(measured.names), "text")
        on, of = f"On the {texts} of the study", f"{texts} and judged on the same ones, for one query of each"
    else:
        on, of = "On this text", f"the {measured.n_tokens} tokens on screen and judged on the same ones, for one query"
    less = 1 - plan.expected_loss / plan.uniform_loss if plan.uniform_loss else 0.0
    verdict = f"**{less:.0%} less** than" if less >= 0.005 else f"**{-less:.0%} more** than" if less < -0.005 else "as"
    st.markdown(
        f"{on} it would lose **{plan.expected_loss:.1%}** of the next token's attention, {verdict} one ratio "
        f"for all ({plan.uniform_loss:.1%}) from the same bytes; no plan of this kind can lose less than "
        f"{plan.bound:.1%}."
    )
    st.caption(
        f"In-sample: planned on {of}. That flatters a plan. Attention lost is not prediction lost, either: see what "
        "was measured below before you believe it."
    )


def _maps(plan: AllocationPlan) -> None:
    layer, head = np.indices(plan.ratios.shape).reshape(2, -1)
    table = {"layer": layer, "kv head": head, "keeps": plan.ratios.ravel()}
    high = None if plan.directions is None else np.array(plan.directions) == "high"
    if high is not None:
        table["stays"] = np.where(high, "high norms", "low norms").ravel()
    left, right = st.columns([3, 2], gap="large")
    with left:
        show(
            figures.ratio_map(plan.ratios),
            key="plan_ratios",
            alt="Share of the tokens that each kv head keeps",
            caption=f"The share of the tokens that each kv head keeps; {plan.used:.1%} of all pairs. Rows are layers, "
            "columns kv heads. Darker keeps more. A ratio that jumps between neighbours is likely fitted to this text.",
            table=table,
        )
    if high is not None:
        with right:
            show(
                figures.direction_map(high),
                key="plan_directions",
                alt="Which norms stay in each kv head",
                caption="Which norms stay: low ones as the paper has it (purple), or high ones (orange), whichever "
                "loses less in that head at its ratio.",
            )


def _take_along(run: Capture, plan: Plan, generate_page: StreamlitPage) -> None:
    with st.container(horizontal=True):
        if st.button("Use this plan in Generate", icon=":material/compare:", type="primary"):
            session.use_plan(plan)
            st.switch_page(generate_page)
        export.download(plan)
    export.as_code(plan, run)
    with st.expander("Open a plan, or a skip list", icon=":material/upload_file:"):
        _import(run)


def _import(run: Capture) -> None:
    typed = st.text_input("A skip list", placeholder="0, 1, 12", key="plan_skip_list")
    file = st.file_uploader("Or a file: a plan (JSON) or a skip list", type=["json", "txt"], key="plan_file")
    given = uploads.text_of(file) if file is not None else typed
    uploads.show_refused()
    if not given.strip() or not st.button("Open it", icon=":material/upload_file:"):
        return
    try:
        session.use_plan(export.plan_from(given, run))
    except RecordError as error:
        st.error(markup.plain(str(error)), icon=":material/error:")
        return
    st.rerun()
