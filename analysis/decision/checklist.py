"""The answer for a model and its compression: GO, GO WITH A PLAN, NO-GO or NOT YET, by rules over results.

A compression passes if prediction and retrieval both hold up against the full cache on the same samples. An interval
decides, not a mean, so that too few samples cannot pass by luck. Runs nothing, and knows no model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from math import exp, isnan, nan
from typing import Annotated

import numpy as np

from analysis.errors import SettingsError
from analysis.evaluation.results import Results
from analysis.evaluation.tasks import TASKS
from analysis.statistics import Interval, few_documents_warning
from analysis.words import counted, signed
from l2kv.policies import POLICIES
from l2kv.spec import CompressionSpec

RETRIEVAL = ("passkey", "needle")
"""Tasks in which something is found or not."""
SAME_BYTES = 0.01
"""Share by which a plan may hold more bytes than the compression that it stands for."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a compression may cost, and what it takes to say so."""

    perplexity_ratio: Annotated[float, "Most that perplexity may be multiplied by."] = 1.02
    points_lost: Annotated[float, "Points, of 100, that finding passkeys or needles may fall by."] = 5.0
    least_excerpts: Annotated[int, "Excerpts that prediction must be measured on."] = 16
    least_samples: Annotated[int, "Passkeys, and needles, that must be asked for."] = 50
    """Where none is lost, an interval that resamples is of no width; 50 without a loss rule out one of 6 points."""
    full_finds: Annotated[float, "Share that the full cache must find itself, or else finding tells nothing."] = 0.9

    def __post_init__(self) -> None:
        if not 1 <= self.perplexity_ratio < 100:
            raise SettingsError(f"perplexity_ratio must be from 1 to 100, got {self.perplexity_ratio:g}")
        if not 0 < self.points_lost <= 100:
            raise SettingsError(f"points_lost must be above 0 and at most 100, got {self.points_lost:g}")
        if not 0 < self.full_finds <= 1:
            raise SettingsError(f"full_finds must be above 0 and at most 1, got {self.full_finds:g}")
        if min(self.least_excerpts, self.least_samples) < 2:
            raise SettingsError("least_excerpts and least_samples must be 2 or more: one sample has no interval")


class Status(StrEnum):
    """How a line of the checklist stands."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_APPLICABLE = "not applicable"
    NOT_YET = "not yet"


class Answer(StrEnum):
    """The word that the checklist ends in, the best first: what is not measured yet may still pass."""

    GO = "GO"
    GO_WITH_A_PLAN = "GO WITH A PLAN"
    NOT_YET = "NOT YET"
    NO_GO = "NO-GO"


@dataclass(frozen=True, slots=True)
class Check:
    """A line of the checklist."""

    asks: str
    """The question: "Does it predict as well?"."""
    status: Status
    says: str
    """What was measured, against which limit, in a sentence."""
    short: str = ""
    """What was measured, in a few characters: "× 1.013", "49 of 50 (full 50)"; empty if nothing was."""
    n: int = 0
    """Number of samples measured with it and with the full cache."""
    missing: str = ""
    """What has to be measured yet: "8 more excerpts"; empty unless the status is NOT_YET."""
    measured: Interval | None = None
    """The perplexity ratio, or the change of the share found in points."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The checklist of a compression and of a plan, and the answer that they end in."""

    answer: Answer
    why: str
    """The answer's reason, in a sentence or two."""
    checks: tuple[Check, ...]
    """Checks of the compression that was asked about."""
    plan: CompressionSpec | None = None
    plan_checks: tuple[Check, ...] = ()
    """Checks of a plan of the same bytes; empty if there is none."""
    smallest: float | None = None
    """Smallest keep ratio measured from which on all measured ones pass; None if none passes."""
    rival: CompressionSpec | None = None
    """The same compression by another policy, which passes; None if none was measured that does."""

    def __str__(self) -> str:
        return f"{self.answer}. {self.why}"

    def told(self, spec: CompressionSpec) -> tuple[str, ...]:
        """Say how the compression asked about, or the plan, stands: what stands above its script.

        The answer, then each line of the checklist that does not pass, with what was measured.
        """
        of_plan = spec == self.plan
        first = "GO WITH A PLAN. This is the plan." if of_plan and self.answer is Answer.GO_WITH_A_PLAN else str(self)
        failed = (Status.FAILED, Status.NOT_YET)
        checks = [check for check in (self.plan_checks if of_plan else self.checks) if check.status in failed]
        return first, *(f"{check.asks} {check.status.capitalize()}. {check.says}" for check in checks)


