"""What a study of many texts shows: one head on each text, the layers, how stable their order is, and the verdicts."""

from __future__ import annotations

import numpy as np
import streamlit as st

from analysis.metrics import METRICS, Metric
from analysis.statistics import MIN_TEXTS, STABLE, Means
from analysis.studies import Study
from analysis.verdicts import meanings, verdict_counts
from analysis.words import counted, head_name, signed, span
from app import figures, library, state
from app.components import markup
from app.components.charts import show

_WITHOUT = "without the first token"


def metric_of(name: str) -> Metric:
    """What is known of a metric of a study; of one that is no longer registered, its name."""
    return METRICS.get(name, Metric(title=name, about=name, of=lambda row: row.mass))


def of_head(side: str, layer: int, head: int) -> None:
    """Draw Γ of one head on each text of the study, on one side, "a" or "b"."""
    study = state.study()
    if study is None:
        st.info("There is no study of this model yet: *Study more texts* makes one.", icon=":material/library_books:")
        return
    probe, id = probe_of(study), state.study_id()
    gamma, without = (library.means_of(id, name, probe) for name in ("gamma", "gamma_skip_first"))
    single = [study.of(name, probe=probe)[:, layer, head] for name in ("gamma", "gamma_skip_first")]
    run = library.run(state.run_id())
    named = head_name(layer, run.kv_head(head), head)
    st.markdown(
        f"Over {counted(len(study.names), 'text')}: **{library.verdicts_over(id, probe)[layer, head]}**. Γ "
        f"{_with_ends(gamma, layer, head)}; {_WITHOUT} {_with_ends(without, layer, head)}."
    )
    show(
        figures.head_over_texts(
            single[0], single[1], study.names, mean=gamma.mean[layer, head], low=gamma.low[layer, head],
            high=gamma.high[layer, head],
        ),
        key=f"over_texts_{side}",
        alt=f"Γ of {named} on each of {counted(len(study.names), 'text')}",
        caption=f"Γ on each text, with the first token and {_WITHOUT} (hollow), n = {len(study.names)}. The band "
        "is the 95 % "
        "interval of the mean. Points on both sides of 0 are texts that say opposite things.",
        table={"text": list(study.names), "Γ": single[0], _WITHOUT: single[1]},
    )  # fmt: skip


def draw(study: Study | None) -> None:
    """Draw what the study says of layers and of all heads."""
    if study is None:
        st.info(
            f"There is no study of {markup.plain(state.model())} yet. One text is an anecdote: over many, each "
            "head's Γ "
            "comes with an interval, and you see whether the layers come in the same order in every text.",
            icon=":material/library_books:",
        )
        return
    _choose(study)
    left, right = st.columns(2, gap="medium")
    with left:
        _layers(study)
    with right:
        _order(study)
    told = meanings(len(study.names))
    verdict = library.verdicts_over(state.study_id(), probe_of(study))
    heads = list(verdict_counts(verdict, told).values())
    st.table({"verdict": list(told), "heads": heads, "meaning": list(told.values())}, hide_index=True)


def _choose(study: Study) -> None:
    """Choose a study of the model, say what it is of, and download or delete it."""
    entries = {entry.id: entry for entry in library.entries("study", model=state.model())}
    shown = state.study_id()

    def choose() -> None:
        state.STUDY.set(st.session_state[f"study_choice_{shown}"])
        st.rerun()  # of the whole page: the map may be of it

    def delete() -> None:
        library.WORKSPACE.delete(shown)
        state.STUDY.drop()
        st.rerun()

    def called(id: str) -> str:
        return f"{entries[id].name}, {entries[id].about or counted(len(study.names), 'text')}"

    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.selectbox(
            "Study", list(entries), list(entries).index(shown), key=f"study_choice_{shown}", on_change=choose,
            format_func=called, width=360,
        )  # fmt: skip
        st.download_button(
            "Download", lambda: library.path_of(shown).read_bytes(), f"{shown}.safetensors", icon=":material/download:",
            on_click="ignore", key="study_download",
        )  # fmt: skip
        if not library.is_bundled(shown):
            st.button("Delete", icon=":material/delete:", on_click=delete, key="study_delete")
    names = ", ".join(markup.plain(name) for name in study.names[:4]) + (", …" if len(study.names) > 4 else "")
    st.caption(
        f"{counted(len(study.names), 'text')} of {span(study.n_tokens.tolist())} tokens ({names}), by "
        f"{probe_of(study)}. "
        "Intervals come "
        f"from resampling {'documents and the texts of each' if study.documents else 'the texts'}, since tokens of one "
        "text are not independent."
        + " They are too narrow if the texts are excerpts of few documents, which is not known."
        * (not study.documents)
    )
    if not study.complete:
        st.warning(
            f"{len(study.names)} of {study.texts} texts are done. *Study more texts* with the same texts continues.",
            icon=":material/timelapse:",
        )
    if 1 < len(study.names) < MIN_TEXTS:
        st.warning(
            f"With fewer than {MIN_TEXTS} texts no head gets a verdict: chance alone would give one sign to all.",
            icon=":material/warning:",
        )


def probe_of(study: Study) -> str:
    """Probe on screen, or the study's first where it lacks that one."""
    probe = state.PROBE.get()
    return probe if probe in study.probes else study.probes[0]


def _layers(study: Study) -> None:
    losses, _ = library.layers_over(state.study_id(), probe_of(study))
    st.markdown("**What does low norm lose, layer by layer?**")
    show(
        figures.means_by_layer(losses.mean, losses.low, losses.high),
        key="study_layers",
        alt=f"Normalised ALR of each layer, mean and interval over {counted(len(study.names), 'text')}",
        caption="Normalised ALR: 0 is the ideal order, 1 chance, 2 the reverse. Heads count by what they have to lose. "
        "Layers whose interval lies above 1 are candidates for skipping, on the page Tune.",
        table={
            "layer": np.arange(len(losses.mean)),
            "normalised ALR": losses.mean,
            "from": losses.low,
            "to": losses.high,
            "texts": losses.defined,
        },
    )


def _order(study: Study) -> None:
    _, order = library.layers_over(state.study_id(), probe_of(study))
    st.markdown("**From how many texts on is the order of layers stable?**")
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
        caption=f"{markup.plain(str(order))} Texts are split in two halves at random, many times; each half orders "
        "the layers "
        "by normalised ALR. A skip list from one text is worth as much as the first point.",
        table={"texts in each half": texts, "Spearman": spearman, "Kendall": kendall},
    )


def _with_ends(of: Means, layer: int, head: int) -> str:
    mean, low, high = (values[layer, head] for values in (of.mean, of.low, of.high))
    if np.isnan(mean):
        return "undefined"
    return signed(mean) + (f" (95 % {signed(low)} to {signed(high)})" if np.isfinite(low) else " (no interval)")
