"""The lower half of the page Heads: one head, its queries, its tokens, and what eviction would lose."""

from __future__ import annotations

import numpy as np
import streamlit as st

from analysis.captures import Capture
from analysis.measures import attention_loss, kept_tokens
from analysis.metrics import HeadValues
from analysis.selftest import is_synthetic
from analysis.verdicts import meanings
from analysis.words import signed
from app import figures, session
from app.components import controls, markup
from app.components.charts import show
from l2kv.spec import CompressionSpec, share


def one_head(run: Capture, values: HeadValues, skip_first: int, probe: str) -> None:
    """Draw the open head: `values` are of the probe that is chosen, the plots say what each is of."""
    layer, head = _choose(run)
    verdict = str(session.verdicts_of(run, probe)[layer, head])
    st.subheader(f"Layer {layer}, head {head}: {verdict}")
    whose = {"last queries": f"the last {len(run.recent_positions)} queries", "all queries": "all queries"}
    st.caption(
        f"By {whose.get(probe, 'the next token')}: {markup.plain(meanings(1)[verdict])}. It reads kv head "
        f"{run.kv_head(head)}. {_layer_note(run, layer)}"
    )
    _numbers(run, values, layer, head, skip_first, probe)
    _queries(run, layer, head, skip_first)

    labels = [markup.visible(label) for label in run.labels]
    norm = run.key_norm[layer, run.kv_head(head)]
    with st.container(horizontal=True, vertical_alignment="bottom"):
        controls.ratio_input()
        rule = st.segmented_control(
            "Keep the keys of", ["low norm", "high norm"], default="low norm", required=True, key="strip_rule",
            persist_state="session",
        )  # fmt: skip
        controls.protect_last_input()
    shared = controls.current_spec()
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
        + f", and lose **{row[~kept].sum():.1%}** of the next token's attention. {1 - row.sum():z.1%} of it goes to "
        "that token itself."
    )
    st.html(markup.token_strip(run.labels, kept.tolist()))
    st.caption(
        "The text as this head would keep it if it were compressed once, now: solid tokens stay, hollow ones go. "
        "· is a space, ⏎ a line end. The latest tokens are protected as set above."
    )

    shown = slice(skip_first, None)
    show(
        figures.norm_and_attention(
            norm[shown],
            run.probe_attention[layer, head][shown],
            labels[shown],
            kept=kept[shown],
            attention_label="attention of the next token",
            first_position=skip_first,
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
        rho = session.values_of(run, skip_first, "all queries").of("spearman")[layer, head]
        show(
            figures.norm_attention_scatter(
                norm[shown],
                run.attention_received[layer, head][shown],
                labels[shown],
                rho=None if np.isnan(rho) else float(rho),
                n=run.n_tokens - skip_first,
                first_position=skip_first,
            ),
            key="scatter",
            alt="Scatter of key norm and attention received",
            caption="Each token by key norm and by the attention it receives, the mean over all queries that see it "
            "(log scale). A slope down to the right is the paper's claim. No p-value: tokens are not independent.",
        )
        _losses(run, layer, head, skip_first, spec)
    with right:
        _pooled(run, layer, head, skip_first)


def _choose(run: Capture) -> tuple[int, int]:
    """The open head, and the ways to another one without a mouse on the map."""
    session.chosen_head(run)

    def step(by: int) -> None:
        layer, head = session.chosen_head(run)
        session.choose_head(*divmod((layer * run.n_heads + head + by) % (run.n_layers * run.n_heads), run.n_heads))

    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.number_input("Layer", 0, run.n_layers - 1, key="layer", persist_state="session", width=130)
        st.number_input("Head", 0, run.n_heads - 1, key="head", persist_state="session", width=130)
        st.button("Previous head", icon=":material/chevron_left:", on_click=step, args=(-1,))
        st.button("Next head", icon=":material/chevron_right:", on_click=step, args=(1,))
        layer = session.LAYER.get()
        skipped = layer in session.SKIP_LAYERS.get()

        def toggle_skip() -> None:
            session.SKIP_LAYERS.set(sorted(set(session.SKIP_LAYERS.get()) ^ {layer}))

        if run.layer_kinds[layer] == "full":
            st.button(
                f"Compress layer {layer} again" if skipped else f"Add layer {layer} to the skip list",
                icon=":material/playlist_remove:" if skipped else ":material/playlist_add:",
                on_click=toggle_skip,
            )
    return session.chosen_head(run)


def _layer_note(run: Capture, layer: int) -> str:
    if run.layer_kinds[layer] == "sliding":
        return "This layer has a sliding window: it is never compressed."
    if layer == 0 and not is_synthetic(run):
        return "In layer 0 a key's norm depends on the token alone, not on what came before it."
    return ""


def _numbers(run: Capture, values: HeadValues, layer: int, head: int, skip_first: int, probe: str) -> None:
    number = {name: values.of(name)[layer, head] for name in values.names}
    group_alr = session.kv_alr_of(run, skip_first, probe)[layer, run.kv_head(head)]
    n = run.n_tokens - skip_first
    ranked = f"{n - len(run.recent_positions)} to {n - 1}" if probe == "last queries" else n
    shown = {
        "Γ": (signed(number["gamma"]), "−1 the paper's claim, 0 chance, +1 the opposite"),
        "Γ without the first": (
            signed(number["gamma_skip_first"]),
            "the same, with the first token left out; undefined where the others get less than 1 % of the attention, "
            "or have no order",
        ),
        "ALR": (f"{number['alr']:z.1f}", f"the paper's sum, of n = {ranked} tokens"),
        "ALR of its kv head": (
            f"{group_alr:z.1f}",
            f"of the mean attention of the {run.n_heads // run.n_kv_heads} query heads that read it, since a key is "
            "evicted for all of them at once; not the mean of their ALRs",
        ),
        "ALR / n": (f"{number['alr_per_token']:z.3f}", "comparable between texts, 0 to 1"),
        "Normalised ALR": (f"{number['normalised_alr']:z.2f}", "0 ideal, 1 random, 2 reversed"),
        "Spearman ρ": (signed(number["spearman"]), "norm against that attention, by rank"),
        "Pearson r": (signed(number["pearson"]), "the same, linear"),
        "Share of the first": (f"{number['sink_share']:.0%}", "of that attention"),
    }
    with st.container(horizontal=True):
        for name, (value, help_text) in shown.items():
            st.metric(name, value.replace("nan", "undefined"), help=help_text, width="content")
    st.caption(
        "Of all tokens: nothing is protected in these figures and in the verdict, as in the paper. What is lost with "
        "the latest tokens protected is told below."
    )


def _queries(run: Capture, layer: int, head: int, skip_first: int) -> None:
    positions = run.recent_positions
    if not positions:
        st.caption("The run on screen keeps no last queries. Capture the text again to see how queries differ.")
        return
    gamma = session.gamma_by_query(run, skip_first)[:, layer, head]
    next_token = float(session.values_of(run, skip_first).of("gamma")[layer, head])
    labels = [markup.visible(run.labels[position]) for position in positions]
    show(
        figures.gamma_by_query(
            gamma, labels, first_position=positions[0], next_token=next_token,
            next_label=markup.visible(run.probe_label),
        ),
        key="by_query",
        alt=f"Γ of each of the last queries, layer {layer}, head {head}",
        caption=f"One query is an anecdote: Γ of each of the last {len(positions)} queries over the tokens before it, "
        "and of the next token. Where the dots lie on both sides of 0, the sign is the query's, not the head's.",
        table={
            "position": [*positions, run.n_tokens],
            "token": [*labels, markup.visible(run.probe_label)],
            "Γ": [*gamma, next_token],
        },
    )  # fmt: skip


def _losses(run: Capture, layer: int, head: int, skip_first: int, spec: CompressionSpec) -> None:
    """With the tokens protected that are protected above, so that one number is told of one thing."""
    loss = attention_loss(run, layer, head, skip_first=skip_first, protect_last=spec.protect_last)
    curves = {
        "keep low norm": loss.low_norm,
        "keep high norm": loss.high_norm,
        "ideal order": loss.ideal,
        "random order": loss.chance,
    }
    dropped = np.arange(len(loss.ideal)) / max(run.n_tokens - skip_first, 1)
    protected = (
        f"the last {spec.protect_last} are protected, as set above, and are never evicted. With nothing protected the "
        "area between *keep low norm* and *ideal order* is the ALR."
        if spec.protect_last
        else "nothing is protected, as in the paper. The area between *keep low norm* and *ideal order* is the ALR."
    )
    show(
        figures.loss_curves(dropped, curves, keep_ratio=spec.keep_ratio),
        key="losses",
        alt="Attention lost by share of tokens evicted",
        caption="The share of the next token's attention that is lost when tokens are evicted, in three orders and at "
        f"random; {protected} A curve above *random order* is worse than chance.",
        table={"evicted": dropped} | {f"lost, {name}": lost for name, lost in curves.items()},
    )


def _pooled(run: Capture, layer: int, head: int, skip_first: int) -> None:
    pooled = run.pooled(layer, head)
    if skip_first:
        pooled[:, 0] = np.nan  # the bin that holds the first token: what is left gets the colours
    show(
        figures.pooled_map(pooled, tokens_per_bin=run.tokens_per_bin, n_tokens=run.n_tokens),
        key="pooled",
        alt="Attention map, pooled",
        caption=f"Who looks where: each row is {run.tokens_per_bin} queries, each column as many keys, "
        "the first at the top left. A bright first column is a sink, a bright diagonal is recency. Of all queries"
        + (", the first column left out." if skip_first else "."),
    )
