"""Verdict: may a compressed cache replace the full one? The answer, what it rests on, and what it would save."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import log
from types import MappingProxyType
from typing import TYPE_CHECKING

import streamlit as st

from analysis import verdicts
from analysis.decision.checklist import Answer, Check, Decision, Status
from analysis.decision.evidence import CONTEXTS, STAGES, Estimate, Measurement, Sizes
from analysis.decision.speed import Speed
from analysis.errors import UserError
from analysis.plans.export import Saving, library_code
from analysis.plans.skip import Plan
from analysis.plans.strategies import title_of
from analysis.words import counted, signed
from app import library, state
from app.components import documents, markup, savings
from app.components import progress as progress_bar
from app.engine import Engine
from app.header import in_words
from app.jobs import Jobs
from l2kv.errors import SpecError
from l2kv.policies import POLICIES
from l2kv.spec import CompressionSpec

if TYPE_CHECKING:
    from streamlit.navigation.page import StreamlitPage

    from analysis.models.load import LoadedModel
    from analysis.progress import Progress

_COLOUR = {Answer.GO: "green", Answer.GO_WITH_A_PLAN: "green", Answer.NO_GO: "red", Answer.NOT_YET: "gray"}
_ICON = {
    Status.PASSED: ":green[:material/check_circle:]",
    Status.FAILED: ":red[:material/cancel:]",
    Status.NOT_APPLICABLE: ":gray[:material/do_not_disturb_on:]",
    Status.NOT_YET: ":gray[:material/pending:]",
}
_HIDDEN = {
    "Passkeys": "A number is hidden in repeated sentences, which are compressed; then the number is asked for.",
    "Needles": "A sentence is hidden in prose, which is compressed; then what it says is asked for.",
}
_NEXT = "keydiff"
"""The policy to try where a norm fails: by docs/results.md the cheapest to predict with."""
_EVERY = 2.0  # seconds between two looks at what is being measured
_STYLE = """<style>
.st-key-tiles [data-testid="stColumn"] { min-width: min(17rem, 100%); }
.st-key-measure_sizes [data-testid="stColumn"] { min-width: min(10rem, 100%); }
</style>"""


def draw(engine: Engine, jobs: Jobs, pages: Mapping[str, StreamlitPage] = MappingProxyType({})) -> None:
    """Draw the page.

    Args:
        pages: pages that lines of the checklist link to, by the paths of their addresses.
    """
    asked, plan = state.spec(), state.plan()
    st.html(_STYLE)
    if plan:
        st.title("Can I use this plan?")
    else:
        st.title("Can I halve this cache?" if asked.keep_ratio == 0.5 else "Can I compress this cache?")
    if progress_bar.running(jobs, "results"):
        st.fragment(_as_it_grows, run_every=_EVERY)(engine, jobs, pages)
    else:
        if _answer(_decision(), asked):
            _measure(engine, jobs)
        _grounds(engine, jobs, pages)
    decision = _decision()
    _script(_chosen(decision), decision)
    savings.table(engine, _chosen(decision))


def _decision() -> Decision:
    return library.decision(library.evidence(state.model()), state.spec(), state.limits(), state.plan())


def _chosen(decision: Decision) -> CompressionSpec:
    """The compression that the page is about: a plan where the answer is one."""
    return decision.plan if decision.answer is Answer.GO_WITH_A_PLAN and decision.plan else state.spec()


def _as_it_grows(engine: Engine, jobs: Jobs, pages: Mapping[str, StreamlitPage]) -> None:
    """Draw the answer and its grounds while more is measured."""
    _answer(_decision(), state.spec(), growing=True)
    _grounds(engine, jobs, pages)


def _grounds(engine: Engine, jobs: Jobs, pages: Mapping[str, StreamlitPage]) -> None:
    """Draw what the answer rests on, as far as it is measured."""
    decision, evidence = _decision(), library.gathered(library.evidence(state.model()))
    asked, chosen = state.spec(), _chosen(decision)
    with st.container(key="tiles"):
        quality, memory, fast = st.columns(3)
    with quality.container(border=True, height="stretch", key="tile_quality"):
        _quality(decision)
    with memory.container(border=True, height="stretch", key="tile_memory"):
        saving = savings.tile(engine, chosen)
    with fast.container(border=True, height="stretch", key="tile_speed"):
        _speed(jobs, asked, evidence.speed_of(chosen) or evidence.speed_of(asked), saving)
    _heads(pages)
    with st.container(horizontal=True, vertical_alignment="center", horizontal_alignment="distribute"):
        st.subheader("Checklist", width="content")
        with st.popover("Limits", icon=":material/rule:"):
            _limits()
    _checklist("The plan in force" if state.plan() else "As set", decision.checks, pages)
    if decision.plan_checks:
        assert decision.plan is not None, "it has been checked"
        strategy = markup.plain(title_of(re.split("[,:]", _plan_of(decision.plan).note)[0]))
        _checklist(f"With a plan of the same bytes: {strategy}", decision.plan_checks, pages)


# --------------------------------------------------------------------------------------------------------- the answer


def _answer(decision: Decision, asked: CompressionSpec, *, growing: bool = False) -> bool:
    """Draw the answer, and what may be done about it unless it grows; tell whether the user wants to measure."""
    with st.container(border=True, key="answer", horizontal=True, vertical_alignment="center"):
        with st.container(width="stretch", gap="xxsmall"):
            st.markdown(f"### :{_COLOUR[decision.answer]}[{decision.answer}]")
            st.markdown(markup.plain(decision.why))
            st.caption(f"{markup.plain(state.model())} with {in_words(asked)}, against its full cache")
        if growing:
            st.button("Measuring …", icon=":material/play_arrow:", key="being_measured", disabled=True)
            return False
        if decision.answer is Answer.GO_WITH_A_PLAN:
            st.button("Use the plan", type="primary", on_click=_use_plan, args=(decision.plan,), key="use_plan")
        elif decision.rival:
            other = decision.rival.policy
            name = POLICIES.find(other).in_words
            st.button(f"Use {name}", type="primary", on_click=state.POLICY.set, args=(other,), key="use_rival")
        elif decision.answer is Answer.NO_GO and decision.smallest:
            st.button(
                f"Keep {decision.smallest:.0%}".replace("%", " %"), type="primary", key="use_ratio",
                on_click=state.KEEP_RATIO.set, args=(decision.smallest,),
            )  # fmt: skip
        elif decision.answer is Answer.NO_GO and not state.plan() and asked.policy != _NEXT:
            st.button(
                "Try KeyDiff", key="try_next", on_click=state.POLICY.set, args=(_NEXT,),
                help="It keeps the keys least like the mean key, without attention scores too, and often costs less.",
            )  # fmt: skip
        not_yet = decision.answer is Answer.NOT_YET
        measure = st.button(
            "Measure" if not_yet else "Measure again", icon=":material/play_arrow:", key="measure",
            type="primary" if not_yet else "secondary",
        )  # fmt: skip
    return measure


def _use_plan(spec: CompressionSpec) -> None:
    kept = {library.opened(Plan, one.id).spec: one.id for one in library.entries("plan", model=state.model())}
    if spec not in kept:  # it is of a Pareto front
        kept[spec] = library.WORKSPACE.add(_plan_of(spec), name="Verdict").id
    state.PLAN.set(kept[spec])


def _plan_of(spec: CompressionSpec) -> Plan:
    """The plan that a decision fell back on."""
    return next(plan for plan in library.gathered(library.evidence(state.model())).plans if plan.spec == spec)


# ---------------------------------------------------------------------------------------------------------- the tiles


def _quality(decision: Decision) -> None:
    of_plan = decision.answer is Answer.GO_WITH_A_PLAN
    prediction, *retrieval = (decision.plan_checks if of_plan else decision.checks)[:3]
    st.markdown("**Quality**" + (" with the plan" if of_plan else ""))
    not_yet = prediction.status is Status.NOT_YET
    st.metric(
        "Perplexity against the full cache", "Not yet measured" if not_yet else prediction.short,
        help="How unsure the model is of each next token of real prose: × 1 is as sure as with the full cache. "
        "nats/token is the logarithm of it.",
    )  # fmt: skip
    if not_yet and prediction.n:
        st.caption(prediction.says)
    if (ends := prediction.measured) is not None:
        nats = f"{signed(log(ends.value), 3)} nats/token"
        limit = f"must end by × {state.MOST_PERPLEXITY.get():g}"
        st.caption(f"95 % × {ends.low:.3f} to {ends.high:.3f}, {limit}; {nats}; {prediction.n} excerpts")
    for check, noun in zip(retrieval, _HIDDEN, strict=True):
        told = f"{_ICON[check.status]} {noun}: {markup.plain(check.short or 'not yet measured')}"
        st.markdown(told, help=_HIDDEN[noun])


def _speed(jobs: Jobs, asked: CompressionSpec, speed: Speed | None, saving: Saving | None) -> None:
    st.markdown("**Speed**")
    if speed is None:
        st.metric("Decoding on this machine", "Not yet measured")
        st.button("Time it", icon=":material/timer:", key="time_it", on_click=_start_timing, args=(jobs, asked))
    else:
        st.metric("Decoding, tokens per second", f"{speed.full_rate:.3g} → {speed.kept_rate:.3g}")
        low, high = speed.spread
        if high < 1:
            st.markdown(":orange[:material/warning:] **Slower than the full cache here**")
        elif low < 1:
            st.markdown("Not told apart from the full cache here")
        st.caption(
            f"× {speed.speedup:.2f} ({low:.2f} to {high:.2f} in {len(speed.full_seconds)} runs); reading weights and "
            f"cache once allows × {speed.bound:.2f}. {speed.n_tokens:,} tokens, batch {speed.batch}, {speed.dtype}, "
            f"{markup.plain(speed.device)}."
        )
        st.button("Time again", icon=":material/timer:", key="time_it", on_click=_start_timing, args=(jobs, asked))
    if saving is not None and saving.kept_seconds:
        st.markdown(
            f"On {markup.plain(state.GPU.get())}: at most **× {saving.full_seconds / saving.kept_seconds:.2f}** at "
            f"{saving.n_tokens:,} tokens, batch {state.BATCH.get()}"
        )


def _start_timing(jobs: Jobs, spec: CompressionSpec) -> None:
    batch, tokens = int(state.BATCH.get()), min(int(state.CACHE_TOKENS.get()), CONTEXTS[0])

    def work(loaded: LoadedModel, progress: Progress) -> str:
        from analysis.decision.speed import measure_speed

        longest = min(tokens, loaded.positions - 100)
        speed = measure_speed(loaded, spec, n_tokens=longest, batch=batch, progress=progress)
        return library.WORKSPACE.add(speed, name="Speed").id

    state.follow(jobs.start(f"Timing {state.model()}", state.model_ref(), work, kind="speed").id)


# ---------------------------------------------------------------------------------------------------- heads and checks


def _heads(pages: Mapping[str, StreamlitPage]) -> None:
    """Say which layers follow the paper: the why, never the answer."""
    study, probe = state.study(), state.PROBE.get()
    if study is None and not state.run_id():
        return
    if study is not None and probe not in study.probes:
        probe = study.probes[0]
    told = library.answer_of(state.study_id() or state.run_id(), probe)
    with st.container(horizontal=True, vertical_alignment="center"):
        of_one = "" if (run := state.run()) is None or study else f" By one text of {counted(run.n_tokens, 'token')}."
        st.markdown(f"**{verdicts.QUESTION}** {markup.plain(told)}{of_one}", width="stretch")
        _link(pages, "explore", "Why")


_LINKS = {Status.PASSED: ("demo", "Show"), Status.FAILED: ("tune", "Fix"), Status.NOT_YET: ("evaluate", "Prove")}


def _checklist(title: str, checks: tuple[Check, ...], pages: Mapping[str, StreamlitPage]) -> None:
    with st.container(border=True):
        st.markdown(f"**{title}**")
        for check in checks:
            with st.container(horizontal=True, vertical_alignment="center"):
                told = f"{_ICON[check.status]} **{check.asks}** {check.status.capitalize()}. {markup.plain(check.says)}"
                st.markdown(told, width="stretch")
                if link := _LINKS.get(check.status):
                    _link(pages, *link)


def _link(pages: Mapping[str, StreamlitPage], path: str, label: str) -> None:
    if path in pages:
        st.page_link(pages[path], label=label, icon=":material/arrow_forward:")


def _limits() -> None:
    st.number_input("Most that perplexity may be multiplied by", 1.0, 99.0, step=0.01, **state.MOST_PERPLEXITY.widget())
    st.number_input("Points that finding may lose", 0.1, 100.0, step=1.0, **state.POINTS_LOST.widget())
    st.number_input("Least number of excerpts", 2, 9999, **state.LEAST_EXCERPTS.widget())
    st.number_input("Least number of passkeys, and of needles", 2, 9999, **state.LEAST_SAMPLES.widget())
    st.number_input("Share that the full cache must find", 0.01, 1.0, step=0.05, **state.FULL_FINDS.widget())
    st.caption("The ends of 95 % intervals are held against the limits, not means.")


def _script(spec: CompressionSpec, decision: Decision) -> None:
    with st.expander("Use it: a script", icon=":material/code:", key="script", on_change="rerun") as script:
        if script.open:
            code = library_code(spec, state.model_ref(), told=decision.told(spec))
            st.code(code, language="python", wrap_lines=True)


# ---------------------------------------------------------------------------------------------------------- measuring


@st.dialog("Measure", width="large", on_dismiss="rerun")
def _measure(engine: Engine, jobs: Jobs) -> None:
    """Say what will be measured and how long it takes, and start it."""
    spec, ref = state.spec(), state.model_ref()
    beside = "" if state.plan() else ", with larger keep ratios, and with a plan of the same bytes"
    st.markdown(
        f"Measures **{markup.plain(state.model())}** with {in_words(spec)}{beside}: prediction of prose, passkeys, "
        "needles, and decoding speed. Nothing is measured twice, and what is measured before you cancel is kept."
    )
    with st.container(key="measure_sizes"):
        left, middle, right = st.columns(3)
    excerpts = left.number_input("Excerpts", 2, 500, max(16, int(state.LEAST_EXCERPTS.get())), key="verdict_excerpts")
    samples = middle.number_input(
        "Passkeys, and needles", 5, 1000, max(50, int(state.LEAST_SAMPLES.get())), step=5, key="verdict_samples"
    )
    context = right.selectbox(
        "Tokens of their prompts", [0, *reversed(CONTEXTS)], key="verdict_context",
        format_func=lambda n: f"{n:,}" if n else "the longest for 20 minutes",
    )  # fmt: skip
    with st.expander("Texts", icon=":material/article:"):
        given = documents.ask(few="Half of them are planned on, the others are measured.")
    sizes = Sizes(int(excerpts), int(samples), int(context), int(state.BATCH.get()))
    known = _known(ref, spec, sizes, given)
    done = known is not None and not known.seconds
    if st.button("Start", type="primary", icon=":material/play_arrow:", key="verdict_start", disabled=done):
        state.follow(start(jobs, ref, spec, sizes, given, known))
        st.rerun()
    try:
        left_to_do = _estimate(engine, ref, spec, sizes, given)
    except (UserError, SpecError) as error:
        st.error(markup.plain(str(error)), icon=":material/error:")
        return
    told = f"{counted(sizes.excerpts, 'excerpt')}, {counted(sizes.samples, 'passkey')} and as many needles"
    if left_to_do.seconds:
        longer = not context and left_to_do.total > 60 * sizes.minutes
        fewer = " Those are the shortest: fewer excerpts, passkeys and needles take less." * longer
        st.markdown(f"{told} take {left_to_do}.{fewer}")
    else:
        st.markdown(f"{told} are measured already: more of them add to it.")


_Asked = tuple[object, ...]
_ESTIMATES = state.Slot[dict[_Asked, dict[Sizes, Estimate]]]("verdict_estimates", {})


def start(
    jobs: Jobs, ref: str, spec: CompressionSpec, sizes: Sizes, texts: Mapping[str, str], known: Estimate | None
) -> str:
    """Start the whole measurement, and return the job's id."""
    plan = state.plan()

    def work(loaded: LoadedModel, progress: Progress) -> str:
        progress(0, 0, "Timing a few tokens …" if known is None else "Planning …")
        Measurement(loaded, spec, library.WORKSPACE, sizes, texts, plan=plan).run(known=known, progress=progress)
        return library.WORKSPACE.entries("results", model=loaded.name)[0].id

    return jobs.start(f"Measuring {state.model()}", ref, work, kind="results").id


