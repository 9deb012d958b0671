"""Texts: does what one text shows hold over many?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import streamlit as st

from analysis.metrics import METRICS, PROBES, Metric
from analysis.statistics import MIN_TEXTS, STABLE, Means, Stability, means, stability
from analysis.studies import Study, head_means, layer_alr
from analysis.verdicts import answer, meanings, verdict_counts, verdicts
from analysis.words import signed, span
from app import figures, session
from app.components import markup
from app.components.charts import show
from app.engine import Engine
from app.views import studies

_WITHOUT = "without the first token"


@dataclass(frozen=True, slots=True, eq=False)
class _Numbers:
    """What a study says by one probe."""

    answer: str
    gamma: Means  # [L, H]
    without: Means  # the same with the first token left out
    verdict: np.ndarray  # [L, H] of str
    losses: Means  # [L], ALR / chance
    order: Stability  # of the layers


@session.remembered
def _numbers(study: Study, probe: str) -> _Numbers:
    losses = layer_alr(study, probe=probe)
    return _Numbers(
        answer(study, probe=probe),
        head_means(study, probe=probe),
        head_means(study, "gamma_skip_first", probe=probe),
        verdicts(study, probe=probe),
        means(losses, documents=study.documents),
        stability(losses),
    )


def metric_of(name: str) -> Metric:
    """What is known of a metric of a study; of one that is registered no more, its name."""
    return METRICS.get(name, Metric(title=name, about=name, of=lambda row: row.mass))


@session.remembered
def _means_of(study: Study, metric: str, probe: str) -> Means:
    return head_means(study, metric, probe=probe)


def page(engine: Engine) -> None:
    """Draw the page."""
    study, model = session.current_study(), session.current_run().model
    st.header(f"Does it hold over many texts in {markup.plain(study.model if study else model)}?")
    if study is None:
        _nothing_yet(model)
    else:
        _results(study)
        if study.model != model:
            st.caption(f"This study is of {markup.plain(study.model)}; the run on screen is of {markup.plain(model)}.")
    st.divider()
    left, right = st.columns([3, 2], gap="large")
    with left:
        studies.run(engine)
    with right:
        studies.files(study)


def _nothing_yet(model: str) -> None:
    """What to do where there is no study of the model on screen; another model's answer is not its."""
    with st.container(border=True):
        st.markdown(
            f"**No study of {markup.plain(model)} yet.** One text is an anecdote: over many, each head's Γ comes with "
            "an interval, and you see whether the layers come in the same order in every text. Give texts below and "
            f"press *Measure it for {markup.plain(model)}*, or open a saved study."
        )
        if other := session.study_of_another():
            st.button(
                f"Show the study of {markup.plain(other.model)}",
                icon=":material/library_books:",
                on_click=session.show_study,
                args=(other,),
            )


def _results(study: Study) -> None:
    place = st.empty()
    probe = st.segmented_control(
        "Attention of", study.probes, default=study.probes[0], required=True, key="study_probe",
        persist_state="session", help="\n".join(f"- **{name}**: {about}" for name, about in PROBES.items()),
    )  # fmt: skip
    numbers = _numbers(study, probe)
    with place.container():
        st.markdown(markup.headline(numbers.answer))
        _about(study)
    _heads(study, numbers, probe)
    left, right = st.columns(2, gap="large")
    with left:
        _layers(numbers)
    with right:
        _order(numbers)
    _verdicts(numbers, len(study.names))


