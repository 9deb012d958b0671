"""Generate: the full cache and up to two compressed ones, side by side, token by token.

Colour is for a preset's task, found or not found. Whether texts agree token by token is a footnote: a wrong answer may
agree, and a right one need not.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import streamlit as st

from analysis.captures import Capture
from analysis.demo.presets import Preset, presets
from analysis.errors import UserError
from analysis.evaluation.prompts import can_chat, decided, found, prompt_tokens
from analysis.models.memory import DTYPES
from analysis.plans.skip import Plan
from analysis.selftest import is_synthetic
from analysis.texts.read import plain_text
from analysis.words import human_bytes
from app import figures, session
from app.components import controls, markup, sources
from app.components.charts import show
from app.engine import Engine, allowed_models
from l2kv.errors import SpecError
from l2kv.spec import CompressionSpec

if TYPE_CHECKING:
    from streamlit.delta_generator import DeltaGenerator

    from analysis.preview import Step

OWN = "My own text"
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
    ref: str = ""  # the model
    answer: str = ""  # that is expected; empty: nothing is right or wrong
    chat: bool = False
    cache_dtype: str = ""  # that bytes are told in: the checkpoint's
    counted_dtype: str = ""  # that they were counted in
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

    @property
    def settings(self) -> tuple:
        """What it is of."""
        return self.prompt, self.columns, self.ref, self.chat

    @property
    def decided(self) -> bool:
        """Whether no more tokens are needed to score the task: of a chat the whole answer is worth reading."""
        texts = [step.text for step in (self.full, *self.compressed)]
        return bool(self.answer) and not self.chat and all(decided(self.answer, text) for text in texts)

    def nbytes(self, n: int) -> str:
        """Bytes that were counted, as they are in the checkpoint's dtype."""
        return human_bytes(n * DTYPES[self.cache_dtype] / DTYPES[self.counted_dtype])

    def seen(self, step: Step) -> int:
        """Tokens that a column has seen: one that has finished sees no more, and the others go on."""
        return max(self.full.held) - len(self.full.token_ids) + len(step.token_ids)

    def share(self, step: Step) -> float:
        """Bytes of a column as a share of those of the full cache when it had seen as many tokens."""
        return step.nbytes / (self.full.nbytes * self.seen(step) / self.seen(self.full))

    def agreement(self, column: int) -> float:
        """The share of the full cache's new tokens that a column has at the same place."""
        pairs = zip(self.full.token_ids, self.compressed[column].token_ids, strict=False)
        return sum(one == other for one, other in pairs) / len(self.full.token_ids)


def page(engine: Engine) -> None:
    """Draw the page."""
    run = session.current_run()
    st.header("What does compression change in the text?")
    st.markdown(
        "The same prompt, decoded greedily over the full cache and over compressed ones. The prompt is compressed "
        "before its last token is read, so the first new token already pays the price."
    )
    left, right = st.columns([3, 2], gap="large")
    with right:
        ref = _model_input(engine, run)
    with left:
        prompt, preset = _prompt_input(ref)
        chat = _chat_input(engine, ref)
        length = st.empty()
    with right:
        columns = _columns_input(run, ref)
        st.number_input("New tokens", 1, 1024, 48, 16, key="new_tokens", persist_state="session")

    if ref:
        _positions(length, engine, ref, prompt, chat=chat)
    wanted = Preview(prompt, columns, ref, preset.answer if preset else "", chat)
    buttons = st.container(horizontal=True, vertical_alignment="center")
    started = buttons.button("Generate", type="primary", icon=":material/play_arrow:")
    boxes = st.container()
    if started and not ref:
        boxes.error("Choose a model first.", icon=":material/error:")
    elif started:
        cancel = buttons.empty()
        # A click ends this script at its next st.* call: after a layer of the prompt, or a token.
        cancel.button("Cancel", icon=":material/cancel:",
                      on_click=lambda: st.session_state.update(generate_cancelled=True))  # fmt: skip
        _generate(engine, wanted, boxes)
        cancel.empty()
        return
    cancelled, preview = st.session_state.pop("generate_cancelled", False), session.GENERATED.get()
    with boxes:
        if preview and not preview.done:
            st.info("Cancelled: what was generated until then is kept.", icon=":material/cancel:")
        elif cancelled:
            st.info("Cancelled while the prompt was read: nothing was generated.", icon=":material/cancel:")
        if not preview:
            st.info("Press *Generate*. The texts appear here, token by token.", icon=":material/info:")
            return
        if preview.settings != wanted.settings:
            st.info("This is of earlier settings. Press *Generate* to see the new ones.", icon=":material/history:")
        _draw(_places(preview), preview)
        _summary(preview)


