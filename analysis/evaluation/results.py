"""Results of an evaluation, as a record: one row for each method and sample, and views of them. Runs nothing.

A Pareto front, a single-layer ablation and a passkey grid are views of results.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import exp, isfinite, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.errors import SettingsError
from analysis.records import content_of, from_content, record
from analysis.statistics import Interval, means
from analysis.texts.read import read_text
from l2kv.spec import CompressionSpec

if TYPE_CHECKING:
    import pandas as pd

    from analysis.evaluation.task import Task

Methods = Mapping[str, CompressionSpec | None]
"""What is compared, by name; None is the full cache."""
Place = tuple[str | float, ...]
"""Where samples stand on some axes of a task's grid: (400, 0.5)."""
FULL = "full cache"
"""What the full cache is called where a caller doesn't say."""
ONCE, LIVE = "context once, then live", "live from the first token"
"""When a cache was compressed (`Row.compressed`)."""


@dataclass(frozen=True, slots=True)
class Row:
    """Score and bytes of one sample by one method."""

    method: str
    sample: str
    score: float | None
    """In the task's unit; None is undefined."""
    nbytes: int
    """Payload of the keys and values held, counted from tensors: after the prompt (context and question), or after the
    last token where there is no context."""
    allocated: int = 0
    """Bytes allocated for them then, slack included; 0 where it is not known."""
    text: str = ""
    """The answer that was generated."""
    document: str = ""
    at: Mapping[str, str | float] = field(default_factory=dict)
    """Place of the sample in the task's grid: {"n_tokens": 400, "depth": 0.5}."""
    compressed: str = ""
    """When the cache was compressed, `ONCE` or `LIVE`; empty for the full cache."""
    context: int = 0
    """Number of tokens that ran before the first compression."""
    decoded: int = 0
    """Number of tokens that ran after it: the question, and the target or answer without its last token."""
    nats: tuple[float | None, ...] = ()
    """NLL of each target token, to 5 decimals; None is undefined."""
    hits: tuple[int, ...] = ()
    """1 for each target token that was the likeliest, else 0."""
    key: str = ""
    """Digest of everything the score depends on (`analysis.evaluation.log`)."""

    @property
    def value(self) -> float:
        """The score; NaN where it is undefined."""
        return nan if self.score is None else self.score


@dataclass(frozen=True, slots=True)
class Run:
    """What results depend on besides the model, the task, its settings and the methods."""

    samples: int
    """Number of samples, N."""
    digest: str
    """Digest of the samples, in order."""
    task_version: int
    tokens_at_once: int
    """Most tokens whose pairs a batch holds."""
    threads: int
    device: str
    dtype: str
    packages: Mapping[str, str]
    """Versions of l2kv, torch and transformers."""
    together: tuple[tuple[str, ...], ...] = ()
    """Methods that were evaluated at a time, in order, as batches are made of them: all, but for those added later."""


@dataclass(frozen=True, slots=True)
class Work:
    """Number of tokens to run, over all samples and specs."""

    prefilled: int
    """Number of context tokens."""
    saved: int
    """Number of context tokens that sharing one pass between specs saves."""
    decoded: int
    """Number of tokens after the contexts: questions, targets and answers, each to its own end."""


