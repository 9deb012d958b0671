"""Generate: the full cache and a compressed one, side by side, token by token."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import streamlit as st

from analysis.errors import UserError
from analysis.memory import human_bytes
from analysis.presets import presets
from analysis.tokens import tokenize
from app import figures, markup, state
from app.charts import show
from app.engine import Engine, allowed_models, check_allowed
from l2kv.spec import CompressionSpec

if TYPE_CHECKING:
    from streamlit.delta_generator import DeltaGenerator

    from analysis.generation import Step

_PROMPT_TAIL = 160  # characters of the prompt shown before what was generated


@dataclass(slots=True)
class Preview:
    """What is on screen: grows token by token, and outlives the run."""

    prompt: str
    spec: CompressionSpec
    full: Step | None = None
    compressed: Step | None = None
    same: int | None = None  # tokens and characters that both share, once they differ
    same_text: int | None = None
    done: bool = False

    def add(self, full: Step, compressed: Step) -> None:
        """Take the state after one more token."""
        before = self.full
        self.full, self.compressed = full, compressed
        if self.same is None and full.token_ids != compressed.token_ids[: len(full.token_ids)]:
            self.same = len(before.token_ids) if before else 0
            self.same_text = len(before.text) if before else 0


def page(engine: Engine) -> None:
    """Draw the page."""
    run = state.current_run()
    st.header("What does compression change in the text?")
    st.markdown(
        "The same prompt, decoded greedily over the full cache and over a compressed one. The prompt is compressed "
        "before its last token is read, so the first new token already pays the price."
    )
    left, right = st.columns([3, 2], gap="large")
    with left:
        prompt = _prompt_input()
        length = st.empty()
    with right:
        ref = _model_input(engine)
        with st.container(horizontal=True, vertical_alignment="bottom"):
            state.ratio_input()
            state.policy_input()
        with st.container(horizontal=True, vertical_alignment="bottom"):
            state.protect_last_input()
            state.prune_after_input()
            st.number_input("New tokens", 1, 1024, 48, 16, key="new_tokens", persist_state="session")
        state.skip_layers_input(run)

    _positions(length, engine, ref, prompt)
    buttons = st.container(horizontal=True, vertical_alignment="center")
    started = buttons.button("Generate", type="primary", icon=":material/play_arrow:")
    boxes = st.container()
    if started:
        cancel = buttons.empty()
        cancel.button("Cancel", icon=":material/cancel:")  # any click ends this script at its next st.* call
        _generate(engine, ref, prompt, boxes)
        cancel.empty()
    elif preview := st.session_state.get("generated"):
        if not preview.done:
            st.info("Cancelled: what was generated until then is kept.", icon=":material/cancel:")
        with boxes:
            if (preview.prompt, preview.spec) != (prompt, state.current_spec()):
                st.info("This is of earlier settings. Press *Generate* to see the new ones.", icon=":material/history:")
            _draw(_columns(preview), preview)
            _summary(preview)
    else:
        boxes.info("Press *Generate*. The two texts appear here, token by token.", icon=":material/info:")


def _prompt_input() -> str:
    by_name = {preset.name: preset for preset in presets()}

    def take() -> None:
        preset = by_name[st.session_state["prompt_preset"]]
        st.session_state["prompt"] = preset.text
        if preset.spec is not None:
            state.take_spec(preset.spec)

    st.session_state.setdefault("prompt", next(iter(by_name.values())).text)
    chosen = st.selectbox("Start from", list(by_name), key="prompt_preset", persist_state="session", on_change=take)
    if by_name[chosen].why:
        st.caption(markup.plain(by_name[chosen].why))
    return st.text_area("Prompt", key="prompt", persist_state="session", height=250, max_chars=200_000)


def _positions(place: DeltaGenerator, engine: Engine, ref: str, prompt: str) -> None:
    """How long it will get, and whether the model was trained for that."""
    if not prompt.strip() or not (found := engine.tokenizer_and_config(ref)):
        return
    tokenizer, config = found
    try:
        n = len(tokenize(tokenizer, prompt))
    except UserError as error:
        place.warning(markup.plain(str(error)), icon=":material/warning:")
        return
    new, limit = int(st.session_state["new_tokens"]), getattr(config, "max_position_embeddings", None)
    of = f" of the {limit:,} positions that the model was trained on" if limit else ""
    if limit and n + new > limit:
        place.warning(
            f"{n} + {new} new tokens are more than the {limit:,} that the model was trained on: expect it to fail."
        )
    else:
        place.caption(f"{n} + {new} new tokens{of}.")


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


def _generate(engine: Engine, ref: str, prompt: str, boxes: DeltaGenerator) -> None:
    from analysis.generation import stream

    preview = Preview(prompt, state.current_spec())
    with boxes:
        note = st.empty()
        try:
            with engine.turn(
                check_allowed(ref),
                on_wait=lambda ahead: note.info(f"Waiting: {ahead} ahead of you"),
                on_load=lambda: note.info(f"Loading {markup.plain(ref)} …"),
            ) as loaded:
                note.empty()
                n_new, columns = int(st.session_state["new_tokens"]), None
                # Closed before the turn ends: the next session must find the model as it was.
                with closing(stream(loaded, prompt, [None, preview.spec], max_new_tokens=n_new)) as rows:
                    for full, compressed in rows:
                        preview.add(full, compressed)
                        st.session_state["generated"] = preview  # at every token: a click may end this here
                        columns = columns or _columns(preview)
                        _draw(columns, preview)
                preview.done = True
        except UserError as error:
            note.error(markup.plain(str(error)), icon=":material/error:")
            return
        except ValueError as error:  # a skip list that was made for another model
            note.error(markup.plain(str(error)), icon=":material/error:")
            return
        _summary(preview)


def _columns(preview: Preview) -> list[tuple[DeltaGenerator, DeltaGenerator]]:
    """For each cache a place for its text and one for its counters."""
    places = []
    policy = state.POLICY_NAMES[preview.spec.policy].split(" (")[0].lower()
    spec = preview.spec
    details = [f"{policy}", f"last {spec.protect_last} protected"]
    details += [f"layers {', '.join(map(str, spec.skip_layers))} whole"] * bool(spec.skip_layers)
    details += [f"from {spec.prune_after} tokens on"] * bool(spec.prune_after)
    titles = (":gray[**Full cache**]", f":primary[**{spec.keep_ratio:.0%} kept**, {', '.join(details)}]")
    for column, title in zip(st.columns(2, gap="large", border=True), titles, strict=True):
        with column:
            st.markdown(title)
            places.append((st.empty(), st.empty()))
    return places


def _draw(columns: list[tuple[DeltaGenerator, DeltaGenerator]], preview: Preview) -> None:
    tail = preview.prompt[-_PROMPT_TAIL:]
    if len(preview.prompt) > _PROMPT_TAIL:
        tail = "… " + tail.partition(" ")[2]
    share = preview.compressed.nbytes / preview.full.nbytes
    for (text, counters), step in zip(columns, (preview.full, preview.compressed), strict=True):
        text.html(markup.generated(tail, step.text, preview.same_text))
        seen, held = max(preview.full.held), step.held
        span = f"{min(held)} to {max(held)}" if min(held) != max(held) else f"{max(held)}"
        counters.markdown(
            f"**{span}** of {seen} tokens held per layer · **{human_bytes(step.nbytes)}** "
            + (f"({share:.0%} of the full cache)" if step is preview.compressed else "")
            + (f", and {human_bytes(step.slack_nbytes)} of slack for what comes" if step.slack_nbytes else "")
        )


def _summary(preview: Preview) -> None:
    full, compressed = preview.full, preview.compressed
    if full is None:
        return
    n = len(full.token_ids)
    if compressed.held == full.held:
        st.info("Nothing was evicted: with these settings the compressed cache holds every token.")
    elif preview.same is None:
        st.success(f"The same {n} tokens from {human_bytes(compressed.nbytes)} as from {human_bytes(full.nbytes)}.")
    else:
        st.warning(
            f"The first {preview.same} new tokens agree, then the texts differ (underlined). Greedy texts that part "
            "seldom meet again: read whether what follows is as good, not whether it is the same.",
            icon=":material/difference:",
        )
    show(
        figures.kept_by_layer(
            {"full cache": list(full.held), "compressed": list(compressed.held)}, seen=max(full.held)
        ),
        key="kept_by_layer",
        alt="Tokens held per layer",
        caption="Tokens held in each layer at the end, counted in the caches. Bytes are those of the keys and "
        "values held; slack is told apart. No tokens per second here: two caches decoded in turn give no fair time.",
        table={"layer": list(range(len(full.held))), "full cache": full.held, "compressed": compressed.held},
    )
