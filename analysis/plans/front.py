"""The front: what each way to share out a cache's bytes costs in prediction, on texts it was not made from.

Each point is one compression: the bytes that its cache held, counted, and the change of the negative log likelihood of
the text that follows, text by text; beside it the attention that it was expected to lose, which is what plans go by. A
`Front` is a record on disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from analysis.across import Interval, means, spearman
from analysis.errors import RunFileError, TextError
from analysis.files import content_of, record
from analysis.memory import CacheShape, human_bytes
from analysis.plans.curves import loss_curves
from analysis.plans.skip import spec_of
from analysis.plans.ways import WAYS
from l2kv.spec import CompressionSpec

if TYPE_CHECKING:
    from analysis.evaluation import OnDone
    from analysis.models import LoadedModel

VERSION = 1
KEEPS = (0.1, 0.2, 0.3, 0.5, 0.7)


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
    left_out: tuple[str, ...] = ()  # ways that a budget is too small for: "plan by head, keep 0.1: ..."

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

    def best(self, kind: str) -> dict[float, FrontPoint]:
        """At each budget the point of least mean NLL among the ways of a kind (`analysis.ways.KINDS`)."""
        points = [p for p in self.points if p.line in WAYS and WAYS[p.line].kind == kind and np.isfinite(_mean(p))]
        return {
            keep: min((p for p in points if p.keep == keep), key=_mean) for keep in sorted({p.keep for p in points})
        }

    def agreement(self, losses: str = "measured_loss") -> dict[float, float]:
        """At each budget, Spearman over its points of expected attention loss ("planned_loss" or "measured_loss") and
        mean NLL change: whether what plans go by is what counts. Under 3 points it is undefined, NaN."""
        result = {}
        for keep in sorted({p.keep for p in self.points}):
            points = [p for p in self.points if p.keep == keep and np.isfinite(getattr(p, losses))]
            loss, change = (np.array(v) for v in ([getattr(p, losses) for p in points], [_mean(p) for p in points]))
            result[keep] = float(spearman(loss, change))
        return result

    def answer(self) -> str:
        """Does a plan beat one ratio for all at equal bytes? In two or three sentences."""
        uniform, n = self.best("uniform"), len(self.measured_on)
        ahead = {
            (line, keep): interval
            for line in self.lines
            if line in WAYS and WAYS[line].kind == "plan"
            for keep, point in uniform.items()
            if (interval := self.against(line, point.line).get(keep)) is not None
        }
        if not ahead:
            return "This front cannot tell: it has no plan beside a uniform rule at the same budget."
        won = {key: interval for key, interval in ahead.items() if interval.high < 0}
        lost = sum(interval.low > 0 for interval in ahead.values())
        (line, keep), most = min((won or ahead).items(), key=lambda item: item[1].value)
        best = f"at keep {keep:g} ({human_bytes(uniform[keep].nbytes)}), {line} against {uniform[keep].line}: "
        best += f"{_nats(most)} nats a token"
        if won:
            where = ", ".join(f"{keep:g}" for keep in sorted({keep for _, keep in won}))
            told = f"Yes: at keep {where} a plan beats the best uniform rule by norm at equal bytes; most {best}."
        else:
            told = f"No: no plan beats the best uniform rule by norm at equal bytes; nearest comes, {best}."
        texts = f"{n} text{'s' * (n != 1)}"
        told += f" By the interval over {texts}, {len(won)} of {len(ahead)} comparisons are won and {lost} lost."
        return told + self._told_of_yardsticks()

    def _told_of_yardsticks(self) -> str:
        """Where what reads no norms is as good as all that do, which a front of norms must not hide."""
        by_norm = {
            keep: min((kind[keep] for kind in (self.best("uniform"), self.best("plan")) if keep in kind), key=_mean)
            for keep in self.best("uniform")
        }
        better = {
            keep: self.against(point.line, by_norm[keep].line)[keep]
            for keep, point in self.best("yardstick").items()
            if keep in by_norm and _mean(point) <= _mean(by_norm[keep])
        }
        if not better:
            return ""
        keep, interval = min(better.items(), key=lambda item: item[1].value)
        return (
            f" But {self.best('yardstick')[keep].line}, which reads no norms, is no worse than all of them at keep "
            f"{', '.join(f'{keep:g}' for keep in better)} ({_nats(interval)} at {keep:g})."
        )

    def to_json(self) -> str:
        """The file's text."""
        return record("front", VERSION, asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Front:
        """Read a front, which may come from anyone. Raises RunFileError, with the reason."""
        content = content_of(text, "front", VERSION)
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
            )
        except KeyError as error:
            raise RunFileError(f"This is not a front that can be read: it has no {error}.") from error
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise RunFileError(f"This is not a front that can be read: {str(error)[:200]}") from error
        n = len(front.measured_on)
        if {n} != {len(front.full_nll), *(len(point.nll_change) for point in front.points)}:
            raise RunFileError(f"This is not a front that can be read: not all its points are of its {n} texts.")
        return front