def _columns_input(run: Capture, ref: str) -> tuple[Column, ...]:
    """The compressed caches to decode with: one, and another beside it."""
    plan = session.plan_in_use()
    if plan is not None:
        _plan_note(plan, ref)
    first_planned = plan is not None and _by_plan("Compress by", session.FIRST_BY)
    if not first_planned:
        with st.container(horizontal=True, vertical_alignment="bottom"):
            controls.ratio_input()
            controls.policy_input()
    beside = st.toggle(
        "Beside it: a second compression", **session.BESIDE.widget(),
        help="Decoded in step with the first, so that two ways to spend the same bytes can be read side by side.",
    )  # fmt: skip
    second_planned = (
        beside and plan is not None and not first_planned and _by_plan("Compress the second by", session.SECOND_BY)
    )
    if beside and not second_planned:
        with st.container(horizontal=True, vertical_alignment="bottom"):
            controls.ratio_input(second=True)
            controls.policy_input(second=True)
    if beside or not first_planned:
        with st.container(horizontal=True, vertical_alignment="bottom"):
            controls.protect_last_input()
            controls.prune_after_input()
        controls.skip_layers_input(run)
    first = Column("plan", plan.spec) if first_planned else Column("compressed", controls.current_spec())
    if not beside:
        return (first,)
    second = Column("plan", plan.spec) if second_planned else Column("second", controls.current_spec(second=True))
    return (first, second)


def _by_plan(label: str, slot: session.Slot[str]) -> bool:
    """Whether a column is to be compressed by the plan in use, or else by the controls."""
    if not slot.held():
        slot.set(_PLAN)
    chosen = st.segmented_control(label, [_PLAN, _CONTROLS], required=True, **slot.widget())
    return chosen == _PLAN


def _plan_note(plan: Plan, ref: str) -> None:
    with st.container(border=True, horizontal=True, vertical_alignment="center"):
        note = f" ({markup.plain(plan.note)})" if plan.note else ""
        st.markdown(f"**Plan in use**: {controls.in_words(plan.spec)}{note}. Made for {markup.plain(plan.model)}.")
        st.button("Drop it", icon=":material/close:", on_click=session.use_plan, args=(None,))
    if sources.name_of(ref) != plan.model:
        st.warning(
            f"The plan was made for {markup.plain(plan.model)}, and {markup.plain(sources.name_of(ref))} is chosen: "
            "its layers and heads are others.",
            icon=":material/warning:",
        )


def _prompt_input(ref: str) -> tuple[str, Preset | None]:
    """The prompt, and the preset that it is, if it is one as it came: those that hold for the model are offered."""
    by_name = {preset.name: preset for preset in presets(sources.name_of(ref))}

    def take() -> None:
        if (name := st.session_state["prompt_preset"]) == OWN:
            return
        preset = by_name[name]
        st.session_state.update(prompt=preset.text, chat=preset.chat)
        if preset.spec is not None:
            st.session_state.setdefault("before_preset", controls.current_spec())
            controls.take_spec(preset.spec, beside=preset.beside)
            for slot in (session.FIRST_BY, session.SECOND_BY):
                slot.set(_CONTROLS)  # which now are the preset's
        elif before := st.session_state.pop("before_preset", None):
            controls.take_spec(before)  # a preset's compression leaves with it

    st.session_state.setdefault("prompt", next(iter(by_name.values())).text)
    named = next((name for name, preset in by_name.items() if preset.text == st.session_state["prompt"]), OWN)
    if st.session_state.get("prompt_preset", OWN) not in by_name:  # one of another model, or text of one's own
        st.session_state["prompt_preset"] = named
    chosen = st.selectbox("Start from", [*by_name, OWN], key="prompt_preset", persist_state="session", on_change=take)
    preset = by_name.get(chosen)
    if preset and preset.why:
        st.caption(markup.plain(preset.why))
    prompt = st.text_area(
        "Prompt", key="prompt", persist_state="session", height=250, max_chars=200_000,
        on_change=lambda: st.session_state.update(prompt_preset=OWN),
    )  # fmt: skip
    return plain_text(prompt), preset


def _chat_input(engine: Engine, ref: str) -> bool:
    """Whether to ask through the chat template, where the model has one."""
    if not ref or not (found := engine.tokenizer_and_config(ref)) or not can_chat(found[0]):
        return False
    st.session_state["chat"] = st.session_state.get("chat", False)  # as `session.Slot.widget` does
    return st.toggle(
        "Chat: ask it as a question", key="chat", persist_state="session",
        help="The prompt is put to the model as a user's message, through its own chat template, and the answer ends "
        "where the model ends its turn. Off: the model goes on with the text as it stands.",
    )  # fmt: skip