def decide(
    results: Iterable[Results],
    spec: CompressionSpec,
    *,
    plan: CompressionSpec | None = None,
    planned_on: Collection[str] = (),
    weights: str = "",
    limits: Limits | None = None,
) -> Decision:
    """Decide whether a compression, or else a plan of the same bytes, may replace the full cache.

    Args:
        results: of the tasks `lm`, `passkey` and `needle`, in any number; others are ignored. Of several that measure a
            compression on one task those of the most samples count, of equally many the last.
        spec: the compression that is asked about. Others that differ in `keep_ratio` alone tell which ratio would pass.
        plan: a compression by layer or head to fall back on, which counts on texts that it was not made from.
        planned_on: names of the texts that the plan was made from.
        weights: digest of the model that is asked about, where it is known (`Results.weights`).

    Raises:
        SettingsError: the results are of several models, or of another one.
    """
    limits, given = limits or Limits(), tuple(one for one in results if one.rows)  # some have just begun
    _check_one_model(given, weights)
    asked = _checks(given, spec, limits)
    planned = () if plan is None else (*_checks(given, plan, limits), *_fair(given, plan, spec, planned_on))
    family = _family(given, spec)
    smallest, rival = _smallest_passing(given, family, limits), _passing_rival(given, spec, limits)
    match _outcome(asked), _outcome(planned):
        case Status.PASSED, _:
            answer, why = Answer.GO, "This compression passes every check that applies."
        case Status.NOT_YET, _:
            answer, why = Answer.NOT_YET, f"To be measured: {_missing(asked)}."
        case _, Status.PASSED:
            answer, why = (
                Answer.GO_WITH_A_PLAN,
                "This compression fails; a plan of the same bytes passes, on texts that it was not made from.",
            )
        case _, Status.NOT_YET:
            answer, why = Answer.NOT_YET, f"As set, it fails: {_failures(asked)}. A plan of the same bytes may pass; "
            why += f"to be measured of it: {_missing(planned)}." if planned else "none is measured yet."
            why += f" {_would_pass(smallest, family)}" if smallest else ""
        case _:
            answer, why = (
                Answer.NO_GO,
                f"This compression fails, and so does a plan of the same bytes. {_would_pass(smallest, family)}",
            )
    if answer in (Answer.GO, Answer.GO_WITH_A_PLAN):
        why += _not_judged(planned if answer is Answer.GO_WITH_A_PLAN else asked)
    elif rival:
        why += f" The same bytes by {POLICIES.find(rival.policy).in_words} pass."
    return Decision(answer, why, asked, plan, planned, smallest, rival)


def decide_plan(
    results: Iterable[Results],
    plan: CompressionSpec,
    *,
    planned_on: Collection[str] = (),
    weights: str = "",
    limits: Limits | None = None,
) -> Decision:
    """Decide whether a plan may replace the full cache, whatever bytes it holds.

    Args:
        results, planned_on, weights, limits: as for `decide`.

    Raises:
        SettingsError: as `decide`.
    """
    limits, given = limits or Limits(), tuple(one for one in results if one.rows)
    _check_one_model(given, weights)
    checks = _checks(given, plan, limits)
    if planned_on or plan.layer_ratios or plan.head_ratios or plan.directions:  # else it was made from no texts
        checks = (*checks, _on_other_texts(given, plan, planned_on))
    match _outcome(checks):
        case Status.PASSED:
            return Decision(Answer.GO, f"This plan passes every check that applies.{_not_judged(checks)}", checks)
        case Status.NOT_YET:
            return Decision(Answer.NOT_YET, f"To be measured of this plan: {_missing(checks)}.", checks)
    failed = [check for check in checks if check.status is Status.FAILED]
    return Decision(Answer.NO_GO, f"This plan fails {len(failed)} of {len(checks)} checks.", checks)


def _check_one_model(results: Sequence[Results], weights: str) -> None:
    """Raise SettingsError unless all results are of one model: by its weights, and by name where those are unknown."""
    digests = {one.weights for one in results if one.weights} | ({weights} if weights else set())
    names = {one.model for one in results}
    if len(digests) > 1 or (len(names) > 1 and not all(one.weights for one in results)):
        raise SettingsError(f"The results are of different models ({', '.join(sorted(names))}). Give those of one.")


def _checks(results: Sequence[Results], spec: CompressionSpec, limits: Limits) -> tuple[Check, ...]:
    return (_prediction(results, spec, limits), *(_retrieval(task, results, spec, limits) for task in RETRIEVAL))


def _outcome(checks: Sequence[Check]) -> Status:
    """FAILED if any check is; else NOT_YET if any is, or there is none."""
    statuses = {check.status for check in checks} or {Status.NOT_YET}
    return next((one for one in (Status.FAILED, Status.NOT_YET) if one in statuses), Status.PASSED)


def _missing(checks: Sequence[Check]) -> str:
    return ", ".join(check.missing for check in checks if check.status is Status.NOT_YET)


