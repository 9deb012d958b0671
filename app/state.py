"""State of a session: what is on screen. Each value that parts of the app share is a `Slot` here, and nowhere else.

Slots with a `Param` stand in the page's address (`app.address`), so a link shows what its sender saw. Draws nothing;
keys of a single widget or page stay there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import streamlit as st

from analysis import defaults
from analysis.captures import Capture
from analysis.demo.presets import demo_model
from analysis.errors import ModelError, RecordError
from analysis.metrics import METRICS, PROBES
from analysis.models.load import model_name
from analysis.models.memory import DTYPES
from analysis.plans.skip import Plan, skip_list
from analysis.studies import Study
from app import library
from l2kv.policies import POLICIES
from l2kv.spec import CompressionSpec

Value = TypeVar("Value")


@dataclass(frozen=True)
class Param(Generic[Value]):
    """How a value stands in the address."""

    name: str
    read: Callable[[str], Value]
    """Raises ValueError, with what is allowed."""
    write: Callable[[Value], str] = str
    always: bool = False
    """Written even if it is the default, which may be another one in the next version."""


IN_ADDRESS: dict[str, Slot[Any]] = {}
"""All slots that stand in the address, by the names of their parameters."""


@dataclass(frozen=True)
class Slot(Generic[Value]):
    """One value of a session. Its key may also be a widget's, on any number of pages."""

    key: str
    default: Value
    param: Param[Value] | None = None

    def __post_init__(self) -> None:
        if self.param:
            IN_ADDRESS[self.param.name] = self

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

        The default is not the widget's own: Streamlit warns of one whose value is set, too.
        """
        self.set(self.get())
        return {"key": self.key, "persist_state": "session"}


def _within(low: float, high: float, kind: Callable[[str], Any] = int) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:  # NaN too
            raise ValueError(f"must be from {low} to {high}")
        return value

    return read


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    """Make the reader of a value that is one of some names."""

    def read(text: str) -> str:
        if text not in names:
            raise ValueError(f"must be one of {', '.join(names)}")
        return text

    return read


def _pair(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    layer, _, head = text.partition(".")
    return int(layer), int(head)


def _layers(text: str) -> tuple[int, ...]:
    try:
        return skip_list(text)
    except RecordError:
        raise ValueError("must be numbers of layers, such as 0,1") from None


def _flag(text: str) -> bool:
    return one_of(("0", "1"))(text) == "1"


_NUMBERED = _within(0, 9999)
MODEL = Slot("model", "", Param("model", str, always=True))
"""What the model is asked for by: a name, a hub id, a folder or file. Empty: that of `demo_model`."""
RUN = Slot("run_id", "", Param("run", str, always=True))
STUDY = Slot("study_id", "", Param("study", str))
PLAN = Slot("plan_id", "", Param("plan", str))
RESULTS = Slot("results_id", "", Param("results", str))
STORY = Slot("story_id", "", Param("story", str))
JOB = Slot("job_id", "", Param("job", str))
OTHER_RUN = Slot("other_run_id", "", Param("with", str))
"""Run that is shown beside the one on screen."""

PROBE = Slot("probe", "next token", Param("probe", one_of(tuple(PROBES)), always=True))
SKIP_FIRST = Slot("skip_first", False, Param("skip_first", _flag, lambda on: str(int(on))))
MAP = Slot("map", "gamma", Param("map", str, always=True))
LAYER = Slot("layer_open", 0, Param("layer", _NUMBERED, always=True))
HEAD = Slot("head_open", 0, Param("head", _NUMBERED, always=True))
PINNED = Slot[tuple[int, int] | None](
    "pinned", None, Param("pinned", _pair, lambda pair: ".".join(map(str, pair or ())))
)
"""The head B that is shown beside the chosen one."""
QUERY = Slot("query", 0, Param("query", _NUMBERED))
"""Which of the last queries is shown, counted back from the last."""

POLICY = Slot("policy", "low_norm", Param("policy", one_of(tuple(POLICIES)), always=True))
KEEP_RATIO = Slot("keep_ratio", defaults.KEEP_RATIO, Param("keep", _within(0.01, 1, float), "{:g}".format, always=True))
PROTECT_LAST = Slot("protect_last", defaults.RECENT_WINDOW, Param("window", _within(0, 4096), always=True))
PROTECT_FIRST = Slot("protect_first", 0, Param("first", _within(0, 4096)))
SKIP_LAYERS = Slot[Sequence[int]](
    "skip_layers", (), Param("skip", _layers, lambda layers: ",".join(map(str, layers)), always=True)
)
CACHE_DTYPE = Slot("bytes_dtype", "", Param("dtype", one_of(("", *DTYPES))))
"""Dtype that bytes are counted in; empty: the model's own."""

