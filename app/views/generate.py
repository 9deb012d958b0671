"""Generate: the full cache and up to two compressed ones, side by side, token by token."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import streamlit as st

from analysis.errors import UserError
from analysis.memory import human_bytes
from analysis.plans.skip import Plan
from analysis.presets import presets
from analysis.run import Capture
from analysis.texts import plain_text
from analysis.tokens import tokenize
from app import figures, markup, state
from app.charts import show
from app.engine import Engine, allowed_models, check_allowed
from l2kv.spec import CompressionSpec

if TYPE_CHECKING:
    from streamlit.delta_generator import DeltaGenerator

    from analysis.generation import Step

_PLAN, _CONTROLS = "the plan", "the controls"
_PROMPT_TAIL = 160  # characters of the prompt shown before what was generated


@dataclass(frozen=True, slots=True)
class Column:
    """A compressed cache on the page."""

    name: str
    spec: CompressionSpec


@dataclass(slots=True)
class Parting:
    """What a compressed column's text shares with that of the full cache, once they differ."""

    tokens: int
    characters: int


@dataclass(slots=True)
class Preview:
    """What is on screen: grows token by token, and outlives the run."""

    prompt: str
    columns: tuple[Column, ...]
    full: Step | None = None
    compressed: tuple[Step, ...] = ()
    partings: list[Parting | None] = field(default_factory=list)  # of each column
    done: bool = False

    def __post_init__(self) -> None:
        self.partings = [None] * len(self.columns)

    def add(self, full: Step, *compressed: Step) -> None:
        """Take the state after one more token."""
        before = self.full
        self.full, self.compressed = full, compressed
        for i, step in enumerate(compressed):
            if self.partings[i] is None and full.token_ids != step.token_ids[: len(full.token_ids)]:
                self.partings[i] = Parting(len(before.token_ids), len(before.text)) if before else Parting(0, 0)

    def agreement(self, column: int) -> float:
        """The share of the full cache's new tokens that a column has at the same place."""
        pairs = zip(self.full.token_ids, self.compressed[column].token_ids, strict=False)
        return sum(one == other for one, other in pairs) / len(self.full.token_ids)


def page(engine: Engine) -> None:
    """Draw the page."""
    run = state.current_run()
    st.header("What does compression change in the text?")
    st.markdown(
        "The same prompt, decoded greedily over the full cache and over compressed ones. The prompt is compressed "
        "before its last token is read, so the first new token already pays the price."
    )
    left, right = st.columns([3, 2], gap="large")
    with left:
        prompt = _prompt_input()
        length = st.empty()
    with right:
        ref = _model_input(engine)
        columns = _columns_input(run, ref)
        st.number_input("New tokens", 1, 1024, 48, 16, key="new_tokens", persist_state="session")

    _positions(length, engine, ref, prompt)
    buttons = st.container(horizontal=True, vertical_alignment="center")
    started = buttons.button("Generate", type="primary", icon=":material/play_arrow:")
    boxes = st.container()
    if started:
        cancel = buttons.empty()
        # A click ends this script at its next st.* call: after a layer of the prompt, or a token.
        cancel.button("Cancel", icon=":material/cancel:",
                      on_click=lambda: st.session_state.update(generate_cancelled=True))  # fmt: skip
        _generate(engine, ref, Preview(prompt, columns), boxes)
        cancel.empty()
        return
    cancelled, preview = st.session_state.pop("generate_cancelled", False), st.session_state.get("generated")
    with boxes:
        if preview and not preview.done:
            st.info("Cancelled: what was generated until then is kept.", icon=":material/cancel:")
        elif cancelled:
            st.info("Cancelled while the prompt was read: nothing was generated.", icon=":material/cancel:")
        if not preview:
            st.info("Press *Generate*. The texts appear here, token by token.", icon=":material/info:")
            return
        if (preview.prompt, preview.columns) != (prompt, columns):
            st.info("This is of earlier settings. Press *Generate* to see the new ones.", icon=":material/history:")
        _draw(_places(preview), preview)
        _summary(preview)


