"""What a decision takes, measured as one job: a plan, prediction, passkeys, needles and speed, in a workspace.

What was measured before, by whomever, counts too: a decision is a view of all records of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from hashlib import sha256
from math import ceil, inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from analysis.decision.checklist import RETRIEVAL, Answer, Decision, Limits, bytes_beside, decide, decide_plan
from analysis.decision.planning import best_plan, strategies
from analysis.decision.speed import RUNS, STEPS, WARM_UP, Speed, measure_speed
from analysis.defaults import EXCERPTS, PROMPT_TOKENS
from analysis.demo.presets import bundled_prose
from analysis.errors import RecordError, SettingsError
from analysis.evaluation.benchmarks import NeedleSettings
from analysis.evaluation.lm import Lengths
from analysis.evaluation.passkey import PasskeySettings
from analysis.evaluation.results import FULL, Methods, Results
from analysis.plans.front import Front
from analysis.plans.skip import Plan
from analysis.progress import SECONDS, Progress, unheard
from analysis.records import load
from analysis.texts.excerpts import Excerpt, planning_and_measuring
from analysis.words import counted, duration
from l2kv.config import CacheShape
from l2kv.spec import CompressionSpec

if TYPE_CHECKING:
    from analysis.evaluation.run import Machine
    from analysis.models.load import LoadedModel
    from analysis.workspace import Workspace

LADDER = (0.6, 0.7, 0.8, 0.9)
"""Keep ratios that are measured besides the one asked about, those above it: to name one that would pass."""
CONTEXTS = (4000, 2000, 900, 400)
"""Lengths in tokens of which the longest is taken that the time allows."""
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
STAGES = ("plan", "lm", *RETRIEVAL, "speed")
_ABOUT_THE_SAME = 0.05  # bytes by which a plan may differ to be of the same budget; the checklist is stricter
_AFTER = 80  # tokens that follow a prompt at most
_CAPTURE = 3.0  # times as long as a forward pass of the same tokens


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    excerpts: Annotated[int, "Excerpts to plan on, and other ones to measure prediction on."] = EXCERPTS
    samples: Annotated[int, "Passkeys, and needles, to ask for."] = 50
    context: Annotated[
        int, "Tokens of the prompts of passkeys, needles and timed decoding; 0 is the longest that the time allows."
    ] = 0
    batch: Annotated[int, "Sequences to decode at once when decoding is timed."] = 1
    minutes: Annotated[float, "Time that choosing the length of prompts aims at."] = 20.0

    def __post_init__(self) -> None:
        if min(self.excerpts, self.samples, self.batch) < 1 or not self.minutes > 0:
            raise SettingsError("excerpts, samples and batch must be 1 or more, and minutes positive")
        if self.context and self.context < PROMPT_TOKENS:  # the recent window would take more of the plan's bytes
            raise SettingsError(f"context must be {PROMPT_TOKENS} or more, as plans are made at, got {self.context}")


@dataclass(frozen=True)
class Evidence:
    """Everything known of one model that a decision may rest on, the newest first."""

    results: tuple[Results, ...] = ()
    plans: tuple[Plan, ...] = ()
    speeds: tuple[Speed, ...] = ()

    @classmethod
    def of(cls, records: Iterable[object]) -> Evidence:
        """Sort records by their kind; a Pareto front is results with plans, and other kinds are ignored."""
        found = tuple(records)
        fronts = [one for one in found if isinstance(one, Front)]
        planned = (
            Plan(front.model, point.spec, f"{point.strategy}: a point of the Pareto front", front.planned_on)
            for front in fronts
            for point in front.points
        )
        return cls(
            (*(one for one in found if isinstance(one, Results)), *(front.results for front in fronts)),
            (*(one for one in found if isinstance(one, Plan)), *planned),
            tuple(one for one in found if isinstance(one, Speed)),
        )

    @cached_property
    def _oldest_first(self) -> tuple[Results, ...]:
        return self.results[::-1]

    def of_one_model(self) -> Evidence:
        """Select what is of the weights that were measured last: a name may have been another model's before."""
        weights = next((one.weights for one in self.results if one.weights), "")
        return replace(
            self,
            results=tuple(one for one in self.results if one.weights in ("", weights)),
            speeds=tuple(one for one in self.speeds if one.weights == weights or not weights),
        )

    def decide(self, spec: CompressionSpec, *, weights: str = "", limits: Limits | None = None) -> Decision:
        """Decide on a compression and, of the plans of the same bytes measured beside it, on the best.

        Raises as the function of this name.
        """
        plans = [plan for plan in self.plans if plan.spec != spec and self._same_budget(plan.spec, spec)]
        decisions = [
            decide(self._oldest_first, spec, plan=one.spec, planned_on=one.planned_on, weights=weights, limits=limits)
            for one in plans
        ]
        alone = [decide(self._oldest_first, spec, weights=weights, limits=limits)]
        return min(decisions or alone, key=_how_good)

    def decide_plan(self, plan: Plan, *, weights: str = "", limits: Limits | None = None) -> Decision:
        """Decide on a plan by itself; the texts that made it are those of any known plan that is equal.

        Raises as the function of this name.
        """
        known = (one.planned_on for one in (plan, *self.plans) if one.spec == plan.spec and one.planned_on)
        return decide_plan(self._oldest_first, plan.spec, planned_on=next(known, ()), weights=weights, limits=limits)

    def _same_budget(self, plan: CompressionSpec, spec: CompressionSpec) -> bool:
        ratio = bytes_beside(self.results, plan, spec)
        return abs(ratio - 1) <= _ABOUT_THE_SAME  # of NaN it is not

    def speed_of(self, spec: CompressionSpec) -> Speed | None:
        """The latest measurement of speed with a compression."""
        return next((one for one in self.speeds if one.spec == spec), None)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds that the stages which are to be done take, from their beginning."""

    context: int
    """Tokens of the prompts of passkeys and needles."""
    seconds: Mapping[str, float]
    """By stage, in order, of those in `STAGES`."""

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())

    def scaled(self, of: Sizes, to: Sizes) -> Estimate:
        """Estimate for other sizes than it is of, in proportion."""
        context = to.context or self.context
        texts, asked = to.excerpts / of.excerpts, to.samples * context / (of.samples * self.context)
        by = {"plan": texts, "lm": texts, "passkey": asked, "needle": asked, "speed": context / self.context}
        return Estimate(context, {stage: taken * by[stage] for stage, taken in self.seconds.items()})

    def __str__(self) -> str:
        return f"about {duration(self.total)} on this machine, with prompts of {self.context:,} tokens"


@dataclass(frozen=True)
class Measurement:
    """The whole measurement of one compression of one model, kept in a workspace as it is run.

    Raises:
        TextError: there are too few or too short texts.
        SettingsError: a strategy is unknown.
    """

    loaded: LoadedModel
    spec: CompressionSpec
    workspace: Workspace
    sizes: Sizes = Sizes()
    texts: Mapping[str, str] | None = None
    """Texts by name, half of which are planned on; None is the bundled prose."""
    strategies: tuple[str, ...] = ()
    """Allocation strategies that the plan is chosen from; by default all that need no measured costs."""
    plan: Plan | None = None
    """The plan whose compression it is: measured beside the full cache alone, without other ratios or a plan made."""

    @cached_property
    def estimate(self) -> Estimate:
        """Time that is left, by timing some tokens; it chooses the length of prompts.

        Raises as `evaluate`.
        """
        from analysis.evaluation.work import estimate

        plan = self._known_plan
        methods = self._methods(plan.spec if plan else self._like_a_plan)
        lm = estimate(self.loaded, "lm", methods, texts=self._excerpts[1])
        seconds = {"lm": lm.seconds}
        if not plan:
            captures = _CAPTURE * self.sizes.excerpts * PROMPT_TOKENS / lm.prefill_rate
            tried = 2 * len(self.strategies or strategies())  # at most, by two policies each
            seconds = {"plan": captures + lm.seconds * tried / len(methods), "lm": lm.seconds}
        longest = min(self.loaded.positions - _AFTER, CONTEXTS[0])
        timed = self.sizes.context or min(900, longest)
        one = estimate(self.loaded, "passkey", methods, settings=self._settings("passkey", timed))
        steps = 2 * RUNS * (WARM_UP + STEPS) * len(methods) / one.decode_rate  # one row takes nearly as long as each
        left = 60 * self.sizes.minutes - sum(seconds.values()) - steps
        fits = [n for n in CONTEXTS if n <= longest and 2 * one.seconds * n / timed <= left]
        begun = (n for n in CONTEXTS if plan and self._file("passkey", n, methods)[1].exists())
        context = self.sizes.context or next(begun, None) or next(iter(fits), min(longest, CONTEXTS[-1]))
        retrieval = one.seconds * context / timed
        seconds |= {"passkey": retrieval, "needle": retrieval, "speed": steps}
        known = {task for task in ("lm", *RETRIEVAL) if _is_complete(self._file(task, context, methods)[1])}
        known |= {"speed"} if self._known_speed(context) else set()
        return Estimate(context, {stage: taken for stage, taken in seconds.items() if stage not in known})

    def run(self, *, known: Estimate | None = None, progress: Progress = unheard) -> Evidence:
        """Measure all that the workspace does not have yet.

        Args:
            known: the estimate of an equal measurement, which is not made again then.
            progress: counts seconds of the estimate; an exception cancels, and what was measured is kept.

        Raises:
            As `evaluate`, and RecordError where the workspace cannot be written.
        """
        from analysis.evaluation.run import evaluate

        left = known or self.estimate
        context, stages = left.context, _Stages(left, progress)
        plan = self._known_plan or self._made_plan(stages.of("plan"))
        methods, results = self._methods(plan.spec), []
        for task in ("lm", *RETRIEVAL):
            id, file = self._file(task, context, methods)
            list_it = partial(self.workspace.note_results, id, name=f"Verdict: {task}")
            try:
                found = evaluate(
                    self.loaded,
                    task,
                    methods,
                    texts=self._texts_of(task),
                    settings=self._settings(task, context),
                    out=file,
                    progress=stages.of(task, begun=list_it),  # so that pages read the file while it grows
                )
            finally:  # what there is, cancelled or not
                if file.exists():
                    list_it()
            results.append(found)
        speed = self._known_speed(context) or self.time(context, progress=stages.of("speed"))
        return Evidence(tuple(results), (plan,), (speed,))

    def time(self, context: int, *, progress: Progress = unheard) -> Speed:
        """Measure speed alone, again if need be. Raises as `measure_speed`."""
        batch = self.sizes.batch
        speed = measure_speed(self.loaded, self.spec, n_tokens=context, batch=batch, progress=progress)
        self.workspace.add(speed, name="Verdict: speed")
        return speed

    @cached_property
    def _machine(self) -> Machine:
        from analysis.evaluation.run import Machine

        return Machine.of(self.loaded)

    @cached_property
    def _given(self) -> Mapping[str, str]:
        return bundled_prose() if self.texts is None else self.texts

    @cached_property
    def _excerpts(self) -> tuple[tuple[Excerpt, ...], tuple[Excerpt, ...]]:
        """Excerpts to plan on, and excerpts to measure on."""
        tokens, each = Lengths().n_tokens, self.sizes.excerpts
        return planning_and_measuring(self.loaded.tokenizer, self._given, n_tokens=tokens, each=each)

    def _texts_of(self, task: str) -> tuple[Excerpt, ...] | None:
        """Texts that a task measures on; needles are hidden in the whole documents of the excerpts."""
        measuring = self._excerpts[1]
        documents = dict.fromkeys(one.document for one in measuring)
        whole = tuple(Excerpt(name, self._given[name]) for name in documents)
        return {"lm": measuring, "needle": whole}.get(task)

    def _settings(self, task: str, context: int) -> Any:
        each = ceil(self.sizes.samples / len(DEPTHS))
        if task == "passkey":
            return PasskeySettings(lengths=(context,), depths=DEPTHS, keys=each)
        return NeedleSettings(lengths=(context,), depths=DEPTHS, samples=each) if task == "needle" else None

    def _methods(self, plan: CompressionSpec) -> Methods:
        if self.plan:
            return {FULL: None, "plan": plan}
        ratios = [self.spec.keep_ratio, *(ratio for ratio in LADDER if ratio > self.spec.keep_ratio)]
        name = self.spec.policy.replace("_", " ")
        methods: dict[str, CompressionSpec | None] = {FULL: None}
        methods |= {f"{name} {ratio:g}": replace(self.spec, keep_ratio=ratio) for ratio in ratios}
        return {**methods, "plan": plan}

    def _file(self, task: str, context: int, methods: Methods) -> tuple[str, Path]:
        """Id and file of results; the same measurement finds them again."""
        asked = {"task": task, "settings": self._settings(task, context), "methods": methods}
        return self.workspace.results_file({**asked, "machine": self._machine, "texts": _digest(self._texts_of(task))})

    @cached_property
    def _shape(self) -> CacheShape:
        return CacheShape.of(self.loaded.config, self.loaded.model.dtype.itemsize)

    @property
    def _like_a_plan(self) -> CompressionSpec:
        """A spec that takes as long as a plan: its heads keep different shares."""
        ratios = (self.spec.keep_ratio, self.spec.keep_ratio * 0.9)
        heads = ((layer, head) for layer in self._shape.layers for head in range(self._shape.n_kv_heads))
        return replace(self.spec, head_ratios=tuple((at, ratios[sum(at) % 2]) for at in heads))

    @property
    def _share(self) -> float:
        """Share of the pairs of the layers that can be compressed that the compression keeps: the plan's budget."""
        n, plain = PROMPT_TOKENS, replace(self.spec, key_bits=None, value_bits=None, key_channels=1.0)
        return self._shape.nbytes(n, plain) / self._shape.nbytes(n)

    @cached_property
    def _asked(self) -> str:
        """Digest of what the plan depends on, which its note ends in."""
        asked = (
            self._machine.weights,
            self._excerpts[0],
            self.spec,
            self.strategies,
        )
        return _digest(asked)[:8]

    @cached_property
    def _known_plan(self) -> Plan | None:
        if self.plan:
            return self.plan
        plans = (self.workspace.open(Plan, one.id) for one in self.workspace.entries("plan", model=self.loaded.name))
        return next((one for one in plans if one.note.endswith(f"({self._asked})")), None)

    def _made_plan(self, progress: Progress) -> Plan:
        """Make the plan that has the compression's bytes."""
        planning = self._excerpts[0]
        strategy, spec = best_plan(
            self.loaded,
            planning,
            self._share,
            like=self.spec,
            tried=self.strategies,
            out=self.workspace.results_file({"plan": self._asked})[1],
            progress=progress,
        )
        on = counted(len(planning), "excerpt")
        note = f"{strategy}: the best on {on} at {self._share:.3g} of the pairs ({self._asked})"
        made = Plan(self.loaded.name, spec, note, tuple(one.name for one in planning))
        self.workspace.add(made, name=f"Verdict: {strategy}, keep {self.spec.keep_ratio:g}")
        return made

    def _known_speed(self, context: int) -> Speed | None:
        found = (self.workspace.open(Speed, one.id) for one in self.workspace.entries("speed", model=self.loaded.name))
        wanted = self._machine.weights, self.spec, context, self.sizes.batch
        return next((one for one in found if (one.weights, one.spec, one.n_tokens, one.batch) == wanted), None)