def _about(study: Study) -> None:
    source = "Your study" if session.STUDY.get() else "The bundled study"
    names = ", ".join(markup.plain(name) for name in study.names[:4]) + (", …" if len(study.names) > 4 else "")
    st.caption(
        f"{source}: {len(study.names)} texts of {span(study.n_tokens.tolist())} tokens ({names}). Intervals come from "
        "resampling "
        + ("documents and the texts of each" if study.documents else "the texts")
        + ", since tokens of one text are not independent."
        + " They are too narrow if the texts are excerpts of few documents, which is not known." * (not study.documents)
    )
    if not study.complete:
        st.warning(
            f"{len(study.names)} of {study.texts} texts are done. What is shown is of those.",
            icon=":material/timelapse:",
        )
    if 1 < len(study.names) < MIN_TEXTS:
        st.warning(
            f"With fewer than {MIN_TEXTS} texts no head gets a verdict: chance alone would give one sign to all.",
            icon=":material/warning:",
        )


def _heads(study: Study, numbers: _Numbers, probe: str) -> None:
    layer, head = _chosen(numbers)
    left, right = st.columns([3, 2], gap="large")
    with left:
        if st.session_state.get("study_map") not in study.metrics:  # one of another study
            st.session_state.pop("study_map", None)
        metric = st.selectbox(
            "Map of", study.metrics, format_func=lambda name: metric_of(name).title, key="study_map",
            persist_state="session",
            help="\n".join(f"- **{of.title}**: {of.about}" for of in map(metric_of, study.metrics)),
        )  # fmt: skip
        shown, of = _means_of(study, metric, probe), metric_of(metric)
        colours = (
            "Purple is below 0: for Γ and correlations that is the paper's claim, the keys of low norm get the "
            "attention. Orange is above."
            if of.diverging
            else "The colours begin at 0."
        )
        show(
            figures.head_map(
                shown.mean,
                title=of.title,
                diverging=of.diverging,
                status=numbers.verdict,
                zmin=of.low or 0.0,
                zmax=of.high,
            ),
            key=f"study_map_{metric}_{probe}",
            alt=f"Map of {of.title}, mean over texts, by layer and head",
            caption=f"The mean over the texts of **{of.about}**. {colours} Rows are layers, columns "
            "query heads. Click a cell to see the single texts.",
            on_head=_choose,
        )
        _all_heads(numbers, of.title, shown)
    with right:
        with st.container(horizontal=True, vertical_alignment="bottom"):
            n_layers, n_heads = numbers.verdict.shape
            st.number_input("Layer", 0, n_layers - 1, key="study_layer", persist_state="session", width=130)
            st.number_input("Head", 0, n_heads - 1, key="study_head", persist_state="session", width=130)
        verdict = str(numbers.verdict[layer, head])
        gamma, without = (_with_ends(of, layer, head) for of in (numbers.gamma, numbers.without))
        st.markdown(
            f"**Layer {layer}, head {head}: {verdict}.** {markup.plain(meanings(len(study.names))[verdict])}. "
            f"Γ {gamma}; {_WITHOUT} {without}."
        )
        single = [study.of(name, probe=probe)[:, layer, head] for name in ("gamma", "gamma_skip_first")]
        show(
            figures.head_over_texts(
                single[0], single[1], study.names, mean=numbers.gamma.mean[layer, head],
                low=numbers.gamma.low[layer, head], high=numbers.gamma.high[layer, head],
            ),
            key="study_single",
            alt=f"Γ on each text, layer {layer}, head {head}",
            caption=f"Γ of this head on each text, with the first token and {_WITHOUT} (hollow). The band is the 95 % "
            "interval of the mean. Points on both sides of 0 are texts that would be told opposite things.",
            table={"text": list(study.names), "Γ": single[0], _WITHOUT: single[1]},
        )  # fmt: skip


def _layers(numbers: _Numbers) -> None:
    st.markdown("**What does low norm cost, layer by layer?**")
    losses = numbers.losses
    show(
        figures.means_by_layer(losses.mean, losses.low, losses.high),
        key="study_layers",
        alt="ALR against chance by layer, with intervals",
        caption="What keeping low norms loses beyond the ideal order, as a share of what a random order loses: 0 is "
        "ideal, 1 chance, 2 the worst order. Heads count by what they have to lose. Layers whose interval lies above "
        "1 are candidates for the page *Skip layers*.",
        table={
            "layer": np.arange(len(losses.mean)),
            "ALR / chance": losses.mean,
            "from": losses.low,
            "to": losses.high,
            "texts": losses.defined,
        },
    )