def measure_front(
    loaded: LoadedModel,
    plan_texts: Sequence[tuple[str, str]],
    test_texts: Sequence[tuple[str, str]],
    *,
    keeps: Sequence[float] = KEEPS,
    ways: Iterable[str] = tuple(WAYS),
    prompt_tokens: int,
    new_tokens: int,
    protect_last: int = 32,
    on_done: OnDone | None = None,
) -> Front:
    """Make the specs of all ways from the prompts of the planning texts, and measure them on the others.

    Takes a capture of each text's prompt, and for each of the N test texts a continuation by the full cache and by
    each spec; where a way goes by costs, one for each planning text and kv head as well. A way that cannot be had at a
    budget is left out, and named in `Front.left_out`.

    Args:
        plan_texts, test_texts: (name, text) of each; none may be in both.
        keeps: budgets, shares of the pairs of the layers that can be compressed.
        ways: names in `analysis.ways.WAYS`.
        on_done: for progress and cancelling, after each capture and each continuation.

    Raises:
        TextError: there are no texts, one is in both, empty or too short.
        ModelError, OutOfMemoryError: as `capture`.
        ValueError: a way is unknown, or as `continuations`.
    """
    from analysis.capturing import capture
    from analysis.evaluation import continuations, ignore, prompt_of  # waits for torch
    from analysis.plans.causal import weighed_by_cost

    on_done, ways = on_done or ignore, tuple(ways)
    if unknown := [way for way in ways if way not in WAYS]:
        raise ValueError(f"ways must be of {', '.join(WAYS)}; got {', '.join(map(repr, unknown))}")
    if not plan_texts or not test_texts:
        raise TextError("A front takes texts to plan on, and others to measure on.")
    if both := {text for _, text in plan_texts} & {text for _, text in test_texts}:
        raise TextError(f"A text to measure on was planned on, too: {next(iter(both))[:60]!r}. Give others.")
    costly = any(WAYS[way].needs_costs for way in ways)
    shape = CacheShape.of(loaded.config, loaded.model.dtype.itemsize)
    before = len(plan_texts) * (1 + costly * (1 + len(shape.layers) * shape.n_kv_heads))
    total = before + len(test_texts) * (2 + len(ways) * len(keeps))  # fewer, where ways agree on a spec
    runs = []
    for i, (_, text) in enumerate(plan_texts):
        runs.append(capture(loaded, prompt_of(loaded, text, prompt_tokens)))
        on_done(i + 1, total)
    curves = loss_curves(*runs, protect_last=protect_last)
    if costly:
        curves = weighed_by_cost(
            curves,
            loaded,
            [text for _, text in plan_texts],
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            on_done=lambda done, _: on_done(len(plan_texts) + done, total),
        )
    made, left_out = {}, []
    for way in ways:
        for keep in keeps:
            try:
                made[way, keep] = WAYS[way].make(curves, keep)
            except ValueError as error:
                left_out.append(f"{way}, keep {keep:g}: {error}")
    specs = tuple(dict.fromkeys(made.values()))
    losses = np.zeros((len(test_texts), len(specs)))
    for i, (_, text) in enumerate(test_texts):
        one = loss_curves(capture(loaded, prompt_of(loaded, text, prompt_tokens)), protect_last=protect_last)
        losses[i] = [one.loss_of(spec) for spec in specs]
        on_done(before + i + 1, total)
    before += len(test_texts)
    total = before + len(test_texts) * (1 + len(specs))
    full, *rows = continuations(
        loaded,
        [text for _, text in test_texts],
        (None, *specs),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        on_done=lambda done, _: on_done(before + done, total),
    )
    rows, expected = dict(zip(specs, rows, strict=True)), dict(zip(specs, losses.mean(axis=0), strict=True))
    return Front(
        model=loaded.name,
        planned_on=tuple(name for name, _ in plan_texts),
        measured_on=tuple(name for name, _ in test_texts),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        full_nbytes=_mean_bytes(full),
        full_nll=tuple(one.nll for one in full),
        points=tuple(
            FrontPoint(
                line=way,
                keep=float(keep),
                spec=spec,
                nbytes=_mean_bytes(rows[spec]),
                nll_change=tuple(one.nll - whole.nll for one, whole in zip(rows[spec], full, strict=True)),
                planned_loss=curves.loss_of(spec),
                measured_loss=float(expected[spec]),
            )
            for (way, keep), spec in made.items()
        ),
        left_out=tuple(left_out),
    )


def _mean_bytes(row) -> int:
    return round(sum(one.nbytes for one in row) / len(row))


def _mean(point: FrontPoint) -> float:
    return float(np.mean(point.nll_change))


def _nats(interval: Interval) -> str:
    """Three decimals: what plans differ by is less than a hundredth."""
    value, low, high = (
        f"{number:+.3f}".replace("-", "\N{MINUS SIGN}") for number in (interval.value, interval.low, interval.high)
    )
    return f"{value} ({'no interval' if np.isnan(interval.low) else f'95 % {low} to {high}'})"


def _interval(by_text: np.ndarray) -> Interval:
    over = means(by_text[:, None])
    return Interval(float(over.mean[0]), float(over.low[0]), float(over.high[0]))


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
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TypeError(f"a count must be a whole number, got {value!r:.60}")
    return value


def _number(value: object) -> float:
    """None is what a record makes of NaN."""
    if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
        raise TypeError(f"a number is needed, got {value!r:.60}")
    return float("nan") if value is None else float(value)
