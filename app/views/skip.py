"""Skip layers: which layers to leave whole, and what that costs and saves."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import streamlit as st

from analysis.captures import Capture
from analysis.errors import RecordError
from analysis.plans.ablation import COSTLY, Ablation, suggest_by_ablation
from analysis.plans.export import LENGTHS
from analysis.plans.skip import RULES, Plan, SkipSuggestion, skip_list, suggest_skip_layers
from analysis.statistics import nanmean
from analysis.studies import layer_alr, policy_alr
from analysis.words import human_bytes
from app import figures, session
from app.components import controls, markup, sources, uploads
from app.components.charts import show
from app.engine import Engine
from app.views import ablation, export
from l2kv.spec import CompressionSpec

if TYPE_CHECKING:
    from streamlit.navigation.page import Page as StreamlitPage

_RULES = {"threshold": "By threshold", "count": "By number", "gap": "By the widest gap"}


def page(engine: Engine, generate_page: StreamlitPage) -> None:
    """Draw the page; the list can be tried on `generate_page`."""
    run = session.current_run()
    st.header(f"Which layers of {markup.plain(run.model)} to leave whole?")
    st.markdown(
        "Compression throws away the same share in every layer, but layers do not all take it alike. Those listed here "
        "keep everything."
    )
    if not run.cache_shape.layers:
        st.info(
            "Every layer of this model has a sliding window: its cache is bounded already, and none of it is "
            "compressed. There is nothing to skip.",
            icon=":material/info:",
        )
        return
    with st.container(horizontal=True, vertical_alignment="bottom"):
        controls.policy_input(controls.BY_NORM)
        controls.ratio_input()
    spec = controls.current_spec()
    check = ablation.ABLATION.of(run)
    if check is not None and check.spec.policy == spec.policy:
        suggestion, threshold = _by_cost(check), None
        _suggest(run, spec, suggestion, check)
    else:
        suggestion, threshold = _by_alr(run, spec.policy)
        _suggest(run, spec, suggestion, None)
    _import(run)
    controls.skip_layers_input(run)
    spec = controls.current_spec()

    study = session.study_of_run(run, "next token")
    by_head, by_layer = policy_alr(study, spec.policy)[0], layer_alr(study, spec.policy)[0]
    paper = nanmean(by_head.T)
    show(
        figures.layer_alr(by_head / study.of("alr_chance")[0], by_layer, threshold=threshold, skipped=spec.skip_layers),
        key="layer_alr",
        alt="ALR against chance, by layer",
        caption=f"What *{markup.plain(controls.title(spec.policy))}* loses beyond the ideal order, as a share "
        "of what a random order loses: small points are heads, large ones the layer as a whole (heads count by what "
        "they have to lose). Below 1 the policy is better than chance. Shaded layers are skipped. One text, one query: "
        "the page *Texts* has the same over many, with intervals.",
        table={
            "layer": np.arange(run.n_layers),
            "ALR / chance": by_layer,
            "ALR, mean over heads": paper,
            "ALR / n": paper / run.n_tokens,
            "skipped": [i in spec.skip_layers for i in range(run.n_layers)],
        },
    )
    _bytes(run, spec)
    _export(run, spec, generate_page)
    st.divider()
    ablation.section(engine, run)


def _rule(of: str, key: str) -> str:
    """By which rule layers are suggested."""
    about = "\n".join(f"- **{_RULES[name]}**: {about.replace('ALR / chance', of)}" for name, about in RULES.items())
    return st.segmented_control(
        "Suggest", list(RULES), default="threshold", required=True, format_func=_RULES.get, key=key,
        persist_state="session", help=about,
    )  # fmt: skip


def _by_cost(check: Ablation) -> SkipSuggestion:
    """The layers that a rule suggests by what compressing each alone was measured to cost."""
    with st.container(horizontal=True, vertical_alignment="bottom"):
        rule, options = _rule("the measured cost", "skip_rule"), {}
        if rule == "threshold":
            options["threshold"] = st.slider(
                "Threshold (nats a token)", 0.0, 0.2, COSTLY, 0.005, key="cost_threshold", persist_state="session",
                format="%.3f", help="Layers that cost this or more when each is compressed alone are suggested.",
            )  # fmt: skip
        if rule == "count":
            most = len(check.layers)
            options["count"] = st.number_input(
                "Layers", 0, most, min(2, most), key="skip_count", persist_state="session", width=130
            )
    return suggest_by_ablation(check, rule=rule, **options)


def _by_alr(run: Capture, policy: str) -> tuple[SkipSuggestion, float | None]:
    """The layers that a rule suggests by ALR, a proxy, and its threshold if it goes by one."""
    study = session.current_study()
    if study is not None and (study.model, study.layer_kinds) != (run.model, run.layer_kinds):
        study = None
    with st.container(horizontal=True, vertical_alignment="bottom"):
        rule = _rule("ALR / chance", "skip_rule")
        measured = session.study_of_run(run, "next token")
        if study is not None:
            names = {"text": "this text", "study": f"the study of {len(study.names)} texts"}
            judged = st.segmented_control(
                "Judged by", list(names), default="study", required=True, format_func=names.get, key="judged_by",
                persist_state="session",
                help="A list that hangs on one text may be another one tomorrow: see the page *Texts*.",
            )  # fmt: skip
            measured = measured if judged == "text" else study
        options = {}
        if rule == "threshold":
            options["threshold"] = st.slider(
                "Threshold (ALR / chance)", 0.0, 2.0, 1.0, 0.05, key="threshold", persist_state="session",
                help="0 is the ideal order, 1 a random one, 2 the worst. Layers at or above the threshold are "
                "suggested.",
            )  # fmt: skip
        if rule == "count":
            most = run.layer_kinds.count("full")
            options["count"] = st.number_input(
                "Layers", 0, most, min(2, most), key="skip_count", persist_state="session", width=130
            )
    return suggest_skip_layers(measured, policy, rule=rule, **options), options.get("threshold")


def _suggest(run: Capture, spec: CompressionSpec, suggestion: SkipSuggestion, check: Ablation | None) -> None:
    """Say which layers are suggested, and by what: `check` where they were measured, else ALR."""
    full = [i for i, kind in enumerate(run.layer_kinds) if kind == "full"]
    chosen, rule, policy = list(suggestion.layers), markup.plain(suggestion.rule), spec.policy
    names = ", ".join(map(str, chosen)) or "none"
    if check is not None:
        st.info(f"**Suggestion, as measured: {names}.** {rule}", icon=":material/lightbulb:")
        if (check.spec.keep_ratio, check.spec.protect_last) != (spec.keep_ratio, spec.protect_last):
            st.caption(
                f"The controls say otherwise: {controls.in_words(replace(spec, skip_layers=()))}. Measure it again "
                "below for them; layers that are costly at one ratio need not be at another."
            )
    elif policy == "random":
        st.info("Random eviction is the baseline: its ALR / chance is 1 in every layer.", icon=":material/casino:")
    elif len(chosen) < len(full):
        st.info(
            f"**Suggestion by a proxy, ALR: {names}.** {rule} It goes by attention, whatever the keep ratio; what a "
            "layer costs in prediction can be measured below, and the suggestion then goes by that.",
            icon=":material/lightbulb:",
        )
    else:
        st.warning(
            f"**Suggestion by a proxy, ALR: all layers.** {rule} With all of them whole nothing is compressed. Where "
            "this policy is nowhere better than chance, try the other direction of norms rather than a skip list.",
            icon=":material/warning:",
        )
    with st.container(horizontal=True):
        if check is not None or policy != "random":
            st.button("Take the suggestion", icon=":material/check:", type="primary", on_click=_take, args=(chosen,))
        paper = [i for i in (0, 1) if i in full]
        st.button("The paper's: 0 and 1", on_click=_take, args=(paper,))
        st.button("None", on_click=_take, args=([],))


def _take(layers: list[int]) -> None:
    session.SKIP_LAYERS.set(layers)


def _import(run: Capture) -> None:
    """A skip list that was typed, or is in a file; of a plan's file its list."""

    def opened() -> None:
        _opened(run, uploads.text_of(st.session_state["skip_file"]))

    with st.expander("Open a skip list", icon=":material/upload_file:"):
        uploads.show_refused()
        st.text_input(
            "Layers",
            placeholder="0, 1, 12",
            key="skip_text",
            on_change=lambda: _opened(run, st.session_state["skip_text"]),
        )
        st.file_uploader("Or a file: a list, or a plan (JSON)", type=["json", "txt"], key="skip_file", on_change=opened)
        if refused := st.session_state.pop("skip_refused", ""):
            st.error(markup.plain(refused), icon=":material/error:")