@record("results", version=2, title="a file of results", again="l2kv evaluate", lines="rows")
@dataclass(frozen=True)
class Results:
    """Scores and bytes of every method on every sample of a task."""

    model: str
    weights: str
    """A digest of weights and vocabulary (`analysis.models.digest`); empty where it is not known."""
    task: str
    settings: Mapping[str, Any]
    methods: Methods
    rows: tuple[Row, ...]
    """By method, and within it by sample."""
    run: Run | None = None
    """None where it is not known."""
    notes: tuple[str, ...] = ()
    """Warnings about texts and lengths."""

    def __post_init__(self) -> None:
        if unknown := {row.method for row in self.rows} - set(self.methods):
            raise ValueError(f"rows are of methods that the results do not have: {', '.join(sorted(unknown))}")
        n = self.run.samples if self.run else len(self.samples)
        if len(self.rows) != len(self.methods) * n or len(self.samples) != n or len(self._cells) != len(self.rows):
            raise ValueError(
                f"each method must have one row for each sample, and {len(self.rows)} of {len(self.methods) * n} are "
                "there; run a stopped evaluation again to continue it"
            )
        if not all(row.score is None or isfinite(row.score) for row in self.rows):
            raise ValueError("a score must be a finite number, or none")
        if not all(0 <= row.nbytes < 2**63 for row in self.rows):
            raise ValueError("nbytes must be from 0 to 2^63")
        if any(len(row.nats) != len(row.hits) for row in self.rows):
            raise ValueError("each token with an NLL must be a hit or a miss")
        # Files have them in the order in which they were computed.
        in_order = tuple(self._cells[method, sample] for method in self.methods for sample in self.samples)
        object.__setattr__(self, "rows", in_order)

    @cached_property
    def samples(self) -> tuple[str, ...]:
        """Names of the N samples, in row order."""
        return tuple(dict.fromkeys(row.sample for row in self.rows))

    @cached_property
    def documents(self) -> tuple[str, ...]:
        """Names of the documents that the N samples were cut from; by default the sample's own name."""
        of = {row.sample: row.document or row.sample for row in self.rows}
        return tuple(of[sample] for sample in self.samples)

    @cached_property
    def _cells(self) -> dict[tuple[str, str], Row]:
        return {(row.method, row.sample): row for row in self.rows}

    @cached_property
    def by_spec(self) -> Mapping[CompressionSpec | None, str]:
        """Name of the method of each spec; of equal ones, which are run once, the last."""
        return {spec: name for name, spec in self.methods.items()}

    @property
    def full(self) -> str:
        """Name of the full cache. Raises SettingsError if it was not measured."""
        names = [name for name, spec in self.methods.items() if spec is None]
        if not names:
            raise SettingsError(
                "These results lack the full cache, which changes are measured against. Evaluate it, too."
            )
        return names[0]

    def of(self, method: str) -> tuple[Row, ...]:
        """Select the N rows of a method. Raises KeyError if there is none."""
        return tuple(self._cells[method, sample] for sample in self.samples)

    def scores(self, method: str) -> np.ndarray:
        """Scores of a method, [N] float64; NaN where undefined."""
        return np.array([row.value for row in self.of(method)])

    def of_samples(self) -> Results:
        """Leave out what is known of single tokens, and keys: a tenth of the size, which no evaluation continues."""
        return replace(self, rows=tuple(replace(row, nats=(), hits=(), key="") for row in self.rows))

    def change(self, method: str) -> np.ndarray:
        """Scores of a method minus those of the full cache on the same samples, [N]. Raises as `full`."""
        return self.scores(method) - self.scores(self.full)

    def nbytes(self, method: str) -> int:
        """Mean number of bytes that a method held, over samples, rounded."""
        return round(sum(row.nbytes for row in self.of(method)) / len(self.samples))

    def interval(self, values: np.ndarray, samples: Sequence[str] = ()) -> Interval:
        """Mean of values [N] over samples (by default all), with a 95 % interval that resamples documents."""
        of = dict(zip(self.samples, self.documents, strict=True))
        over = means(values[:, None], documents=[of[sample] for sample in samples or self.samples])
        return Interval(float(over.mean[0]), float(over.low[0]), float(over.high[0]))

    def grouped(self, *axes: str) -> dict[Place, tuple[str, ...]]:
        """Group samples by axes of the task's grid: {(400, 0.5): names} for the axes n_tokens and depth.

        Raises KeyError for an axis that the grid does not have.
        """
        groups: dict[Place, tuple[str, ...]] = {}
        for sample in self.of(next(iter(self.methods))):
            key = tuple(sample.at[axis] for axis in axes)
            groups[key] = (*groups.get(key, ()), sample.sample)
        return groups

    def scores_by(self, method: str, *axes: str) -> dict[Place, np.ndarray]:
        """Scores of a method in each group of `grouped`."""
        return {
            key: np.array([self._cells[method, sample].value for sample in samples])
            for key, samples in self.grouped(*axes).items()
        }

    def nats(self, method: str) -> np.ndarray:
        """NLL of each predicted token, [N, T]; NaN where undefined. Raises as `positions`."""
        shape = len(self.samples), len(self.positions)
        return np.array([row.nats for row in self.of(method)], dtype=float).reshape(shape)

    def hits(self, method: str) -> np.ndarray:
        """Whether each predicted token was the likeliest, [N, T] bool. Raises as `positions`."""
        shape = len(self.samples), len(self.positions)
        return np.array([row.hits for row in self.of(method)], dtype=bool).reshape(shape)

    @cached_property
    def positions(self) -> np.ndarray:
        """Positions of the predicted tokens in their texts, [T], counted from 0.

        Raises:
            SettingsError: nothing was predicted token by token, or positions differ between samples.
        """
        spans = {(row.context + row.decoded + 1 - len(row.nats), len(row.nats)) for row in self.rows}
        if len(spans) != 1 or not (span := next(iter(spans)))[1]:
            raise SettingsError("These results have no NLL by position, or at different positions of each sample.")
        return np.arange(span[0], sum(span))

    def by_position(self, *, width: int = 1) -> list[dict[str, Any]]:
        """Tabulate each method by `width` positions: mean NLL, perplexity and accuracy with their intervals.

        "position" is the first of each group; the last group may be smaller. "change" and "perplexity_ratio" are as in
        `summary`.

        Raises:
            SettingsError: as `positions`, or the width is less than 1.
        """
        if width < 1:
            raise SettingsError(f"width must be 1 or more, got {width}")
        full = next((name for name, spec in self.methods.items() if spec is None), None)
        starts = np.arange(0, len(self.positions), width)
        sizes = np.diff([*starts, len(self.positions)])

        def intervals(values: np.ndarray) -> list[Interval]:
            over = means(np.add.reduceat(values, starts, axis=1) / sizes, documents=self.documents)
            ends = zip(over.mean.tolist(), over.low.tolist(), over.high.tolist(), strict=True)
            return [Interval(*one) for one in ends]

        rows = []
        for method in self.methods:
            columns = {"nll": intervals(self.nats(method)), "accuracy": intervals(self.hits(method).astype(float))}
            columns["perplexity"] = [_exp(one) for one in columns["nll"]]
            if full is not None:
                columns["change"] = intervals(self.nats(method) - self.nats(full))
                columns["perplexity_ratio"] = [_exp(one) for one in columns["change"]]
            for i, start in enumerate(self.positions[starts].tolist()):
                rows.append({"method": method, "position": start} | {name: of[i] for name, of in columns.items()})
        return rows

    def work(self) -> Work:
        """Count the tokens that were run, and those that sharing passes saved."""
        one = self.by_spec
        runs = min(len(one), len(self.run.together) if self.run and self.run.together else 1)
        context = sum(row.context for row in self.of(next(iter(self.methods)))) if self.methods else 0
        decoded = sum(row.decoded for name in one.values() for row in self.of(name))
        return Work(runs * context, (len(one) - runs) * context, decoded)

    def summary(self, task: Task) -> list[dict[str, Any]]:
        """Tabulate each method at each place on the task's axes: samples, bytes, score and change of it.

        Intervals of shares are Wilson's; others resample documents. "change" is the paired difference to the full
        cache, and there only where that was measured. Where tokens were predicted there are perplexity,
        its ratio (`exp` of the change), and next-token accuracy.

        Args:
            task: task that the results are of, as registered. An axis that not all of its samples have is ignored.
        """
        axes = tuple(axis for axis in task.axes if all(axis in row.at for row in self.rows))
        changes, allocated = None in self.methods.values(), all(row.allocated for row in self.rows)
        predicted = bool(self.rows) and all(row.nats for row in self.rows)
        rows = []
        for method in self.methods:
            for key, samples in self.grouped(*axes).items():
                here = np.array([self._cells[method, sample].value for sample in samples])
                row: dict[str, Any] = {"method": method, **dict(zip(axes, key, strict=True)), "samples": len(samples)}
                row["MiB"] = np.mean([self._cells[method, sample].nbytes for sample in samples]) / 2**20
                if allocated:
                    row["allocated_MiB"] = np.mean([self._cells[method, one].allocated for one in samples]) / 2**20
                row["score"] = wilson(here, task.right) if task.share else self.interval(here, samples)
                if changes:
                    full = np.array([self._cells[self.full, sample].value for sample in samples])
                    row["change"] = self.interval(here - full, samples)
                if predicted:
                    hits = [np.mean(self._cells[method, sample].hits) for sample in samples]
                    row["perplexity"] = _exp(row["score"])
                    row |= {"perplexity_ratio": _exp(row["change"])} if changes else {}
                    row["accuracy"] = self.interval(np.array(hits), samples)
                rows.append(row)
        return rows

    def table(self) -> list[dict[str, Any]]:
        """Flatten the rows to dicts, for CSV or a data frame, with the model, its digest and the task in each."""
        common = {"model": self.model, "weights": self.weights, "task": self.task}
        own = (
            "method",
            "sample",
            "document",
            "score",
            "nbytes",
            "allocated",
            "compressed",
            "context",
            "decoded",
            "text",
            "key",
        )
        return [
            common
            | {name: getattr(row, name) for name in own}
            | {"seed": getattr(self.methods[row.method], "seed", None)}
            | dict(row.at)
            for row in self.rows
        ]

    def frame(self) -> pd.DataFrame:
        """Return `table` as a data frame."""
        import pandas as pd

        return pd.DataFrame(self.table())


def results_so_far(path: str | Path) -> Results:
    """Read results that may have been stopped at any row: those of the samples that every method has done.

    Raises:
        RecordError: the file is missing, or no file of results.
    """
    content = content_of(Results, read_text(path))
    rows = content.get("rows", [])
    done = Counter(row.get("sample") for row in rows)
    n_methods = len(content.get("methods", ()))
    of_all = [row for row in rows if done[row.get("sample")] == n_methods]
    run = content.get("run")
    if isinstance(run, dict) and n_methods:
        content["run"] = run | {"samples": len(of_all) // n_methods}
    return from_content(Results, content | {"rows": of_all})


def _exp(values: Interval) -> Interval:
    """Perplexity of an NLL, or perplexity ratio of an NLL change."""
    return Interval(*(exp(min(value, 700.0)) for value in (values.value, values.low, values.high)))


def wilson(scores: np.ndarray, right: float = 1.0) -> Interval:
    """Mean of scores that are 0 or `right`, with Wilson's 95 % interval."""
    from scipy.stats import binomtest

    ends = binomtest(int((scores == right).sum()), len(scores)).proportion_ci(method="wilson")
    return Interval(float(scores.mean()), right * ends.low, right * ends.high)