def _columns_input(run: Capture, ref: str) -> tuple[Column, ...]:
    """The compressed caches to decode with: one, and another beside it."""
    plan = state.plan_in_use()
    if plan is not None:
        _plan_note(plan, ref)
    first_planned = plan is not None and _by_plan("Compress by", "first_by")
    if not first_planned:
        with st.container(horizontal=True, vertical_alignment="bottom"):
            state.ratio_input()
            state.policy_input()
    beside = st.toggle(
        "Beside it: a second compression", key="beside", persist_state="session",
        help="Decoded in step with the first, so that two ways to spend the same bytes can be read side by side.",
    )  # fmt: skip
    second_planned = (
        beside and plan is not None and not first_planned and _by_plan("Compress the second by", "second_by")
    )
    if beside and not second_planned:
        with st.container(horizontal=True, vertical_alignment="bottom"):
            state.ratio_input(second=True)
            state.policy_input(second=True)
    if beside or not first_planned:
        with st.container(horizontal=True, vertical_alignment="bottom"):
            state.protect_last_input()
            state.prune_after_input()
        state.skip_layers_input(run)
    first = Column("plan", plan.spec) if first_planned else Column("compressed", state.current_spec())
    if not beside:
        return (first,)
    second = Column("plan", plan.spec) if second_planned else Column("second", state.current_spec(second=True))
    return (first, second)


def _by_plan(label: str, key: str) -> bool:
    """Whether a column is to be compressed by the plan in use, or else by the controls."""
    st.session_state.setdefault(key, _PLAN)
    chosen = st.segmented_control(label, [_PLAN, _CONTROLS], required=True, key=key, persist_state="session")
    return chosen == _PLAN


def _plan_note(plan: Plan, ref: str) -> None:
    with st.container(border=True, horizontal=True, vertical_alignment="center"):
        note = f" ({markup.plain(plan.note)})" if plan.note else ""
        st.markdown(f"**Plan in use**: {state.in_words(plan.spec)}{note}. Made for {markup.plain(plan.model)}.")
        st.button("Drop it", icon=":material/close:", on_click=state.use_plan, args=(None,))
    if Path(ref).name != plan.model:
        st.warning(
            f"The plan was made for {markup.plain(plan.model)}, and {markup.plain(Path(ref).name)} is chosen: its "
            "layers and heads are others.",
            icon=":material/warning:",
        )


def _prompt_input() -> str:
    by_name = {preset.name: preset for preset in presets()}

    def take() -> None:
        preset = by_name[st.session_state["prompt_preset"]]
        st.session_state["prompt"] = preset.text
        if preset.spec is not None:
            st.session_state.setdefault("before_preset", state.current_spec())
            state.take_spec(preset.spec)
            st.session_state["first_by"] = _CONTROLS  # which now are the preset's
        elif before := st.session_state.pop("before_preset", None):
            state.take_spec(before)  # a preset's compression leaves with it

    st.session_state.setdefault("prompt", next(iter(by_name.values())).text)
    chosen = st.selectbox("Start from", list(by_name), key="prompt_preset", persist_state="session", on_change=take)
    if by_name[chosen].why:
        st.caption(markup.plain(by_name[chosen].why))
    return plain_text(st.text_area("Prompt", key="prompt", persist_state="session", height=250, max_chars=200_000))


def _positions(place: DeltaGenerator, engine: Engine, ref: str, prompt: str) -> None:
    """How long it will get, and whether the model was trained for that."""
    if not prompt.strip() or not (found := engine.tokenizer_and_config(ref)):
        return
    tokenizer, config = found
    try:
        tokens = tokenize(tokenizer, prompt)
    except UserError as error:
        place.warning(markup.plain(str(error)), icon=":material/warning:")
        return
    n = len(tokens)
    new, limit = int(st.session_state["new_tokens"]), getattr(config, "max_position_embeddings", None)
    of = f" of the {limit:,} positions that the model was trained on" if limit else ""
    if limit and n + new > limit:
        place.warning(
            f"{n} + {new} new tokens are more than the {limit:,} that the model was trained on: expect it to fail. "
            + " ".join(map(markup.plain, tokens.notes))
        )
    else:
        place.caption(" ".join([f"{n} + {new} new tokens{of}.", *map(markup.plain, tokens.notes)]))


def _model_input(engine: Engine) -> str:
    """The models at hand, and the one in memory, which may be from the hub."""
    resident = [engine.ref] if engine.ref else []
    return st.selectbox(
        "Model",
        list(dict.fromkeys([*resident, *allowed_models()])),
        key="generate_model",
        persist_state="session",
        help="Another model can be loaded on the page *Capture*.",
    )


