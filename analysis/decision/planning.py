"""A plan of given bytes, chosen by measurement: every allocation strategy is tried on the texts that it was made from.

Attention that a plan is expected to lose tells poorly what it costs in prediction (in SmolLM2 the plan that loses least
of it multiplies perplexity by 3.4), so the plan is the one that predicts best. It must be measured on other texts then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.errors import SettingsError
from analysis.evaluation.lm import Lengths
from analysis.plans.allocation import BudgetError
from analysis.plans.curves import BY_NORM, LossCurves
from analysis.plans.strategies import STRATEGIES, plan
from analysis.progress import Progress, part_of, unheard
from analysis.texts.excerpts import Excerpt
from l2kv.spec import CompressionSpec

if TYPE_CHECKING:
    from analysis.models.load import LoadedModel


def strategies() -> tuple[str, ...]:
    """List the allocation strategies that a plan is chosen from: those that make plans, and need no measured costs."""
    return tuple(name for name, one in STRATEGIES.items() if one.kind == "plan" and not one.needs_costs)


def best_plan(
    loaded: LoadedModel,
    texts: Sequence[Excerpt],
    keep_ratio: float,
    *,
    like: CompressionSpec,
    tried: Sequence[str] = (),
    out: Path | None = None,
    progress: Progress = unheard,
) -> tuple[str, CompressionSpec]:
    """Choose the plan of a budget that predicts best on the texts that it is made from; return its strategy and spec.

    Args:
        keep_ratio: the budget, a share of the pairs of the layers that can be compressed.
        like: compression that the plan stands for: it has the same protection and the same formats, and its policy is
            tried beside the strategy's own, where it goes by norm.
        tried: strategies to choose from; by default all `strategies`.
        out: file of what was measured, which a stopped choice continues from.
        progress: counts texts captured and predicted.

    Raises:
        SettingsError: a strategy is unknown, or no plan is possible at this budget.
        As `evaluate`.
    """
    from analysis.evaluation.run import evaluate
    from analysis.plans.ablation import measured_curves

    names, lengths = tuple(tried) or strategies(), Lengths()
    needs_costs = next((name for name in names if STRATEGIES.find(name).needs_costs), names[0])
    total = len(texts) * (1 + 2 * len(names))
    told = part_of(progress, 0, total)
    curves = measured_curves(
        loaded, texts, needs_costs, protect_last=like.protect_last, settings=lengths.settings, progress=told
    )
    plans = _plans(curves, keep_ratio, names, like)
    if not plans:
        raise SettingsError(f"no plan keeps {keep_ratio:.0%} of the bytes: the recent window alone takes more")
    told = part_of(progress, len(texts), total)
    measured = evaluate(loaded, "lm", plans, texts=texts, settings=lengths.settings, out=out, progress=told)
    best = min(plans, key=lambda name: measured.scores(name).mean())
    return best, plans[best]


_OF_PLANS = ("keep_ratio", "budget", "skip_layers", "policy", "layer_ratios", "head_ratios", "directions")


def _plans(
    curves: LossCurves, keep_ratio: float, names: Sequence[str], like: CompressionSpec
) -> dict[str, CompressionSpec]:
    """The distinct plans of a budget, by their strategies and policies."""
    made: dict[str, CompressionSpec] = {}
    for name in names:
        own = STRATEGIES[name].policy
        for policy in dict.fromkeys([own, like.policy] if {own, like.policy} <= set(BY_NORM) else [own]):
            try:
                planned = plan(curves, keep_ratio, name, policy=policy if policy in BY_NORM else None).to_spec()
            except BudgetError:
                continue
            spec = replace(like, **{field: getattr(planned, field) for field in _OF_PLANS})
            if spec not in made.values():
                made[f"{name}, {policy}"] = spec
    return made
