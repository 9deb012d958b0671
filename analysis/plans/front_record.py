"""What was measured of ways to share out a cache's bytes, as a file, and what it says. Knows no model and runs nothing.

Each point is one compression: the bytes that its cache held, counted, and the change of the negative log likelihood of
the text that follows, text by text; beside it the attention that it was expected to lose, which is what plans go by.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np

from analysis.errors import RecordError
from analysis.files import content_of, record
from analysis.models.memory import human_bytes
from analysis.plans.skip import spec_of
from analysis.plans.strategies import KINDS, WAYS
from analysis.statistics import MIN_TEXTS, Interval, means, simultaneous, spearman, told_of_documents
from l2kv.spec import CompressionSpec

VERSION = 1
_MOST = 2**63


@dataclass(frozen=True, slots=True)
class FrontPoint:
    """One compression, measured on N texts."""

    line: str  # the way it belongs to, one of `Front.lines`: "uniform, low norm"
    keep: float  # the budget it was given: a share of the pairs of the layers that can be compressed
    spec: CompressionSpec
    nbytes: int  # of keys and values held after the last token, counted from tensors, mean over texts
    nll_change: tuple[float, ...]  # N, nats a token against the full cache
    planned_loss: float = np.nan  # attention expected to be lost (`LossCurves.loss_of`) on the planning texts
    measured_loss: float = np.nan  # the same of the measured texts' prompts; NaN of ways that read no norms


@dataclass(frozen=True, slots=True)
class Comparison:
    """A plan beside a uniform way, at one budget."""

    plan: FrontPoint
    uniform: FrontPoint
    less: Interval  # NLL of the plan less that of the uniform way; holds at once with those of all others of the front

    @property
    def verdict(self) -> str:
        """The plan is "better" or "worse" where the whole interval says so, else "not told apart"."""
        return "better" if self.less.high < 0 else "worse" if self.less.low > 0 else "not told apart"


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
    left_out: tuple[str, ...] = ()  # ways that a budget is too small for: "plan by head, keep 0.1: ..."
    documents: tuple[str, ...] = ()  # N, names of what the measured texts are excerpts of; none of older files: unknown

    @property
    def lines(self) -> dict[str, tuple[FrontPoint, ...]]:
        """The points of each way, by rising bytes, in the order in which the ways were measured."""
        names = dict.fromkeys(point.line for point in self.points)
        return {
            name: tuple(sorted((p for p in self.points if p.line == name), key=lambda p: p.nbytes)) for name in names
        }

    def interval(self, point: FrontPoint) -> Interval:
        """The mean of a point's NLL change over texts and its 95 % interval, by resampling them."""
        over = means(np.array(point.nll_change)[:, None], documents=self.documents)
        return Interval(float(over.mean[0]), float(over.low[0]), float(over.high[0]))

    def best(self, kind: str) -> dict[float, FrontPoint]:
        """At each budget the point of least mean NLL among the ways of a kind (`analysis.plans.strategies.KINDS`)."""
        points = [p for p in self.points if p.line in WAYS and WAYS[p.line].kind == kind and np.isfinite(_mean(p))]
        return {
            keep: min((p for p in points if p.keep == keep), key=_mean) for keep in sorted({p.keep for p in points})
        }

    def agreement(self) -> dict[float, float]:
        """At each budget, Spearman over its points of `measured_loss` and mean NLL change: whether what plans go by is
        what counts. Under 3 points it is undefined, NaN."""
        result = {}
        for keep in sorted({p.keep for p in self.points}):
            points = [p for p in self.points if p.keep == keep and np.isfinite(p.measured_loss)]
            loss, change = (np.array(v) for v in ([p.measured_loss for p in points], [_mean(p) for p in points]))
            result[keep] = float(spearman(loss, change))
        return result

    def comparisons(self) -> tuple[Comparison, ...]:
        """At each budget the best plan beside the best uniform way.

        Both are the best on the texts that they are compared on, so the intervals hold for every plan beside every
        uniform way at every budget at once (`analysis.statistics.simultaneous`): whichever are picked.
        """
        plans = self.best("plan")
        best = (one for one in self._against_best_uniform() if one.plan is plans[one.plan.keep])
        return tuple(sorted(best, key=lambda one: one.plan.keep))

    def _against_best_uniform(self) -> list[Comparison]:
        """Every plan, beside the best uniform way at its budget."""
        kinds = {kind: [p for p in self.points if p.line in WAYS and WAYS[p.line].kind == kind] for kind in KINDS}
        pairs = [(plan, way) for plan in kinds["plan"] for way in kinds["uniform"] if way.keep == plan.keep]
        if not pairs:
            return []
        less = np.array([np.subtract(plan.nll_change, way.nll_change) for plan, way in pairs])
        best = self.best("uniform")
        return [
            Comparison(plan, way, interval)
            for (plan, way), interval in zip(pairs, simultaneous(less.T, documents=self.documents), strict=True)
            if way is best.get(way.keep) and np.isfinite(interval.value)
        ]

    def answer(self) -> str:
        """Does a plan beat one ratio for all at equal bytes? In two or three sentences."""
        compared, n = self._against_best_uniform(), len(self.measured_on)
        if not compared:
            return "This front cannot tell: it has no plan beside a uniform rule at the same budget."
        if n < MIN_TEXTS:
            return (
                f"This front cannot tell: it was measured on {n} text{'s' * (n != 1)}, and {MIN_TEXTS} are the least."
            )
        won = [one for one in compared if one.verdict == "better"]
        lost = sum(one.verdict == "worse" for one in compared)
        most = min(won or compared, key=lambda one: one.less.value)
        best = f"at keep {most.plan.keep:g} ({human_bytes(most.uniform.nbytes)}), {most.plan.line} against "
        best += f"{most.uniform.line}: {_nats(most.less)} nats a token"
        if won:
            where = _listed(sorted({one.plan.keep for one in won}))
            told = f"Yes: at keep {where} a plan beats the best uniform rule by norm at equal bytes; most {best}."
        else:
            told = "Not shown: no plan beats the best uniform rule by norm at equal bytes by more than texts differ; "
            told += f"nearest comes, {best}."
        told += f" By intervals over {n} texts that hold for all comparisons at once, {len(won)} of {len(compared)} are"
        of_few = told_of_documents(self.documents)
        return f"{told} won and {lost} lost.{f' {of_few}' if of_few else ''}{self._told_of_yardsticks()}"

    def _told_of_yardsticks(self) -> str:
        """Where what reads no norms is as good as all that do, which a front of norms must not hide."""
        uniform, plans = self.best("uniform"), self.best("plan")
        by_norm = {keep: min(map(_mean, (way, plans.get(keep, way)))) for keep, way in uniform.items()}
        as_good: dict[str, dict[float, float]] = {}  # by line and keep, NLL less that of the best by norm
        for keep, point in self.best("yardstick").items():
            if keep in by_norm and _mean(point) <= by_norm[keep]:
                as_good.setdefault(point.line, {})[keep] = _mean(point) - by_norm[keep]
        if not as_good:
            return ""
        lines = [
            f"{line} at keep {_listed(less)} ({_signed(min(less.values()))} at {min(less, key=less.get):g})"
            for line, less in as_good.items()
        ]
        return f" But what reads no norms is, in the mean, no worse than all of them: {'; '.join(lines)}."

    def to_json(self) -> str:
        """The file's text."""
        return record("front", VERSION, asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Front:
        """Read a front, which may come from anyone. Raises RecordError, with the reason."""
        content = content_of(text, "front", VERSION, called="front of ways")
        try:
            front = cls(
                model=_text(content["model"]),
                planned_on=tuple(map(_text, content["planned_on"])),
                measured_on=tuple(map(_text, content["measured_on"])),
                prompt_tokens=_count(content["prompt_tokens"]),
                new_tokens=_count(content["new_tokens"]),
                full_nbytes=_count(content["full_nbytes"]),
                full_nll=tuple(map(_number, content["full_nll"])),
                points=tuple(map(_point, content["points"])),
                left_out=tuple(map(_text, content.get("left_out", ()))),
                documents=tuple(map(_text, content.get("documents", ()))),
            )
        except KeyError as error:
            raise RecordError(f"This is not a front that can be read: it has no {error}.") from error
        except (ValueError, TypeError, AttributeError, RecursionError, ArithmeticError) as error:
            raise RecordError(f"This is not a front that can be read: {str(error)[:200]}") from error
        n = len(front.measured_on)
        if not n or {n} != {len(front.full_nll), *(len(point.nll_change) for point in front.points)}:
            raise RecordError(f"This is not a front that can be read: not all its points are of its {n} texts.")
        if len(front.documents) not in (0, n):
            raise RecordError(f"This is not a front that can be read: its documents are not of its {n} texts.")
        return front


def _mean(point: FrontPoint) -> float:
    return float(np.mean(point.nll_change))


def _listed(keeps: Iterable[float]) -> str:
    return ", ".join(f"{keep:g}" for keep in keeps)


def _signed(nats: float) -> str:
    """Three decimals: what plans differ by is less than a hundredth."""
    return f"{nats:+.3f}".replace("-", "\N{MINUS SIGN}")


def _nats(interval: Interval) -> str:
    return f"{_signed(interval.value)} (95 % {_signed(interval.low)} to {_signed(interval.high)})"


def _point(given: dict) -> FrontPoint:
    keep = _number(given["keep"])
    if not 0 <= keep <= 1:
        raise ValueError(f"keep must be from 0 to 1, got {keep!r}")
    return FrontPoint(
        line=_text(given["line"]),
        keep=keep,
        spec=spec_of(given["spec"]),
        nbytes=_count(given["nbytes"]),
        nll_change=tuple(map(_number, given["nll_change"])),
        planned_loss=_number(given.get("planned_loss")),
        measured_loss=_number(given.get("measured_loss")),
    )


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a name must be text, got {value!r:.60}")
    return value


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _MOST:
        raise TypeError(f"a count must be a whole number from 0 to 2^63, got {value!r:.60}")
    return value


def _number(value: object) -> float:
    """None is what a record makes of NaN."""
    if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
        raise TypeError(f"a number is needed, got {value!r:.60}")
    return float("nan") if value is None else float(value)