def _known(ref: str, spec: CompressionSpec, sizes: Sizes, texts: Mapping[str, str]) -> Estimate | None:
    """What was timed for the same question, or for other sizes where nothing is measured yet."""
    of_sizes = _ESTIMATES.get().get(_asked(ref, spec, texts), {})
    if sizes in of_sizes:
        return of_sizes[sizes]
    whole = ((of, found) for of, found in of_sizes.items() if set(found.seconds) == set(STAGES))
    return next((found.scaled(of, sizes) for of, found in whole), None)


def _asked(ref: str, spec: CompressionSpec, texts: Mapping[str, str]) -> _Asked:
    return ref, spec, state.PLAN.get(), tuple(texts.items()), library.evidence(state.model())


def _estimate(engine: Engine, ref: str, spec: CompressionSpec, sizes: Sizes, texts: Mapping[str, str]) -> Estimate:
    """How long it takes, timed if need be. Raises UserError, SpecError."""
    if known := _known(ref, spec, sizes, texts):
        return known
    place = st.empty()

    def show(done: int, total: int, what: str) -> None:
        place.caption(markup.plain(what))

    asked = _asked(ref, spec, texts)
    with st.spinner("Timing a few tokens …", show_time=True), engine.lend(ref, show) as loaded:
        found = Measurement(loaded, spec, library.WORKSPACE, sizes, texts, plan=state.plan()).estimate
        # Before anything is drawn: a click meanwhile, as on Start, ends this script there.
        _ESTIMATES.set({asked: {**_ESTIMATES.get().get(asked, {}), sizes: found}})
    place.empty()
    return found
