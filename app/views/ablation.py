"""Each layer compressed alone, part of the page Skip layers: does ALR tell which layers cost most?"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import streamlit as st

from analysis.captures import Capture
from analysis.demo.presets import bundled_results
from analysis.evaluation.lm import LmSettings
from analysis.plans.ablation import POLICIES, Ablation, ablate_layers
from analysis.progress import Progress
from analysis.records import from_json, load, to_json
from analysis.statistics import means
from app import figures
from app.components import controls, markup, measured, sources
from app.components.charts import show
from app.components.jobs import Job
from app.components.measured import Kind
from app.engine import Engine
from app.report.chapters import ablation_table

if TYPE_CHECKING:
    from analysis.models.load import LoadedModel


@lru_cache(maxsize=4)
def _bundled(model: str) -> Ablation | None:
    file = bundled_results(model).ablation
    return load(Ablation, file) if file else None


ABLATION: Kind[Ablation] = Kind("ablation", "check", partial(from_json, Ablation), to_json, _bundled)


def section(engine: Engine, run: Capture) -> None:
    """Draw the check of the model on screen, and the ways to have one measured or to open one."""
    st.subheader("Measured: each layer compressed alone")
    check = ABLATION.of(run)
    if check is not None:
        _draw(check)
    else:
        st.info(
            "ALR is read off attention. What counts is prediction: compress one layer at a time, and see which are "
            f"costly. Nothing was measured for {markup.plain(run.model)} yet: give texts below and press *Measure it "
            f"for {markup.plain(run.model)}*.",
            icon=":material/info:",
        )
    measured.section(ABLATION, engine, run, _measure)


def _draw(check: Ablation) -> None:
    change, loss = (means(of.T, documents=check.documents) for of in (check.nll_change, check.normalised_alr))
    n = check.normalised_alr.shape[1]
    st.markdown(f"**{markup.plain(str(check))}**")
    show(
        figures.layer_costs(check.layers, loss.mean, (loss.low, loss.high), change.mean, (change.low, change.high)),
        key="layer_costs",
        alt="NLL change by compressing one layer alone against its ALR",
        caption=f"Each point is a layer, numbered: its ALR / chance (across) and what it costs to compress that layer "
        f"alone, all others whole (up): {controls.in_words(check.spec)}. Means over {n} texts, bars their 95 % "
        "intervals. "
        "Where the points rise to the right, ALR / chance orders the layers as prediction does: a skip list by it is "
        "sound." + (" The paper's ALR also counts how much there is to lose." if check.alr is not None else ""),
        table=ablation_table(check),
    )


def _measure() -> Job[Ablation]:
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

    def measure(loaded: LoadedModel, progress: Progress) -> Ablation:
        given = continued.excerpts(loaded, texts)
        settings = LmSettings(continued.prompt_tokens, continued.new_tokens)
        return ablate_layers(loaded, given, spec, settings=settings, progress=progress)

    return Job(
        "run_ablation",
        sources.label("Measure it", ref),
        ref,
        measure,
        missing=missing,
        cancelled="What was measured is gone.",
    )
