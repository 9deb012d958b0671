"""Demo: show me. The full cache beside compressed ones, in step: recorded, live, or as a chat. The task is scored.

What is shown is a `Story`, whether it was recorded or is being told: its steps are scrubbed, played and presented
without a model.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import streamlit as st

from analysis.demo.presets import Preset, presets
from analysis.errors import ModelError, UserError
from analysis.evaluation.prompts import can_chat, prompt_tokens
from analysis.models.memory import DTYPES
from analysis.models.sizes import checkpoint_dtype
from analysis.sampling import GREEDY, Sampling
from analysis.stories import FULL, MOST_COUNTED, TIMED, Story, Told, name_of
from analysis.texts.read import plain_text
from analysis.words import counted
from app import header, library, state
from app.components import choices, markup, player, stage, uploads
from app.engine import Engine
from app.jobs import Jobs
from l2kv.errors import SpecError
from l2kv.spec import CompressionSpec

if TYPE_CHECKING:
    from streamlit.delta_generator import DeltaGenerator
    from transformers import PretrainedConfig

    from analysis.demo.telling import Chat
    from analysis.models.load import LoadedModel
    from analysis.progress import Progress

RECORDED, LIVE, CHAT = "Recorded", "Live", "Chat"
OWN = "My own text"
MODE = state.Slot("demo_mode", RECORDED, state.Param("demo", state.one_of((RECORDED, LIVE, CHAT))))
BESIDE = state.Slot("demo_beside", "", state.Param("beside", state.one_of(("", *choices.policies()))))
"""Policy of a second compressed cache; empty: there is none."""
BESIDE_RATIO = state.Slot(
    "demo_beside_ratio", 0.5, state.Param("beside_keep", state.within(0.05, 1, float), "{:g}".format)
)
TOLD = state.Slot[Story | None]("demo_told", None)
"""The latest story that was told live, which grows while it is."""
TOLD_ID = state.Slot("demo_told_id", "", state.Param("told", str))
"""The same, once it is kept: a reload begins with it."""
TALK: state.Slot[Chat | None] = state.Slot("demo_talk", None)
ASKED = state.Slot("demo_asked", ("", 0))
"""The latest message of the chat, and the number of turns before it: with no more of them it was not answered."""
FAILED = state.Slot("demo_failed", "")
"""Why a run failed, to be said once."""
_MOST_CHARACTERS = 400_000  # of a prompt or a message
_MOST_QUOTED = 80  # characters of a message
_CHAT_FROM = 128  # tokens: of a question alone the recent window leaves nothing to choose


@dataclass(frozen=True, slots=True)
class Run:
    """How caches are to be run."""

    new_tokens: int
    sampling: Sampling
    specs: Mapping[str, CompressionSpec]
    """The compressed ones, by name."""


def draw(engine: Engine, jobs: Jobs) -> None:
    """Draw the page."""
    with st.container(horizontal=True, vertical_alignment="center"):
        st.title("Show me", width="content")
        mode = st.segmented_control(
            "What to show", [RECORDED, LIVE, CHAT], required=True, label_visibility="collapsed", **MODE.widget(),
        )  # fmt: skip
    {RECORDED: _recorded, LIVE: _live, CHAT: _chat}[mode or RECORDED](engine, jobs)


def _recorded(engine: Engine, jobs: Jobs) -> None:
    stories = sorted(library.entries("story", model=state.model()), key=lambda entry: not library.is_bundled(entry.id))
    entries = {entry.id: entry for entry in stories}
    if not entries:
        st.info(
            f"No story of {markup.plain(state.model())} is recorded yet: tell one under *{LIVE}*, and it is kept.",
            icon=":material/movie:",
        )
        return
    if state.STORY.get() not in entries:
        state.STORY.set(next(iter(entries)))
    with st.container(horizontal=True, vertical_alignment="bottom"):
        id = st.selectbox(
            "Story", list(entries), format_func=lambda id: f"{entries[id].name} · {entries[id].about}",
            **state.STORY.widget(),
        )  # fmt: skip
        if not library.is_bundled(id) and st.button("Delete", icon=":material/delete:", key="delete_story"):
            library.WORKSPACE.delete(id)
            state.STORY.drop()
            st.rerun()
    story = library.opened(Story, id)
    _player(story, jobs=jobs, at_its_end=False, note=_over_many(story))


def _over_many(story: Story) -> str:
    """Say what the first compression of a story finds over many passkeys, as Verdict has it; empty if not measured."""
    if (spec := story.caches[1].spec) is None or not story.answer:
        return ""
    for where, measured in (("", spec), (" in every layer", replace(spec, skip_layers=()))):
        decision = library.decision(library.evidence(story.model), measured, state.limits())
        passkeys = decision.checks[1]
        if passkeys.short:
            found = f"Of many passkeys {name_of(measured)}{where}, finds {passkeys.short}."
            return f"This is one prompt. {found} The page Verdict says {decision.answer}."
    return ""


def _player(*turns: Story, jobs: Jobs | None = None, at_its_end: bool, note: str = "") -> None:
    """Draw a story, or the last turn of a chat, so that it can be played and presented, and offer a report of it all.

    With `jobs` its caches can be timed.
    """
    story = turns[-1]
    if not story.ended:
        st.caption(":material/cancel: Cancelled: what was written until then is kept.")
    player.player(story, at_its_end=at_its_end, note=note)
    st.caption(
        f"{story.sampling.told()} Bytes are of the keys and values held, counted, in {story.dtype}, the checkpoint's "
        "dtype."
    )
    with st.container(horizontal=True, vertical_alignment="center"):
        _report(turns)
        if jobs is None:
            return
        if st.button(
            "Time each cache alone", icon=":material/timer:", key="time_story",
            help="Decodes with one cache at a time: caches decoded in turn give no fair rate.",
        ):  # fmt: skip
            _time(story, jobs)
        if run := state.run():
            pace = library.pace(run.model, run)
            takes = pace.told(pace.generations(len(story.caches), story.at(0, 0).seen, TIMED))
            st.caption(f"It takes {takes}; loading the model and other work add to it.", width="content")


def _report(turns: Sequence[Story]) -> None:
    from app.report.story import report

    st.download_button(
        "Download report", lambda: report(*turns).encode(), "story.html", "text/html", icon=":material/download:",
        on_click="ignore", key="story_report", help="One page: the text, scores, bytes and code. It needs no network.",
    )  # fmt: skip


def _time(story: Story, jobs: Jobs) -> None:
    """Start a job that times each cache of a story and keeps it with the rates."""

    def work(loaded: LoadedModel, progress: Progress) -> str:
        from analysis.demo.telling import timed

        return library.WORKSPACE.add(timed(loaded, story, progress=progress), name=f"{story.name}, timed").id

    state.follow(jobs.start("Timing each cache alone", state.model_ref(), work, kind="story").id)
    st.rerun()


def _specs(prune_after: int) -> dict[str, CompressionSpec]:
    """The compressed caches by name: that of the header, and one beside it with the same protection."""
    specs = [state.spec()]
    if BESIDE.get():
        specs.append(replace(state.uniform_spec(), policy=BESIDE.get(), keep_ratio=round(BESIDE_RATIO.get(), 2)))
    return {name_of(spec): replace(spec, prune_after=prune_after) for spec in specs}


def _ask_beside() -> None:
    offered = choices.policies()
    st.selectbox(
        "Beside it", ["", *offered], format_func=lambda name: offered[name].title if name else "Nothing",
        help="A second compressed cache, with the header's window and skipped layers.", **BESIDE.widget(),
    )  # fmt: skip
    if BESIDE.get():
        st.number_input("Its keep ratio", 0.05, 1.0, step=0.05, width=150, **BESIDE_RATIO.widget())


def _ask_run(key: str, *, prune_after: int) -> Run:
    """Ask how long, how tokens are drawn, and from which length on caches are compressed. Raises SettingsError."""
    for name, value in (("temperature", 0.0), ("top_p", 1.0), ("seed", 0)):
        st.session_state.setdefault(f"{key}_{name}", value)  # not the widget's own: a reload may begin with others
    with st.container(horizontal=True):
        new = st.number_input("New tokens", 1, 512, 48, 16, key=f"{key}_new", persist_state="session", width=120)
        temperature = st.number_input(
            "Temperature", 0.0, 2.0, step=0.1, key=f"{key}_temperature", help="0 takes the most probable token.",
            persist_state="session", width=120,
        )  # fmt: skip
        top_p = st.number_input("Top-p", 0.05, 1.0, step=0.05, key=f"{key}_top_p", persist_state="session", width=120)
        seed = st.number_input("Seed", 0, 2**31 - 1, key=f"{key}_seed", persist_state="session", width=120)
        start = st.number_input(
            "Compress from", 0, 100_000, prune_after, 64, key=f"{key}_from", persist_state="session", width=120,
            help="In tokens: a head that holds fewer evicts nothing.",
        )  # fmt: skip
    sampling = Sampling(temperature, top_p, int(seed)) if temperature else GREEDY
    return Run(int(new), sampling, _specs(int(start)))


def _live(engine: Engine, jobs: Jobs) -> None:
    _go_on_from_address()
    ref, shown = state.model_ref(), TOLD.get()
    begin = _presets()
    with st.container(horizontal=True, vertical_alignment="bottom"):
        name = st.selectbox(
            "Start from", [*begin, OWN], key="live_preset", persist_state="session", on_change=_take_preset,
            help="A task is offered for a model only where its full cache solves it.",
        )  # fmt: skip
        _ask_beside()
        started = st.button(
            "Start", type="primary", icon=":material/play_arrow:", key="tell_story",
            disabled=not plain_text(st.session_state["live_prompt"]).strip(),
        )  # fmt: skip
        place, about = st.empty(), st.empty()
    chosen = begin.get(name, Preset(OWN, ""))
    _offer_compression(chosen)
    told = st.empty()  # above the prompt, so in view; what it shows replaces all that it showed
    left, right = st.columns([3, 2])
    with left:
        preset, n_tokens = _ask_prompt(engine, ref, chosen)
    with right, st.expander("Length and sampling", icon=":material/casino:"):
        run = _ask_run("live", prune_after=0)
    if started:
        place.button("Cancel", icon=":material/cancel:", key="cancel_story")  # any click ends this script
        about.caption("A reload ends it, and forgets the prompt.", width="content")
        _tell(engine, preset, run, told)
        return
    if n_tokens and (config := engine.config(ref)):
        pace = library.pace(state.model(), config)
        seconds = pace.generations(1 + len(run.specs), n_tokens, run.new_tokens)
        about.caption(f"Takes {pace.told(seconds)}.", width="content")
    with told.container():
        _tell_failure()
        if shown is None or not shown.n_steps:
            return
        asked = (state.model(), preset.text, preset.answer, preset.chat, run.sampling, list(run.specs.values()))
        specs = [one.spec for one in shown.caches[1:]]
        if (shown.model, shown.prompt, shown.answer, shown.chat, shown.sampling, specs) != asked:
            st.caption(":material/history: This is of earlier settings. Press *Start* to see the new ones.")
        _player(shown, jobs=jobs, at_its_end=True)


def _go_on_from_address() -> None:
    """Begin with the story that the address names and its prompt, where this session has told none yet."""
    entry = library.find(TOLD_ID.get()) if TOLD.get() is None else None
    if entry is None or entry.model != state.model():
        return
    TOLD.set(story := library.opened(Story, entry.id))
    same = (one.name for one in presets(story.model) if (one.text, one.answer) == (story.prompt, story.answer))
    st.session_state.update(
        live_preset=next(same, OWN), live_prompt=story.prompt, live_answer=story.answer, live_chat=story.chat,
        live_temperature=story.sampling.temperature, live_top_p=story.sampling.top_p, live_seed=story.sampling.seed,
    )  # fmt: skip


def _presets() -> dict[str, Preset]:
    """Presets of the model on screen, by name, those with a task first; one of them, or one's own text, is chosen."""
    found = sorted(presets(state.model()), key=lambda preset: not preset.answer)
    by_name = {preset.name: preset for preset in found}
    if st.session_state.get("live_preset") not in (*by_name, OWN):  # at first, or of another model
        _begin_with(next(iter(by_name), OWN))
    return by_name


