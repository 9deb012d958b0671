"""The eviction time machine, a section of Explore: record a generation, scrub through it, and ask "what if".

The strip is `app.components.timeline`. What was asked of a recording is kept in the workspace.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import streamlit as st

from analysis.demo.presets import Preset, presets
from analysis.errors import RecordError, UserError
from analysis.evaluation.prompts import can_chat
from analysis.texts.read import plain_text
from analysis.texts.tokens import about_tokens
from analysis.timelines import COMPRESSED, Timeline, WhatIf, timeline_bytes
from analysis.words import counted, duration, human_bytes, layers_listed
from app import address, header, library, state
from app.components import markup, timeline
from app.components.charts import page_is_dark, show
from app.engine import Engine
from app.figures import timeline as figures
from app.figures.style import literal
from app.jobs import Jobs
from l2kv.config import CacheShape, kv_heads_by_layer
from l2kv.spec import CompressionSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from analysis.models.load import LoadedModel
    from analysis.progress import Progress

_OWN = "My own text"
_FIELDS = ("record_prompt", "record_question", "record_continuation", "record_chat")
_MOST_LISTED = 8
_FURTHER_ROW = 0.4  # of the time of one row, what another takes in the same batch: SmolLM2 on a CPU
_STYLE = "<style>.st-key-shortlist button p { text-align: left; }</style>"


def draw(engine: Engine, jobs: Jobs) -> None:
    """Draw the section."""
    st.html(_STYLE)
    st.header("Eviction time machine")
    st.markdown(
        "Scrub through a generation: which tokens each head still holds, when it evicted the others, and what the "
        "continuation would have cost had they stayed."
    )
    entries = {entry.id: entry for entry in library.entries("timeline", model=state.model())}
    shown = state.TIMELINE.get() if state.TIMELINE.get() in entries else next(iter(entries), "")
    with st.container(horizontal=True, vertical_alignment="bottom"):
        if entries:
            chosen = st.selectbox(
                f"Recorded generations of {markup.plain(state.model())}, newest first",
                list(entries),
                index=list(entries).index(shown),
                format_func=lambda id: f"{entries[id].name}, {entries[id].about}",
                key=f"timeline_choice_{shown}",
            )
            if chosen != shown:
                state.TIMELINE.set(chosen)
                state.TOKENS.drop()
                st.rerun()
        if st.button(
            "Record a generation", icon=":material/fiber_manual_record:", type="secondary" if entries else "primary"
        ):
            _dialog(engine, jobs)
    if not entries:
        st.info("None is recorded yet for this model. A short one takes less than a minute.", icon=":material/history:")
        return
    try:
        recorded = library.opened(Timeline, shown)
    except RecordError as error:
        st.error(markup.plain(str(error)), icon=":material/error:")
        return
    _recording(shown, recorded, jobs)


@st.fragment(key="time_machine")
def _recording(id: str, recorded: Timeline, jobs: Jobs) -> None:
    state.TIMELINE.set(id)
    whose = "given" if recorded.given else "written by the model"
    st.caption(
        f"{header.in_words(recorded.spec)} · {counted(recorded.n_context, 'token')} of context, compressed once; "
        f"{counted(recorded.n_question, 'token')} read after that; {len(recorded.nats)} {whose}, "
        f"{recorded.nats.mean():.3f} nats/token. {_held_in_words(recorded)}"
    )
    timeline.strip(recorded, key=f"timeline_{id}", chosen=_chosen(recorded), on_choose=state.TOKENS.set)
    listed, detail = st.columns([2, 3], gap="large")
    with listed:
        _shortlist(id, recorded, jobs)
    with detail:
        _detail(id, recorded, jobs)
    address.write()


def _held_in_words(recorded: Timeline) -> str:
    """Say how much the compression of the context left, of which heads, and why it is more than the keep ratio."""
    spec, kv_heads = recorded.spec, counted(recorded.n_heads, "kv head")
    held = recorded.held(COMPRESSED).sum() / (recorded.n_heads * recorded.n_context)
    reasons = [f"{layers_listed(spec.skip_layers)} skipped, so whole"] * bool(spec.skip_layers)
    if (
        spec.budget is None
        and (protected := spec.protect_first + spec.protect_last) > spec.keep_ratio * recorded.n_context
    ):
        reasons.append(f"{counted(protected, 'token')} protected")
    why = f" ({', '.join(reasons)})" if reasons else ""
    return f"Compressed, {held:.0%} of the pairs of {kv_heads} are held{why}".replace("%", " %") + "."


def _chosen(recorded: Timeline) -> tuple[int, ...]:
    return tuple(token for token in state.TOKENS.get() if token < len(recorded.labels))


def _shortlist(id: str, recorded: Timeline, jobs: Jobs) -> None:
    st.markdown("**Worth asking about**")
    st.caption(
        "Tokens that some head paid much attention to while it held them, and that many heads evicted. A cheap "
        "shortlist: what the eviction cost is not measured until you ask."
    )
    listed = recorded.missed(_MOST_LISTED).tolist()
    most, all_heads = recorded.mean_attention.max(axis=0), counted(recorded.n_heads, "kv head")
    with st.container(gap=None, key="shortlist"):
        for token in listed:
            name = f"{token} “{markup.plain(markup.visible(recorded.labels[token]))}”"
            heads = int((recorded.evicted[:, token] != 0).sum())
            share = f"{100 * most[token]:.1f} %"
            told = f"evicted by {heads} of {all_heads}, up to {share} of a head's attention before"
            answer = _answer(id, (token,))
            measured = f"; had it stayed **{_change(answer)}** nats/token" if answer else ""
            st.button(
                f"**{name}**: {told}{measured}",
                key=f"missed_{token}",
                type="tertiary",
                on_click=state.TOKENS.set,
                args=((token,),),
            )
    open_ones = [(token,) for token in listed if _answer(id, (token,)) is None]
    if open_ones:
        took = duration(_seconds(recorded, len(open_ones)))
        if st.button(f"Ask for each of these (about {took})", icon=":material/history:", key="ask_all"):
            state.follow(_ask(jobs, id, open_ones))
            st.rerun()


def _detail(id: str, recorded: Timeline, jobs: Jobs) -> None:
    chosen = _chosen(recorded)
    if not chosen:
        st.markdown("**No token is chosen**")
        st.caption("Click one on the strip, or press Enter on it. With Ctrl or Shift more are chosen.")
        return
    token = chosen[0]
    names = ", ".join(f"{one} “{markup.plain(markup.visible(recorded.labels[one]))}”" for one in chosen[:4])
    st.markdown(f"**Token{'s' * (len(chosen) > 1)} {names}{' …' * (len(chosen) > 4)}**")
    gone = int((recorded.evicted[:, list(chosen)] != 0).sum())
    _what_if(id, recorded, chosen, gone, jobs)
    label = markup.visible(recorded.labels[token])
    show(
        figures.evictions_by_head(
            recorded.layers, recorded.heads, recorded.evicted_after(token),
            span=(recorded.n_context, len(recorded.labels)), dark=page_is_dark(),
        ),
        key="evictions_by_head",
        alt=f"Map of layers and kv heads: {int((recorded.evicted[:, token] == 0).sum())} of {recorded.n_heads} hold "
        f"token {token} to the end, the others evicted it.",
        caption=f"Heads that hold token {token} to the end (●) and those that evicted it (×), by the tokens read then.",
    )  # fmt: skip
    show(
        figures.attention_by_step(*recorded.history(token), n_heads=recorded.n_heads), key="attention_by_step",
        alt=f"Lines: mean attention to token {token} at each step, and the share of heads that hold it.",
        caption=f"Attention to “{markup.plain(label)}”, mean over all {counted(recorded.n_heads, 'kv head')}, without "
        "its own. The first point is that of the last 32 queries of the context.",
    )  # fmt: skip


def _what_if(id: str, recorded: Timeline, chosen: tuple[int, ...], gone: int, jobs: Jobs) -> None:
    """Ask for the counterfactual, or tell it."""
    answer = _answer(id, chosen)
    if answer is None:
        if not gone:
            st.caption("No head evicted it: nothing would be different.")
            return
        if st.button(
            "What if it had stayed?" if len(chosen) == 1 else "What if they had stayed?",
            type="primary",
            icon=":material/history:",
            help="The same continuation is predicted again, once as recorded and once with the chosen tokens pinned.",
        ):
            state.follow(_ask(jobs, id, [chosen]))
            st.rerun()
        took = duration(_seconds(recorded, 1))
        st.caption(f"About {took} at the pace of the recording; the context is read once for both.")
        return
    st.markdown(
        f"Had {'it' if len(chosen) == 1 else 'they'} stayed: **{_change(answer)} nats/token** "
        f"(perplexity × {answer.perplexity_ratio:.3f}), for {counted(answer.pairs, 'pair')} more in the cache."
    )
    labels = [literal(markup.visible(label)) for label in recorded.labels[-len(recorded.nats) :]]
    show(
        figures.nats_by_token(answer.without, answer.with_them, labels), key="what_if",
        alt="Lines: NLL of each token of the continuation, as recorded and with the chosen tokens pinned.",
        caption=f"NLL of the continuation, {counted(len(labels), 'token')}, n = 1 text.",
    )  # fmt: skip


def _seconds(recorded: Timeline, choices: int) -> float:
    """Time to ask `what_if` about so many choices, at the pace of the recording."""
    return recorded.context_seconds + recorded.seconds * (1 + _FURTHER_ROW * choices)


def _change(answer: WhatIf) -> str:
    return f"{answer.change:+.3f}".replace("-", "\N{MINUS SIGN}")


def _question(id: str, tokens: Sequence[int]) -> dict[str, object]:
    return {"what if they had stayed": sorted(tokens), "timeline": id}


def _answer(id: str, tokens: Sequence[int]) -> WhatIf | None:
    return library.WORKSPACE.answer(WhatIf, _question(id, tokens))


def _ask(jobs: Jobs, id: str, choices: Sequence[tuple[int, ...]]) -> str:
    """Start to measure what each choice of tokens would have changed, and return the job's id."""

    def work(loaded: LoadedModel, progress: Progress) -> str:
        from analysis.generations import what_if

        for answer in what_if(loaded, library.opened(Timeline, id), choices, progress=progress):
            library.WORKSPACE.keep(answer, _question(id, answer.pinned))
        return id

    return jobs.start("What if tokens had stayed", state.model_ref(), work, kind="timeline").id


