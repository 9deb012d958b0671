"""Explore: which heads, and why? A map of layer x head beside the open head, and many heads at once below."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import TYPE_CHECKING, cast

import numpy as np
import streamlit as st

from analysis.captures import Capture
from analysis.errors import SettingsError, UserError
from analysis.metrics import METRICS, OVERLAP_RATIO, PROBES
from analysis.selftest import check, is_synthetic
from analysis.verdicts import QUESTION, VERDICTS, meanings
from analysis.words import counted, head_name, signed
from app import address, header, library, new_study, state
from app.components import cells, charts, choices, comparison, keys, many_texts, markup, one_head
from app.engine import Engine
from app.figures import heat, planes
from app.jobs import Jobs
from app.screens import time_machine
from l2kv.errors import SpecError

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from streamlit.navigation.page import StreamlitPage

_FEW_TOKENS = 64
_STYLE = """<style>
.st-key-explore [data-testid="stColumn"] { min-width: min(19rem, 100%); }
.st-key-explore [data-testid="stMetricValue"] { font-size: 1.25rem; }
.st-key-explore [data-testid="stMetricLabel"] p { font-size: 0.8rem; }
.st-key-explore [data-testid="stButtonGroup"] button { padding: 0 0.6rem; }
.st-key-explore h1 { padding: 0; font-size: 2rem; }
.st-key-explore h4 { padding: 0; font-size: 1.25rem; }
.st-key-map_frame { position: relative; }
.st-key-outlines, .st-key-outlines * { position: absolute; inset: 0; pointer-events: none; }
</style>"""
_WHOSE = {
    "next token": "Of one query, the next token's.",
    "last queries": "The mean over the last {w} queries, each over the tokens before it.",
    "all queries": "Of the attention that each token receives, the mean over all queries that see it.",
}
_SIDES = "Purple: keys of low norm get the attention, as the paper says. Orange: keys of high norm do."
_NEITHER = "No end is good or bad."
_GOOD = {  # which end of a map is good
    **dict.fromkeys(("gamma", "gamma_skip_first", "spearman", "pearson"), _SIDES),
    **dict.fromkeys(("alr", "alr_per_token", "normalised_alr", state.LOST), "Weak colour is good."),
    "overlap": f"Strong colour is good; {OVERLAP_RATIO:g} is chance.",
    **dict.fromkeys(("alr_chance", "sink_share", "entropy", "entropy_normalised"), _NEITHER),
}
_READ = {  # maps for which the metric's own line is too short, or says no more
    "gamma": "",
    "alr": "It is a sum over the tokens, so it grows with the text and with how much there is to lose.",
    "spearman": "It counts every token alike, so it does not notice a sink. In layer 0 equal tokens have equal norms.",
}


def draw(engine: Engine, jobs: Jobs, pages: Mapping[str, StreamlitPage]) -> None:
    """Draw the page.

    Args:
        pages: pages that it links to, by the paths of their addresses.
    """
    st.html(_STYLE)
    with st.container(key="explore"):
        st.title("Which heads, and why?")
        if not state.run_id():
            header.no_run()
            return
        state.RUN.set(state.run_id())  # chosen now, so that the parts below need not look for the latest
        state.OVER.set(state.over())
        run = library.run(state.run_id())
        probes = _probes(run)
        state.choose_head(*state.chosen_head())
        _say(run)
        _choose_values(run, probes, engine, jobs)
        pinned = state.PINNED.get()
        left, right = st.columns([2, 5] if pinned else [2, 3], gap="medium")
        with left:
            _map()
        if not charts.first_is_drawn():
            return
        with right:
            _heads(pages.get("tune"), jobs)
        st.divider()
        _below(jobs)
        st.divider()
        time_machine.draw(engine, jobs)


def _part(key: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a fragment of the page: drawn alone, it too says what is wrong and keeps the address."""

    def made(draw: Callable[..., None]) -> Callable[..., None]:
        @wraps(draw)
        def guarded(*given: object) -> None:
            try:
                draw(*given)
            except (UserError, SpecError) as error:
                st.error(markup.plain(str(error)), icon=":material/error:")
            address.write()

        return cast(Callable[..., None], st.fragment(guarded, key=key))

    return made


