"""Results of an evaluation as drawings and as a section of a page: what each method scores. Runs no model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import floor, inf, log10, nan
from typing import Any, NamedTuple

import numpy as np

from analysis.errors import SettingsError
from analysis.evaluation.results import Results
from analysis.evaluation.task import Task
from analysis.evaluation.tasks import TASKS
from analysis.statistics import MIN_TEXTS, Interval, few_documents_warning, nanmean
from analysis.words import counted, span
from app import figures
from app.figures import Curve
from app.report.writing import Drawing, Section, Table
from l2kv.policies import POLICIES

_PLACES = 16  # points of a line over positions, each the mean of neighbouring ones


@dataclass(frozen=True, slots=True)
class _Score:
    """How a column of `Results.by_position` is drawn."""

    title: str
    unit: str
    most: float | None = None
    """The axis begins at 0 where there is one, and ends here."""


SCORES = {
    "nll": _Score("NLL", "NLL, nats/token"),
    "perplexity_ratio": _Score("Perplexity ratio", "perplexity ratio to the full cache"),
    "accuracy": _Score("Accuracy", "share of next tokens predicted", inf),
}


POSITIONED = ("perplexity_ratio", "accuracy")
"""Scores of predicted tokens that are drawn by their position, unless others are asked for."""


def section(
    results: Results, *, heading: str = "", by_position: Sequence[str] = POSITIONED, dark: bool = False
) -> Section:
    """The section of results of a task: what they hold in drawings, and their summary as a table.

    Args:
        heading: by default, task and model.
        by_position: what to draw where tokens were predicted, of "nll", "perplexity_ratio" and "accuracy".
        dark: whether the page is.

    Raises:
        SettingsError: the task is not registered.
    """
    task = TASKS.find(results.task)
    better = "higher" if task.higher_is_better else "lower"
    spread = "Wilson's, over samples" if task.share else "by resampling documents"
    known, n = any(row.document for row in results.rows), len(results.samples)
    words = (
        f"{task.about} {counted(n, 'sample')}; the score is in {task.unit}, and {better} is better. "
        f"Intervals are 95 %, {spread}. Bytes are those of the keys and values held, the mean over samples.",
        few_documents_warning(results.documents if known else ()),
        f"Of {counted(n, 'sample')} they are too narrow." if not task.share and n < MIN_TEXTS else "",
        "The full cache scores 0, so this task tells nothing about this model." if _fails(results, task) else "",
        *map(_note, results.notes),
    )
    maps = tuple(_maps(results, task, dark))
    drawings = (_by_bytes(results, task), *maps, *by_positions(results, by_position))
    columns = 1 if maps else 2  # a map for each method takes the whole width
    rows = _table(told(results, task))
    return Section(heading or f"{task.title}: {results.model}", tuple(filter(None, words)), drawings, columns, rows)


def _fails(results: Results, task: Task) -> bool:
    """Tell whether the full cache gets nothing right, so that nothing can be worse."""
    return task.higher_is_better and None in results.methods.values() and not results.scores(results.full).any()


def summaries(results: Iterable[Results]) -> list[dict[str, Any]]:
    """What each of some results is of, and its summary, for JSON."""
    about = ("model", "task", "settings", "methods", "run", "notes")
    return [
        {name: getattr(one, name) for name in about} | {"rows": one.summary(TASKS.find(one.task))} for one in results
    ]


def _by_bytes(results: Results, task: Task) -> Drawing:
    rows, n = results.summary(replace(task, axes=())), len(results.samples)
    name = "perplexity_ratio" if "perplexity_ratio" in rows[0] else "score"
    most = task.right if task.scoring else None
    score = SCORES.get(name, _Score(task.title, f"score, {task.unit}", most))
    lines, full = _lines(results, (_Point(row["method"], row["MiB"], row[name]) for row in rows))
    return Drawing(
        figures.score_by_bytes(lines, full=full, score=score.unit, most=score.most),
        alt=f"The bytes held against the {score.unit}, a line for each method",
        title=f"{task.title} against bytes, n = {n}",
        caption=f"Means over {counted(n, 'sample')} with 95 % intervals; those of the same bytes stand side by side. "
        f"{'Upper' if task.higher_is_better else 'Lower'} left is better.",
        table=_table(rows),
    )


def _maps(results: Results, task: Task, dark: bool) -> Iterator[Drawing]:
    """The maps of lengths and depths, where samples have both."""
    if not all({"n_tokens", "depth"} <= row.at.keys() for row in results.rows):
        return
    places = results.grouped("n_tokens", "depth")
    lengths, depths = (sorted({float(place[axis]) for place in places}) for axis in (0, 1))
    cells = {place: (depths.index(float(place[1])), lengths.index(float(place[0]))) for place in places}
    samples = np.zeros((len(depths), len(lengths)), dtype=np.int64)
    for place, names in places.items():
        samples[cells[place]] = len(names)
    panels = {}
    for method in results.methods:
        panels[_words(method)] = shares = np.full(samples.shape, np.nan)
        for place, scores in results.scores_by(method, "n_tokens", "depth").items():
            shares[cells[place]] = nanmean(scores) / task.right
    depth, length = (index.ravel() for index in np.indices(samples.shape))
    yield Drawing(
        figures.length_depth_maps(panels, lengths=lengths, depths=depths, samples=samples, dark=dark),
        alt="Share found by length of the prompt and depth in it, a map for each method",
        title=f"{task.title} by length and depth, n = {span(samples[samples > 0].tolist())} in each cell",
        caption="Depth 0 % is the beginning of the text. Strong colour is found, weak is not.",
        table={"tokens": np.array(lengths)[length], "depth": np.array(depths)[depth], "samples": samples.ravel()}
        | {name: shares.ravel() for name, shares in panels.items()},
    )


def by_positions(results: Results, names: Sequence[str] = POSITIONED) -> Iterator[Drawing]:
    """Draw scores by the position in the text: a figure for each of `names` and each budget, whose lines would mix."""
    try:
        n = len(results.positions)
    except SettingsError:  # nothing was predicted, or at other positions in each sample
        return
    least = -(-n // _PLACES)
    width = min(range(least, 2 * least), key=lambda width: -n % width)  # few tokens at the end would make a wild point
    rows = results.by_position(width=width)
    compressed = [method for method, spec in results.methods.items() if spec is not None]
    for budget in dict.fromkeys(_budget_of(method) for method in compressed):
        here = [row for row in rows if row["method"] not in compressed or _budget_of(row["method"]) == budget]
        for name in (name for name in names if name in here[0]):
            score = SCORES[name]
            points = [_Point(row["method"], row["position"], row[name]) for row in here]
            lines, full = _lines(results, points)
            yield Drawing(
                figures.score_by_position(lines, full=full, score=score.unit, most=score.most),
                alt=f"{score.title} by position in the text, a line for each method",
                title=f"{score.title} by position{budget and f', budget {budget}'}, n = {len(results.samples)}",
                caption="Each point is the mean over neighbouring positions, with its 95 % interval.",
                table=_table([{"method": at.method, "position": at.x, score.unit: at.value} for at in points]),
            )


class _Point(NamedTuple):
    """A mean of a method at a place."""

    method: str
    x: float
    value: Interval


def _lines(results: Results, points: Iterable[_Point]) -> tuple[dict[str, Curve], Curve | None]:
    """The line of each method over its budgets or places, from left to right, and that of the full cache."""
    of: dict[str, list[_Point]] = {}
    for point in points:
        of.setdefault(_line_of(point.method), []).append(point)
    curves = {name: _curve(sorted(line, key=lambda point: point.x)) for name, line in of.items()}
    full = next((_line_of(method) for method, spec in results.methods.items() if spec is None), None)
    return {name: curve for name, curve in curves.items() if name != full}, None if full is None else curves[full]


def _curve(points: Sequence[_Point]) -> Curve:
    x, values = np.array([point.x for point in points]), [_with_width(point.value) for point in points]
    mean, low, high = (np.array([getattr(one, end) for one in values]) for end in ("value", "low", "high"))
    return Curve(x, mean, low, high, tuple(_words(point.method) for point in points))


def _budget_of(method: str) -> str:
    """The budget that a method's name ends with: "low_norm 0.5" -> "0.5"; "" where it ends with none."""
    line, _, budget = method.rpartition(" ")
    return budget if line and budget.replace(".", "", 1).isdecimal() else ""