def _ask_prompt(engine: Engine, ref: str, chosen: Preset) -> tuple[Preset, int]:
    """Show the prompt that was chosen, to be edited, and return it and its number of tokens, 0 if that is not known."""

    def answer_edited() -> None:
        st.session_state["live_preset"] = OWN

    def prompt_edited() -> None:  # what was expected of another prompt says nothing of this one
        st.session_state.update(live_answer="", live_preset=OWN)

    def uploaded() -> None:
        if text := uploads.text_of(st.session_state["live_file"]):
            st.session_state.update(live_prompt=text, live_answer="", live_preset=OWN)

    with st.expander("Prompt", icon=":material/edit:", expanded=chosen.name == OWN):
        prompt = st.text_area(
            "Prompt", key="live_prompt", persist_state="session", height=180, max_chars=_MOST_CHARACTERS,
            on_change=prompt_edited,
        )  # fmt: skip
        answer = st.text_input(
            "Expected answer", key="live_answer", persist_state="session", on_change=answer_edited,
            placeholder="None: nothing is right or wrong",
            help="Digits are found where the first number written begins with them, words wherever they are written.",
        )  # fmt: skip
        st.file_uploader("Or upload a text", key="live_file", on_change=uploaded)
        uploads.show_refused()
        chat = _ask_template(engine, ref)
        why = chosen.why if chosen.spec in (None, state.spec()) else ""  # it was measured with that compression
        preset = Preset(chosen.name, plain_text(prompt), why, None, answer.strip(), chat)
        return preset, _length(engine, ref, preset)


