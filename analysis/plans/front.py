"""The Pareto front: bytes against prediction of every allocation strategy, on texts that plans were not made from.

A view of results of the task `lm`, and a record on disk: each point is one strategy at one budget, with the bytes that
its cache held and the change of the negative log likelihood, text by text; beside it the attention that it was expected
to lose, which is what plans go by. Reading one waits for no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.defaults import KEEP_RATIOS, RECENT_WINDOW
from analysis.errors import ModelError, SettingsError, TextError
from analysis.evaluation.lm import LmSettings, prompt_of
from analysis.evaluation.results import FULL, Results
from analysis.measures import slim
from analysis.plans.allocation import BudgetError
from analysis.plans.curves import loss_curves
from analysis.plans.strategies import STRATEGIES, plan, title_of
from analysis.progress import Progress, part_of, unheard
from analysis.records import record
from analysis.statistics import MIN_TEXTS, Interval, few_documents_warning, simultaneous, spearman
from analysis.texts.excerpts import Texts, excerpts_from
from analysis.words import counted, human_bytes
from l2kv.config import CacheShape
from l2kv.spec import CompressionSpec

if TYPE_CHECKING:
    from analysis.captures import Capture
    from analysis.models.load import LoadedModel


@dataclass(frozen=True, slots=True)
class Planned:
    """One strategy at one budget, before it is measured."""

    strategy: str
    keep_ratio: float
    """The budget: a share of the pairs of the layers that can be compressed."""
    method: str
    """Name in the results."""
    planned_loss: float | None = None
    """Attention expected to be lost (`LossCurves.loss_of`) on the planning texts; None of those that read no norms."""
    measured_loss: float | None = None
    """The same on the prompts of the measured texts."""

    def __post_init__(self) -> None:
        if not 0 <= self.keep_ratio <= 1:
            raise ValueError(f"keep_ratio must be from 0 to 1, got {self.keep_ratio!r}")


@dataclass(frozen=True, slots=True)
class FrontPoint:
    """One strategy at one budget, measured on N texts."""

    strategy: str
    keep_ratio: float
    spec: CompressionSpec
    nbytes: int  # held after the prompt, mean over texts
    nll_change: tuple[float, ...]  # N, nats/token against the full cache
    planned_loss: float  # NaN of strategies that read no norms, as is the next
    measured_loss: float

    @property
    def mean(self) -> float:
        """Mean NLL change over texts."""
        return float(np.mean(self.nll_change))


@dataclass(frozen=True, slots=True)
class Comparison:
    """A plan beside a uniform strategy, at one budget."""

    plan: FrontPoint
    uniform: FrontPoint
    less: Interval  # NLL of the plan less that of the uniform one; intervals hold for all comparisons at once

    @property
    def verdict(self) -> str:
        """Verdict on the plan: "better" or "worse" if the whole interval is on one side of 0, else "not told apart"."""
        return "better" if self.less.high < 0 else "worse" if self.less.low > 0 else "not told apart"

    def __str__(self) -> str:
        if np.isnan(self.less.low):
            return f"{self.less.value:+.3f} nats/token; no interval with fewer than {MIN_TEXTS} texts"
        return f"{self.less.value:+.3f} [{self.less.low:+.3f}, {self.less.high:+.3f}] nats/token, {self.verdict}"


@record("front", version=2, title="a Pareto front", again="l2kv front")
@dataclass(frozen=True)
class Front:
    """The Pareto front of one model: allocation strategies at several budgets, measured on N texts."""

    planned_on: tuple[str, ...]
    """Names of the texts that plans were made from."""
    results: Results
    """Results of the task `lm` on other texts."""
    plans: tuple[Planned, ...]
    left_out: tuple[str, ...] = ()
    """Strategies that a budget is too small for: "by_head, keep ratio 0.1: ..."."""

    def __post_init__(self) -> None:
        if not self.measured_on:
            raise ValueError("it was measured on no texts")
        if unknown := {one.method for one in self.plans} - set(self.results.methods):
            raise ValueError(f"its results lack {', '.join(sorted(unknown))}")
        if any(self.results.methods[one.method] is None for one in self.plans):
            raise ValueError("the full cache is no plan")
        _ = self.results.full

    @property
    def model(self) -> str:
        """Name of the model."""
        return self.results.model

    @property
    def measured_on(self) -> tuple[str, ...]:
        """Names of the N texts that plans were measured on."""
        return self.results.samples

    @property
    def counted(self) -> str:
        """What it was measured on, in words: "16 excerpts of 8 texts"."""
        return f"{counted(len(self.measured_on), 'excerpt')} of {counted(len(set(self.results.documents)), 'text')}"

    @property
    def lengths(self) -> tuple[int, int]:
        """Numbers of tokens of each prompt and after it; 0 where the file does not say."""
        told = self.results.settings
        return int(told.get("prompt_tokens", 0)), int(told.get("new_tokens", 0))

    @property
    def full_nbytes(self) -> int:
        """Number of bytes that the full cache held, as `FrontPoint.nbytes`."""
        return self.results.nbytes(self.results.full)

    @cached_property
    def points(self) -> tuple[FrontPoint, ...]:
        """All points, in planning order."""
        points = []
        for one in self.plans:
            spec, change = self.results.methods[one.method], self.results.change(one.method)
            assert spec is not None, "checked when it was made"
            losses = (np.nan if loss is None else loss for loss in (one.planned_loss, one.measured_loss))
            nbytes = self.results.nbytes(one.method)
            points.append(FrontPoint(one.strategy, one.keep_ratio, spec, nbytes, tuple(change.tolist()), *losses))
        return tuple(points)

    @property
    def lines(self) -> dict[str, tuple[FrontPoint, ...]]:
        """Points of each strategy by rising bytes; strategies in the order of measurement."""
        names = dict.fromkeys(point.strategy for point in self.points)
        return {
            name: tuple(sorted((p for p in self.points if p.strategy == name), key=lambda p: p.nbytes))
            for name in names
        }

    def table(self) -> list[dict[str, Any]]:
        """A row for each point, by strategy and rising bytes; the NLL change with its interval."""
        names = ("strategy", "keep_ratio", "nbytes", "planned_loss", "measured_loss")
        points = [point for line in self.lines.values() for point in line]
        return [{name: getattr(p, name) for name in names} | {"nll_change": self.interval(p)} for p in points]

    def interval(self, point: FrontPoint) -> Interval:
        """Mean of a point's NLL change over texts, with a 95 % interval that resamples documents."""
        return self._intervals[point]

    @cached_property
    def _intervals(self) -> dict[FrontPoint, Interval]:
        return {point: self.results.interval(np.array(point.nll_change)) for point in self.points}

    def _of_kind(self, kind: str) -> list[FrontPoint]:
        return [p for p in self.points if p.strategy in STRATEGIES and STRATEGIES[p.strategy].kind == kind]

    def best(self, kind: str) -> dict[float, FrontPoint]:
        """Best point at each budget: least mean NLL among strategies of a kind (`analysis.plans.strategies.KINDS`)."""
        points = [point for point in self._of_kind(kind) if np.isfinite(point.mean)]
        return {
            keep: min((p for p in points if p.keep_ratio == keep), key=lambda p: p.mean)
            for keep in sorted({p.keep_ratio for p in points})
        }

    def agreement(self) -> dict[float, float]:
        """Spearman's ρ at each budget, over its points, of `measured_loss` and mean NLL change; NaN with fewer than 3.

        It tells whether what plans go by is what counts."""
        known = [point for point in self.points if np.isfinite(point.measured_loss)]
        result = {}
        for keep in sorted({p.keep_ratio for p in self.points}):
            points = [p for p in known if p.keep_ratio == keep]
            loss, change = np.array([p.measured_loss for p in points]), np.array([p.mean for p in points])
            result[keep] = float(spearman(loss, change))
        return result

    def comparisons(self) -> tuple[Comparison, ...]:
        """Compare, at each budget, the best plan with the best uniform strategy.

        Both are the best on the texts that they are compared on, so the intervals hold for every plan beside every
        uniform strategy at every budget at once (`simultaneous`): whichever are picked.
        """
        plans = self.best("plan")
        best = (one for one in self._against_best_uniform if one.plan is plans[one.plan.keep_ratio])
        return tuple(sorted(best, key=lambda one: one.plan.keep_ratio))

    @cached_property
    def _against_best_uniform(self) -> list[Comparison]:
        """Every plan, beside the best uniform strategy at its budget."""
        uniform = self._of_kind("uniform")
        pairs = [(p, other) for p in self._of_kind("plan") for other in uniform if other.keep_ratio == p.keep_ratio]
        if not pairs:
            return []
        less = np.array([np.subtract(p.nll_change, other.nll_change) for p, other in pairs])
        best = self.best("uniform")
        return [
            Comparison(p, other, interval)
            for (p, other), interval in zip(pairs, simultaneous(less.T, documents=self.results.documents), strict=True)
            if other is best.get(other.keep_ratio) and np.isfinite(interval.value)
        ]

    def __str__(self) -> str:
        return "\n".join(self._sentences())

    def _sentences(self) -> Iterator[str]:
        yield from (f"not possible: {words}" for words in self.left_out)
        known = {keep: value for keep, value in self.agreement().items() if np.isfinite(value)}
        agreement = ", ".join(f"{value:+.2f} at keep ratio {keep:g}" for keep, value in known.items())
        yield (
            "Spearman over strategies of expected attention loss, on the measured texts, and NLL change: "
            + (agreement or "undefined, with fewer than 3 strategies of known loss at each keep ratio")
        )
        for one in self.comparisons():
            yield f"keep ratio {one.plan.keep_ratio:g}: {one.plan.strategy} against {one.uniform.strategy}: {one}"
        yield self.answer()

    def answer(self) -> str:
        """Say in two or three sentences whether a plan beats one ratio for all at equal bytes."""
        compared, n = self._against_best_uniform, len(self.measured_on)
        if not compared:
            return "This Pareto front cannot tell: it has no plan beside a uniform strategy at the same budget."
        if n < MIN_TEXTS:
            return f"This Pareto front cannot tell: it was measured on {counted(n, 'text')}; {MIN_TEXTS} are needed."
        won = [one for one in compared if one.verdict == "better"]
        lost = sum(one.verdict == "worse" for one in compared)
        most = min(won or compared, key=lambda one: one.less.value)
        best = f"at keep ratio {most.plan.keep_ratio:g} ({human_bytes(most.uniform.nbytes)}), "
        best += f"{title_of(most.plan.strategy)} against {title_of(most.uniform.strategy)}: {_nats(most.less)}"
        if won:
            where = _listed(sorted({one.plan.keep_ratio for one in won}))
            told = f"At keep ratio {where} a plan beats the best uniform strategy of the same bytes. The largest gain "
            told += f"is {best}."
        else:
            told = "No plan is clearly better than the best uniform strategy of the same bytes. The best case "
            told += f"is {best}{', which may be luck' if most.less.value < 0 else ''}."
        told += f" Over {self.counted}, by intervals that hold for all comparisons at once, plans win {len(won)} of "
        told += f"{len(compared)} and lose {lost}."
        of_few = few_documents_warning(self.results.documents)
        return f"{told}{f' {of_few}' if of_few else ''}{self._baselines_warning()}"

    def _baselines_warning(self) -> str:
        """Say where a baseline, which reads no norms, is as good as every strategy that does."""
        uniform, plans = self.best("uniform"), self.best("plan")
        by_norm = {keep: min(one.mean, plans.get(keep, one).mean) for keep, one in uniform.items()}
        as_good: dict[str, dict[float, float]] = {}  # by strategy and budget, NLL less that of the best by norm
        for keep, point in self.best("baseline").items():
            if keep in by_norm and point.mean <= by_norm[keep]:
                as_good.setdefault(point.strategy, {})[keep] = point.mean - by_norm[keep]
        if not as_good:
            return ""
        lines = [
            f"{title_of(name)} at keep ratio {_listed(less)} ({_signed(min(less.values()))} at "
            f"{min(less, key=less.__getitem__):g})"
            for name, less in as_good.items()
        ]
        return f" But a baseline that reads no norms is, on average, no worse than any of them: {'; '.join(lines)}."


