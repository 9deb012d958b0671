"""The measured front, part of the page Plan: what each way to spend the bytes costs in prediction."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import TYPE_CHECKING

import numpy as np
import streamlit as st

from analysis.captures import Capture
from analysis.defaults import KEEP_RATIOS
from analysis.demo.presets import bundled_results
from analysis.evaluation.lm import LmSettings
from analysis.plans.front import Front, measure_front, passes
from analysis.plans.skip import Plan
from analysis.plans.strategies import STRATEGIES, title_of
from analysis.progress import Progress
from analysis.records import from_json, load, to_json
from analysis.statistics import Interval
from analysis.texts.excerpts import SPLIT
from app import figures, session
from app.components import choices, controls, markup, measured, sources
from app.components.charts import show
from app.components.jobs import Job
from app.components.measured import Kind
from app.engine import Engine
from app.report.chapters import front_lines

if TYPE_CHECKING:
    from streamlit.navigation.page import Page as StreamlitPage

    from analysis.models.load import LoadedModel

_MIB = 2**20
_FIRST = (
    "uniform_low",
    "uniform_high",
    "uniform_signed",
    "by_head",
    "by_head_by_cost",
    "adakv",
    "random",
)


@lru_cache(maxsize=4)
def _bundled(model: str) -> Front | None:
    file = bundled_results(model).front
    return load(Front, file) if file else None


FRONT: Kind[Front] = Kind("front", "front", partial(from_json, Front), to_json, _bundled)


def _title(name: str) -> str:
    return markup.plain(title_of(name))


def answer(run: Capture) -> None:
    """Does a plan pay in the model on screen? Nothing where it was not measured."""
    if front := FRONT.of(run):
        st.markdown(f"##### {markup.plain(front.answer())}")


def section(engine: Engine, run: Capture, generate_page: StreamlitPage) -> None:
    """Draw the front of the model on screen, and the ways to have one measured or to open one."""
    st.subheader("Measured: what each way costs")
    front = FRONT.of(run)
    if front is None:
        st.info(
            f"Nothing was measured for {markup.plain(run.model)} yet: give texts below and press *Measure it for "
            f"{markup.plain(run.model)}*, or open a front that `python -m analysis front` has written.",
            icon=":material/info:",
        )
    elif not front.points:
        st.info("This front has no points: no way fitted its budgets.", icon=":material/info:")
    else:
        _draw(front)
        _pick(front, generate_page)
    measured.section(FRONT, engine, run, lambda: _measure(run))


def _draw(front: Front) -> None:
    n = len(front.measured_on)
    lines = list(front.lines)
    shown = st.pills(
        "Ways", lines, selection_mode="multi", key=f"front_ways_{id(front)}", format_func=_title,
        default=[name for name in lines if name in _FIRST] or lines,
        help=choices.explained({name: STRATEGIES[name] for name in lines if name in STRATEGIES}),
    )  # fmt: skip
    points = [point for name in shown for point in front.lines[name]]
    intervals = [front.interval(point) for point in points]
    show(
        figures.front(
            front_lines(front),
            full_mib=front.full_nbytes / _MIB,
            shown=[title_of(name) for name in shown],
        ),
        key="front",
        alt="Bytes of the cache against the change of the negative log likelihood",
        caption=f"Bytes that the caches held, counted, against the change of NLL: the mean over {n} texts and its 95 % "
        f"interval. Lower left is better. Each text: a prompt of {front.lengths[0]} tokens, then {front.lengths[1]} "
        f"more predicted over the compressed cache. Plans (solid) were made on {len(front.planned_on)} other texts; "
        "uniform ways (dashed) give every head the same share. Intervals of two ways overlap even where one is better "
        "in every text: the table compares them text by text.",
        table={
            "way": [title_of(point.strategy) for point in points],
            "keep": [point.keep_ratio for point in points],
            "MiB": [point.nbytes / _MIB for point in points],
            "NLL change": [interval.value for interval in intervals],
            "from": [interval.low for interval in intervals],
            "to": [interval.high for interval in intervals],
            "attention lost, planning texts": [point.planned_loss for point in points],
            "attention lost, measured texts": [point.measured_loss for point in points],
        },
    )
    _compared(front)
    if front.left_out:
        with st.expander(f"Left out, since the budget is too small: {len(front.left_out)}"):
            st.markdown("\n".join(f"- {markup.plain(reason)}" for reason in front.left_out))


def _compared(front: Front) -> None:
    """At each budget the best plan beside the best uniform way, paired by text."""
    compared = sorted(front.comparisons(), key=lambda one: one.plan.keep_ratio)
    if not compared:
        return
    st.markdown("**At equal bytes: the best plan against the best uniform way**")
    st.dataframe(
        {
            "keep": [f"{one.plan.keep_ratio:.0%}" for one in compared],
            "the plan is": [one.verdict for one in compared],
            "plan less uniform, nats": [_nats(one.less.value) for one in compared],
            "95 %, of all at once": [_ends(one.less) for one in compared],
            "best plan": [title_of(one.plan.strategy) for one in compared],
            "best uniform": [title_of(one.uniform.strategy) for one in compared],
            "MiB": [f"{one.plan.nbytes / _MIB:.2f}" for one in compared],
        },
        hide_index=True,
    )
    st.caption(
        "Taken text by text. The intervals hold for every plan beside every uniform way at every budget at once, since "
        "both are the best of several on the very texts that they are compared on."
    )


def _ends(interval: Interval) -> str:
    return "no interval" if np.isnan(interval.low) else f"{_nats(interval.low)} to {_nats(interval.high)}"


def _nats(value: float) -> str:
    return f"{value:+.4f}".replace("-", "\N{MINUS SIGN}")


def _pick(front: Front, generate_page: StreamlitPage) -> None:
    """A point of the front, to be used in Generate."""
    with st.container(horizontal=True, vertical_alignment="bottom"):
        name = st.selectbox("Use a point: way", list(front.lines), format_func=_title, key="front_way")
        by_keep = {point.keep_ratio: point for point in front.lines[name]}
        keep = st.selectbox("keep", list(by_keep), format_func=lambda keep: f"{keep:.0%}", key="front_keep")
        if st.button("Use it in Generate", icon=":material/compare:", key="use_point"):
            note = f"{title_of(name)}, keep ratio {keep:g}, of the measured front"
            session.use_plan(Plan(front.model, by_keep[keep].spec, note=note))
            st.switch_page(generate_page)
    st.caption(
        f"{controls.in_words(by_keep[keep].spec)}: NLL {_nats(front.interval(by_keep[keep]).value)} nats a token."
    )


def _measure(run: Capture) -> Job[Front]:
    ref = sources.model_input()
    texts = sources.texts_input()
    offered = choices.strategies(measured=True)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        keeps = st.multiselect(
            "Budgets (keep)", KEEP_RATIOS, default=[0.3, 0.5], key="front_keeps", persist_state="session"
        )
        ways = st.multiselect(
            "Ways", list(offered), default=_FIRST, format_func=_title, key="front_measured_ways",
            persist_state="session", help=choices.explained(offered),
        )  # fmt: skip
    continued = sources.continued_input(
        "Texts to plan on, and to measure on",
        "At most so many of each, cut from what was given. With fewer than 16 the intervals are too narrow.",
    )
    protect_last = controls.current_spec().protect_last
    costly = any(offered[name].needs_costs for name in ways)
    known = sources.name_of(ref) == run.model  # else nobody knows yet how many kv heads it has
    runs = passes(
        continued.texts,
        continued.texts,
        keep_ratios=len(keeps),
        strategies=ways,
        kv_heads=len(run.cache_shape.layers) * run.n_kv_heads if known else 0,
    )
    estimate = (
        f"{SPLIT} At most {runs:,} runs, captures and continuations of {continued.new_tokens} tokens"
        + f", and {continued.texts} more for each kv head of the model" * (costly and not known)
        + f". The last {protect_last} tokens are protected."
    )
    missing = "" if texts else "Upload texts or paste a long one first."
    if not (keeps and ways):
        missing = "Choose a budget and a way first."

    def measure(loaded: LoadedModel, progress: Progress) -> Front:
        return measure_front(
            loaded,
            *continued.planning_and_measuring(loaded, texts),
            keep_ratios=keeps,
            strategies=ways,
            settings=LmSettings(continued.prompt_tokens, continued.new_tokens),
            protect_last=protect_last,
            progress=progress,
        )

    return Job(
        "run_front",
        sources.label("Measure it", ref),
        ref,
        measure,
        estimate=estimate,
        missing=missing,
        cancelled="What was measured is gone.",
    )
