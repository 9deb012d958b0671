"""State of a session: what is on screen. Each value that parts of the app share is a `Slot` here, and nowhere else.

Slots with a `Param` stand in the page's address (`app.address`), so a link shows what its sender saw. Draws nothing;
keys of a single widget or page stay there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import streamlit as st

from analysis import defaults
from analysis.captures import Capture
from analysis.decision.checklist import Limits
from analysis.demo.presets import demo_model
from analysis.errors import ModelError, RecordError
from analysis.metrics import METRICS, PROBES
from analysis.models.gpus import GPUS
from analysis.models.load import model_name
from analysis.models.memory import DTYPES
from analysis.plans.skip import Plan, skip_list
from analysis.studies import Study
from analysis.verdicts import VERDICTS
from analysis.workspace import KINDS
from app import library
from l2kv.policies import POLICIES
from l2kv.spec import CompressionSpec

Value = TypeVar("Value")
VIEWS = ("By position", "Tokens", "Loss curves", "Scatter", "Queries", "Attention map", "Over texts", "Why")
"""What there is to see of a head."""
BELOWS = ("All heads", "Many texts", "Another run")
"""What there is to see of many heads at once."""
LOST = "lost"
"""Map that is no metric: the attention lost at the settings in force."""


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


def within(low: float, high: float, kind: Callable[[str], Any] = int) -> Callable[[str], Any]:
    """Make the reader of a number in a range."""

    def read(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:  # NaN too
            raise ValueError(f"must be from {low} to {high}")
        return value

    return read


_MOST_JOBS = 20  # that an address may name
_NUMBERED = within(0, 9999)


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
    return _NUMBERED(layer), _NUMBERED(head)


def _layers(text: str) -> tuple[int, ...]:
    try:
        return skip_list(text)
    except RecordError:
        raise ValueError("must be numbers of layers, such as 0,1") from None


def _map(text: str) -> str:
    return one_of(tuple(maps()))(text)


def _verdicts(text: str) -> tuple[str, ...]:
    known = one_of(tuple(VERDICTS))
    return tuple(known(name) for name in text.split(",") if name)


def _numbers(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


def _positions(text: str) -> tuple[int, ...]:
    if not all(part.isdecimal() and len(part) < 8 for part in text.split(",")):
        raise ValueError("must be positions of tokens, such as 3,17")
    return tuple(sorted({int(part) for part in text.split(",")}))


def _ids(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(filter(None, text.split(",")[:_MOST_JOBS])))


def _flag(text: str) -> bool:
    return one_of(("0", "1"))(text) == "1"


MODEL = Slot("model", "", Param("model", str, always=True))
"""What the model is asked for by: a name, a hub id, a folder or file. Empty: that of `demo_model`."""
RUN = Slot("run_id", "", Param("run", str, always=True))
STUDY = Slot("study_id", "", Param("study", str))
PLAN = Slot("plan_id", "", Param("plan", str))
RESULTS = Slot("results_id", "", Param("results", str))
TIMELINE = Slot("timeline_id", "", Param("timeline", str))
TOKENS = Slot[tuple[int, ...]]("tokens", (), Param("tokens", _positions, _numbers))
"""Tokens that are chosen in the recorded generation."""
STORY = Slot("story_id", "", Param("story", str))
JOBS = Slot[tuple[str, ...]]("job_ids", (), Param("job", _ids, ",".join))
"""Ids of the jobs that this session started and that have not ended, in the order of their starts."""
OTHER_RUN = Slot("other_run_id", "", Param("with", str))
"""Run that is shown beside the one on screen."""

PROBE = Slot("probe", "next token", Param("probe", one_of(tuple(PROBES)), always=True))
SKIP_FIRST = Slot("skip_first", False, Param("skip_first", _flag, lambda on: str(int(on))))
OVER = Slot("over", "one text", Param("over", one_of(("one text", "many texts")), always=True))
"""Whether the map shows one text or the mean of many; read it by `over`."""
MAP = Slot("map", "gamma", Param("map", _map, always=True))
ONLY_VERDICTS = Slot[Sequence[str]]("only_verdicts", (), Param("verdicts", _verdicts, ",".join))
"""Verdicts of the heads that the map does not fade; empty: all."""
ONLY_KV = Slot[Sequence[int]]("only_kv", (), Param("kv", _layers, _numbers))
"""Numbers of the kv heads whose query heads the map does not fade; empty: all."""
VIEW = Slot("view", "By position", Param("view", one_of(VIEWS), always=True))
"""What is shown of the open head."""
LAYER = Slot("layer_open", 0, Param("layer", _NUMBERED, always=True))
HEAD = Slot("head_open", 0, Param("head", _NUMBERED, always=True))
PINNED = Slot[tuple[int, int] | None](
    "pinned", None, Param("pinned", _pair, lambda pair: ".".join(map(str, pair or ())))
)
"""The head B that is shown beside the chosen one."""
BELOW = Slot("below", "All heads", Param("below", one_of(BELOWS)))
"""What is shown below the map and the head."""
QUERY = Slot("query", 0, Param("query", _NUMBERED))
"""Which query is shown: 0 is the next token, 1 the text's last token, 2 the one before it, ..."""

