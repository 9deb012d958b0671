"""Evaluate: what does compression cost? Tasks x methods x keep ratios, measured as a job; earlier results beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import streamlit as st

from analysis import defaults
from analysis.demo.presets import bundled_prose
from analysis.errors import SettingsError, UserError
from analysis.evaluation.methods import RANDOM, Comparison, compare, prompt_length
from analysis.evaluation.results import Results
from analysis.evaluation.tasks import TASKS
from analysis.words import counted, duration
from app import address, library, state
from app.components import choices, documents, markup, progress, settings
from app.components.charts import page_is_dark, show
from app.engine import Engine
from app.jobs import Job, Jobs
from app.report.evaluation import by_positions, section, told
from app.report.writing import Drawing, Section
from l2kv.config import CacheShape
from l2kv.errors import SpecError
from l2kv.policies import POLICIES
from l2kv.spec import CompressionSpec

if TYPE_CHECKING:
    from analysis.models.load import LoadedModel

TASK = state.Slot("task", "passkey", state.Param("task", state.one_of(tuple(TASKS))))
OTHER = state.Slot("other_results", "", state.Param("and", str))
_FOLLOWED = state.Slot("followed_job", "")
"""Job whose results were put on screen when the first of them were there."""
_CHECKED = state.Slot[tuple[str, tuple[str, ...], str]]("checked_evaluation", ("", (), ""))
"""What was checked last, with warnings and why it can't be measured."""
_COLUMNS = ("method", "n", "MiB held", "score", "change", "perplexity ratio")  # the figure's Data has all
_EVERY = 3.0  # seconds between two looks at results that grow
_RATIOS = (0.9, 0.75, 0.5, 0.25, 0.1)


@dataclass(frozen=True)
class Asked:
    """An evaluation, before it has begun."""

    task: str
    settings: object
    base: CompressionSpec
    """What all compressions have in common: protected tokens and skipped layers."""
    policies: tuple[str, ...]
    keep_ratios: tuple[float, ...]
    plans: tuple[tuple[str, CompressionSpec], ...]
    texts: Mapping[str, str] | None
    """Texts by name; None where the task takes none, or is content with the bundled ones."""
    excerpts: int

    def given(self, loaded: LoadedModel) -> Any:
        """Excerpts of the texts, as the task takes them."""
        from analysis.texts.excerpts import excerpts

        of = TASKS[self.task].excerpt_tokens
        if self.texts is None or of is None:
            return self.texts
        n_tokens = min(of(self.settings), loaded.positions)
        return excerpts(loaded.tokenizer, self.texts, n_tokens=n_tokens, at_most=self.excerpts)

    def check(self, loaded: LoadedModel) -> tuple[str, ...]:
        """Warnings of texts and lengths. Raises UserError where it can't be measured."""
        from analysis.evaluation.run import check_request

        return check_request(loaded, self.task, texts=self.given(loaded), settings=self.settings)

    def compared(self, loaded: LoadedModel, texts: Any) -> Comparison:
        """Make methods that hold the same bytes after a prompt of the task's median length."""
        from analysis.evaluation.run import samples_of

        samples = samples_of(loaded, self.task, texts=texts, settings=self.settings)[0]
        return compare(
            CacheShape.of(loaded.config, loaded.model.dtype.itemsize),
            self.base,
            n_tokens=prompt_length(samples),
            keep_ratios=self.keep_ratios,
            policies=self.policies,
            plans=self.plans,
        )


def draw(engine: Engine, jobs: Jobs) -> None:
    """Draw the page."""
    st.title("What does it cost?")
    found = library.entries("results", model=state.model())
    st.caption(
        f"Tasks are scored with the full cache of {markup.plain(state.model())} and with compressed ones. The prompt "
        "is compressed once, the question comes after it, and the cache goes on evicting."
    )
    with st.expander("New evaluation", icon=":material/science:", expanded=not found, key="new_evaluation"):
        _new(engine, jobs)
    growing = progress.running(jobs, "results")
    st.fragment(_results, run_every=_EVERY if growing else None)(growing)