class _Stages:
    """Progress of stages as that of the whole, in seconds of the estimate."""

    def __init__(self, estimate: Estimate, progress: Progress) -> None:
        self._estimate, self._progress = estimate, progress

    def of(self, stage: str, *, begun: Callable[[], object] = lambda: None) -> Progress:
        """Progress of one stage, which counts its own steps; `begun` is called once, after the first."""
        seconds = self._estimate.seconds
        if stage not in seconds:  # it is known already
            return unheard
        names, total = list(seconds), max(1, round(self._estimate.total))
        before = sum(seconds[name] for name in names[: names.index(stage)])
        first = iter([begun])

        def tell(done: int, steps: int, _: str, /) -> None:
            if done:
                next(first, lambda: None)()
            at = before + (done / steps if steps else 0.0) * seconds[stage]
            self._progress(min(round(at), total), total, f"{SECONDS} ({stage})")

        return tell


def _is_complete(results: Path) -> bool:
    with suppress(RecordError):
        return bool(load(Results, results).rows)
    return False


def _how_good(decision: Decision) -> tuple[int, float]:
    """The better, the less: by the answer, then by the plan's perplexity ratio."""
    ratio = decision.plan_checks[0].measured if decision.plan_checks else None
    return list(Answer).index(decision.answer), ratio.high if ratio else inf


def _digest(content: object) -> str:
    return sha256(repr(content).encode()).hexdigest()
