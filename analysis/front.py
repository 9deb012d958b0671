"""The front: what each way to share out a cache's bytes costs in prediction, on texts it was not made from.

Each point is one compression: the bytes that its cache held, counted, and the change of the negative log likelihood of
the text that follows, text by text. A `Front` is a record on disk.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.across import Interval, means
from l2kv.spec import CompressionSpec

VERSION = 1


@dataclass(frozen=True, slots=True)
class FrontPoint:
    """One compression, measured on N texts."""

    line: str  # the way it belongs to, one of `Front.lines`: "uniform, low norm"
    keep: float  # the budget it was given: a share of the pairs of the layers that can be compressed
    spec: CompressionSpec
    nbytes: int  # of keys and values held after the last token, counted from tensors, mean over texts
    nll_change: tuple[float, ...]  # N, nats a token against the full cache

    def interval(self) -> Interval:
        """The mean over texts and its 95 % interval, by resampling them."""
        return _interval(np.array(self.nll_change))


@dataclass(frozen=True, slots=True)
class Front:
    """Ways to share out a cache's bytes in one model, at several budgets."""

    model: str
    planned_on: tuple[str, ...]  # names of the texts that the plans were made from
    measured_on: tuple[str, ...]  # N others
    prompt_tokens: int
    new_tokens: int
    full_nbytes: int  # of the full cache, as `FrontPoint.nbytes`
    full_nll: tuple[float, ...]  # N, nats a token of the full cache
    points: tuple[FrontPoint, ...]

    @property
    def lines(self) -> dict[str, tuple[FrontPoint, ...]]:
        """The points of each way, by rising bytes, in the order in which the ways were measured."""
        names = dict.fromkeys(point.line for point in self.points)
        return {
            name: tuple(sorted((p for p in self.points if p.line == name), key=lambda p: p.nbytes)) for name in names
        }

    def against(self, line: str, other: str) -> dict[float, Interval]:
        """NLL of one way less that of another at each budget that both have; paired by text, so the interval is too."""
        first, second = ({p.keep: np.array(p.nll_change) for p in self.lines[name]} for name in (line, other))
        return {keep: _interval(first[keep] - second[keep]) for keep in sorted(first.keys() & second.keys())}


def _interval(by_text: np.ndarray) -> Interval:
    over = means(by_text[:, None])
    return Interval(float(over.mean[0]), float(over.low[0]), float(over.high[0]))