@st.dialog("Record a generation", width="large", on_dismiss="rerun")
def _dialog(engine: Engine, jobs: Jobs) -> None:
    form(engine, jobs)


def form(engine: Engine, jobs: Jobs) -> None:
    """Ask for a prompt and what follows it, say what it takes, and start the recording."""
    st.markdown(
        f"**{markup.plain(state.model())}** reads the prompt, which is then compressed, and goes on from what is left."
    )
    offered = {preset.name: preset for preset in presets(state.model())}

    def take() -> None:
        if preset := offered.get(st.session_state["record_preset"]):
            st.session_state.update(zip(_FIELDS, (*preset.parts, preset.chat), strict=True))

    first = next(iter(offered.values()))
    for field, value in zip(_FIELDS, (*first.parts, first.chat), strict=True):
        st.session_state.setdefault(field, value)
    name = st.selectbox("Start from", [*offered, _OWN], key="record_preset", on_change=take)
    found = engine.tokenizer_and_config(state.model_ref())
    prompt = plain_text(st.text_area("Prompt", key="record_prompt", height=160, max_chars=200_000))
    chat = found is not None and can_chat(found[0]) and st.toggle("Put it as a chat message", key="record_chat")
    question = "" if chat else plain_text(st.text_input("Read after compression (optional)", key="record_question"))
    continuation = plain_text(
        st.text_input(
            "Continuation to predict (optional)",
            key="record_continuation",
            help="Its negative log-likelihood is measured. Without one, the model writes its own.",
        )
    )
    new_tokens = 1 if continuation else int(st.number_input("New tokens", 1, 1024, 48, 16, key="record_new_tokens"))
    spec = _spec_for(offered.get(name))
    if found is not None and prompt.strip():
        _tell_size(*found, prompt + question, continuation, new_tokens)
    if st.button(
        "Start", type="primary", icon=":material/play_arrow:", disabled=not prompt.strip(), key="record_start"
    ):
        title = name if name in offered else " ".join(prompt.split()[:6])

        def work(loaded: LoadedModel, progress: Progress) -> str:
            from analysis.generations import record_timeline, text_sample

            sample = text_sample(
                loaded, prompt, question=question, continuation=continuation, new_tokens=new_tokens, chat=chat
            )
            return library.WORKSPACE.add(record_timeline(loaded, sample, spec, progress=progress), name=title).id

        state.follow(jobs.start(f"Recording “{title}”", state.model_ref(), work, kind="timeline").id)
        state.TOKENS.drop()
        st.rerun()


