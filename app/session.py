"""State of a session: each key of `st.session_state` that parts of the app share is a `Slot` here, and nowhere else.

It also knows what is on screen (a run, a study, a plan, the open head) and what was computed from it. Draws nothing.
Keys of a single widget or page stay there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, cast

import numpy as np
import streamlit as st

from analysis import defaults
from analysis.captures import Capture, load_run
from analysis.demo.presets import BUNDLED_RUNS, bundled_results, demo_model
from analysis.measures import by_kv_head
from analysis.metrics import METRICS, HeadValues, by_query, metrics
from analysis.plans.curves import LossCurves, loss_curves
from analysis.plans.skip import Plan
from analysis.studies import Study, load_study, study_of
from analysis.verdicts import verdicts

Value = TypeVar("Value")
_Remembered = dict[str, tuple[object, dict[Any, Any]]]
"""Name of a function -> what it was asked of, and its answers by settings."""


@dataclass(frozen=True)
class Slot(Generic[Value]):
    """One value of a session. Its key may also be a widget's, on any number of pages."""

    key: str
    default: Value
    goes_with: tuple[str, ...] = ()
    """"run", "study" or both: what takes the value along when another one is shown."""

    def get(self) -> Value:
        """Return the value, or the default where there is none."""
        value: Value = st.session_state.get(self.key, self.default)
        return value

    def set(self, value: Value) -> None:
        """Set the value, before the widget of that key is drawn if there is one."""
        st.session_state[self.key] = value

    def held(self) -> bool:
        """Tell whether a value was set."""
        return self.key in st.session_state

    def drop(self) -> None:
        """Return to the default."""
        st.session_state.pop(self.key, None)

    def take(self) -> Value:
        """Return the value and drop it: for messages that are shown once."""
        value = self.get()
        self.drop()
        return value

    def widget(self) -> dict[str, Any]:
        """Arguments that tie a widget to the slot: it begins with its value, and the value outlives the page.

        The default is not the widget's own: Streamlit warns of one whose value is set, too, as presets do.
        """
        self.set(self.get())
        return {"key": self.key, "persist_state": "session"}


# On screen.
RUN = Slot[Capture | None]("run", None)  # None: the demo
OTHER_RUN = Slot[Capture | None]("other_run", None)
STUDY = Slot[Study | None]("study", None)
STUDY_ANYWAY = Slot("study_anyway", False, ("run",))  # though it is of another model than the run
PLAN = Slot[Plan | None]("plan", None)
LAYER, HEAD = Slot("layer", 0, ("run",)), Slot("head", 0, ("run",))
STUDY_LAYER, STUDY_HEAD = Slot("study_layer", 0, ("study",)), Slot("study_head", 0, ("study",))
GENERATED = Slot[Any]("generated", None, ("run",))
_REMEMBERED = Slot[_Remembered]("remembered", {}, ("run", "study"))

# The compression that pages share, and the second one that Generate can set beside it.
KEEP_RATIO, SECOND_KEEP_RATIO = Slot("keep_ratio", defaults.KEEP_RATIO), Slot("second_keep_ratio", 0.25)
POLICY, SECOND_POLICY = Slot("policy", "low_norm"), Slot("second_policy", "low_norm")
PROTECT_LAST = Slot("protect_last", defaults.RECENT_WINDOW)
PRUNE_AFTER = Slot("prune_after", 0)
SKIP_LAYERS = Slot[Sequence[int]]("skip_layers", (), ("run",))
SKIP_COUNT = Slot("skip_count", 0, ("run",))
CACHE_DTYPE = Slot("cache_dtype", "bfloat16", ("run",))
BESIDE = Slot("beside", False)  # whether there is a second one
FIRST_BY, SECOND_BY = Slot("first_by", ""), Slot("second_by", "")  # by the plan, or by the controls