def _take_preset() -> None:
    _begin_with(st.session_state["live_preset"])


def _begin_with(name: str) -> None:
    """Begin with a preset's text. The compression stays as it is: that of a preset is taken on a click only."""
    st.session_state["live_preset"] = name
    preset = next((one for one in presets(state.model()) if one.name == name), None)
    if preset is None:  # one's own text begins with what is there, of which nothing is expected
        st.session_state.setdefault("live_prompt", "")
        st.session_state["live_answer"] = ""
        return
    st.session_state.update(live_prompt=preset.text, live_answer=preset.answer, live_chat=preset.chat)


def _offer_compression(chosen: Preset) -> None:
    """Offer the compression that a preset was chosen with, where another one is in force."""
    if (spec := chosen.spec) is None or spec == state.spec():
        return

    def take() -> None:
        state.take_spec(spec)
        BESIDE.set(chosen.beside.policy if chosen.beside else "")
        BESIDE_RATIO.set(chosen.beside.keep_ratio if chosen.beside else BESIDE_RATIO.default)

    with st.container(horizontal=True, vertical_alignment="center"):
        st.caption(f"This task was chosen with {header.in_words(spec)}.", width="content")
        st.button("Use that", key="take_compression", on_click=take)


def _ask_template(engine: Engine, ref: str) -> bool:
    """Whether to ask through the chat template, where the model has one."""
    found = engine.tokenizer_and_config(ref)
    if found and not can_chat(found[0]):
        return False
    st.session_state["live_chat"] = st.session_state.get("live_chat", False)
    return st.toggle("Through the chat template", key="live_chat", persist_state="session")