def _say(run: Capture) -> None:
    """The answer by layer in a line, and what the reader must know of the run."""
    if is_synthetic(run):
        found = check(run)
        (st.success if found.passed else st.error)(
            "A synthetic run, made by no model to test the metrics: Γ is −1 in layer 0, 0 in layer 1 and +1 in "
            "layer 2. "
            f"{markup.plain(str(found))}"
        )
        return
    answer, rest = _answer(state.study_id() if _over_many() else state.run_id())
    st.markdown(f"{QUESTION} {answer}", help=markup.plain(rest) or None)
    if (study := state.study()) and not _over_many():
        over_texts, _ = _answer(state.study_id())
        st.caption(f"One text is an anecdote. Over {counted(len(study.names), 'text')}: {over_texts}")
    if run.n_tokens < _FEW_TOKENS:
        short = f"A text of {counted(run.n_tokens, 'token')} says little: take one of some hundred."
        st.warning(short, icon=":material/warning:")
    for warning in run.warnings:
        st.warning(markup.plain(warning), icon=":material/warning:")


def _answer(id: str) -> tuple[str, str]:
    """The answer by a run or a study: in a word and by layer, in Markdown, and the rest of it in plain text."""
    told = library.answer_of(id, state.PROBE.get())
    word, by_layer, rest = (*(f"{part.rstrip('.')}." for part in told.split(". ", 2)), "", "")[:3]
    return f"**{markup.plain(word)}** {markup.plain(by_layer)}", rest


def _over_many() -> bool:
    """Whether the map is of the mean over texts, and there is a study to take it from."""
    return state.OVER.get() == "many texts" and bool(state.study_id())


def _probes(run: Capture) -> dict[str, str]:
    """Probes, with titles, that the run and a study that is shown both have; another gives way to the first of them."""
    probes = {probe: probe for probe in PROBES} | {"last queries": f"last {len(run.recent_positions)} queries"}
    if not run.recent_positions:  # a file of an earlier version
        del probes["last queries"]
    if (study := state.study()) and _over_many():
        of_both = {probe: title for probe, title in probes.items() if probe in study.probes}
        if not of_both:
            st.info("The study has no probe of this run, so the map is of one text.", icon=":material/info:")
            state.OVER.set("one text")
        probes = of_both or probes
    if (asked := state.PROBE.get()) not in probes:
        state.PROBE.set(next(iter(probes)))
        st.info(f"Not measured here: {asked}. The attention shown is {state.PROBE.get()}.", icon=":material/info:")
    return probes


def _choose_values(run: Capture, probes: Mapping[str, str], engine: Engine, jobs: Jobs) -> None:
    """Whose attention, of which texts, with or without the sink."""
    study = state.study()
    over = {
        "one text": "One text",
        "many texts": f"Mean of {counted(len(study.names), 'text')}" if study else "Mean of many texts",
    }
    with st.container(horizontal=True, vertical_alignment="bottom", gap="medium"):
        st.segmented_control(
            "Map of", list(over), format_func=over.__getitem__, required=True, label_visibility="collapsed",
            **state.OVER.widget(),
        )  # fmt: skip
        if st.button("Study more texts", icon=":material/library_add:", type="tertiary"):
            new_study.dialog(engine, jobs)
        st.segmented_control(
            "Attention of", list(probes), format_func=probes.__getitem__, required=True, label_visibility="collapsed",
            help="\n".join(f"- **{probes[probe]}**: {PROBES[probe]}" for probe in probes), **state.PROBE.widget(),
        )  # fmt: skip
        st.toggle(
            "Without the first token",
            help="One token, the attention sink, often draws most of the attention. Metrics, scatter and queries are "
            "then of the others. Verdicts weigh both; what is lost and kept is always of all tokens.",
            **state.SKIP_FIRST.widget(),
        )
    if state.OVER.get() == "many texts" and study is None:
        st.info(
            f"No study of {markup.plain(state.model())} yet, so the map is of one text. *Study more texts* makes one: "
            "each head's Γ then comes with an interval.",
            icon=":material/library_books:",
        )