def _order(numbers: _Numbers) -> None:
    st.markdown("**From how many texts on is their order stable?**")
    order = numbers.order
    texts, spearman, kendall = (
        np.array([getattr(agreement, name) for agreement in order.by_texts])
        for name in ("texts", "spearman", "kendall")
    )
    if not len(texts) or np.isnan(spearman).all():
        st.info(markup.plain(str(order)), icon=":material/info:")
        return
    show(
        figures.order_agreement(texts, spearman, kendall, stable=STABLE),
        key="study_order",
        alt="Agreement of two halves of the texts on the order of layers",
        caption=f"**{markup.plain(str(order))}** The texts are split in two halves at random, many times; each half "
        "orders the layers by ALR / chance, and the two orders are compared. A skip list that one text suggests is "
        "worth as much as the curve's first point.",
        table={"texts in each half": texts, "Spearman": spearman, "Kendall": kendall},
    )


def _verdicts(numbers: _Numbers, n_texts: int) -> None:
    st.markdown("**The verdict on each head**")
    told = meanings(n_texts)
    counts = list(verdict_counts(numbers.verdict, told).values())
    st.dataframe(
        {"verdict": list(told), "heads": counts, "meaning": list(told.values())},
        hide_index=True,
        column_config={
            "heads": st.column_config.ProgressColumn(
                "heads", format="%d", min_value=0, max_value=numbers.verdict.size, width="small"
            ),
            "meaning": st.column_config.TextColumn(width="large"),
        },
    )


def _all_heads(numbers: _Numbers, title: str, shown: Means) -> None:
    """Γ with and without the first token, the figure of the map if it is neither, and the verdict."""
    layer, head = np.indices(numbers.verdict.shape).reshape(2, -1)
    maps = {"Γ": numbers.gamma, METRICS["gamma_skip_first"].title: numbers.without, title: shown}
    intervals = {
        f"{name}{end}": values.ravel()
        for name, of in maps.items()
        for end, values in (("", of.mean), (", from", of.low), (", to", of.high))
    }

    def chosen() -> None:
        if rows := st.session_state["study_heads"].selection.rows:
            _choose(int(layer[rows[0]]), int(head[rows[0]]))

    with st.expander("All heads as a table", icon=":material/table:"):
        st.dataframe(
            {"layer": layer, "head": head}
            | intervals
            | {"texts": numbers.gamma.defined.ravel(), "verdict": numbers.verdict.ravel().astype(str)},
            hide_index=True,
            key="study_heads",
            on_select=chosen,
            selection_mode="single-row",
        )


def _choose(layer: int, head: int) -> None:
    session.STUDY_LAYER.set(layer)
    session.STUDY_HEAD.set(head)


def _chosen(numbers: _Numbers) -> tuple[int, int]:
    """The open head; at first the one that follows the paper most, and so is no pure sink."""
    if not (session.STUDY_LAYER.held() and session.STUDY_HEAD.held()):
        follows = numbers.verdict == "follows the paper"
        shown = np.isfinite(numbers.gamma.mean) & (follows if follows.any() else True)
        gamma = np.where(shown, numbers.gamma.mean, np.inf)
        _choose(*(int(i) for i in np.unravel_index(gamma.argmin(), gamma.shape)))
    return session.STUDY_LAYER.get(), session.STUDY_HEAD.get()


def _with_ends(of: Means, layer: int, head: int) -> str:
    mean, low, high = (values[layer, head] for values in (of.mean, of.low, of.high))
    if np.isnan(mean):
        return "undefined"
    ends = f" (95 % {signed(low)} to {signed(high)})" if np.isfinite(low) else " (no interval)"
    return signed(mean) + ends
