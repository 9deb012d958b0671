"""Records that pages show: those of the workspace, and those that come with the program. Opened once, kept by id.

Records never change, so what was computed from one is kept by its id, for all sessions (`remembered`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from analysis.captures import Capture
from analysis.decision.checklist import RETRIEVAL, Decision, Limits
from analysis.decision.evidence import Evidence
from analysis.demo.presets import BUNDLED_RUNS, bundled_results
from analysis.errors import RecordError
from analysis.evaluation.results import Results, results_so_far
from analysis.measures import attention_lost, by_kv_head
from analysis.metrics import METRICS, HeadValues, by_query, metrics
from analysis.pace import Pace
from analysis.plans.allocation import AllocationPlan
from analysis.plans.curves import loss_curves
from analysis.plans.skip import Plan
from analysis.plans.strategies import plan
from analysis.records import load, load_any
from analysis.statistics import Means, Stability, means, stability
from analysis.stories import Story
from analysis.studies import Study, head_means, layer_alr, study_of
from analysis.verdicts import answer, verdicts
from analysis.workspace import KINDS, Entry, Workspace, digest_of_file
from l2kv.spec import CompressionSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig

WORKSPACE = Workspace()
_BUNDLED = {"demo": "run", "study": "study", "front": "front", "ablation": "ablation", "plan": "plan"}
_BUNDLED |= {"timeline": "timeline"} | dict.fromkeys(("lm", "passkey", "needle"), "results")
"""Field of `BundledResults` -> kind of record."""
_BUNDLED_KINDS = (*dict.fromkeys(_BUNDLED.values()), "story")
_NAMES = {"run": "Anne of Avonlea", "timeline": "A pass key that is lost"}  # of the bundled records
_MOST_OPEN = 8
_MOST_ANSWERS = 256
_MOST_EVIDENCE = 200
_MOST_TIMED = 3

Thing = TypeVar("Thing")
Asked = ParamSpec("Asked")
Answer = TypeVar("Answer")
Version = tuple[int, int]
"""When a file was last written, in ns, and its bytes."""


def entries(kind: str, *, model: str | None = None) -> list[Entry]:
    """List the records of a kind, and of a model: the workspace's, newest first, then the bundled ones."""
    found = WORKSPACE.entries(kind, model=model)
    ids = {entry.id for entry in found}
    return found + [one for one in _bundled_entries(kind) if model in (None, one.model) and one.id not in ids]


def find(id: str) -> Entry | None:
    """Find what is known of a record; None where this machine doesn't have it."""
    bundled = (entry for kind in _BUNDLED_KINDS for entry in _bundled_entries(kind) if entry.id == id)
    return WORKSPACE.find(id) or next(bundled, None)


def is_bundled(id: str) -> bool:
    """Tell whether a record comes with the program."""
    return id in _bundled_files()


def path_of(id: str) -> Path:
    """File of a record. Raises RecordError where there is none."""
    return _bundled_files().get(id) or WORKSPACE.path(id)


@lru_cache(maxsize=_MOST_OPEN)
def _opened(id: str) -> object:
    return load_any(tuple(KINDS.values()), path_of(id))


@lru_cache(maxsize=_MOST_OPEN)
def _so_far(path: Path, version: Version) -> Results:
    return results_so_far(path)


def version_of(id: str) -> Version:
    """Version of the file of a record: results grow while they are measured. Raises RecordError."""
    path = path_of(id)
    try:
        found = path.stat()
    except OSError as error:  # it has just been deleted
        raise RecordError(f"{path.name} cannot be read: {error}.") from error
    return found.st_mtime_ns, found.st_size


def opened(cls: type[Thing], id: str) -> Thing:
    """Open a record of a class. Raises RecordError. Results that have grown are read again."""
    growing = cls is Results and path_of(id).suffix == ".jsonl"
    thing = _so_far(path_of(id), version_of(id)) if growing else _opened(id)
    assert isinstance(thing, cls), f"{id} is a {type(thing).__name__}, not a {cls.__name__}"
    return thing


@lru_cache(maxsize=1)
def _bundled_files() -> dict[str, Path]:
    """Files that come with the program, by id."""
    return {entry.id: Path(entry.file) for kind in _BUNDLED_KINDS for entry in _bundled_entries(kind)}


@lru_cache(maxsize=len(_BUNDLED_KINDS))
def _bundled_entries(kind: str) -> tuple[Entry, ...]:
    if kind == "story":
        files = (file for model in BUNDLED_RUNS for file in bundled_results(model).stories)
        stories = ((file, load(Story, file)) for file in files)
        return tuple(
            Entry(digest_of_file(file), kind, story.model, story.name, "recorded", "", str(file))
            for file, story in stories
        )
    fields = [field for field, of in _BUNDLED.items() if of == kind]
    found = ((model, field, getattr(bundled_results(model), field)) for model in BUNDLED_RUNS for field in fields)
    return tuple(
        Entry(
            digest_of_file(file),
            kind,
            model,
            _NAMES.get(kind, f"Bundled {field}"),
            f"{field}, bundled" if kind == "results" else "bundled",
            "",
            str(file),
        )
        for model, field, file in found
        if file
    )


