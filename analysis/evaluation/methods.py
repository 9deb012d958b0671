"""Methods that hold the same bytes, made for a comparison. Knows what caches hold by their specs; runs no model.

A column of a comparison is a payload: what low norm holds at a keep ratio, in keys and values of the model's dtype.
Every method in it has the same protected tokens and holds as much, at a keep ratio of its own where it must.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median_high
from typing import TypeAlias

from analysis.errors import SettingsError
from analysis.evaluation.results import FULL, Methods
from analysis.evaluation.task import Sample
from analysis.plans.allocation import BudgetError
from analysis.plans.curves import LossCurves
from analysis.plans.strategies import plan
from analysis.words import counted
from l2kv.config import CacheShape
from l2kv.errors import SpecError
from l2kv.spec import CompressionSpec

RANDOM, PROTECTED_RANDOM = "random", "protected ends + random"
"""Baselines: tokens at random, of all and of those between the protected ends."""
TOLERANCE = 0.01
"""Share by which the payloads of a column may differ."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Methods to evaluate, and what is to be known of them."""

    methods: Methods
    notes: tuple[str, ...]
    """Which methods were left out and why, and which hold other bytes or protect other tokens."""


def compare(
    shape: CacheShape,
    base: CompressionSpec,
    *,
    n_tokens: int,
    keep_ratios: Sequence[float],
    policies: Sequence[str] = (),
    strategies: Sequence[str] = (),
    curves: LossCurves | None = None,
    plans: Sequence[tuple[str, CompressionSpec]] = (),
    baselines: bool = True,
) -> Comparison:
    """Make the methods of a comparison: the full cache, and for each keep ratio baselines, policies and strategies.

    Args:
        shape: shape of the model's cache.
        base: what all compressions have in common: protected tokens, skipped layers, schedule.
        n_tokens: length of the prompts after which payloads are equal.
        policies: names of policies, at one keep ratio for all heads.
        strategies: names of allocation strategies.
        curves: loss curves to allocate by.
        plans: specs by name that stay as they are.
        baselines: whether to add `RANDOM` and `PROTECTED_RANDOM`.

    Raises:
        SettingsError: there are strategies and no curves, or as `plan`.
        SpecError: a keep ratio is out of range.
    """
    if strategies and curves is None:
        raise SettingsError("Allocation strategies go by loss curves: give a study.")
    if curves is not None and curves.protect_last != base.protect_last:
        raise SettingsError(
            f"The study protects the last {counted(curves.protect_last, 'token')}, and the methods the last "
            f"{base.protect_last}. Give both the same number."
        )
    # Made first: a keep ratio that is out of range is a mistake, and no reason to leave a method out.
    payloads = {ratio: shape.nbytes(n_tokens, replace(base, keep_ratio=ratio)) for ratio in keep_ratios}
    makers = list(_makers(base, policies, strategies, curves, baselines))
    methods: dict[str, CompressionSpec | None] = {FULL: None}
    notes = []

    def enter(name: str, spec: CompressionSpec) -> None:
        if name in methods:
            raise SettingsError(f"Two methods are called {name!r}. Give each plan, method and keep ratio once.")
        methods[name] = spec

    for name, spec in plans:
        enter(name, spec)
        held = shape.nbytes(n_tokens, spec)
        if not any(abs(held - payload) <= TOLERANCE * payload for payload in payloads.values()):
            notes.append(f"{name} holds {held:,} bytes of {n_tokens:,} tokens, as no other method does.")
        if (spec.protect_first, spec.protect_last) != (base.protect_first, base.protect_last):
            notes.append(f"{name} protects other tokens: the first {spec.protect_first}, the last {spec.protect_last}.")
    for keep_ratio in keep_ratios:
        for title, make in makers:
            name = f"{title} {keep_ratio:.12g}"
            try:
                spec = meeting(payloads[keep_ratio], make, shape, n_tokens, first=keep_ratio)
            except (BudgetError, SpecError) as error:
                notes.append(f"{name} is left out: {error}")
            else:
                enter(name, spec)
    return Comparison(methods, tuple(notes))


_COMMON = ("protect_first", "protect_last", "prune_after", "schedule", "key_bits", "value_bits", "key_channels")
Make: TypeAlias = Callable[[float], CompressionSpec]
"""Makes the spec of a keep ratio; at a larger one it holds no less."""


def _makers(
    base: CompressionSpec,
    policies: Sequence[str],
    strategies: Sequence[str],
    curves: LossCurves | None,
    baselines: bool,
) -> Iterator[tuple[str, Make]]:
    ends = replace(base, policy=RANDOM)
    if baselines or RANDOM in policies:
        bare = replace(ends, protect_first=0, protect_last=0)
        yield RANDOM, partial(_uniform, bare)
        if bare != ends:
            yield PROTECTED_RANDOM, partial(_uniform, ends)
    for policy in policies:
        if policy != RANDOM:
            yield policy, partial(_uniform, replace(base, policy=policy))
    for strategy in strategies:
        assert curves is not None, "strategies have curves"
        yield strategy, partial(_allocated, base, curves, strategy)


def _uniform(spec: CompressionSpec, keep_ratio: float) -> CompressionSpec:
    return replace(spec, keep_ratio=keep_ratio)


def _allocated(base: CompressionSpec, curves: LossCurves, strategy: str, keep_ratio: float) -> CompressionSpec:
    spec = plan(curves, keep_ratio, strategy).to_spec()
    return replace(spec, **{name: getattr(base, name) for name in _COMMON})


def meeting(payload: int, make: Make, shape: CacheShape, n_tokens: int, *, first: float) -> CompressionSpec:
    """Find the spec that holds a payload, to `TOLERANCE`, after `n_tokens`; `first` is the keep ratio to begin with.

    Raises:
        SpecError: there is none; the message says what the nearest holds.
        BudgetError: as `make`.
    """

    def off(spec: CompressionSpec) -> int:
        return shape.nbytes(n_tokens, spec) - payload

    low, ratio, high = 0.0, first, 1.0
    nearest = spec = make(first)
    for _ in range(20):  # to a millionth
        if abs(off(spec)) <= TOLERANCE * payload:
            return spec
        nearest = min(nearest, spec, key=lambda one: abs(off(one)))
        low, high = (ratio, high) if off(spec) < 0 else (low, ratio)
        ratio = (low + high) / 2
        spec = make(ratio)
    held = shape.nbytes(n_tokens, nearest)
    raise SpecError(f"the nearest that it can hold is {held:,} bytes, not the {payload:,} of the others")


def prompt_length(samples: Sequence[Sample]) -> int:
    """Median length of prompts, context and question; of targets where there is no context."""
    return median_high(len(one.context) + len(one.question) if len(one.context) else len(one.target) for one in samples)
