"""Skip layers: which layers to leave whole, and what that costs and saves."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import streamlit as st

from analysis.curves import BY_NORM
from analysis.export import kvpress_code, library_code
from analysis.memory import human_bytes
from analysis.run import Capture
from analysis.skip import Plan, layer_loss, suggest_skip_layers
from app import figures, markup, state
from app.charts import show
from l2kv.spec import CompressionSpec

if TYPE_CHECKING:
    from streamlit.navigation.page import Page as StreamlitPage

LENGTHS = (4096, 32_768, 131_072)


def page(generate_page: StreamlitPage) -> None:
    """Draw the page; the plan can be tried on `generate_page`."""
    run = state.current_run()
    st.header(f"Which layers of {markup.plain(run.model)} to leave whole?")
    st.markdown(
        "Compression throws away the same share in every layer, but layers do not all take it alike. Those listed here "
        "keep everything."
    )
    with st.container(horizontal=True, vertical_alignment="bottom"):
        state.policy_input(state.BY_NORM)
        state.ratio_input()
        threshold = st.slider(
            "Threshold (ALR / chance)", 0.0, 2.0, 1.0, 0.05, key="threshold", persist_state="session",
            help="0 is the ideal order, 1 a random one, 2 the worst. Layers at or above the threshold are suggested.",
        )  # fmt: skip
    spec = state.current_spec()
    _suggest(run, spec.policy, threshold)
    state.skip_layers_input(run)
    spec = state.current_spec()

    loss = layer_loss(run, spec.policy)
    show(
        figures.layer_alr(loss.by_head, loss.by_layer, threshold=threshold, skipped=spec.skip_layers),
        key="layer_alr",
        alt="ALR against chance, by layer",
        caption=f"What *{markup.plain(state.POLICY_NAMES[spec.policy])}* loses beyond the ideal order, as a share "
        "of what a random order loses: small points are heads, large ones the layer as a whole (heads count by what "
        "they have to lose). Below 1 the policy is better than dice. Shaded layers are skipped. One text, one query.",
        table={
            "layer": np.arange(run.n_layers),
            "ALR / chance": loss.by_layer,
            "ALR, mean over heads": loss.paper,
            "ALR / n": loss.paper / run.n_tokens,
            "skipped": [i in spec.skip_layers for i in range(run.n_layers)],
        },
    )
    _bytes(run, spec)
    _export(run, spec, generate_page)


def _suggest(run: Capture, policy: str, threshold: float) -> None:
    full = [i for i, kind in enumerate(run.layer_kinds) if kind == "full"]
    suggestion = suggest_skip_layers(run, policy, threshold=threshold)
    chosen, rule = list(suggestion.layers), markup.plain(suggestion.rule)
    if policy == "random":
        st.info("Random eviction is the yardstick: its ALR / chance is 1 in every layer.", icon=":material/casino:")
    elif len(chosen) < len(full):
        names = ", ".join(map(str, chosen)) or "none"
        st.info(f"**Suggestion: {names}.** {rule}", icon=":material/lightbulb:")
    elif threshold < 1:
        st.warning(
            f"**The threshold is below every layer**, so all would be skipped. {rule}", icon=":material/warning:"
        )
    else:
        st.warning(
            f"**Suggestion: all layers.** {rule} So on this text this policy is nowhere better than dice: try the "
            "mirror policy rather than a skip list.",
            icon=":material/warning:",
        )
    with st.container(horizontal=True):
        if policy != "random":
            st.button(
                "Take the suggestion",
                icon=":material/check:",
                type="primary",
                on_click=lambda: st.session_state.update(skip_layers=chosen),
            )
        paper = [i for i in (0, 1) if i in full]
        st.button("The paper's: 0 and 1", on_click=lambda: st.session_state.update(skip_layers=paper))
        st.button("None", on_click=lambda: st.session_state.update(skip_layers=[]))


def _bytes(run: Capture, spec: CompressionSpec) -> None:
    st.subheader("What it saves")
    shape = run.cache_shape
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
        f"Keys and values of one sequence in {markup.plain(run.dtype)}, after that many tokens, by arithmetic: "
        f"{run.n_kv_heads} kv heads of {run.head_dim}, keep ratio {spec.keep_ratio:g}, the last {spec.protect_last} "
        "protected. The page *Generate* counts the real bytes. (This model need not work at all of these lengths.)"
        + (" Layers with a sliding window are bounded anyway, and left out." if "sliding" in run.layer_kinds else "")
    )


def _export(run: Capture, spec: CompressionSpec, generate_page: StreamlitPage) -> None:
    st.subheader("Take it along")
    plan = Plan(run.model, spec, note=f"chosen on {run.n_tokens} tokens")
    with st.container(horizontal=True):
        st.download_button(
            "Download the plan (JSON)",
            plan.to_json(),
            file_name="plan.json",
            mime="application/json",
            icon=":material/download:",
            on_click="ignore",
        )
        if st.button("Try it in Generate", icon=":material/compare:", type="primary"):
            st.switch_page(generate_page)
    with st.expander("The plan as JSON and as code", icon=":material/code:"):
        st.code(plan.to_json(), language="json")
        st.code(library_code(spec), language="python")
        if spec.policy in BY_NORM:
            st.markdown("The nearest that NVIDIA's kvpress can do:")
            st.code(kvpress_code(spec, run.cache_shape), language="python")
