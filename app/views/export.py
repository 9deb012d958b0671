"""A plan to take along: as a file and as code; and one that is brought in. Parts of the pages Skip layers and Plan."""

from __future__ import annotations

from dataclasses import replace

import streamlit as st

from analysis.captures import Capture
from analysis.plans.curves import BY_NORM
from analysis.plans.export import kvpress_code, library_code
from analysis.plans.skip import Plan, skip_list
from analysis.records import from_json, to_json
from app.components import controls, sources


def download(plan: Plan) -> None:
    """A button that gives the plan as a file."""
    st.download_button(
        "Download the plan (JSON)",
        to_json(plan),
        file_name="plan.json",
        mime="application/json",
        icon=":material/download:",
        on_click="ignore",
    )


def as_code(plan: Plan, run: Capture) -> None:
    """The plan's text, and what decodes by it in this library and in kvpress, to look at and to copy."""
    ref = sources.ref_of(plan.model) or plan.model
    with st.expander("The plan as JSON and as code", icon=":material/code:"):
        text = to_json(plan)
        st.code(text, language="json", height=min(420, 30 + 22 * text.count("\n")))
        st.markdown("A script that runs as it is pasted:")
        st.code(library_code(plan.spec, ref), language="python", wrap_lines=True)
        if plan.spec.policy in BY_NORM:
            st.markdown("The nearest that NVIDIA's kvpress can do:")
            code = kvpress_code(plan.spec, run.cache_shape, ref, n_layers=run.n_layers)
            st.code(code, language="python", wrap_lines=True)
        st.caption("Both are for Hugging Face transformers. Servers such as vLLM keep caches of their own.")


def plan_from(text: str, run: Capture) -> Plan:
    """What a file holds: a plan, or a bare skip list, which with the controls makes one for the model of the run.

    Raises RecordError, with the reason.
    """
    if text.lstrip().startswith("{"):
        return from_json(Plan, text)
    spec = replace(controls.current_spec(), skip_layers=skip_list(text, n_layers=run.n_layers))
    return Plan(run.model, spec, note="a skip list that was opened")