NOTICES = Slot[tuple[str, ...]]("notices", ())
"""What to say once at the top of the page, such as a part of an address that had to be ignored."""
OPENING = Slot("opening", "")
"""Name of a dialog to open."""
REFUSED = Slot[tuple[str, ...]]("refused", ())
"""Why uploaded files could not be read, to be said once."""
CHART_DRAWN = Slot("chart_drawn", False)
"""Whether the browser has drawn a chart."""
FIRST_CHART_SENT = Slot[float | None]("first_chart_sent", None)


def notice(text: str) -> None:
    """Say something once, at the top of the page."""
    NOTICES.set((*NOTICES.get(), text))


def name_of(ref: str) -> str:
    """Name of the model that is asked for so."""
    try:
        return model_name(ref)
    except ModelError:  # of a record, or a folder of several, which is refused when it is loaded
        return ref


def model() -> str:
    """Name of the model on screen, as records have it."""
    return name_of(MODEL.get() or demo_model())


def model_ref() -> str:
    """What the model on screen is asked for by."""
    return MODEL.get() or demo_model()


def run_id() -> str:
    """Id of the run on screen: the chosen one, else the latest of the model; empty where it has none."""
    if (id := RUN.get()) and (entry := library.find(id)) and entry.model == model():
        return id
    return next((entry.id for entry in library.entries("run", model=model())), "")


def run() -> Capture | None:
    """The run on screen; None where the model has none."""
    shown = run_id()
    return library.run(shown) if shown else None


def study_id() -> str:
    """Id of the study of the model on screen: the chosen one, else the latest; empty where there is none."""
    if (id := STUDY.get()) and (entry := library.find(id)) and entry.model == model():
        return id
    return next((entry.id for entry in library.entries("study", model=model())), "")


def study() -> Study | None:
    """The study of the model on screen; None where there is none."""
    shown = study_id()
    return library.opened(Study, shown) if shown else None


def plan() -> Plan | None:
    """The plan in force; None where all heads are compressed alike."""
    if (id := PLAN.get()) and (entry := library.find(id)) and entry.model == model():
        return library.opened(Plan, id)
    return None


def spec() -> CompressionSpec:
    """The compression in force on every page: the plan's, or that of the header's controls."""
    return in_force.spec if (in_force := plan()) else uniform_spec()


def uniform_spec() -> CompressionSpec:
    """The compression of the header's controls."""
    return CompressionSpec(
        keep_ratio=round(KEEP_RATIO.get(), 4),
        policy=POLICY.get(),
        protect_first=int(PROTECT_FIRST.get()),
        protect_last=int(PROTECT_LAST.get()),
        skip_layers=tuple(sorted(SKIP_LAYERS.get())),
    )


def take_spec(spec: CompressionSpec) -> None:
    """Set the header's controls to a compression, in place of a plan."""
    PLAN.drop()
    KEEP_RATIO.set(spec.keep_ratio)
    POLICY.set(spec.policy)
    PROTECT_FIRST.set(spec.protect_first)
    PROTECT_LAST.set(spec.protect_last)
    SKIP_LAYERS.set(list(spec.skip_layers))


def show_model(ref: str) -> None:
    """Put another model on screen. What belongs to the one before is dropped."""
    if name_of(ref) != model():
        for slot in (RUN, STUDY, PLAN, RESULTS, STORY, OTHER_RUN, LAYER, HEAD, PINNED, QUERY, SKIP_LAYERS, CACHE_DTYPE):
            slot.drop()
    MODEL.set(ref)


def show_run(id: str) -> None:
    """Put a run on screen, and its model."""
    entry = library.find(id)
    assert entry is not None, f"there is no run {id}"
    if entry.model != model():
        show_model(entry.model)
    for slot in (QUERY, PINNED):
        slot.drop()
    RUN.set(id)


def chosen_head() -> tuple[int, int]:
    """The head that is open; until one is chosen, one that teaches: see `teaching_head`."""
    run = library.run(run_id())
    if LAYER.held() and HEAD.held() and LAYER.get() < run.n_layers and HEAD.get() < run.n_heads:
        return LAYER.get(), HEAD.get()
    return teaching_head(run_id(), PROBE.get())


def choose_head(layer: int, head: int) -> None:
    """Open a head."""
    LAYER.set(layer)
    HEAD.set(head)


@library.remembered
def teaching_head(run_id: str, probe: str) -> tuple[int, int]:
    """The head that shows the paper's claim best: lowest Γ among those that look at more than the first token."""
    import numpy as np

    values = library.values_of(run_id, 0, probe)
    without = values.of("gamma_skip_first")
    looks_about = np.isfinite(without) & (values.of("sink_share") < 0.5)
    gamma = np.where(looks_about, without, np.nan)
    if not np.isfinite(gamma).any():
        gamma = np.where(np.isfinite(values.of("gamma")), values.of("gamma"), np.nan)
    if not np.isfinite(gamma).any():
        return 0, 0
    layer, head = divmod(int(np.nanargmin(gamma)), gamma.shape[1])
    return layer, head


def maps() -> dict[str, str]:
    """Titles of the maps of heads, by name."""
    return {name: metric.title for name, metric in METRICS.items()}
