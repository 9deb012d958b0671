"""Heads: does low norm predict attention here, and in which heads?"""

from __future__ import annotations

import numpy as np
import streamlit as st

from analysis.measures import VERDICTS, HeadFigures, answer, attention_loss, kept_tokens, signed
from analysis.run import Capture
from app import figures, markup, state
from app.charts import show
from l2kv.spec import CompressionSpec, share

_FEW_TOKENS = 64
MAPS = {
    "Γ": "**Γ** of each head, −1 to +1. Purple: the keys of low norm get the attention, as the paper says. Orange: "
    "those of high norm do. It weighs tokens by their attention and is of ONE query, the next token's.",
    "ALR": "**ALR**, the paper's figure: how much more attention is lost by evicting high norms first than by the "
    "ideal order. Pale is good. It is a sum over the tokens, so it grows with the text, and with how much there is "
    "to lose.",
    "Spearman": "**Spearman's ρ** of key norm and the attention that a key receives, the mean over all queries that "
    "see it. It counts every token alike, so it does not notice a sink. In layer 0 equal tokens have equal norms.",
}


def page() -> None:
    """Draw the page."""
    run = state.current_run()
    st.header(f"Does low norm predict attention in {markup.plain(run.model)}?")
    st.markdown(f"##### {markup.plain(answer(run))}")
    _about(run)
    without = st.toggle(
        "Leave out the first token (the usual sink)",
        key="leave_out",
        persist_state="session",
        help="One token often draws most of the attention. The figures and plots below are then of the others; "
        "verdicts, which weigh both, and the strip of tokens stay of all.",
    )
    leave_out = int(without)
    numbers = state.figures_of(run, leave_out)
    _maps(run, numbers, leave_out)
    layer, head = state.chosen_head(run)
    st.markdown(
        f"Open below: **layer {layer}, head {head}**, {numbers.verdict[layer, head]}, "
        f"Γ {signed(numbers.gamma[layer, head])}."
    )
    st.divider()
    _one_head(run, numbers, leave_out)


def _about(run: Capture) -> None:
    source = "The bundled demo run" if state.is_demo() else "Your run"
    beginning = markup.plain(run.text[:80]) + (" …" if len(run.text) > 80 else "")
    st.caption(
        f"{source}: {run.n_tokens} tokens of “{beginning}” in {markup.plain(run.architecture)}, {run.n_layers} layers, "
        f"{run.n_heads} query heads on {run.n_kv_heads} kv heads, {markup.plain(run.dtype)}. Γ and ALR are of one "
        f"query, the next token (“{markup.plain(markup.visible(run.probe_label))}”). One text is an anecdote: "
        "capture your own on the page *Capture*."
    )
    if run.n_tokens < _FEW_TOKENS:
        st.warning(f"{run.n_tokens} tokens say little: take a text of some hundred.", icon=":material/warning:")
    for warning in run.warnings:
        st.warning(markup.plain(warning), icon=":material/warning:")


def _maps(run: Capture, numbers: HeadFigures, leave_out: int) -> None:
    left, right = st.columns([3, 2], gap="large")
    with left:
        which = st.segmented_control(
            "Map",
            list(MAPS),
            default="Γ",
            required=True,
            key="map",
            persist_state="session",
            label_visibility="collapsed",
        )
        values = {"Γ": numbers.gamma, "ALR": numbers.alr, "Spearman": numbers.spearman}[which]
        show(
            figures.head_map(values, title=which, diverging=which != "ALR", status=numbers.status),
            key=f"map_{which}_{leave_out}",
            alt=f"Map of {which} by layer and head",
            caption=f"{MAPS[which]} Rows are layers, columns query heads. Click a cell to open that head.",
            on_head=state.choose_head,
        )
        _all_heads(run, numbers)
    with right:
        st.markdown("**With and without the first token**")
        gamma = state.figures_of(run, 0).gamma
        show(
            figures.head_quadrant(gamma, state.figures_of(run, 1).gamma, numbers.sink_share, status=numbers.verdict),
            key="quadrant",
            alt="All heads by Γ with the first token and without it",
            caption="Every head by Γ with the first token (across) and without it (up); size is the first token's "
            "share of the attention. Lower left follows the paper. Click a head to open it.",
            on_head=state.choose_head,
        )