def _line_of(method: str) -> str:
    """The name of a method for readers, without its budget: "low_norm 0.5" -> "low norm"."""
    return _words(method.removesuffix(f" {_budget_of(method)}"))


def _words(method: str) -> str:
    """The name of a method for readers: a policy is called what it is called everywhere."""
    budget = _budget_of(method)
    name = method.removesuffix(f" {budget}")
    told = POLICIES[name].in_words if name in POLICIES else name.replace("_", " ")
    return f"{told} {budget}".rstrip()


def _note(note: str) -> str:
    """A note that may begin with the name of a method, as those of `analysis.evaluation.methods`."""
    method, left_out, why = note.partition(" is left out: ")
    return _words(method) + left_out + why if left_out else note


_AGAINST_FULL = ("change", "perplexity_ratio")


def told(results: Results, task: Task) -> list[dict[str, Any]]:
    """The summary for readers: methods by their names, and each interval in one cell."""
    return [
        row
        | {"method": _words(row["method"])}
        | {name: _told(value, row["samples"]) for name, value in row.items() if isinstance(value, Interval)}
        | {name: "" for name in _AGAINST_FULL if name in row and results.methods[row["method"]] is None}
        for row in results.summary(task)
    ]


def _told(value: Interval, n: int) -> str:
    """A mean of n and its interval, to the places that its width makes worth reading."""
    if np.isnan(value.value):
        return "undefined"
    width = value.high - value.low
    places = min(max(2 - floor(log10(width)), 0), 4) if width > 0 else 3
    mean, low, high = (
        f"{end:.{places}f}".replace("-", "\N{MINUS SIGN}") for end in (value.value, value.low, value.high)
    )
    if _all_equal(value):
        return f"{mean} (no interval: all {n} are equal)"
    return mean if np.isnan(value.low) else f"{mean} ({low} to {high})"


def _all_equal(value: Interval) -> bool:
    """Tell whether an interval has no width: resampling equal numbers says nothing about others."""
    return bool(np.isclose(value.low, value.high, rtol=1e-9, atol=0))


def _with_width(value: Interval) -> Interval:
    """The mean alone where its interval has no width."""
    return replace(value, low=nan, high=nan) if _all_equal(value) else value


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A summary as columns for readers, an interval in three."""
    columns: dict[str, Iterable[Any]] = {}
    for name, first in rows[0].items():
        values, title = [row[name] for row in rows], name.removeprefix("n_").replace("_", " ")
        if isinstance(first, Interval):
            ends = (("", "value"), (", from", "low"), (", to", "high"))
            columns |= {f"{title}{word}": [getattr(_with_width(one), end) for one in values] for word, end in ends}
        else:
            columns[title] = [_words(value) for value in values] if name == "method" else values
    return columns