def _failures(checks: Sequence[Check]) -> str:
    """What failed and by how much: "perplexity × 1.019 (95 % up to 1.056), passkeys 31 of 50 (full 50)"."""
    prediction, *retrieval = checks
    ends = prediction.measured
    told = [
        f"perplexity {prediction.short}{f' (95 % up to {ends.high:.3f})' if ends else ''}",
        *(f"{task}s {one.short}" for task, one in zip(RETRIEVAL, retrieval, strict=True)),
    ]
    return ", ".join(words for words, one in zip(told, checks, strict=True) if one.status is Status.FAILED)


def _not_judged(checks: Sequence[Check]) -> str:
    """A sentence on the tasks that say nothing, since the full cache fails at them; empty where there are none."""
    names = [task for task, check in zip(RETRIEVAL, checks[1:], strict=False) if check.status is Status.NOT_APPLICABLE]
    return f" What the full cache does not find itself is not judged: {' and '.join(names)}." if names else ""


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Scores of a compression and of the full cache on the same samples."""

    results: Results
    method: str

    @property
    def scores(self) -> tuple[np.ndarray, np.ndarray]:
        """Scores [N] of the compression and of the full cache."""
        return self.results.scores(self.method), self.results.scores(self.results.full)

    @property
    def n(self) -> int:
        """Number of samples whose score is defined with the full cache."""
        return int(np.isfinite(self.scores[1]).sum())

    @property
    def undefined(self) -> int:
        """Number of these that have no score under the compression."""
        ours, full = self.scores
        return int((np.isfinite(full) & ~np.isfinite(ours)).sum())

    def interval(self) -> Interval:
        """Mean change with its interval, over the samples that have both scores."""
        return self.results.interval(self.results.change(self.method))


def _pairs(results: Sequence[Results], task: str, spec: CompressionSpec) -> _Pairs | None:
    """The measurement with the most samples; None if there is none with the full cache beside it."""
    found = [
        _Pairs(one, name)
        for one in results
        if one.task == task and None in one.methods.values()
        for name, its in one.methods.items()
        if its == spec
    ]
    return max(reversed(found), key=lambda pairs: pairs.n, default=None)


def _prediction(results: Sequence[Results], spec: CompressionSpec, limits: Limits) -> Check:
    asks, needed = "Does it predict text as well as the full cache?", limits.least_excerpts
    pairs = _pairs(results, "lm", spec)
    if pairs is None or pairs.n < needed:
        return _not_yet(asks, 0 if pairs is None else pairs.n, needed, "excerpt")
    if pairs.undefined:
        return _undefined(asks, pairs)
    change = pairs.interval()
    ratio = Interval(*(exp(min(end, 700.0)) for end in (change.value, change.low, change.high)))
    says = (
        f"Perplexity × {ratio.value:.3f} (95 % {ratio.low:.3f} to {ratio.high:.3f}; {signed(change.value, 3)} "
        f"nats/token) over {counted(pairs.n, 'excerpt')}; the interval must end by × {limits.perplexity_ratio:g}."
    )
    says = f"{says} {few_documents_warning(pairs.results.documents)}".rstrip()
    status = Status.PASSED if ratio.high <= limits.perplexity_ratio else Status.FAILED
    return Check(asks, status, says, f"× {ratio.value:.3f}", pairs.n, measured=ratio)


def _retrieval(task: str, results: Sequence[Results], spec: CompressionSpec, limits: Limits) -> Check:
    asks, needed, noun = f"Does it find each {task} that the full cache finds?", limits.least_samples, task
    pairs = _pairs(results, task, spec)
    if pairs is None or pairs.n < needed:
        return _not_yet(asks, 0 if pairs is None else pairs.n, needed, noun)
    right = TASKS[task].right
    ours, full = (scores / right for scores in pairs.scores)
    found, of_full = np.nansum(ours), np.nansum(full)
    if of_full < limits.full_finds * pairs.n:
        says = (
            f"The full cache itself finds {of_full:g} of {pairs.n}, less than {limits.full_finds:.0%}: "
            "what it does not find cannot be lost."
        )
        return Check(asks, Status.NOT_APPLICABLE, says, f"full cache {of_full:g} of {pairs.n}", pairs.n)
    if pairs.undefined:
        return _undefined(asks, pairs)
    change = pairs.interval()
    points = Interval(*(100 * end / right for end in (change.value, change.low, change.high)))
    says = (
        f"It finds {found:g} of {pairs.n}, the full cache {of_full:g}: {_points(points.value)} points "
        f"(95 % {_points(points.low)} to {_points(points.high)}); the interval must be above "
        f"{_points(-limits.points_lost)}."
    )
    status = Status.PASSED if points.low > -limits.points_lost else Status.FAILED
    return Check(asks, status, says, f"{found:g} of {pairs.n} (full {of_full:g})", pairs.n, measured=points)


def _points(value: float) -> str:
    return f"{value:+.3g}".replace("-", "\N{MINUS SIGN}") if value else "0"


def _not_yet(asks: str, n: int, needed: int, noun: str) -> Check:
    says = f"Measured on {n} of the {counted(needed, noun)} that it takes." if n else "Not measured."
    missing = counted(needed - n, f"more {noun}" if n else noun)
    return Check(asks, Status.NOT_YET, says, f"{n} of {needed} measured" if n else "", n, missing)


def _undefined(asks: str, pairs: _Pairs) -> Check:
    says = f"{pairs.undefined} of {pairs.n} have no score under it, as its logits are not finite."
    return Check(asks, Status.FAILED, says, "undefined", pairs.n)


def bytes_beside(results: Iterable[Results], plan: CompressionSpec, spec: CompressionSpec) -> float:
    """Bytes that a plan holds over those of a compression, on the task where it is most; NaN if none measured both."""
    named = [(one, one.by_spec.get(plan), one.by_spec.get(spec)) for one in results if one.rows]
    both = [(one.nbytes(ours), one.nbytes(its)) for one, ours, its in named if ours and its]
    return max((planned / its for planned, its in both if its), default=nan)


def _fair(
    results: Sequence[Results], plan: CompressionSpec, spec: CompressionSpec, planned_on: Collection[str]
) -> tuple[Check, Check]:
    """Whether a plan holds no more bytes than the compression, and was measured on other texts than made it."""
    asks, ratio = "Does the plan hold the same bytes?", bytes_beside(results, plan, spec)
    if isnan(ratio):
        held = Check(asks, Status.NOT_YET, "Not measured.", missing="the plan and the compression side by side")
    else:
        says = f"It holds × {ratio:.3f} of them; up to × {1 + SAME_BYTES:g} is allowed."
        held = Check(asks, Status.PASSED if ratio <= 1 + SAME_BYTES else Status.FAILED, says)
    return held, _on_other_texts(results, plan, planned_on)


def _on_other_texts(results: Sequence[Results], plan: CompressionSpec, planned_on: Collection[str]) -> Check:
    """Whether a plan was measured on texts that it was not made from."""
    asks = "Was the plan measured on other texts than it was made from?"
    pairs = _pairs(results, "lm", plan)
    if pairs is None or not planned_on:
        told = "Not measured." if pairs is None else "The texts that it was made from are not known."
        return Check(asks, Status.NOT_YET, told, missing="a plan from known texts, on others")
    if same := set(planned_on) & {*pairs.results.samples, *pairs.results.documents}:
        says = f"{counted(len(same), 'text')} of those measured made the plan, such as {min(same)}."
        return Check(asks, Status.FAILED, says)
    says = f"It was made from {counted(len(set(planned_on)), 'text')}, and measured on {len(pairs.results.samples)}."
    return Check(asks, Status.PASSED, says)


def _family(results: Sequence[Results], spec: CompressionSpec) -> list[CompressionSpec]:
    """The compression and those measured that differ from it in the keep ratio alone, the largest first."""
    specs = {its for one in results for its in one.methods.values() if its is not None} | {spec}
    alike = (its for its in specs if _differ_in(its, spec) <= {"keep_ratio"})
    return sorted(alike, key=lambda its: -its.keep_ratio)


def _differ_in(one: CompressionSpec, other: CompressionSpec) -> set[str]:
    """Names of the settings in which two compressions differ."""
    return {each.name for each in fields(one) if getattr(one, each.name) != getattr(other, each.name)}


def _smallest_passing(results: Sequence[Results], family: Sequence[CompressionSpec], limits: Limits) -> float | None:
    """Smallest keep ratio of a family from which on all of them pass, so that no lucky one is named."""
    smallest = None
    for its in family:
        if _outcome(_checks(results, its, limits)) is not Status.PASSED:
            break
        smallest = its.keep_ratio
    return smallest


def _passing_rival(results: Sequence[Results], spec: CompressionSpec, limits: Limits) -> CompressionSpec | None:
    """The same compression by another policy that passes, the one measured last; None if none does."""
    specs = [its for one in reversed(results) for its in one.methods.values() if its is not None and its != spec]
    alike = (its for its in dict.fromkeys(specs) if _differ_in(its, spec) == {"policy"})
    return next((its for its in alike if _outcome(_checks(results, its, limits)) is Status.PASSED), None)


def _would_pass(smallest: float | None, family: Sequence[CompressionSpec]) -> str:
    if smallest is None:
        ratios = ", ".join(f"{its.keep_ratio:g}" for its in reversed(family))
        return f"Of the keep ratios measured ({ratios}) none passes."
    return f"The smallest keep ratio measured that passes is {smallest:g}."
