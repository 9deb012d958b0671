"""One head of the run on screen: its metrics, and one view of it at a time, so that a click has little to draw.

All that is said to be lost or kept is of the settings in the header, and of all tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import streamlit as st

from analysis.captures import Capture
from analysis.errors import SettingsError
from analysis.measures import attention_loss, kept_tokens
from analysis.metrics import METRICS
from analysis.selftest import is_synthetic
from analysis.verdicts import meanings
from analysis.words import counted, head_name, signed
from app import figures, library, state
from app.components import many_texts, markup, why
from app.components.charts import explain, page_is_dark, show
from app.figures import positions
from app.jobs import Jobs
from l2kv.policies import POLICIES

_HEIGHT = 340
_PROBES = {"next token": "the next token", "all queries": "all queries"}


@dataclass(frozen=True, slots=True, eq=False)
class _Head:
    """What is shown of a head."""

    side: str
    """"a" or "b": names the widgets."""
    run: Capture
    layer: int
    head: int
    kept: np.ndarray | None
    """[T] bool, tokens that the settings in force keep; None where a run does not tell."""
    skip_first: int

    @property
    def name(self) -> str:
        return head_name(self.layer, self.run.kv_head(self.head), self.head)

    def file(self, whose: str = "") -> str:
        """Name of a file of the view on screen: of whose attention, and without the first token if it is left out."""
        without = "without first token" if self.skip_first else ""
        return file_name(f"{self.name} {state.VIEW.get()}", whose, without, text_name())

    @property
    def row(self) -> np.ndarray:
        """Attention of the next token, [T] float64."""
        return np.asarray(self.run.probe_attention[self.layer, self.head], dtype=np.float64)

    def attention_of(self, position: int) -> np.ndarray:
        """Attention of the query at a position to the tokens before it, [position] float64."""
        if position == self.run.n_tokens:
            return self.row
        row = self.run.recent_attention[position - self.run.n_tokens, self.layer, self.head, :position]
        return np.asarray(row, dtype=np.float64)

    @property
    def norm(self) -> np.ndarray:
        return self.run.key_norm[self.layer, self.run.kv_head(self.head)]

    @property
    def labels(self) -> list[str]:
        return [markup.visible(label) for label in self.run.labels]


def draw(side: str, layer: int, head: int, jobs: Jobs) -> None:
    """Draw the head on one side, "a" or "b"."""
    run = library.run(state.run_id())
    try:
        kept = kept_tokens(run, layer, head, state.spec())
    except SettingsError:
        kept = None
    one = _Head(side, run, layer, head, kept, int(state.SKIP_FIRST.get()))
    _numbers(one)
    view = state.VIEW.get()
    if view == "Over texts":
        many_texts.of_head(side, layer, head)
    elif view == "Why":
        why.draw(side, layer, head, jobs)
    else:
        _VIEWS[view](one)


def file_name(*parts: str) -> str:
    """Name a file of a chart of the model on screen, without its end; empty parts are left out."""
    words = (re.sub(r"[\W_]+", "-", part.lower()).strip("-") for part in (state.model(), *parts))
    return "_".join(filter(None, words))


def text_name() -> str:
    """Name of the run on screen."""
    run = library.find(state.run_id())
    return run.name if run else ""


def step_query(run: Capture, by: int) -> None:
    """Show an earlier query (`by` 1) or a later one (-1)."""
    state.QUERY.set(int(np.clip(state.QUERY.get() + by, 0, len(run.recent_positions))))


def _numbers(one: _Head) -> None:
    run, layer, head, probe = one.run, one.layer, one.head, state.PROBE.get()
    values = library.values_of(state.run_id(), one.skip_first, probe)
    verdict = str(library.verdicts_of(state.run_id(), probe)[layer, head])
    number = {name: float(values.of(name)[layer, head]) for name in values.names}
    whose = _PROBES.get(probe, f"the last {len(run.recent_positions)} queries")
    lost, scale = _lost(one), "−1 the paper's claim, 0 chance, +1 the opposite"
    with_first = float(library.values_of(state.run_id(), 0, probe).of("gamma")[layer, head])
    shown = {
        "Γ": (signed(with_first), f"{scale}. The verdict goes by this and by that without the first token."),
        "Γ without first": (
            signed(number["gamma_skip_first"]),
            "The same without the first token. Undefined where the others get less than 1 % of the attention.",
        ),
        "First token": (f"{number['sink_share']:.0%}", "share of the attention that the first token gets"),
        "Lost": (
            "not told" if lost is None else f"{lost:.1%}",
            "share of the next token's attention that goes to tokens evicted at the settings in the header",
        ),
    }
    said = verdict
    if state.over() == "many texts" and (study := state.study()):
        id, of, texts = state.study_id(), many_texts.probe_of(study), counted(len(study.names), "text")
        over = str(library.verdicts_over(id, of)[layer, head])
        said = f"{verdict} in this text{' and' if over == verdict else f'; {over}'} over {texts}"
        mean = signed(library.means_of(id, "gamma", of).mean[layer, head])
        shown = {f"Γ, {texts}": (mean, f"Mean of all: {scale}. The view *Over texts* has more.")} | {
            f"{name}, here": value for name, value in shown.items()
        }
    which = f"{one.side.upper()} · " if state.PINNED.get() else ""
    st.markdown(f"#### {which}{one.name}: {said}", help=f"By {whose}: {markup.plain(meanings(1)[verdict])}.")
    with st.container(horizontal=True, gap="small" if which else "medium", vertical_alignment="bottom"):
        for name, (value, about) in shown.items():
            st.metric(name, value.replace("nan%", "undefined"), help=about, width="content")
    with st.container(horizontal=True, vertical_alignment="top", gap="small", key=f"explain_numbers_{one.side}"):
        notes = (_kept_words(one, lost), _layer_note(run, layer), _query_note(run, whose))
        st.caption(" ".join(filter(None, notes)), width="stretch")
        with st.popover("All metrics", type="tertiary", key=f"numbers_{one.side}", on_change="rerun") as every:
            if every.open:
                _all_numbers(one, number, whose)


def _all_numbers(one: _Head, number: dict[str, float], whose: str) -> None:
    group = float(
        library.kv_alr_of(state.run_id(), one.skip_first, state.PROBE.get())[one.layer, one.run.kv_head(one.head)]
    )
    titles = {METRICS[name].title: _decimals(value) for name, value in number.items()}
    titles |= {"ALR of its kv head": _decimals(group)}
    st.caption(
        f"By {whose}, {one.run.n_tokens - one.skip_first:,} tokens of this text, nothing protected, as in the paper."
    )
    st.table({"metric": list(titles), "value": list(titles.values())})
    st.caption(
        f"The ALR of a kv head is of the mean attention of its {one.run.n_heads // one.run.n_kv_heads} query "
        "heads: a key is "
        "evicted for all of them at once."
    )


def _decimals(value: float) -> str:
    return "undefined" if np.isnan(value) else f"{value:z.2f}".replace("-", "−")


def _lost(one: _Head) -> float | None:
    return None if one.kept is None else float(one.row[~one.kept].sum())


def _kept_words(one: _Head, lost: float | None) -> str:
    spec, n = state.spec(), one.run.n_tokens
    title = POLICIES[spec.policy].title.split(" (")[0]
    if one.kept is None or lost is None:
        return f"A run holds no keys, so it does not tell which tokens *{title}* keeps."
    if one.kept.all():
        return f"All {n:,} tokens are kept at these settings."
    return (
        f"{title} keeps **{one.kept.sum():,} of {n:,}** tokens and loses **{lost:.1%}** of the next token's attention; "
        f"{1 - one.row.sum():z.1%} of it goes to that token itself."
    )


def _layer_note(run: Capture, layer: int) -> str:
    if run.layer_kinds[layer] == "sliding":
        return "This layer has a sliding window: it is never compressed."
    if layer == 0 and not is_synthetic(run):
        return "In layer 0 a key's norm depends on the token alone."
    return ""


def _query_note(run: Capture, whose: str) -> str:
    """Whose the numbers are, where the chart below them is of another query."""
    if state.VIEW.get() != "By position" or not state.QUERY.get():
        return ""
    return f"Γ and the share of the first token are of {whose}; only the chart is of {_query(run)[0]}."


def query_stepper(run: Capture) -> None:
    """Draw what steps through the queries whose attention the heads are shown by."""
    query, last = state.QUERY.get(), len(run.recent_positions)
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        for by, icon, about, end in (
            (1, "left", "Query before", query >= last),
            (-1, "right", "Next query", query <= 0),
        ):
            st.button(
                about, icon=f":material/chevron_{icon}:", type="tertiary", on_click=step_query, args=(run, by),
                disabled=end,
            )  # fmt: skip
        st.caption(f"Attention of {_query(run)[0]}")


def _query(run: Capture) -> tuple[str, int]:
    """The query that is shown: its name in Markdown, and its position."""
    back = min(state.QUERY.get(), len(run.recent_positions))
    label = markup.plain(markup.visible(run.labels[-back] if back else run.probe_label))
    position = run.n_tokens - back
    return f"token {position:,} “{label}”" if back else f"the next token “{label}”", position


def _by_position(one: _Head) -> None:
    named, end = _query(one.run)
    row = one.attention_of(end)
    shown = slice(one.skip_first, end)
    received = one.run.attention_received[one.layer, one.head]
    key, alt = (
        f"by_position_{one.side}",
        f"Key norm and attention by position, {one.name}, {counted(end - one.skip_first, 'token')}",
    )
    st.echarts_chart(
        positions.norm_and_attention(
            one.norm[shown], row[one.skip_first :], one.labels[shown],
            kept=None if one.kept is None else one.kept[shown], first_position=one.skip_first, height=_HEIGHT,
            dark=page_is_dark(),
        ),
        key=key, height=_HEIGHT, alt=alt,
    )  # fmt: skip
    explain(
        key,
        file=one.file(f"token {end}" if end < one.run.n_tokens else "next token"),
        alt=alt,
        caption=f"Key norm, and the attention of {named} (log scale), by position, n = {end - one.skip_first:,}. "
        "Where the "
        "paper holds, attention is high where the norm is low. Solid: kept; hollow: evicted.",
        table={
            "position": np.arange(one.run.n_tokens)[shown],
            "token": one.labels[shown],
            "key norm": one.norm[shown],
            "value norm": one.run.value_norm[one.layer, one.run.kv_head(one.head)][shown],
            "attention": row[one.skip_first :],
            "attention received": received[shown],
        }
        | ({} if one.kept is None else {"kept": one.kept[shown]}),
    )


def _tokens(one: _Head) -> None:
    if one.kept is None:
        st.info("Choose another policy in the header: which tokens this one keeps depends on the keys themselves.")
        return
    st.html(markup.token_strip(one.run.labels, one.kept.tolist()))
    st.caption(
        "Solid tokens are kept, hollow ones evicted. · is a space, ⏎ a line end. Point at a token for its position."
    )


def _losses(one: _Head) -> None:
    spec = state.spec()
    loss = attention_loss(
        one.run, one.layer, one.head, protect_first=spec.protect_first, protect_last=spec.protect_last
    )
    curves = {
        "keep low norm": loss.low_norm,
        "keep high norm": loss.high_norm,
        "ideal order": loss.ideal,
        "random order": loss.chance,
    }
    dropped = np.arange(len(loss.ideal)) / one.run.n_tokens
    lost = _lost(one)
    protected = " and ".join(
        f"the {which} {n}" for which, n in (("first", spec.protect_first), ("last", spec.protect_last)) if n
    )
    show(
        figures.loss_curves(
            dropped, curves, keep_ratio=spec.keep_ratio if one.kept is None else float(one.kept.mean()), lost=lost
        ),
        key=f"losses_{one.side}",
        file=file_name(f"{one.name} loss curves", "next token", text_name()),
        alt=f"Attention lost by share of tokens evicted, {one.name}",
        caption="Share of the next token's attention that is lost as tokens are evicted. "
        + (f"Protected, never evicted: {protected} tokens. " if protected else "Nothing is protected. ")
        + "Of tokens with equal norms a curve is the mean over their orders. Above *random order*: worse than chance.",
        table={"evicted": dropped} | {f"lost, {name}": values for name, values in curves.items()},
    )


def _scatter(one: _Head) -> None:
    shown = slice(one.skip_first, None)
    rho = float(library.values_of(state.run_id(), one.skip_first, "all queries").of("spearman")[one.layer, one.head])
    received = one.run.attention_received[one.layer, one.head]
    show(
        figures.norm_attention_scatter(
            one.norm[shown], received[shown], one.labels[shown], rho=None if np.isnan(rho) else rho,
            n=one.run.n_tokens - one.skip_first, first_position=one.skip_first,
        ),
        key=f"scatter_{one.side}",
        file=one.file("all queries"),
        alt=f"Key norm against attention received, {one.name}",
        caption="Each token by key norm and by the attention it receives (log scale), the mean over all queries that "
        "see it, whichever attention is chosen above. A slope down to the right is the paper's claim. No p-value: "
        "tokens are not independent.",
        table={
            "position": np.arange(one.run.n_tokens)[shown],
            "token": one.labels[shown],
            "key norm": one.norm[shown],
            "attention received": received[shown],
        },
    )  # fmt: skip


def _queries(one: _Head) -> None:
    positions = one.run.recent_positions
    if not positions:
        st.info("This run keeps no last queries. Make a new run of the text to see how queries differ.")
        return
    gamma = library.gamma_by_query(state.run_id(), one.skip_first)[:, one.layer, one.head]
    next_token = float(library.values_of(state.run_id(), one.skip_first).of("gamma")[one.layer, one.head])
    labels = [one.labels[position] for position in positions]
    show(
        figures.gamma_by_query(
            gamma, labels, first_position=positions[0], next_token=next_token,
            next_label=markup.visible(one.run.probe_label), marked=one.run.n_tokens - state.QUERY.get(),
        ),
        key=f"by_query_{one.side}",
        file=one.file(),
        alt=f"Γ of each of the last {len(positions)} queries, {one.name}",
        caption=f"Γ of each of the last {len(positions)} queries over the tokens before it, and of the next token. "
        "One query "
        "is an anecdote: where dots lie on both sides of 0, the sign is the query's and not the head's.",
        table={
            "position": [*positions, one.run.n_tokens],
            "token": [*labels, markup.visible(one.run.probe_label)],
            "Γ": [*gamma, next_token],
        },
    )  # fmt: skip


def _attention_map(one: _Head) -> None:
    pooled = one.run.pooled(one.layer, one.head)
    if one.skip_first:
        pooled[:, 0] = np.nan  # the bin that holds the first token: what is left gets the colours
    show(
        figures.pooled_map(
            pooled, tokens_per_bin=one.run.tokens_per_bin, n_tokens=one.run.n_tokens, dark=page_is_dark()
        ),
        key=f"pooled_{one.side}",
        file=one.file(),
        alt=f"Attention map of {one.name}, pooled in bins of {counted(one.run.tokens_per_bin, 'token')}",
        caption=f"Each row is {one.run.tokens_per_bin} queries, each column as many keys. A strong first column is "
        "a sink, a strong diagonal is recency." + " The first column is not shown." * one.skip_first,
        table={f"keys from {i * one.run.tokens_per_bin}": column for i, column in enumerate(pooled.T)},
    )


_VIEWS: dict[str, Callable[[_Head], None]] = {
    "By position": _by_position,
    "Tokens": _tokens,
    "Loss curves": _losses,
    "Scatter": _scatter,
    "Queries": _queries,
    "Attention map": _attention_map,
}