POLICY = Slot("policy", "low_norm", Param("policy", one_of(tuple(POLICIES)), always=True))
KEEP_RATIO = Slot("keep_ratio", defaults.KEEP_RATIO, Param("keep", within(0.01, 1, float), "{:g}".format, always=True))
PROTECT_LAST = Slot("protect_last", defaults.RECENT_WINDOW, Param("window", within(0, 4096), always=True))
PROTECT_FIRST = Slot("protect_first", 0, Param("first", within(0, 4096)))
SKIP_LAYERS = Slot[Sequence[int]]("skip_layers", defaults.SKIP_LAYERS, Param("skip", _layers, _numbers, always=True))
CACHE_DTYPE = Slot("bytes_dtype", "", Param("dtype", one_of(("", *DTYPES))))
"""Dtype that bytes are counted in; empty: the model's own."""

GPU = Slot("gpu", "H100 SXM (80 GB)", Param("gpu", one_of(tuple(GPUS))))
CACHE_TOKENS = Slot("cache_tokens", 4096, Param("cache_tokens", within(1, 10_000_000)))
"""Tokens of a sequence that memory is counted for."""
BATCH = Slot("batch", 1, Param("batch", within(1, 4096)))
"""Sequences that are decoded at once."""
MOST_PERPLEXITY = Slot("most_perplexity", Limits().perplexity_ratio, Param("max_ppl", within(1, 99, float)))
POINTS_LOST = Slot("points_lost", Limits().points_lost, Param("max_points", within(0.1, 100, float)))
LEAST_EXCERPTS = Slot("least_excerpts", Limits().least_excerpts, Param("min_excerpts", within(2, 9999)))
LEAST_SAMPLES = Slot("least_samples", Limits().least_samples, Param("min_samples", within(2, 9999)))
FULL_FINDS = Slot("full_finds", Limits().full_finds, Param("full_finds", within(0.01, 1, float)))

NOTICES = Slot[Mapping[str, float]]("notices", {})
"""What to say at the top of the page, as of a part of an address that was ignored, and when it was first said."""
_NOTICED = 30.0  # seconds that a notice stays: a page may be drawn several times before it is read
OPENING = Slot("opening", "")
"""Name of a dialog to open."""
REFUSED = Slot[tuple[str, ...]]("refused", ())
"""Why uploaded files could not be read, to be said once."""
CHART_DRAWN = Slot("chart_drawn", False)
"""Whether the browser has drawn a chart."""
FIRST_CHART_SENT = Slot[float | None]("first_chart_sent", None)


def notice(text: str) -> None:
    """Say something at the top of the page, for a while."""
    NOTICES.set({**NOTICES.get(), text: time.monotonic()})


