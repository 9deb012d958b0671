"""Ways to share out a cache's bytes, by name: each makes a `CompressionSpec` at a budget. Knows loss curves, no model.

A budget is a share of the pairs of the layers that can be compressed. All ways hold equal bytes at an equal budget, but
for heads that round up to a whole pair, and for ratios that come in whole percents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from analysis.plans.allocation import BudgetError, plan
from analysis.plans.curves import TINY, LossCurves
from l2kv.spec import CompressionSpec

Make = Callable[[LossCurves, float], CompressionSpec]
"""(curves of the planning texts, keep) -> spec. Raises BudgetError, with the reason, where the budget is too small."""

KINDS = ("uniform", "plan", "yardstick")


@dataclass(frozen=True, slots=True)
class Way:
    """How a budget is shared out."""

    kind: str
    """"uniform": one ratio for all, by norm; "plan": shared out by norm; "yardstick": reads no norms."""
    about: str
    make: Make
    needs_costs: bool = False
    """The curves must be `weighed`."""


def _uniform(policy: str) -> Make:
    def make(curves: LossCurves, keep: float) -> CompressionSpec:
        _check_pays_for_protected(curves, keep)
        return CompressionSpec(keep_ratio=keep, policy=policy, protect_last=curves.protect_last)

    return make


def _planned(**options) -> Make:
    def make(curves: LossCurves, keep: float) -> CompressionSpec:
        return plan(curves, keep, **options).to_spec()

    return make


def _first_two_whole(curves: LossCurves, keep: float) -> CompressionSpec:
    layers = np.flatnonzero(curves.compressible)
    whole = [int(layer) for layer in layers if layer in (0, 1)]
    others = len(layers) - len(whole)
    rest = (keep * len(layers) - len(whole)) / others if others else -1.0
    if rest < 0:
        raise BudgetError(f"layers 0 and 1 alone hold more than {keep:g} of {len(layers)} layers")
    _check_pays_for_protected(curves, rest)
    return CompressionSpec(keep_ratio=round(rest, 9), skip_layers=tuple(whole), protect_last=curves.protect_last)


def _check_pays_for_protected(curves: LossCurves, ratio: float) -> None:
    """Below it a cache holds its protected tokens all the same, and more bytes than its budget."""
    least = curves.least_bin / curves.bins
    if ratio < least - TINY:
        raise BudgetError(
            f"that leaves {ratio:.3g} of the tokens to a head, and the last {curves.protect_last} take {least:.3g}"
        )


WAYS: dict[str, Way] = {
    "uniform, low norm": Way("uniform", "the paper's rule, everywhere the same", _uniform("low_norm")),
    "uniform, high norm": Way("uniform", "its mirror, everywhere the same", _uniform("high_norm")),
    "uniform, measured directions": Way(
        "uniform", "low norms in some kv heads and high ones in others, as measured", _planned(method="uniform")
    ),
    "skip 0 and 1, low norm": Way("plan", "the paper's skip list; the other layers keep less", _first_two_whole),
    "suggested skip list, low norm": Way(
        "plan", "layers worse than dice stay whole; the others keep less", _planned(method="skip", policy="low_norm")
    ),
    "plan by layer": Way("plan", "a ratio for each layer, of least expected loss", _planned(by="layer")),
    "plan by head": Way("plan", "a ratio for each kv head, of least expected loss", _planned()),
    "plan by head, no signal whole": Way(
        "plan", "as plan by head; heads without a signal stay whole", _planned(whole_without_signal=True)
    ),
    "plan by head, weighed by cost": Way(
        "plan",
        "as plan by head; attention counts by what it costs to compress each head alone",
        _planned(weighed=True),
        needs_costs=True,
    ),
    "global threshold": Way("plan", "one threshold on norms for all heads", _planned(method="global")),
    "AdaKV's shares": Way("plan", "heads share their layer's budget by top attention", _planned(method="adakv")),
    "random": Way("yardstick", "any tokens: what a rule must beat", _uniform("random")),
    "first and latest": Way("yardstick", "the first four tokens and the latest (StreamingLLM)", _uniform("streaming")),
}