# The model and the texts that long work is done with.
MODEL, MODEL_REF = Slot("model_choice", "", ("run",)), Slot("model_ref", "", ("run",))
MODEL_CHOSEN_FOR = Slot("model_choice_of", "")  # the model of the run that was on screen then
GENERATE_MODEL = Slot[str | None]("generate_model", None, ("run",))
FILES = Slot[Mapping[str, str]]("sources", {})  # name -> text
UPLOADS = Slot("uploads", 0)  # the number of the uploader: another one is empty
PASTED = Slot("pasted", "")
EXCERPTS = Slot("continued", defaults.EXCERPTS)
PROMPT_TOKENS = Slot("prompt_tokens", defaults.PROMPT_TOKENS)
PREDICTED_TOKENS = Slot("predicted", defaults.NEW_TOKENS)

# To be said once.
NOTES = Slot[tuple[str, ...]]("notes", ())  # on special tokens in the texts, beside a result

SLOTS = tuple(value for value in list(globals().values()) if isinstance(value, Slot))


def _drop_all_of(what: str) -> None:
    for slot in SLOTS:
        if what in slot.goes_with:
            slot.drop()


Thing = TypeVar("Thing")
Settings = ParamSpec("Settings")
Answer = TypeVar("Answer")

_MOST_REMEMBERED = 16  # answers of one function
_OF_THE_DEMO: _Remembered = {}


def remembered(
    work: Callable[Concatenate[Thing, Settings], Answer],
) -> Callable[Concatenate[Thing, Settings], Answer]:
    """Cache the results of a function of a run or a study and of settings.

    The session keeps the latest results on one run or study; the process would keep the runs of closed tabs. Only
    results on the demo run are kept for all sessions.
    """
    name = f"{work.__module__}.{work.__qualname__}"

    @wraps(work)
    def ask(thing: Thing, /, *settings: Settings.args, **named: Settings.kwargs) -> Answer:
        kept = _OF_THE_DEMO if thing is demo_run() else _own_answers()
        of, answers = kept.get(name, (None, {}))
        if of is not thing:
            answers = {}
            kept[name] = thing, answers
        asked = settings, tuple(named.items())
        with suppress(KeyError):
            return cast(Answer, answers[asked])
        answer: Answer = work(thing, *settings, **named)
        answers[asked] = answer
        for oldest in list(answers)[:-_MOST_REMEMBERED]:
            answers.pop(oldest, None)  # another session may have been first
        return answer

    return ask


def _own_answers() -> _Remembered:
    if not _REMEMBERED.held():
        _REMEMBERED.set({})
    return _REMEMBERED.get()


@lru_cache(maxsize=2)
def bundled_run(model: str) -> Capture:
    """Load the bundled run of a model, one of `BUNDLED_RUNS`."""
    run = bundled_results(model).demo
    assert run is not None
    return load_run(run)


def demo_run() -> Capture:
    """Load the run that the app opens on."""
    return bundled_run(demo_model())


@remembered
def study_of_run(run: Capture, probe: str) -> Study:
    """Make the study of one text from a run, by one probe."""
    return study_of(run, probes=(probe,))


@remembered
def values_of(run: Capture, skip_first: int, probe: str = "next token") -> HeadValues:
    """Metrics of all heads by a probe. Metrics of the first token itself ignore `skip_first`."""
    study = study_of_run(run, probe)
    whole = HeadValues(study.metrics, study.values[0, 0], study.status[0, 0])
    if not skip_first:
        return whole
    others = metrics(run, probe, skip_first)
    of_all = np.array([METRICS[name].about_sink for name in whole.names])[:, None, None]
    return HeadValues(
        whole.names, np.where(of_all, whole.values, others.values), np.where(of_all, whole.status, others.status)
    )


@remembered
def verdicts_of(run: Capture, probe: str = "next token") -> np.ndarray:
    """Verdict of each head by a probe, [L, H]."""
    return verdicts(study_of_run(run, probe), probe=probe)