def _all_heads(run: Capture, numbers: HeadFigures) -> None:
    layer, head = np.indices(numbers.gamma.shape).reshape(2, -1)
    with st.expander("All heads as a table", icon=":material/table:"):

        def chosen() -> None:
            if rows := st.session_state["all_heads"].selection.rows:
                state.choose_head(int(layer[rows[0]]), int(head[rows[0]]))

        st.dataframe(
            {
                "layer": layer,
                "head": head,
                "kv head": head * run.n_kv_heads // run.n_heads,
                "Γ": numbers.gamma.ravel(),
                "Γ without the first": state.figures_of(run, 1).gamma.ravel(),
                "ALR": numbers.alr.ravel(),
                "ALR / n": numbers.alr_per_token.ravel(),
                "ALR / chance": numbers.alr_against_chance.ravel(),
                "Spearman": numbers.spearman.ravel(),
                "Pearson": numbers.pearson.ravel(),
                "share of the first": numbers.sink_share.ravel(),
                "verdict": numbers.verdict.ravel().astype(str),
                "status": numbers.status.ravel().astype(str),
            },
            hide_index=True,
            key="all_heads",
            on_select=chosen,
            selection_mode="single-row",
        )
        st.caption(" · ".join(f"**{name}**: {markup.plain(meaning)}" for name, meaning in VERDICTS.items()))


def _one_head(run: Capture, numbers: HeadFigures, leave_out: int) -> None:
    layer, head = _choose(run)
    verdict = str(numbers.verdict[layer, head])
    st.subheader(f"Layer {layer}, head {head}: {verdict}")
    st.caption(f"{markup.plain(VERDICTS[verdict])}. It reads kv head {run.kv_head(head)}. {_layer_note(run, layer)}")
    _numbers(run, numbers, layer, head, leave_out)

    labels = [markup.visible(label) for label in run.labels]
    norm = run.key_norm[layer, run.kv_head(head)]
    with st.container(horizontal=True, vertical_alignment="bottom"):
        state.ratio_input()
        rule = st.segmented_control(
            "Keep the keys of", ["low norm", "high norm"], default="low norm", required=True, key="strip_rule",
            persist_state="session",
        )  # fmt: skip
        state.protect_last_input()
    shared = state.current_spec()
    spec = CompressionSpec(
        keep_ratio=shared.keep_ratio,
        protect_last=shared.protect_last,
        policy="low_norm" if rule == "low norm" else "high_norm",
    )
    kept = kept_tokens(run, layer, head, spec)
    row = run.probe_attention[layer, head].astype(float)
    more = kept.sum() > share(spec.keep_ratio, run.n_tokens)
    st.markdown(
        f"Of {run.n_tokens} tokens this head would keep **{kept.sum()}**"
        + (f" (more than the ratio: the last {spec.protect_last} are protected)" if more else "")
        + f", and lose **{row[~kept].sum():.1%}** of the next token's attention. {1 - row.sum():.1%} of it goes to "
        "that token itself."
    )
    st.html(markup.token_strip(run.labels, kept))
    st.caption(
        "The text as this head would keep it if it were compressed once, now: solid tokens stay, hollow ones go. "
        "· is a space, ⏎ a line end. The latest tokens are protected as set above."
    )

    shown = slice(leave_out, None)
    show(
        figures.norm_and_attention(
            norm[shown],
            run.probe_attention[layer, head][shown],
            labels[shown],
            kept=kept[shown],
            attention_label="attention of the next token",
            first_position=leave_out,
        ),
        key="by_position",
        alt=f"Key norm and attention by position, layer {layer}, head {head}",
        caption="Key norm (above) and the attention that the next token pays (below, log scale), by position. Where "
        "the paper holds, peaks of attention stand under valleys of the norm.",
        table={
            "position": np.arange(run.n_tokens)[shown],
            "token": labels[shown],
            "key norm": norm[shown],
            "value norm": run.value_norm[layer, run.kv_head(head)][shown],
            "attention of the next token": run.probe_attention[layer, head][shown],
            "attention received": run.attention_received[layer, head][shown],
            "kept": kept[shown],
        },
    )
    left, right = st.columns(2, gap="large")
    with left:
        rho = numbers.spearman[layer, head]
        show(
            figures.norm_attention_scatter(
                norm[shown],
                run.attention_received[layer, head][shown],
                labels[shown],
                rho=None if np.isnan(rho) else float(rho),
                n=run.n_tokens - leave_out,
                first_position=leave_out,
            ),
            key="scatter",
            alt="Scatter of key norm and attention received",
            caption="Each token by key norm and by the attention it receives, the mean over all queries that see it "
            "(log scale). A slope down to the right is the paper's claim. No p-value: tokens are not independent.",
        )
        _losses(run, layer, head, leave_out, spec.keep_ratio)
    with right:
        _pooled(run, layer, head, leave_out)