def _generate(engine: Engine, ref: str, preview: Preview, boxes: DeltaGenerator) -> None:
    from analysis.generation import stream

    with boxes:
        note = st.empty()
        try:
            with engine.turn(
                check_allowed(ref),
                on_wait=lambda ahead: note.info(f"Waiting: {ahead} ahead of you"),
                on_load=lambda: note.info(f"Loading {markup.plain(ref)} …"),
            ) as loaded:
                note.empty()
                n_new, places = int(st.session_state["new_tokens"]), None
                specs = [None, *(column.spec for column in preview.columns)]
                # Closed before the turn ends: the next session must find the model as it was.
                bar = st.progress(0.0, "Reading the prompt …")

                def on_layer(done: int, total: int) -> None:
                    bar.progress(done / total, f"Reading the prompt: layer {done} of {total}")

                with closing(stream(loaded, preview.prompt, specs, max_new_tokens=n_new, on_layer=on_layer)) as rows:
                    for row in rows:
                        bar.empty()
                        preview.add(*row)
                        st.session_state["generated"] = preview  # at every token: a click may end this here
                        places = places or _places(preview)
                        _draw(places, preview)
                preview.done = True
        except UserError as error:
            note.error(markup.plain(str(error)), icon=":material/error:")
            return
        except ValueError as error:  # a skip list or a plan that was made for another model
            note.error(markup.plain(str(error)), icon=":material/error:")
            return
        _summary(preview)


def _places(preview: Preview) -> list[tuple[DeltaGenerator, DeltaGenerator]]:
    """For each cache a place for its text and one for its counters."""
    titles = [":gray[**Full cache**]"]
    for column in preview.columns:
        lead = f"{column.name.capitalize()}: " * (column.name == "plan" or len(preview.columns) > 1)
        titles.append(f":primary[{lead}{state.in_words(column.spec)}]")
    places = []
    beside = st.container(key="caches")
    for box, title in zip(beside.columns(len(titles), gap="medium", border=True), titles, strict=True):
        with box:
            st.markdown(title)
            places.append((st.empty(), st.empty()))
    return places


def _draw(places: list[tuple[DeltaGenerator, DeltaGenerator]], preview: Preview) -> None:
    tail = preview.prompt[-_PROMPT_TAIL:]
    if len(preview.prompt) > _PROMPT_TAIL:
        tail = "… " + tail.partition(" ")[2]
    seen, full = max(preview.full.held), preview.full.nbytes
    steps, partings = (preview.full, *preview.compressed), (None, *preview.partings)
    for (text, counters), step, parting in zip(places, steps, partings, strict=True):
        text.html(markup.generated(tail, step.text, parting.characters if parting else None))
        span = f"{min(step.held)} to {max(step.held)}" if min(step.held) != max(step.held) else f"{max(step.held)}"
        counters.markdown(
            f"**{span}** of {seen} tokens held per layer · **{human_bytes(step.nbytes)}** "
            + (f"({step.nbytes / full:.0%} of the full cache)" if step is not preview.full else "")
            + (f", and {human_bytes(step.slack_nbytes)} of slack for what comes" if step.slack_nbytes else "")
        )


def _summary(preview: Preview) -> None:
    if preview.full is None:
        return
    for i in range(len(preview.columns)):
        _agreement(preview, i)
    held = {"full cache": preview.full.held}
    held |= {column.name: step.held for column, step in zip(preview.columns, preview.compressed, strict=True)}
    show(
        figures.kept_by_layer({name: list(counts) for name, counts in held.items()}, seen=max(preview.full.held)),
        key="kept_by_layer",
        alt="Tokens held per layer",
        caption="Tokens held in each layer at the end, counted in the caches; where the heads of a layer differ, by "
        "the one that holds most. Bytes are those of the keys and values held; slack is told apart. No tokens per "
        "second here: caches decoded in turn give no fair time.",
        table={"layer": list(range(len(preview.full.held))), **held},
    )


def _agreement(preview: Preview, i: int) -> None:
    """In a sentence: whether a column's text is that of the full cache."""
    full, step, parting, n = preview.full, preview.compressed[i], preview.partings[i], len(preview.full.token_ids)
    which = "" if len(preview.columns) == 1 else f"**{preview.columns[i].name.capitalize()}**: "
    if step.nbytes == full.nbytes:
        st.info(f"{which}Nothing was evicted: with these settings the cache holds every token.")
    elif parting is None:
        st.success(f"{which}The same {n} tokens from {human_bytes(step.nbytes)} as from {human_bytes(full.nbytes)}.")
    else:
        st.warning(
            f"{which}The first {parting.tokens} new tokens agree, then the texts differ (underlined); "
            f"{preview.agreement(i):.0%} of all {n} are the same at the same place. Greedy texts that part seldom meet "
            "again: read whether what follows is as good, not whether it is the same.",
            icon=":material/difference:",
        )
