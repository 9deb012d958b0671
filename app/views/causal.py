"""Each layer compressed alone, part of the page Skip layers: does ALR tell which layers cost most?"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import streamlit as st

from analysis.captures import Capture
from analysis.demo.presets import bundled_results
from analysis.files import read_text
from analysis.plans.ablation import POLICIES, CausalCheck, causal_check
from analysis.progress import Progress
from analysis.statistics import means
from app import figures
from app.components import controls, markup, measured, sources
from app.components.charts import show
from app.components.jobs import Job
from app.components.measured import Kind
from app.engine import Engine
from app.report.chapters import causal_table

if TYPE_CHECKING:
    from analysis.models.load import LoadedModel


@lru_cache(maxsize=4)
def _bundled(model: str) -> CausalCheck | None:
    file = bundled_results(model).causal
    return CausalCheck.from_json(read_text(file)) if file else None


CHECK = Kind("causal", "check", CausalCheck.from_json, CausalCheck.to_json, _bundled)


def section(engine: Engine, run: Capture) -> None:
    """Draw the check of the model on screen, and the ways to have one measured or to open one."""
    st.subheader("Measured: each layer compressed alone")
    check = CHECK.of(run)
    if check is not None:
        _draw(check)
    else:
        st.info(
            "ALR is read off attention. What counts is prediction: compress one layer at a time, and see which are "
            f"costly. Nothing was measured for {markup.plain(run.model)} yet: give texts below and press *Measure it "
            f"for {markup.plain(run.model)}*.",
            icon=":material/info:",
        )
    measured.section(CHECK, engine, run, _measure)


def _draw(check: CausalCheck) -> None:
    change, loss = (means(of.T, documents=check.documents) for of in (check.nll_change, check.loss))
    n = check.loss.shape[1]
    st.markdown(f"**{markup.plain(str(check))}**")
    show(
        figures.layer_costs(check.layers, loss.mean, (loss.low, loss.high), change.mean, (change.low, change.high)),
        key="layer_costs",
        alt="NLL change by compressing one layer alone against its ALR",
        caption=f"Each point is a layer, numbered: its ALR / chance (across) and what it costs to compress that layer "
        f"alone, all others whole (up): {controls.in_words(check.spec)}. Means over {n} texts, bars their 95 % "
        "intervals. "
        "Where the points rise to the right, ALR / chance orders the layers as prediction does: a skip list by it is "
        "sound." + (" The paper's ALR also counts how much there is to lose." if check.paper is not None else ""),
        table=causal_table(check),
    )


def _measure() -> Job[CausalCheck]:
    controlled = controls.current_spec()
    ref = sources.model_input()
    texts = sources.texts_input()
    continued = sources.continued_input(
        "Texts", "Cut from what was given. With fewer than 16 the intervals are narrow."
    )
    spec = replace(controlled, prune_after=0, skip_layers=())
    st.caption(f"Each layer alone by the controls above: {controls.in_words(spec)}.")
    missing = "" if texts else "Upload texts or paste a long one first."
    if spec.policy not in POLICIES:
        missing = "ALR says nothing of random eviction: choose low or high norm above."

    def measure(loaded: LoadedModel, progress: Progress) -> CausalCheck:
        given = continued.excerpts(loaded, texts)
        return causal_check(
            loaded,
            [excerpt.text for excerpt in given],
            spec,
            prompt_tokens=continued.prompt_tokens,
            new_tokens=continued.new_tokens,
            documents=[excerpt.document for excerpt in given],
            on_done=lambda done, total: progress(done, total, "runs"),
        )

    return Job(
        "run_causal",
        sources.label("Measure it", ref),
        ref,
        measure,
        missing=missing,
        cancelled="What was measured is gone.",
    )