@_part("map")
def _map() -> None:
    """The map, and what chooses its numbers and its cells."""
    run = library.run(state.run_id())
    titles = _titles()
    if state.MAP.get() not in titles:
        state.MAP.drop()
    verdict = _verdicts()
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        st.selectbox(
            "Map", list(titles), format_func=titles.__getitem__, label_visibility="collapsed", width=250,
            help=choices.explained(METRICS), **state.MAP.widget(),
        )  # fmt: skip
        with st.popover("Filter", icon=":material/filter_alt:", type="tertiary"):
            _filters(run, verdict)
    values, scale, notes, caption = _values(run, verdict)
    alt = f"Map of {scale.title} by layer and query head, {run.n_layers} x {run.n_heads}"

    with st.container(key="map_frame"):
        st.echarts_chart(
            heat.clickable_map(
                values, scale, kv_heads=run.n_kv_heads, names=_names(run), notes=notes, shown=_shown(run, verdict),
                skipped=_not_compressed(run) if state.MAP.get() == state.LOST else None, dark=charts.page_is_dark(),
            ),
            key="map_chart", height=heat.map_height(run.n_layers), alt=alt,
        )  # fmt: skip
        with st.container(key="outlines"):
            st.html(heat.outlines(verdict.shape, state.PINNED.get()))
    charts.explain(
        "map_chart", alt=alt, caption=caption + " Grey: undefined." * bool(np.isnan(values).any()),
        table=_table(run, verdict, values, scale), file=_file(state.MAP.get()),
    )  # fmt: skip


def _file(chart: str) -> str:
    """What a map is of, for the name of a file: whose attention, and which text or how many."""
    if chart == state.LOST:
        return one_head.file_name(chart, "next token", one_head.text_name())
    study = state.study() if _over_many() else None
    without = "without first token" if state.SKIP_FIRST.get() and (chart == "gamma" or not study) else ""
    of = counted(len(study.names), "text") if study else one_head.text_name()
    return one_head.file_name(chart, state.PROBE.get(), without, of)


def _names(run: Capture) -> np.ndarray:
    """Places of the heads, [L, H] of str."""
    names = [head_name(layer, run.kv_head(head), head) for layer, head in np.ndindex(run.n_layers, run.n_heads)]
    return np.array(names).reshape(run.n_layers, run.n_heads)


def _titles() -> dict[str, str]:
    """Maps that can be drawn, with their titles."""
    if not _over_many():
        return state.maps()
    study = state.study()
    assert study is not None
    titles = {name: many_texts.metric_of(name).title for name in study.metrics}
    lost = {state.LOST: "Attention lost, this text"}
    return {name: title for name, title in (state.maps() | titles | lost).items() if name in titles or name in lost}


def _verdicts() -> np.ndarray:
    """Verdict of each head, on one text or over many, [L, H] of str."""
    probe = state.PROBE.get()
    return np.asarray(
        library.verdicts_over(state.study_id(), probe) if _over_many() else library.verdicts_of(state.run_id(), probe)
    )


