"""Allocation strategies: how much of a budget each kv head gets. Knows loss curves; knows no model.

A strategy is a function from a budget to a keep ratio for each kv head. To add one, write it and name it in
`STRATEGIES`: the command line, the page Plan and the Pareto front list it from there. All hold equal bytes at an equal
budget, but for heads that round up to a whole pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.captures import Capture
from analysis.defaults import KEEP_RATIO, RECENT_WINDOW
from analysis.errors import SettingsError
from analysis.measures import by_kv_head
from analysis.plans.allocation import AllocationPlan, Budget
from analysis.plans.curves import BY_NORM, TINY, LossCurves, check_choice, curves_of, loss_curves
from analysis.plans.skip import suggest_skip_layers
from analysis.studies import Study, layer_alr, study_of
from l2kv.registry import Registry

ADAKV_FLOOR = 0.2  # of its even share, that AdaKV leaves to every head
PYRAMID_TOP = 1 / 20  # of the mean, that PyramidKV leaves to the last layer
KINDS = ("uniform", "plan", "baseline")


@dataclass(frozen=True, slots=True)
class Strategy:
    """A way to divide a budget among the kv heads."""

    title: str
    about: str
    """One line on what it does."""
    kind: str
    """"uniform": one ratio for all, by norm; "plan": divided by norm; "baseline": reads no norms."""
    allocate: Callable[[Budget], np.ndarray]
    """(budget) -> the keep ratio [N] of each kv head. Raises BudgetError where the budget is too small."""
    policy: str = "signed_norm"
    """Policy of each head."""
    needs_costs: bool = False
    """True if the curves must be weighted by the measured cost of each head (`LossCurves.weighted_by`)."""
    needs_captures: bool = False
    """True if the curves must come with their captures, because it looks at single tokens."""


def plan(
    measured: LossCurves | Study | Capture | Sequence[Capture],
    keep_ratio: float = KEEP_RATIO,
    strategy: str = "by_head",
    *,
    policy: str | None = None,
) -> AllocationPlan:
    """Divide a budget among the kv heads.

    Args:
        measured: loss curves, or what they come of: a study, or captures of one model (then at `RECENT_WINDOW`).
        keep_ratio: the budget, a share of the pairs of the layers that can be compressed. A cache rounds each head up
            to whole pairs, so it holds up to one pair per head more.
        strategy: name in `STRATEGIES`.
        policy: by default the strategy's own; else "low_norm", "high_norm", or "signed_norm", which takes in each head
            the direction that loses less at its ratio (low where they lose the same).

    Raises:
        SettingsError: a name is unknown, nothing can be compressed, or the curves lack what the strategy needs.
        BudgetError: the budget is too small for what must be kept; the message names the least one.
    """
    chosen, curves = STRATEGIES.find(strategy), _curves_of(measured)
    if policy is not None:
        check_choice("policy", policy, BY_NORM)
    if isinstance(keep_ratio, bool) or not 0 <= keep_ratio <= 1:
        raise SettingsError(f"keep_ratio must be from 0 to 1, got {keep_ratio!r}")
    if chosen.needs_costs and curves.weights is None:
        raise SettingsError(
            f"{strategy} needs the measured cost of each head, which no study holds: {_from_texts(strategy)}"
        )
    if chosen.needs_captures and not curves.captures:
        raise SettingsError(f"{strategy} looks at single tokens, which no study holds: {_from_texts(strategy)}")
    budget = Budget.of(curves, keep_ratio, policy or chosen.policy, weighted=chosen.needs_costs)
    spent = chosen.allocate(budget)
    ratios = np.ones(curves.low.shape[:2])
    ratios[curves.compressible] = spent.reshape(-1, curves.low.shape[1])
    loss = budget.mean_loss(spent)
    return AllocationPlan(
        strategy=strategy,
        policy=budget.policy,
        ratios=ratios,
        directions=_directions(curves, ratios) if budget.policy == "signed_norm" else None,
        compressible=curves.compressible,
        keep_ratio=budget.keep_ratio,
        used=float(min(spent.mean(), budget.keep_ratio)),  # a mean of ratios rounds
        expected_loss=loss,
        uniform_loss=budget.mean_loss(np.full(len(spent), budget.keep_ratio)),
        bound=float(min(budget.bound(), loss)),  # they may differ by rounding where they are the same
        protect_last=curves.protect_last,
    )


def _from_texts(strategy: str) -> str:
    return f"plan from texts (l2kv plan TEXTS --strategy {strategy} -o plan.json), and give the plan"


def _curves_of(measured: LossCurves | Study | Capture | Sequence[Capture]) -> LossCurves:
    if isinstance(measured, LossCurves):
        return measured
    if isinstance(measured, Study):
        return curves_of(measured)
    return loss_curves(*([measured] if isinstance(measured, Capture) else measured), protect_last=RECENT_WINDOW)


def _directions(curves: LossCurves, ratios: np.ndarray) -> tuple[tuple[str, ...], ...]:
    def lost(curve: np.ndarray, head: tuple[int, ...]) -> float:
        return float(np.interp(ratios[head], curves.ratios, curve[head]))

    high = [lost(curves.high, head) < lost(curves.low, head) for head in np.ndindex(ratios.shape)]
    return tuple(tuple(row) for row in np.where(np.reshape(high, ratios.shape), "high", "low").tolist())


def _skip_first_two(budget: Budget) -> np.ndarray:
    return budget.even(np.isin(budget.layer, (0, 1)))


def _skip_suggested(budget: Budget) -> np.ndarray:
    """Skip the suggested layers, the worst first, as many as the budget allows."""
    policy = "low_norm" if budget.policy == "signed_norm" else budget.policy  # the list is of one direction
    study = budget.curves.study
    if study is None:
        if not budget.curves.captures:
            raise SettingsError("skip_suggested goes by ALR, and these curves came without a study or captures")
        study = study_of(*budget.curves.captures, probes=("next token",), names=("alr", "alr_chance"))
    suggested = np.array(suggest_skip_layers(study, policy).layers, dtype=int)
    by_layer = layer_alr(study, policy)
    badness = np.where(np.isnan(by_layer), np.inf, by_layer).mean(axis=0)
    skipped, least = np.zeros(len(budget.layer), dtype=bool), budget.curves.least_bin
    for layer in suggested[np.argsort(-badness[suggested], kind="stable")]:
        more = skipped | (budget.layer == layer)
        if np.where(more, budget.curves.bins, least).sum() > budget.bins:
            break
        skipped = more
    return budget.even(skipped)


def _by_head_with_signal(budget: Budget) -> np.ndarray:
    signal = budget.curves.has_signal(budget.keep_ratio, budget.policy)
    return budget.best(skipped=~signal[budget.curves.compressible].ravel())


def _global_threshold(budget: Budget) -> np.ndarray:
    """The pairs kept are those whose norm, over the median of their head, is the most extreme in the head's direction.

    Under signed_norm that is the direction of the mean Γ.
    """
    sign = {"low_norm": -1.0, "high_norm": 1.0}.get(budget.policy)
    gammas = np.nan_to_num(budget.curves.gammas)[:, budget.curves.compressible].mean(axis=0).ravel()
    signs = np.where(gammas > 0, 1.0, -1.0) if sign is None else np.full(len(gammas), sign)
    kept = []
    for capture in budget.curves.captures:
        norms = np.maximum(capture.key_norm[budget.curves.compressible].astype(np.float64), TINY)
        norms = norms.reshape(len(signs), -1)
        score = signs[:, None] * np.log(norms / np.median(norms, axis=1, keepdims=True))
        kept.append(_share_of_top(score, budget))
    return budget.scaled(np.mean(kept, axis=0))


def _adakv(budget: Budget) -> np.ndarray:
    """Ada-KV: B_i = (1 - α) f_i + α B / h; f_i of the layer's top B attention probabilities are in head i of h."""
    shares = np.zeros(len(budget.layer))
    for capture in budget.curves.captures:
        attention = by_kv_head(capture).probe_attention
        for layer in np.flatnonzero(budget.curves.compressible):
            top = _share_of_top(attention[layer], budget)
            shares[budget.layer == layer] += (1 - ADAKV_FLOOR) * top + ADAKV_FLOOR * budget.keep_ratio
    return budget.scaled(shares / len(budget.curves.captures))