def evidence(model: str) -> tuple[tuple[str, int], ...]:
    """Ids of all that a decision on a model may rest on, the newest first, each with the version of its file."""
    found = [one for kind in ("results", "front", "plan", "speed") for one in entries(kind, model=model)]
    stamps = []
    for one in found[:_MOST_EVIDENCE]:
        if one.kind != "results" or one.about.split(",")[0] in ("lm", *RETRIEVAL):
            with suppress(RecordError, OSError):  # it has just been deleted
                stamps.append((one.id, path_of(one.id).stat().st_mtime_ns))
    return tuple(stamps)


@lru_cache(maxsize=_MOST_OPEN)
def gathered(stamps: tuple[tuple[str, int], ...]) -> Evidence:
    """Open `evidence`; what is still being measured is left out."""
    records = []
    for id, _ in stamps:
        with suppress(RecordError):
            entry = find(id)
            records.append(entry and opened(KINDS[entry.kind], id))
    return Evidence.of(records).of_one_model()


def remembered(work: Callable[Asked, Answer]) -> Callable[Asked, Answer]:
    """Keep the latest answers of a function of ids and settings."""
    return cast(Callable[Asked, Answer], wraps(work)(lru_cache(maxsize=_MOST_ANSWERS)(work)))


def run(id: str) -> Capture:
    """Open a run. Raises RecordError."""
    return opened(Capture, id)


def pace(model: str, like: Capture | PretrainedConfig) -> Pace:
    """Pace of a model here: by its latest runs in the workspace, else a rough one by its size."""
    runs = []
    for entry in WORKSPACE.entries("run", model=model)[:_MOST_TIMED]:
        with suppress(RecordError):
            runs.append(run(entry.id))
    return Pace.of(runs) or Pace.rough(like)


@remembered
def study_of_run(id: str, probe: str) -> Study:
    """Make the study of one text from a run, by one probe."""
    return study_of(run(id), probes=(probe,))


@remembered
def values_of(id: str, skip_first: int, probe: str = "next token") -> HeadValues:
    """Metrics of all heads of a run by a probe. Metrics of the first token itself ignore `skip_first`."""
    study = study_of_run(id, probe)
    of_all = HeadValues(study.metrics, study.values[0, 0], study.status[0, 0])
    if not skip_first:
        return of_all
    import numpy as np

    others = metrics(run(id), probe, skip_first)
    about_sink = np.array([METRICS[name].about_sink for name in of_all.names])[:, None, None]
    return HeadValues(
        of_all.names,
        np.where(about_sink, of_all.values, others.values),
        np.where(about_sink, of_all.status, others.status),
    )


@remembered
def verdicts_of(id: str, probe: str = "next token") -> Any:
    """Verdict of each head of a run by a probe, [L, H] of str."""
    return verdicts(study_of_run(id, probe), probe=probe)


@remembered
def kv_alr_of(id: str, skip_first: int, probe: str) -> Any:
    """ALR of each kv head of a run, [L, Hkv], by the mean attention of the query heads that read it."""
    return metrics(by_kv_head(run(id)), probe, skip_first, ["alr"]).values[0]


@remembered
def gamma_by_query(id: str, skip_first: int) -> Any:
    """Γ of each of the last queries of a run, [W, L, H], with or without the first token."""
    return by_query(run(id), "gamma_skip_first" if skip_first else "gamma")


@remembered
def lost_of(id: str, spec: CompressionSpec) -> Any:
    """Attention that each head of a run loses at given settings, [L, H]. Raises SettingsError."""
    return attention_lost(run(id), spec)


@remembered
def means_of(id: str, metric: str, probe: str) -> Means:
    """Mean over the texts of a study of a metric of each head, with intervals, [L, H]."""
    return head_means(opened(Study, id), metric, probe=probe)


@remembered
def verdicts_over(id: str, probe: str) -> Any:
    """Verdict of each head by a study, [L, H] of str."""
    return verdicts(opened(Study, id), probe=probe)


@remembered
def answer_of(id: str, probe: str) -> str:
    """Answer for a model in a few sentences, by one of its runs or studies."""
    entry = find(id)
    assert entry is not None
    return answer(opened(Study, id) if entry.kind == "study" else study_of_run(id, probe), probe=probe)


@remembered
def layers_over(id: str, probe: str) -> tuple[Means, Stability]:
    """Normalised ALR of each layer by a study, [L], and how stable the order of layers is."""
    study = opened(Study, id)
    losses = layer_alr(study, probe=probe)
    return means(losses, documents=study.documents), stability(losses)


@remembered
def plan_of(id: str, protect_last: int, keep_ratio: float, strategy: str) -> AllocationPlan:
    """Plan from the loss curves of a study, or of a run beside a recent window. Raises SettingsError."""
    entry = find(id)
    assert entry is not None
    curves = opened(Study, id) if entry.kind == "study" else loss_curves(run(id), protect_last=protect_last)
    return plan(curves, keep_ratio, strategy)


@remembered
def decision(
    stamps: tuple[tuple[str, int], ...], spec: CompressionSpec, limits: Limits, plan: Plan | None = None
) -> Decision:
    """Decide by `evidence` on a compression, or on a plan where it is of one."""
    known = gathered(stamps)
    return known.decide_plan(plan, limits=limits) if plan else known.decide(spec, limits=limits)