def _filters(run: Capture, verdict: np.ndarray) -> None:
    """Choose the heads that are not faded."""
    there = [name for name in VERDICTS if (verdict == name).any() or name in state.ONLY_VERDICTS.get()]
    st.pills(
        "Verdicts", there, selection_mode="multi", format_func=lambda name: f"{name} ({(verdict == name).sum()})",
        **state.ONLY_VERDICTS.widget(),
    )  # fmt: skip
    state.ONLY_KV.set([head for head in state.ONLY_KV.get() if head < run.n_kv_heads])
    st.pills(
        "kv heads", range(run.n_kv_heads), selection_mode="multi", format_func=lambda head: f"KV {head}",
        **state.ONLY_KV.widget(),
    )  # fmt: skip
    st.caption("Heads that do not match are faded.")


def _shown(run: Capture, verdict: np.ndarray) -> np.ndarray:
    """Heads that pass the filters, [L, H] bool."""
    verdicts, kv_heads = state.ONLY_VERDICTS.get(), state.ONLY_KV.get()
    of_kv = np.isin([run.kv_head(head) for head in range(run.n_heads)], kv_heads) if kv_heads else True
    shown = np.isin(verdict.astype(str), verdicts) if verdicts else np.ones(verdict.shape, dtype=bool)
    return np.asarray(shown & of_kv)


def _values(run: Capture, verdict: np.ndarray) -> tuple[np.ndarray, heat.Scale, np.ndarray, str]:
    """Numbers of the map, their scale, what is said of each cell, and the caption."""
    which, probe, skip_first = state.MAP.get(), state.PROBE.get(), int(state.SKIP_FIRST.get())
    if which == state.LOST:
        return _lost(run)
    if _over_many() and skip_first and which == "gamma":
        which = "gamma_skip_first"
    of = many_texts.metric_of(which)
    scale = heat.Scale(of.title, of.low or 0.0, of.high, of.diverging)
    about = _READ.get(which, f"{of.about[0].upper()}{of.about[1:]}.")
    reading = " ".join(filter(None, (_GOOD.get(which, ""), about)))
    if _over_many():
        means = library.means_of(state.study_id(), which, probe)
        notes = np.array(
            [
                f"95 % {signed(low)} to {signed(high)}, {counted(n, 'text')}, {said}"
                for low, high, n, said in zip(
                    means.low.ravel(), means.high.ravel(), means.defined.ravel(), verdict.ravel(), strict=True
                )
            ],
            dtype=object,
        ).reshape(verdict.shape)
        with_first = " The first token counts, too." * (skip_first and not of.about_sink)
        return means.mean, scale, notes, f"**{of.title}**, mean over texts. {reading}{with_first}"
    values = library.values_of(state.run_id(), skip_first, probe)
    status = values.status_of(which)
    notes = np.where(status == "ok", verdict, status)
    whose = _WHOSE[probe].format(w=len(run.recent_positions))
    return values.of(which), scale, notes, f"**{of.title}**. {reading} {whose}"


def _lost(run: Capture) -> tuple[np.ndarray, heat.Scale, np.ndarray, str]:
    """The map of what the settings in force lose."""
    spec = state.spec()
    scale = heat.Scale("Lost", 0.0, None, percent=True)
    skipped = np.isin(np.arange(run.n_layers), list(_not_compressed(run)))
    notes = np.repeat(np.where(skipped, "not compressed", "of its attention")[:, None], run.n_heads, axis=1)
    try:
        lost = library.lost_of(state.run_id(), spec)
    except SettingsError as error:
        undefined = np.full(notes.shape, np.nan)
        return undefined, scale, np.full(notes.shape, "not told"), f"**Attention lost at my settings.** {error}"
    caption = (
        f"**Attention lost at my settings**, this one text. {_GOOD[state.LOST]} The share of the next token's "
        "attention that goes to tokens which each head evicts, if the text of "
        f"{counted(run.n_tokens, 'token')} is compressed once, at its end. Median {np.median(lost):.1%}."
    )
    return np.asarray(lost), scale, notes, caption