def _new(engine: Engine, jobs: Jobs) -> None:
    """Ask what to measure, say what it takes, and start it."""
    left, right = st.columns(2, gap="large")
    with left:
        offered = choices.tasks()
        task = st.selectbox(
            "Task", list(offered), format_func=lambda name: offered[name].title,
            help=choices.explained(offered), **TASK.widget(),
        )  # fmt: skip
        st.caption(offered[task].about)
    try:
        with left:
            chosen = settings.ask(offered[task].settings, key=f"task_{task}")
            texts, excerpts = _texts(task)
        with right:
            asked = Asked(task, chosen, *_methods(), texts, excerpts)
    except (UserError, SpecError) as error:
        st.error(markup.plain(str(error)), icon=":material/error:")
        return
    with right:
        if asked.excerpts:
            st.caption(f"{counted(asked.excerpts, 'excerpt')} at most.")
        as_it_comes = chosen == offered[task].settings()  # and a page that nobody has touched loads no tokenizer
        if not as_it_comes and not _possible(engine, asked):
            return
        _estimate(engine, asked)
        started = st.button("Start", type="primary", icon=":material/play_arrow:", key="start_evaluation")
        if started and (not as_it_comes or _possible(engine, asked)):
            state.follow(start(jobs, state.model_ref(), asked))
            st.rerun()


def _possible(engine: Engine, asked: Asked) -> bool:
    """Tell whether it can be measured, as far as shows before it runs; say why not, and what to expect."""
    key = f"{state.model_ref()} {asked!r}"
    if _CHECKED.get()[0] != key:
        with st.spinner("Checking …", show_time=True):
            _CHECKED.set((key, *_checked(engine, asked)))
    _, notes, error = _CHECKED.get()
    for note in notes:
        st.warning(markup.plain(note), icon=":material/warning:")
    if error:
        st.error(markup.plain(error), icon=":material/error:")
    return not error


def _checked(engine: Engine, asked: Asked) -> tuple[tuple[str, ...], str]:
    """Warnings, and why it can't be measured; a model that has to be fetched first is checked by the job."""
    try:
        model = engine.outline(state.model_ref())
        return ((), "") if model is None else (asked.check(model), "")
    except UserError as error:
        return (), str(error)


def _texts(task: str) -> tuple[Mapping[str, str] | None, int]:
    """Ask for texts where the task takes some, and for the number of excerpts."""
    of = TASKS[task]
    if of.texts == "no":
        return None, 0
    texts = documents.ask(few="Give your own for more than a first look." if of.excerpt_tokens else "")
    if texts == bundled_prose() and of.bundled:
        return None, 0
    if of.excerpt_tokens is None:
        return texts, 0
    excerpts = st.number_input(
        "Excerpts",
        1,
        1000,
        defaults.EXCERPTS,
        help="Spread over the texts. A verdict takes 16.",
        key="excerpts",
    )
    return texts, int(excerpts)


def _methods() -> tuple[CompressionSpec, tuple[str, ...], tuple[float, ...], tuple[tuple[str, CompressionSpec], ...]]:
    """Ask for methods: what they have in common, policies, keep ratios, and the plan in force. Raises SettingsError."""
    base = state.uniform_spec()
    offered = {name: policy for name, policy in choices.policies().items() if name != RANDOM}
    first = [base.policy] if base.policy in offered else []
    policies: Sequence[str] = st.multiselect(
        "Policies", list(offered), list(dict.fromkeys([*first, "keydiff"])),
        format_func=lambda name: offered[name].title, help=choices.explained(offered), key="evaluate_policies",
    )  # fmt: skip
    options = sorted({*_RATIOS, base.keep_ratio}, reverse=True)
    ratios: Sequence[float] = st.multiselect(
        "Keep ratios", options, [base.keep_ratio], format_func=lambda ratio: f"{ratio:.0%}".replace("%", " %"),
        key=f"evaluate_ratios_{base.keep_ratio}",
    )  # fmt: skip
    plans: list[tuple[str, CompressionSpec]] = []
    if (plan := state.plan()) is not None and st.checkbox("The plan in force", True, key="evaluate_plan"):
        plans.append(("plan", plan.spec))
    first_ones = f"first {base.protect_first} and " if base.protect_first else ""
    protected = f"{first_ones}last {counted(base.protect_last, 'token')}"
    if not (plans or (ratios and policies)):
        raise SettingsError("Choose a policy and a keep ratio at least")
    st.caption(
        f"Beside the full cache, random, and random between the protected {protected}. Methods of one keep ratio hold "
        "the same bytes after the prompt; one that can't is left out by name."
    )
    return base, tuple(policies), tuple(ratios), tuple(plans)