def _positions(place: DeltaGenerator, engine: Engine, ref: str, prompt: str, *, chat: bool) -> None:
    """How long it will get, and whether the model was trained for that."""
    if not prompt.strip() or not (found := engine.tokenizer_and_config(ref)):
        return
    tokenizer, config = found
    try:
        tokens = prompt_tokens(tokenizer, prompt, chat=chat)
    except UserError as error:
        place.warning(markup.plain(str(error)), icon=":material/warning:")
        return
    n = len(tokens)
    new, limit = int(st.session_state["new_tokens"]), getattr(config, "max_position_embeddings", None)
    of = f" of the {limit:,} positions that the model was trained on" if limit else ""
    if limit and n + new > limit:
        trained = f"more than the {limit:,} that the model was trained on: expect it to fail."
        place.warning(" ".join([f"{n} tokens and {new} new ones are {trained}", *map(markup.plain, tokens.notes)]))
    else:
        template = " with the chat template" if chat else ""
        length = f"{markup.counted(len(tokens), 'token')}{template}, and up to {new} new{of}."
        place.caption(" ".join([length, *map(markup.plain, tokens.notes)]))


def _model_input(engine: Engine, run: Capture) -> str:
    """The models at hand, and the one in memory, which may be from the hub; at first that of the run on screen.

    Empty if that is not at hand, and no other was chosen.
    """
    resident = [engine.ref] if engine.ref else []
    models = list(dict.fromkeys([*resident, *allowed_models()]))
    ref = models[0] if is_synthetic(run) else sources.ref_of(run.model, engine)
    if session.GENERATE_MODEL.get() not in models:
        session.GENERATE_MODEL.set(ref)
    chosen = st.selectbox(
        "Model",
        models,
        **session.GENERATE_MODEL.widget(),
        placeholder=f"{run.model} is not at hand: choose another",
        help="Another model can be loaded on the page *Capture*.",
    )
    return chosen or ""


def _generate(engine: Engine, preview: Preview, boxes: DeltaGenerator) -> None:
    from analysis.preview import stream

    with boxes:
        note = st.empty()
        try:
            with engine.lend(preview.ref, lambda done, total, what: note.info(markup.plain(what))) as loaded:
                note.empty()
                preview.counted_dtype = str(loaded.model.dtype).removeprefix("torch.")
                preview.cache_dtype = controls.dtype_of(preview.ref) or preview.counted_dtype
                n_new, places = int(st.session_state["new_tokens"]), None
                specs = [None, *(column.spec for column in preview.columns)]
                # Closed before the turn ends: the next session must find the model as it was.
                bar = st.progress(0.0, "Reading the prompt …")

                def on_layer(done: int, total: int, _: str) -> None:
                    layers = total // len(specs)
                    cache, layer = divmod(done - 1, layers)
                    whose = "the full cache" if cache == 0 else f"the {preview.columns[cache - 1].name} one"
                    bar.progress(done / total, f"Reading the prompt into {whose}: layer {layer + 1} of {layers}")

                rows = stream(loaded, preview.prompt, specs, max_new_tokens=n_new, chat=preview.chat, progress=on_layer)
                with closing(rows):
                    for row in rows:
                        bar.empty()
                        preview.add(*row)
                        session.GENERATED.set(preview)  # at every token: a click may end this here
                        places = places or _places(preview)
                        _draw(places, preview)
                        if preview.decided:
                            break
                preview.done = True
                if places:
                    _draw(places, preview)  # again: a task that was not decided now is
        except (UserError, SpecError) as error:  # a SpecError: a skip list or a plan that was made for another model
            note.error(markup.plain(str(error)), icon=":material/error:")
            return
        _summary(preview)


def _places(preview: Preview) -> list[tuple[DeltaGenerator, DeltaGenerator]]:
    """For each cache a place for its text and one for its counters."""
    titles = [":gray[**Full cache**]"]
    for column in preview.columns:
        lead = f"{column.name.capitalize()}: " * (column.name == "plan" or len(preview.columns) > 1)
        titles.append(f":primary[{lead}{controls.in_words(column.spec)}]")
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
    if preview.chat:
        tail += "\n"  # the answer does not go on with the question
    steps, partings = (preview.full, *preview.compressed), (None, *preview.partings)
    if preview.answer:  # which is scored: where the texts part is no mark of quality
        partings = (None,) * len(steps)
    for (text, counters), step, parting in zip(places, steps, partings, strict=True):
        text.html(markup.generated(tail, step.text, parting.characters if parting else None))
        span = f"{min(step.held)} to {max(step.held)}" if min(step.held) != max(step.held) else f"{max(step.held)}"
        counters.markdown(
            _badge(preview, step)
            + f"**{span}** of {preview.seen(step)} tokens held per layer · **{preview.nbytes(step.nbytes)}** "
            + (f"({preview.share(step):.0%} of the full cache)" if step is not preview.full else "")
            + (f", and {preview.nbytes(step.slack_nbytes)} of slack for what comes" if step.slack_nbytes else "")
            + (" · ended at once, without a word" if step.finished and not step.text else "")
        )