def _not_compressed(run: Capture) -> dict[int, str]:
    """Layers that the settings in force leave alone, each with the word for it."""
    skipped = dict.fromkeys(state.spec().skip_layers, "skipped")
    return skipped | {layer: "sliding window" for layer, kind in enumerate(run.layer_kinds) if kind != "full"}


def _number(value: float, scale: heat.Scale) -> str:
    return "undefined" if np.isnan(value) else f"{value:.1%}" if scale.percent else signed(value)


def _table(run: Capture, verdict: np.ndarray, values: np.ndarray, scale: heat.Scale) -> dict[str, np.ndarray]:
    """The numbers of the map, a row for each head."""
    layer, head = np.indices(verdict.shape).reshape(2, -1)
    return {
        "layer": layer,
        "kv head": head * run.n_kv_heads // run.n_heads,
        "query head": head,
        scale.title: values.ravel(),
        "verdict": verdict.ravel().astype(str),
    }


@_part("heads")
def _heads(tune: StreamlitPage | None, jobs: Jobs) -> None:
    """The open head and the pinned one, and all that opens a head or says what is shown of it: a click draws no more.

    Args:
        tune: page that suggests layers to skip.
    """
    run = library.run(state.run_id())
    pinned = state.PINNED.get()
    _bar(run, tune)
    sides = st.columns(2, gap="large") if pinned else [st.container()]
    with sides[0]:
        one_head.draw("a", *state.chosen_head(), jobs)
    if pinned:
        with sides[1]:
            one_head.draw("b", *pinned, jobs)
    with st.container(horizontal=True):
        cells.listen("map_chart", state.chosen_head(), (run.n_layers, run.n_heads), state.choose_head)
        _listen(run)


def _listen(run: Capture) -> None:
    """The keys of the page."""

    def step(layers: int, heads: int) -> Callable[[], None]:
        def move() -> None:
            layer, head = state.chosen_head()
            state.choose_head(
                int(np.clip(layer + layers, 0, run.n_layers - 1)), int(np.clip(head + heads, 0, run.n_heads - 1))
            )

        return move

    keys.listen(
        {
            "ArrowLeft": ("previous query head", step(0, -1)),
            "ArrowRight": ("next query head", step(0, 1)),
            "ArrowUp": ("layer before", step(-1, 0)),
            "ArrowDown": ("next layer", step(1, 0)),
            "[": ("query before", lambda: one_head.step_query(run, 1)),
            "]": ("next query", lambda: one_head.step_query(run, -1)),
        },
        hint="Keys: arrows move the cell, [ ] the query, ? lists all",
    )


def _bar(run: Capture, tune: StreamlitPage | None) -> None:
    """Which head is open, and what is shown of it."""
    layer, head = state.chosen_head()

    # The browser sends, with the next key, what its boxes showed before the last one. So there is another box for each
    # layer and head, and one that is no longer shown chooses nothing.
    def chosen() -> None:
        if state.chosen_head() == (layer, head):
            boxes = st.session_state
            state.choose_head(boxes.get(f"layer_{layer}", layer), boxes.get(f"head_{head}", head))

    pinned, skipped = state.PINNED.get(), layer in state.SKIP_LAYERS.get()
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        st.selectbox(
            "Layer", range(run.n_layers), format_func="Layer {}".format, label_visibility="collapsed", width=125,
            index=layer, key=f"layer_{layer}", on_change=chosen,
        )  # fmt: skip
        st.selectbox(
            "Head", range(run.n_heads), format_func=lambda head: f"KV {run.kv_head(head)}, query head {head}",
            label_visibility="collapsed", width=210,
            index=head, key=f"head_{head}", on_change=chosen,
        )  # fmt: skip
        st.button(
            "Unpin B" if pinned else "Pin as B", icon=":material/push_pin:", key="pin", on_click=_pin,
            help="Keep this head beside the next one that you open.",
        )  # fmt: skip
        if run.layer_kinds[layer] == "full" and state.plan() is None:
            st.button(
                f"Compress layer {layer}" if skipped else f"Skip layer {layer}",
                icon=":material/playlist_remove:" if skipped else ":material/playlist_add:", key="skip_layer",
                on_click=_skip, help="Skipped layers keep everything. Their list stands in the header.",
            )  # fmt: skip
            if tune is not None:
                st.page_link(tune, label="Which layers to skip? Tune suggests them", icon=":material/arrow_forward:")
    st.segmented_control("View", state.VIEWS, label_visibility="collapsed", required=True, **state.VIEW.widget())
    if state.VIEW.get() in ("By position", "Queries"):
        one_head.query_stepper(run)