def _estimate(engine: Engine, asked: Asked) -> None:
    """Say how long it will take: at once if the model is in memory, else on a click that loads it."""
    key = state.Slot[tuple[object, str] | None]("estimate", None)
    known = key.get()
    if known and known[0] == repr(asked):
        st.markdown(f"It takes about **{markup.plain(known[1])}** here.")
        return
    if not st.button("Estimate the time", icon=":material/timer:", key="estimate_time", help="Runs a few tokens."):
        return
    from analysis.evaluation.work import estimate

    try:
        with (
            st.spinner("Running a few tokens …", show_time=True),
            engine.lend(state.model_ref(), lambda done, total, what: st.empty().empty()) as loaded,
        ):
            texts = asked.given(loaded)
            methods = asked.compared(loaded, texts).methods
            found = estimate(loaded, asked.task, methods, texts=texts, settings=asked.settings)
    except (UserError, SpecError) as error:
        st.error(markup.plain(str(error)), icon=":material/error:")
        return
    key.set((repr(asked), f"{duration(found.seconds)}, {counted(found.work.decoded, 'token')} at most"))
    st.rerun()


def start(jobs: Jobs, ref: str, asked: Asked) -> str:
    """Start an evaluation, and return the job's id. The same one again goes on where it stopped."""
    title = TASKS[asked.task].title

    def work(loaded: LoadedModel, job: Job) -> str:
        from analysis.evaluation.run import evaluate
        from analysis.models.digest import digest_of

        id, file = library.WORKSPACE.results_file({"weights": digest_of(loaded), "asked": asked})
        file.parent.mkdir(parents=True, exist_ok=True)
        job(0, 0, "Making the samples …")
        texts = asked.given(loaded)
        comparison = asked.compared(loaded, texts)

        def list_them() -> None:
            ratios = ", ".join(f"{ratio:.0%}".replace("%", " %") for ratio in asked.keep_ratios)
            policies = ", ".join(POLICIES[name].in_words for name in asked.policies[:4])
            library.WORKSPACE.note_results(id, name=f"{title}, keep {ratios}, {policies}")
            job.result = id

        def progress(done: int, total: int, what: str) -> None:
            if done and not job.result:
                list_them()  # pages read the file itself from now on
            job(done, total, what)

        try:
            evaluate(
                loaded,
                asked.task,
                comparison.methods,
                texts=texts,
                settings=asked.settings,
                out=file,
                notes=comparison.notes,
                progress=progress,
            )
        finally:  # what was measured is listed, also if it was cancelled
            if job.done:
                list_them()
        return id

    return jobs.start(f"Measuring {title}", ref, work, kind="results").id


def _results(growing: Job | None) -> None:
    """Choose earlier results, one or two, and show them; those that are being measured as far as they are."""
    names = {entry.id: entry for entry in library.entries("results", model=state.model())}
    if not names:
        return
    ids = list(names)
    if growing and growing.result in names and _FOLLOWED.get() != growing.id:
        _FOLLOWED.set(growing.id)
        state.RESULTS.set(growing.result)

    def label(id: str) -> str:
        if not id:
            return "none"
        return " · ".join(filter(None, (names[id].name, names[id].about, names[id].created[:16].replace("T", " "))))

    shown = state.RESULTS.get() if state.RESULTS.get() in names else ids[0]
    left, right = st.columns(2, gap="large")
    chosen = left.selectbox("Results, newest first", ids, ids.index(shown), format_func=label, key=f"results_{shown}")
    state.RESULTS.set(chosen)
    others = ["", *(id for id in ids if id != chosen)]
    if OTHER.get() not in others:
        OTHER.set("")
    other = right.selectbox("Compare with", others, format_func=label, **OTHER.widget())
    for id in filter(None, (chosen, other)):
        _one(id, names[id].name, growing=growing is not None and growing.running and growing.result == id)
    address.write()