def _opened(run: Capture, text: str) -> None:
    if not text.strip():
        return
    try:
        layers = skip_list(text, n_layers=run.n_layers)
    except RecordError as error:
        st.session_state["skip_refused"] = str(error)
        return
    _take([layer for layer in layers if run.layer_kinds[layer] == "full"])


def _bytes(run: Capture, spec: CompressionSpec) -> None:
    st.subheader("What it saves")
    ref = sources.ref_of(run.model)
    shape = replace(run.cache_shape, itemsize=controls.dtype_input(controls.dtype_of(ref) if ref else None))
    uniform_spec = replace(spec, skip_layers=())
    rows = {"tokens": [], "full cache": [], "no layer skipped": [], "with the skip list": [], "saved": []}
    for n in (run.n_tokens, *LENGTHS):
        full, uniform, plan = (shape.nbytes(n, s) for s in (None, uniform_spec, spec))
        sizes = map(human_bytes, (full, uniform, plan))
        saved = f"{human_bytes(full - plan)} ({1 - plan / full:.0%})"
        for key, value in zip(rows, (f"{n:,}", *sizes, saved), strict=True):
            rows[key].append(value)
    st.dataframe(rows, hide_index=True)
    st.caption(
        f"Keys and values of one sequence, {markup.counted(shape.itemsize, 'byte')} a number, after that many tokens, "
        "by arithmetic: "
        f"{run.n_kv_heads} kv heads of {run.head_dim}, keep ratio {spec.keep_ratio:g}, the last {spec.protect_last} "
        "protected. The page *Generate* counts the real bytes; the page *Plan* has GPUs and batches. (This model need "
        "not work at all of these lengths.)"
        + (" Layers with a sliding window are bounded anyway, and left out." if "sliding" in run.layer_kinds else "")
    )


def _export(run: Capture, spec: CompressionSpec, generate_page: StreamlitPage) -> None:
    st.subheader("Take it along")
    plan = Plan(run.model, spec, note=f"chosen on {run.n_tokens} tokens")
    with st.container(horizontal=True):
        export.download(plan)
        if st.button("Try it in Generate", icon=":material/compare:", type="primary"):
            session.use_plan(None)  # Generate would begin with it, and not with this list
            st.switch_page(generate_page)
    export.as_code(plan, run)