def _spec_for(preset: Preset | None) -> CompressionSpec:
    """The compression in force, or that of the preset's story if it is another one and the user wants it."""
    spec = state.spec()
    if preset and preset.spec and preset.spec != spec:
        told = header.in_words(preset.spec)
        if st.checkbox(f"As this story was found: {told}", value=True, key=f"record_spec_{preset.name}"):
            return preset.spec
    st.caption(f"Compressed by the settings in the header: {header.in_words(spec)}.")
    return spec


def _tell_size(
    tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, text: str, continuation: str, new_tokens: int
) -> None:
    """Say how many tokens there will be, what the recording takes, and how long, by the pace of the last one."""
    try:
        read = about_tokens(tokenizer, text)
        written = about_tokens(tokenizer, continuation) if continuation else new_tokens
    except UserError as error:
        st.warning(markup.plain(str(error)), icon=":material/warning:")
        return
    shape = CacheShape.of(config, 4)
    heads = sum(kv_heads_by_layer(config, config.num_hidden_layers))
    size = human_bytes(timeline_bytes(heads, read + written))
    told = f"**{counted(read, 'token')}** and {written:,} more; the recording takes about {size}"
    told += f", the model's cache {human_bytes(shape.nbytes(read + written))}."
    last = next(iter(library.entries("timeline", model=state.model())), None)
    if last is not None:
        before = library.opened(Timeline, last.id)
        seconds = before.context_seconds * read / before.n_context + before.seconds * written / len(before.nats)
        told += f" About **{duration(seconds)}**, at the pace of the last one."
    st.markdown(told)