def notices() -> list[str]:
    """What is to be said at the top of the page now."""
    fresh = {text: said for text, said in NOTICES.get().items() if time.monotonic() - said < _NOTICED}
    NOTICES.set(fresh)
    return list(fresh)


def follow(job_id: str) -> None:
    """Show how far a job is on every page, until it has ended."""
    JOBS.set((*JOBS.get(), job_id))


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


def _shown(slot: Slot[str], kind: str) -> str:
    """Id of the record of the model on screen: the chosen one, else the latest, which then stays; empty if none."""
    if (id := slot.get()) and (entry := library.find(id)) and entry.model == model():
        return id
    latest = next((entry.id for entry in library.entries(kind, model=model())), "")
    if latest:
        slot.set(latest)  # else a record that another session makes would take its place
    return latest


def run_id() -> str:
    """Id of the run on screen; empty where the model has none."""
    return _shown(RUN, "run")


def run() -> Capture | None:
    """The run on screen; None where the model has none."""
    shown = run_id()
    return library.run(shown) if shown else None


def study_id() -> str:
    """Id of the study of the model on screen; empty where it has none."""
    return _shown(STUDY, "study")


def study() -> Study | None:
    """The study of the model on screen; None where there is none."""
    shown = study_id()
    return library.opened(Study, shown) if shown else None


def over() -> str:
    """Whether the map shows one text or the mean of many: as chosen, else many where there is a study of them."""
    return "many texts" if not OVER.held() and study_id() else OVER.get()


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


def limits() -> Limits:
    """What a compression may cost, as set on the page Verdict."""
    return Limits(
        round(MOST_PERPLEXITY.get(), 4),
        round(POINTS_LOST.get(), 2),
        int(LEAST_EXCERPTS.get()),
        int(LEAST_SAMPLES.get()),
        round(FULL_FINDS.get(), 4),
    )


def take_spec(spec: CompressionSpec) -> None:
    """Set the header's controls to a compression, in place of a plan."""
    PLAN.drop()
    KEEP_RATIO.set(spec.keep_ratio)
    POLICY.set(spec.policy)
    PROTECT_FIRST.set(spec.protect_first)
    PROTECT_LAST.set(spec.protect_last)
    SKIP_LAYERS.set(list(spec.skip_layers))


OF_MODEL = (
    RUN, STUDY, PLAN, RESULTS, TIMELINE, TOKENS, STORY, OTHER_RUN, OVER, LAYER, HEAD, PINNED, QUERY, SKIP_LAYERS,
    ONLY_KV, CACHE_DTYPE,
)  # fmt: skip
"""What belongs to one model, and says nothing of another."""


def show_model(ref: str) -> None:
    """Put another model on screen. What belongs to the one before is dropped."""
    if name_of(ref) != model():
        for slot in OF_MODEL:
            slot.drop()
    MODEL.set(ref)


def choose_model(ref: str, check: Callable[[str], str]) -> None:
    """Put a model on screen that a user names: one of which there are records, or one that passes the check.

    Args:
        check: returns what the model is asked for by, or raises ModelError, and then nothing has changed.
    """
    if any(library.entries(kind, model=ref) for kind in KINDS):
        show_model(ref)
        return
    show_model(checked := check(ref))
    if Path(checked).is_absolute():
        library.WORKSPACE.note_model(checked)


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
    """The head that is open; until its layer or its number is chosen, that of one that teaches: see `teaching_head`."""
    run = library.run(run_id())
    layer = LAYER.get() if LAYER.held() and LAYER.get() < run.n_layers else None
    head = HEAD.get() if HEAD.held() and HEAD.get() < run.n_heads else None
    if layer is not None and head is not None:
        return layer, head
    teaching = teaching_head(run_id(), PROBE.get())
    return teaching[0] if layer is None else layer, teaching[1] if head is None else head


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
    titles = {name: metric.title for name, metric in METRICS.items()}
    return {"gamma": titles.pop("gamma"), LOST: "Attention lost at my settings"} | titles