def _choose(run: Capture) -> tuple[int, int]:
    """The open head, and the ways to another one without a mouse on the map."""
    state.chosen_head(run)

    def step(by: int) -> None:
        layer, head = state.chosen_head(run)
        state.choose_head(*divmod((layer * run.n_heads + head + by) % (run.n_layers * run.n_heads), run.n_heads))

    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.number_input("Layer", 0, run.n_layers - 1, key="layer", persist_state="session", width=130)
        st.number_input("Head", 0, run.n_heads - 1, key="head", persist_state="session", width=130)
        st.button("Previous head", icon=":material/chevron_left:", on_click=step, args=(-1,))
        st.button("Next head", icon=":material/chevron_right:", on_click=step, args=(1,))
        layer = st.session_state["layer"]
        skipped = layer in st.session_state.get("skip_layers", [])

        def toggle_skip() -> None:
            now = set(st.session_state.get("skip_layers", []))
            st.session_state["skip_layers"] = sorted(now ^ {layer})

        if run.layer_kinds[layer] == "full":
            st.button(
                f"Compress layer {layer} again" if skipped else f"Add layer {layer} to the skip list",
                icon=":material/playlist_remove:" if skipped else ":material/playlist_add:",
                on_click=toggle_skip,
            )
    return state.chosen_head(run)


def _layer_note(run: Capture, layer: int) -> str:
    if run.layer_kinds[layer] == "sliding":
        return "This layer has a sliding window: it is never compressed."
    if layer == 0:
        return "In layer 0 a key's norm depends on the token alone, not on what came before it."
    return ""


def _numbers(run: Capture, numbers: HeadFigures, layer: int, head: int, leave_out: int) -> None:
    without = state.figures_of(run, 1).gamma[layer, head]
    shown = {
        "Γ": (signed(numbers.gamma[layer, head]), "−1 the paper's claim, 0 chance, +1 the opposite"),
        "Γ without the first": (signed(without), "the same, with the first token left out"),
        "ALR": (f"{numbers.alr[layer, head]:.1f}", f"the paper's sum, of n = {run.n_tokens - leave_out} tokens"),
        "ALR / n": (f"{numbers.alr_per_token[layer, head]:.3f}", "comparable between texts, 0 to 1"),
        "ALR / chance": (f"{numbers.alr_against_chance[layer, head]:.2f}", "0 ideal, 1 as dice, 2 the worst order"),
        "Spearman ρ": (signed(numbers.spearman[layer, head]), "norm against attention received, all queries"),
        "Pearson r": (signed(numbers.pearson[layer, head]), "the same, linear"),
        "Share of the first": (f"{numbers.sink_share[layer, head]:.0%}", "of the next token's attention"),
    }
    with st.container(horizontal=True):
        for name, (value, help_text) in shown.items():
            st.metric(name, value.replace("nan", "undefined"), help=help_text, width="content")


def _losses(run: Capture, layer: int, head: int, leave_out: int, keep_ratio: float) -> None:
    loss = attention_loss(run, layer, head, leave_out=leave_out)
    curves = {
        "low norm kept": loss.low_norm,
        "high norm kept": loss.high_norm,
        "ideal": loss.ideal,
        "chance": loss.chance,
    }
    dropped = np.linspace(0, 1, len(loss.ideal))
    show(
        figures.loss_curves(dropped, curves, keep_ratio=keep_ratio),
        key="losses",
        alt="Attention lost by share of tokens evicted",
        caption="The share of the next token's attention that is lost when tokens are evicted, in three orders and at "
        "random; nothing protected. The area between *low norm kept* and *ideal* is the ALR. A curve above *chance* is "
        "worse than dice.",
        table={"evicted": dropped, **curves},
    )


def _pooled(run: Capture, layer: int, head: int, leave_out: int) -> None:
    pooled = run.pooled(layer, head)
    if leave_out:
        pooled[:, 0] = np.nan  # the bin that holds the first token: what is left gets the colours
    show(
        figures.pooled_map(pooled, tokens_per_bin=run.tokens_per_bin, n_tokens=run.n_tokens),
        key="pooled",
        alt="Attention map, pooled",
        caption=f"Who looks where: each row is {run.tokens_per_bin} queries, each column as many keys, "
        "the first at the top left. A bright first column is a sink, a bright diagonal is recency. Of all queries"
        + (", the first column left out." if leave_out else "."),
    )