def _length(engine: Engine, ref: str, preset: Preset) -> int:
    """Say how long the prompt is, and whether the model was trained for that; return the length, 0 if unknown."""
    if not preset.text.strip() or not (found := engine.tokenizer_and_config(ref)):
        return 0
    tokenizer, config = found
    try:
        tokens = prompt_tokens(tokenizer, preset.text, chat=preset.chat)
    except UserError as error:
        st.warning(markup.plain(str(error)), icon=":material/warning:")
        return 0
    _tell_length(len(tokens), config, tokens.notes)
    return len(tokens)


def _tell_length(n: int, config: PretrainedConfig, notes: Sequence[str]) -> None:
    limit = getattr(config, "max_position_embeddings", None) or 0
    if n > MOST_COUNTED:
        notes = (*notes, f"Which tokens are held is counted for up to {counted(MOST_COUNTED, 'token')}.")
    noted = " ".join(map(markup.plain, notes))
    if 0 < limit < n:
        st.warning(
            f"{counted(n, 'token')}, and the model was trained on {limit:,}: expect it to fail. {noted}",
            icon=":material/warning:",
        )
    else:
        st.caption(f"{counted(n, 'token')} of the {limit:,} that the model was trained on. {noted}")


def _tell(engine: Engine, preset: Preset, run: Run, place: DeltaGenerator) -> None:
    def telling(loaded: LoadedModel) -> Generator[Story, None, None]:
        from analysis.demo.telling import tell

        return tell(
            loaded, preset, run.specs, new_tokens=run.new_tokens, dtype=_dtype(state.model_ref()),
            sampling=run.sampling, progress=_shown_in(place),
        )  # fmt: skip

    TOLD.drop()
    TOLD_ID.drop()
    if story := _grow(engine, telling, place, TOLD.set):
        TOLD_ID.set(library.WORKSPACE.add(story, name=story.name).id)
        state.STORY.set(TOLD_ID.get())
    st.rerun()


def _grow(
    engine: Engine,
    telling: Callable[[LoadedModel], Generator[Story, None, None]],
    place: DeltaGenerator,
    keep: Callable[[Story], object],
) -> Story | None:
    """Generate in this script, so that it ends within a token when the tab is closed, and draw each token.

    Returns the story as it ended; where there is none, `FAILED` says why once the page is drawn again.
    """
    story = None
    try:
        # Closed before the turn ends: the next session must find the model as it was.
        with engine.lend(state.model_ref(), _shown_in(place)) as loaded, closing(telling(loaded)) as stories:
            for story in stories:
                keep(story)  # at every token: a click may end this here
                place.html(stage.STYLE + stage.stage(story, story.n_steps - 1))
    except (UserError, SpecError) as error:  # a SpecError: a skip list or a plan that was made for another model
        FAILED.set(str(error))
        return None
    return story


