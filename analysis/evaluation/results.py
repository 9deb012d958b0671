"""Results of an evaluation, as a record: one row for each method and sample, and views of them. Runs nothing.

A Pareto front, a single-layer ablation and a passkey grid are views of results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite, nan
from typing import Any

import numpy as np

from analysis.errors import SettingsError
from analysis.records import record
from analysis.statistics import Interval, means
from l2kv.spec import CompressionSpec

Methods = Mapping[str, CompressionSpec | None]
"""What is compared, by name; None is the full cache."""
Place = tuple[str | float, ...]
"""Where samples stand on some axes of a task's grid: (400, 0.5)."""
FULL = "full cache"
"""What the full cache is called where a caller doesn't say."""


@dataclass(frozen=True, slots=True)
class Row:
    """Score and bytes of one sample by one method."""

    method: str
    sample: str
    score: float | None
    """In the task's unit; None is undefined."""
    nbytes: int
    """Payload of the keys and values held, counted from tensors: after the last token where tokens were predicted,
    after the question where an answer was generated."""
    text: str = ""
    """The answer that was generated."""
    document: str = ""
    at: Mapping[str, str | float] = field(default_factory=dict)
    """Place of the sample in the task's grid: {"n_tokens": 400, "depth": 0.5}."""

    @property
    def value(self) -> float:
        """The score; NaN where it is undefined."""
        return nan if self.score is None else self.score


@record("results", version=1, title="a file of results", again="l2kv evaluate")
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

    def __post_init__(self) -> None:
        if unknown := {row.method for row in self.rows} - set(self.methods):
            raise ValueError(f"rows are of methods that the results do not have: {', '.join(sorted(unknown))}")
        if len(self.rows) != len(self.methods) * len(self.samples) or len(self._cells) != len(self.rows):
            raise ValueError("each method must have one row for each sample")
        if not all(row.score is None or isfinite(row.score) for row in self.rows):
            raise ValueError("a score must be a finite number, or none")
        if not all(0 <= row.nbytes < 2**63 for row in self.rows):
            raise ValueError("nbytes must be from 0 to 2^63")

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

    def summary(self, *, right: float = 1.0) -> list[dict[str, Any]]:
        """Tabulate each method at each place on the first axis of the grid: samples, bytes, score and NLL change.

        Intervals of scores that are all 0 or `right` are Wilson's; others resample documents. "change" is
        against the full cache, and there only where scores are of another kind and the full cache was measured.

        Args:
            right: score of a right answer, as `Task.right`.
        """
        axes = tuple(self.rows[0].at)[:1] if self.rows else ()
        shares = all(row.score in (0, right) for row in self.rows)
        changes = not shares and None in self.methods.values()
        rows = []
        for method in self.methods:
            for key, samples in self.grouped(*axes).items():
                here = np.array([self._cells[method, sample].value for sample in samples])
                row: dict[str, Any] = {"method": method, **dict(zip(axes, key, strict=True)), "samples": len(samples)}
                row["MiB"] = np.mean([self._cells[method, sample].nbytes for sample in samples]) / 2**20
                row["score"] = wilson(here, right) if shares else self.interval(here, samples)
                if changes:
                    full = np.array([self._cells[self.full, sample].value for sample in samples])
                    row["change"] = self.interval(here - full, samples)
                rows.append(row)
        return rows

    def table(self) -> list[dict[str, Any]]:
        """Flatten the rows to dicts, for CSV or a data frame."""
        common = {"model": self.model, "task": self.task}
        return [
            common
            | {name: getattr(row, name) for name in ("method", "sample", "document", "score", "nbytes", "text")}
            | dict(row.at)
            for row in self.rows
        ]


def wilson(scores: np.ndarray, right: float = 1.0) -> Interval:
    """Mean of scores that are 0 or `right`, with Wilson's 95 % interval."""
    from scipy.stats import binomtest

    ends = binomtest(int((scores == right).sum()), len(scores)).proportion_ci(method="wilson")
    return Interval(float(scores.mean()), right * ends.low, right * ends.high)