def _one(id: str, name: str, *, growing: bool) -> None:
    results = library.opened(Results, id)
    st.subheader(markup.plain(name))
    if growing:
        n = len(results.samples)
        st.caption(f":material/pending: Being measured: {counted(n, 'sample')} done by all methods so far.")
    if not results.rows:
        if not growing:
            st.info(
                "Scores are shown of samples that all methods have done, and none is yet. Start the same evaluation "
                "again: it goes on from the scores that are kept."
            )
        return
    made = _section(id, library.version_of(id), page_is_dark())
    for words in made.words:
        st.caption(markup.plain(words))
    rows = _summary(id, library.version_of(id))
    st.dataframe(
        rows,
        hide_index=True,
        column_order=[name for name in _COLUMNS if any(name in row for row in rows)],
        column_config=dict.fromkeys(("MiB held", "MiB allocated"), st.column_config.NumberColumn(format="%.2f")),
        key=f"summary_{id}",
    )
    for i, drawing in enumerate(made.drawings):
        _draw(drawing, f"{id}_{i}")
    if along := _along(id, library.version_of(id)):  # one at a time: there may be a dozen
        titles = [drawing.title for drawing in along]
        at = st.selectbox("Along the text", range(len(along)), format_func=titles.__getitem__, key=f"along_{id}")
        _draw(along[at], f"{id}_along_{at}")
    with st.expander("Every answer", icon=":material/table:", key=f"rows_{id}", on_change="rerun") as answers:
        if answers.open:
            st.dataframe(results.frame(), hide_index=True, key=f"frame_{id}")
    with st.container(horizontal=True):
        st.download_button(
            "CSV", lambda: results.frame().to_csv(index=False).encode(), f"{id}.csv", "text/csv",
            icon=":material/download:", on_click="ignore", key=f"csv_{id}",
        )  # fmt: skip
        st.download_button(
            "JSON lines", lambda: library.path_of(id).read_bytes(), f"{id}.jsonl", "application/jsonl",
            icon=":material/download:", on_click="ignore", key=f"json_{id}",
        )  # fmt: skip
        if st.button("Delete", icon=":material/delete:", key=f"delete_{id}", disabled=growing):
            library.WORKSPACE.delete(id)
            state.RESULTS.drop()
            st.rerun()


def _draw(drawing: Drawing, key: str) -> None:
    show(
        drawing.figure,
        key=key,
        alt=drawing.alt,
        caption=f"**{drawing.title}.** {drawing.caption}",
        table=drawing.table or None,
    )


@library.remembered
def _section(id: str, version: library.Version, dark: bool) -> Section:
    """What is said and drawn of results, as they were in that version."""
    return section(library.opened(Results, id), by_position=(), dark=dark)


@library.remembered
def _along(id: str, version: library.Version) -> tuple[Drawing, ...]:
    """Scores by position, likewise."""
    return tuple(by_positions(library.opened(Results, id)))


@library.remembered
def _summary(id: str, version: library.Version) -> list[dict[str, Any]]:
    """A row for each method: what it scores, what it holds, and how far it is from the full cache."""
    results = library.opened(Results, id)
    titles = {"samples": "n", "MiB": "MiB held", "allocated_MiB": "MiB allocated"}
    rows = told(results, replace(TASKS[results.task], axes=()))
    return [{titles.get(name, name.replace("_", " ")): value for name, value in row.items()} for row in rows]