def passes(n_planning: int, n_measuring: int, *, keep_ratios: int, strategies: Iterable[str], kv_heads: int) -> int:
    """Most captures and continuations that `measure_front` needs; strategies with equal specs share theirs.

    Args:
        n_planning, n_measuring: numbers of texts.
        keep_ratios: number of budgets.
        kv_heads: number in all layers that can be compressed; each is compressed alone if a strategy goes by costs.
    """
    strategies = tuple(strategies)
    costly = any(STRATEGIES[name].needs_costs for name in strategies)
    return n_planning * (1 + costly * (1 + kv_heads)) + n_measuring * (2 + len(strategies) * keep_ratios)


def measure_front(
    loaded: LoadedModel,
    planning: Texts,
    measuring: Texts,
    *,
    keep_ratios: Sequence[float] = KEEP_RATIOS,
    strategies: Iterable[str] | None = None,
    settings: LmSettings | None = None,
    protect_last: int = RECENT_WINDOW,
    out: str | Path | None = None,
    progress: Progress = unheard,
) -> Front:
    """Plan by every strategy on the prompts of some texts, and measure the plans on other texts.

    Takes a capture of each text's prompt, and for each text to measure on a continuation by the full cache and by each
    spec; where a strategy goes by costs, one for each planning text and kv head as well. `Front.left_out` names the
    strategies that a budget is too small for.

    Args:
        planning, measuring: pairs (name, text), or `excerpts`; no text may be in both.
        keep_ratios: budgets, shares of the pairs of the layers that can be compressed.
        strategies: names in `STRATEGIES`; by default all.
        out: file to write each continuation to, so that a stopped measurement continues, as for `evaluate`; those that
            costs are told by go to `costs_beside` it.
        progress: counts captures and continuations ("passes").

    Raises:
        TextError: there are no texts, or one is in both, empty or too short.
        ModelError: no layer can be compressed, or as `capture`.
        OutOfMemoryError: as `capture`.
        SettingsError: a strategy is unknown, a keep ratio is not from 0 to 1, or as `evaluate`.
    """
    from analysis.evaluation.run import evaluate  # waits for torch
    from analysis.plans.ablation import with_head_costs
    from analysis.recorder import capture

    names, settings = tuple(STRATEGIES if strategies is None else strategies), settings or LmSettings()
    plan_texts, test_texts = (excerpts_from(texts) for texts in (planning, measuring))
    if wrong := [keep for keep in keep_ratios if isinstance(keep, bool) or not 0 <= keep <= 1]:
        raise SettingsError(f"keep_ratios must be from 0 to 1, got {', '.join(map(str, wrong))}")
    if not names or not keep_ratios:
        raise SettingsError("A Pareto front takes one strategy and one keep ratio at least.")
    for name in names:
        STRATEGIES.find(name)
    if not plan_texts or not test_texts:
        raise TextError("A Pareto front needs texts to plan on, and other texts to measure on.")
    if both := {one.text for one in plan_texts} & {one.text for one in test_texts}:
        raise TextError(
            f"A text is given both to plan on and to measure on: {next(iter(both))[:60]!r}. Give different texts."
        )
    shape = CacheShape.of(loaded.config, loaded.model.dtype.itemsize)
    if not shape.layers:
        raise ModelError(f"{loaded.name} has no layer that can be compressed: all have a sliding window.")
    n_heads = len(shape.layers) * shape.n_kv_heads
    before, total = (
        passes(len(plan_texts), n, keep_ratios=len(keep_ratios), strategies=names, kv_heads=n_heads)
        for n in (0, len(test_texts))
    )

    def captured(text: str, done: int) -> Capture:
        prompt = prompt_of(loaded.tokenizer, text, settings.prompt_tokens)
        run = slim(capture(loaded, prompt, last_queries=0, progress=lambda *_: progress(done, total, "passes")))
        progress(done + 1, total, "passes")
        return run

    runs = [captured(one.text, i) for i, one in enumerate(plan_texts)]
    documents = [one.document or one.name for one in plan_texts]
    curves = loss_curves(*runs, protect_last=protect_last, documents=documents)
    if any(STRATEGIES[name].needs_costs for name in names):
        told = part_of(progress, len(plan_texts), total, "passes")
        beside = None if out is None else costs_beside(out)
        curves = with_head_costs(curves, loaded, plan_texts, settings=settings, out=beside, progress=told)
    made, left_out = {}, []
    for name in names:
        for keep in keep_ratios:
            try:
                made[name, float(keep)] = plan(curves, keep, name).to_spec()
            except BudgetError as error:
                left_out.append(f"{name}, keep ratio {keep:g}: {error}")
    losses = np.zeros((len(test_texts), len(made)))
    for i, text in enumerate(test_texts):
        one = loss_curves(captured(text.text, before + i), protect_last=protect_last)
        losses[i] = [one.loss_of(spec) for spec in made.values()]
    before += len(test_texts)
    methods = {f"{name} {keep:.9g}": spec for (name, keep), spec in made.items()}
    total = before + len(test_texts) * len({None, *methods.values()})
    results = evaluate(
        loaded,
        "lm",
        {FULL: None, **methods},
        texts=test_texts,
        settings=settings,
        out=out,
        progress=part_of(progress, before, total, "passes"),
    )
    plans = tuple(
        Planned(name, keep, method, *(None if np.isnan(loss) else float(loss) for loss in (curves.loss_of(spec), lost)))
        for ((name, keep), spec), method, lost in zip(made.items(), methods, losses.mean(axis=0), strict=True)
    )
    return Front(tuple(one.name for one in plan_texts), results.of_samples(), plans, tuple(left_out))


def costs_beside(out: str | Path) -> Path:
    """File beside that of a Pareto front, for the continuations that tell the costs of single heads."""
    return Path(out).with_suffix(".costs.jsonl")


def _listed(keeps: Iterable[float]) -> str:
    return ", ".join(f"{keep:g}" for keep in keeps)


def _signed(nats: float) -> str:
    """Three decimals: what plans differ by is less than a hundredth."""
    return f"{nats:+.3f}".replace("-", "\N{MINUS SIGN}")


def _nats(interval: Interval) -> str:
    return f"{_signed(interval.value)} nats/token (95 % {_signed(interval.low)} to {_signed(interval.high)})"