def _pin() -> None:
    """Keep the open head as B, or let B go."""
    state.PINNED.set(None if state.PINNED.get() else state.chosen_head())
    st.rerun()  # of the whole page: it has other columns now


def _skip() -> None:
    """Put the open layer on the list of skipped layers, or take it off."""
    state.SKIP_LAYERS.set(sorted(set(state.SKIP_LAYERS.get()) ^ {state.chosen_head()[0]}))
    st.rerun()  # of the whole page: the header has the list


@_part("below")
def _below(jobs: Jobs) -> None:
    """Many heads, texts or runs at once."""
    study = state.study()
    if state.OTHER_RUN.get() and not state.BELOW.held():
        state.BELOW.set("Another run")
    chosen = st.segmented_control(
        "More", state.BELOWS, label_visibility="collapsed", required=True, **state.BELOW.widget()
    )
    if chosen == "All heads":
        _all_heads()
    elif chosen == "Many texts":
        many_texts.draw(study)
    else:
        comparison.draw()


def _all_heads() -> None:
    """Every head by Γ with the sink and without it, and as a table that opens them."""
    run, run_id, probe = library.run(state.run_id()), state.run_id(), state.PROBE.get()
    values, verdict = library.values_of(run_id, 0, probe), library.verdicts_of(run_id, probe)

    def open_head(layer: int, head: int) -> None:
        state.choose_head(layer, head)
        st.rerun(["heads"])

    layer, head = np.indices(verdict.shape).reshape(2, -1)
    left, right = st.columns([2, 3], gap="medium")
    with left:
        charts.show(
            _quadrant(run_id, probe),
            key="quadrant",
            file=one_head.file_name("all heads", probe, one_head.text_name()),
            alt="All heads by Γ with the first token and without it",
            caption="This text: Γ with the first token (across) and without it (up); size is the first token's share "
            f"of the attention. Lower left follows the paper. {_WHOSE[probe].format(w=len(run.recent_positions))} "
            "Heads in which the others get next to none are not drawn. Click one to open it.",
            on_head=open_head,
        )
    with right:

        def chosen() -> None:
            if rows := st.session_state["all_heads"].selection.rows:
                open_head(int(layer[rows[0]]), int(head[rows[0]]))

        st.dataframe(
            {"layer": layer, "kv head": head * run.n_kv_heads // run.n_heads, "head": head}
            | {METRICS[name].title: values.of(name).ravel() for name in values.names}
            | {"verdict": verdict.ravel().astype(str), "status": values.status_of("gamma").ravel().astype(str)},
            hide_index=True,
            key="all_heads",
            on_select=chosen,
            selection_mode="single-row",
            height=430,
        )
        told = " · ".join(f"**{name}**: {markup.plain(meaning)}" for name, meaning in meanings(1).items())
        st.caption(f"Select a row to open the head. {told}")


@library.remembered
def _quadrant(run_id: str, probe: str) -> go.Figure:
    """All heads of a run by Γ with the sink and without it."""
    values, verdict = library.values_of(run_id, 0, probe), library.verdicts_of(run_id, probe)
    across, up, size = (values.of(name) for name in ("gamma", "gamma_skip_first", "sink_share"))
    return planes.head_quadrant(across, up, size, status=verdict)