def _badge(preview: Preview, step: Step) -> str:
    """Markdown: whether a cache has given the answer, in colour, once that is decided."""
    if not preview.answer:
        return ""
    if found(preview.answer, step.text):
        return ":green-badge[:material/check: found] "
    if preview.done or step.finished or decided(preview.answer, step.text):
        return ":red-badge[:material/close: not found] "
    return ""


def _summary(preview: Preview) -> None:
    if preview.full is None:
        return
    if preview.answer:
        _scores(preview)
    for i in range(len(preview.columns)):
        _agreement(preview, i)
    if preview.full.finished and not preview.full.text and not preview.chat:
        st.caption("The model ended its text at once. If it is one that answers questions, turn *Chat* on.")
    for column, step in zip(preview.columns, preview.compressed, strict=True):
        protected = column.spec.protect_first + column.spec.protect_last
        if step.nbytes < preview.full.nbytes and min(step.held) <= protected:
            st.caption(
                f"**{column.name.capitalize()}**: the {min(step.held)} tokens held are the protected ones alone: the "
                "policy chose none of them. Take a longer prompt, keep more, or protect fewer."
            )
    held = {"full cache": preview.full.held}
    held |= {column.name: step.held for column, step in zip(preview.columns, preview.compressed, strict=True)}
    as_counted = "" if preview.cache_dtype == preview.counted_dtype else f", here in {preview.counted_dtype}"
    show(
        figures.kept_by_layer({name: list(counts) for name, counts in held.items()}, seen=max(preview.full.held)),
        key="kept_by_layer",
        alt="Tokens held per layer",
        caption="Tokens held in each layer at the end, counted in the caches; where the heads of a layer differ, by "
        f"the one that holds most. Bytes are those of the keys and values held, counted{as_counted}, and told in "
        f"{preview.cache_dtype}, the checkpoint's dtype; slack is told apart. No tokens per second here: caches "
        "decoded in turn give no fair time.",
        table={"layer": list(range(len(preview.full.held))), **held},
    )


def _scores(preview: Preview) -> None:
    """In a sentence each: whether the compressed caches give the expected answer, and from how many bytes."""
    answer, full = markup.plain(preview.answer), preview.full
    solved = found(preview.answer, full.text)
    if not solved and preview.done:
        st.markdown(
            f"The full cache does not give the answer **{answer}**, so this says nothing of compression: take a task "
            "that the model solves."
        )
    for column, step in zip(preview.columns, preview.compressed, strict=True):
        which = "" if len(preview.columns) == 1 else f"**{column.name.capitalize()}**: "
        bytes_told = f"{preview.nbytes(step.nbytes)} ({preview.share(step):.0%} of the full cache)"
        if found(preview.answer, step.text):
            st.success(f"{which}**{answer} found** from {bytes_told}.", icon=":material/check_circle:")
        elif solved and preview.done:
            st.error(f"{which}**{answer} not found** from {bytes_told}.", icon=":material/cancel:")


def _agreement(preview: Preview, i: int) -> None:
    """In a footnote: how far a column's text is that of the full cache. No colour: it is no measure of quality."""
    full, step, parting, n = preview.full, preview.compressed[i], preview.partings[i], len(preview.full.token_ids)
    which = "" if len(preview.columns) == 1 else f"**{preview.columns[i].name.capitalize()}**: "
    if step.nbytes == full.nbytes:
        st.caption(f"{which}Nothing was evicted: with these settings the cache holds every token.")
    elif parting is None:
        st.caption(f"{which}The same {markup.counted(n, 'token')} as with the full cache.")
    else:
        same = round(preview.agreement(i) * n)
        st.caption(
            f"{which}The texts differ from new token {parting.tokens + 1} on; {same} of {markup.counted(n, 'token')} "
            f"{'is' if same == 1 else 'are'} the same at the same place. Texts that part seldom meet again: read "
            "whether what follows is as good, not whether it is the same."
        )