@remembered
def kv_alr_of(run: Capture, skip_first: int, probe: str) -> np.ndarray:
    """ALR of all kv heads, [L, Hkv], by the mean attention of the query heads that read each."""
    return metrics(by_kv_head(run), probe, skip_first, ["alr"]).values[0]


@remembered
def gamma_by_query(run: Capture, skip_first: int) -> np.ndarray:
    """Γ of each of the last queries, [W, L, H], with or without the first token."""
    return by_query(run, "gamma_skip_first" if skip_first else "gamma")


@remembered
def curves_of(run: Capture, protect_last: int) -> LossCurves:
    """Loss curves of a run."""
    return loss_curves(run, protect_last=protect_last)


def current_run() -> Capture:
    """Run on screen: the session's own, or the demo."""
    return RUN.get() or demo_run()


def is_bundled() -> bool:
    """Tell whether a bundled run is on screen."""
    return is_demo() or any(current_run() is bundled_run(model) for model in BUNDLED_RUNS)


def is_demo() -> bool:
    """Tell whether the demo run is on screen."""
    return RUN.get() is None


def show_run(run: Capture | None) -> None:
    """Put a run on screen; None is the demo. Choices made for the old run, such as its model, are dropped."""
    RUN.set(run)
    _drop_all_of("run")


def other_run() -> Capture | None:
    """Run that the one on screen is compared with: an opened or held one, the demo, or none."""
    run = OTHER_RUN.get()
    return demo_run() if run is None and not is_demo() else run


def compare_with(run: Capture | None) -> None:
    """Compare the run on screen with another; None is the demo, if it is not on screen."""
    OTHER_RUN.set(run)


@lru_cache(maxsize=4)
def _bundled_study(model: str) -> Study | None:
    file = bundled_results(model).study
    return load_study(file) if file else None


def current_study() -> Study | None:
    """Study on screen: the session's own, else the bundled one of the model on screen, else None.

    A study of a different model is shown for as long as the user wants it, and not as the answer for the run's model.
    """
    own, model = STUDY.get(), current_run().model
    if own is not None and (own.model == model or STUDY_ANYWAY.get()):
        return own
    return _bundled_study(model)


def study_of_another() -> Study | None:
    """The session's own study, if its model is not that of the run on screen."""
    own = STUDY.get()
    return own if own is not None and own.model != current_run().model else None


def show_study(study: Study | None) -> None:
    """Put a study on screen; None is the bundled one. The choice of a head is dropped with the old one."""
    STUDY.set(study)
    STUDY_ANYWAY.set(study is not None)  # whatever the run on screen is of
    _drop_all_of("study")


def plan_in_use() -> Plan | None:
    """Plan that Generate can decode with."""
    return PLAN.get()


def use_plan(plan: Plan | None) -> None:
    """Use a plan in Generate, or drop the current one."""
    PLAN.set(plan)
    if plan is not None:  # beside it, one ratio for all of the same budget
        SECOND_KEEP_RATIO.set(min(max(round(20 * plan.spec.keep_ratio), 1), 20) / 20)
    for slot in (FIRST_BY, SECOND_BY):  # what Generate compresses by: with a new plan it begins anew
        slot.drop()


def choose_head(layer: int, head: int) -> None:
    """Open a head."""
    LAYER.set(layer)
    HEAD.set(head)


def chosen_head(run: Capture) -> tuple[int, int]:
    """Open head; at first the one that follows the paper most, or contradicts it least.

    Heads that look at nothing but the first token are avoided if there are others.
    """
    if not (LAYER.held() and HEAD.held()):
        values = values_of(run, 0)
        gamma = np.where(np.isnan(values.of("gamma")), 9.0, values.of("gamma"))
        looks_about = (values.of("sink_share") < 0.5) & (gamma < 9)
        best = np.where(looks_about, gamma, 9.0).argmin() if looks_about.any() else gamma.argmin()
        choose_head(*divmod(int(best), run.n_heads))
    return LAYER.get(), HEAD.get()