def _tell_failure() -> None:
    if why := FAILED.take():
        st.error(markup.plain(why), icon=":material/error:")


def _shown_in(place: DeltaGenerator) -> Progress:
    """Progress that is drawn in a place: the queue, the loading of the model, the reading of the prompt."""

    def tell(done: int, total: int, what: str) -> None:
        if total:
            place.progress(min(done / total, 1.0), f"Reading the prompt into each cache: {done} of {total} {what}")
        else:
            place.info(markup.plain(what), icon=":material/hourglass_empty:")

    return tell


def _dtype(ref: str) -> str:
    """Dtype that bytes are told in: the one chosen, or the checkpoint's where it names one."""
    try:
        named = state.CACHE_DTYPE.get() or checkpoint_dtype(ref) or ""
    except ModelError:
        return ""
    return named if named in DTYPES else ""


def _chat(engine: Engine, jobs: Jobs) -> None:
    ref = state.model_ref()
    found = engine.tokenizer_and_config(ref)
    if found and not can_chat(found[0]):
        st.info(
            f"{markup.plain(state.model())} has no chat template: it continues a text, and answers no questions. "
            f"Give it text under *{LIVE}*, or choose another model in the header.",
            icon=":material/forum:",
        )
        return
    with st.container(horizontal=True, vertical_alignment="bottom"):
        _ask_beside()
        if st.button("New chat", icon=":material/add_comment:", key="new_chat"):
            TALK.drop()
            ASKED.drop()
    left, right = st.columns([3, 2])
    with right, st.expander("Length and sampling", icon=":material/casino:"):
        run = _ask_run("chat", prune_after=_CHAT_FROM)
    start = next(iter(run.specs.values())).prune_after
    left.caption(
        "Each cache lives on between the turns: it keeps what it kept, and reads the new message alone. A reload of "
        "the page ends the chat. Compressed: "
        f"{header.in_words(state.spec())}" + (f", from {counted(start, 'token')} on." if start else ".")
    )
    talk = TALK.get()
    turns = talk.turns if talk else ()
    of_another = bool(turns) and turns[0].model != state.model()
    if talk and turns and (of_another or talk.specs != run.specs):
        st.caption(":material/history: This chat has earlier settings. *New chat* begins one with those of the header.")
    # Known before the input is drawn, which this script, as it answers, leaves disabled: another message would end it.
    message = st.session_state.get("chat_message")
    st.chat_input(
        "Ask it something", key="chat_message", max_chars=_MOST_CHARACTERS, disabled=of_another or bool(message)
    )  # fmt: skip
    for turn in turns if message else turns[:-1]:
        st.html(stage.STYLE + stage.stage(turn, turn.n_steps - 1, texts_only=True))
        if not turn.ended:
            st.caption(f":material/cancel: Cancelled after {counted(turn.n_steps, 'token')}.")
    if message:
        _say(engine, plain_text(message), run)
    _tell_failure()
    asked, before = ASKED.get()
    if asked and len(turns) <= before:
        anew = "" if turns else " It was not read to its end, so the chat begins anew."
        st.caption(f":material/cancel: Not answered: “{markup.plain(asked[:_MOST_QUOTED])}”.{anew}")
    if turns:
        _player(*turns, at_its_end=True)
        if found:
            tokenizer, config = found
            notes = prompt_tokens(tokenizer, turns[-1].prompt, chat=True).notes
            _tell_length(turns[-1].at(0, turns[-1].n_steps - 1).seen, config, notes)


def _say(engine: Engine, message: str, run: Run) -> None:
    """Answer a message; the chat keeps its caches, and no model."""
    from analysis.demo.telling import Chat

    talk, asked, place = TALK.get(), st.empty(), st.empty()
    st.button("Cancel", icon=":material/cancel:", key="cancel_chat")  # any click ends this script
    if talk is None or not talk.turns:
        TALK.set(talk := Chat(run.specs, dtype=_dtype(state.model_ref())))
    caches = (Told(FULL, None), *(Told(name, spec) for name, spec in talk.specs.items()))
    asked.html(stage.STYLE + stage.stage(Story(state.model(), "Chat", message, caches, chat=True), -1))
    ASKED.set((message, len(talk.turns)))

    def telling(loaded: LoadedModel) -> Generator[Story, None, None]:
        return talk.say(loaded, message, new_tokens=run.new_tokens, sampling=run.sampling, progress=_shown_in(place))

    _grow(engine, telling, place, lambda story: asked.empty())
    st.rerun()