def _pyramid(budget: Budget) -> np.ndarray:
    """PyramidKV: beside the protected tokens, what a layer keeps falls linearly with depth."""
    even, protected = budget.even(), budget.curves.least_bin / budget.curves.bins
    layers, depth = np.unique(budget.layer, return_inverse=True)
    beside = budget.keep_ratio - protected
    last = max(beside * PYRAMID_TOP, 2 * beside - (1 - protected))  # the first layer cannot keep more than everything
    falling = np.linspace(2 * beside - last, last, len(layers))[depth]
    return protected + falling if len(layers) > 1 else even


def _share_of_top(score: np.ndarray, budget: Budget) -> np.ndarray:
    """Of scores [heads, T], the share of each head's tokens among the budget's best of all; the latest are in first."""
    heads, n = score.shape
    score = score.astype(np.float64)
    score[:, n - min(budget.curves.protect_last, n) :] = np.inf
    top = np.argsort(-score, axis=None, kind="stable")[: int(np.floor(budget.keep_ratio * heads * n + 1e-9))]
    return np.bincount(top // n, minlength=heads) / n


STRATEGIES: Registry[Strategy] = Registry(
    "strategy",
    SettingsError,
    {
        "uniform_low": Strategy(
            "Uniform (low norm)", "The paper's rule, the same ratio everywhere.", "uniform", Budget.even, "low_norm"
        ),
        "uniform_high": Strategy(
            "Uniform (high norm)", "The mirror of it, the same ratio everywhere.", "uniform", Budget.even, "high_norm"
        ),
        "uniform_signed": Strategy(
            "Uniform (measured directions)",
            "Low norms in some kv heads and high norms in others, as measured; the same ratio everywhere.",
            "uniform",
            Budget.even,
        ),
        "skip_first_two": Strategy(
            "Layers 0 and 1 skipped",
            "The paper's skip list; the other layers keep less.",
            "plan",
            _skip_first_two,
            "low_norm",
        ),
        "skip_suggested": Strategy(
            "Suggested layers skipped",
            "Layers whose norms order worse than chance are skipped; the others keep less.",
            "plan",
            _skip_suggested,
            "low_norm",
        ),
        "by_layer": Strategy(
            "By layer",
            "A ratio for each layer, of least expected attention loss.",
            "plan",
            lambda budget: budget.best(by_layer=True),
        ),
        "by_head": Strategy(
            "By head", "A ratio for each kv head, of least expected attention loss.", "plan", Budget.best
        ),
        "by_head_with_signal": Strategy(
            "By head (signal only)",
            "As by head; kv heads whose norms tell nothing of attention keep everything.",
            "plan",
            _by_head_with_signal,
        ),
        "by_head_by_cost": Strategy(
            "By head (by cost)",
            "As by head; lost attention counts by what compressing each kv head alone costs in prediction.",
            "plan",
            Budget.best,
            needs_costs=True,
        ),
        "global_threshold": Strategy(
            "Global threshold",
            "One threshold for all heads, on a key's norm over the median norm of its head.",
            "plan",
            _global_threshold,
            needs_captures=True,
        ),
        "adakv": Strategy(
            "AdaKV",
            "Every layer the same; its heads share by top attention (Feng et al., arXiv 2407.11550), a fifth evenly.",
            "plan",
            _adakv,
            needs_captures=True,
        ),
        "pyramid": Strategy(
            "PyramidKV",
            "Ratios that fall linearly with depth; the last queries' attention chooses (Cai et al., arXiv 2406.02069).",
            "baseline",
            _pyramid,
            "window",
        ),
        "random": Strategy("Random", "Any tokens: the baseline to beat.", "baseline", Budget.even, "random"),
        "streaming": Strategy(
            "StreamingLLM", "The first four tokens and the latest.", "baseline", Budget.even, "streaming"
        ),
    },
)


def title_of(name: str) -> str:
    """Title of a strategy; its name if it is not registered."""
    return STRATEGIES[name].title if name in STRATEGIES else name
