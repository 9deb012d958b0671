"""Where to spend a cache's bytes: how much each kv head, or layer, keeps, so that least attention is lost in all.

Curves that were measured on texts in (`analysis.plans.curves`), a keep ratio per kv head and a `CompressionSpec` out.
Knows no model: everything is arithmetic.

All of it happens on bins: with B bins a head keeps a ratio of 0, 1/B, ... or 1, and a budget is a number of bins over
all heads. The planner is exact on these bins, and for the texts it was given: it promises nothing of another text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from analysis.captures import Capture
from analysis.errors import SettingsError
from analysis.measures import by_kv_head
from analysis.plans.curves import TINY, LossCurves, check_choice
from analysis.plans.skip import layer_loss, suggest_skip_layers
from l2kv.spec import CompressionSpec

ADAKV_FLOOR = 0.2  # of its even share, that AdaKV leaves to every head
_UNITS = ("head", "layer")


class BudgetError(SettingsError):
    """A budget that is too small for what must stay; the message says what that is."""


@dataclass(frozen=True, slots=True, eq=False)
class AllocationPlan:
    """A keep ratio for each kv head, and what it is expected to lose on the texts that it was made from.

    Losses are means over the kv heads that may be compressed.
    """

    method: str
    policy: str
    ratios: np.ndarray  # [L, Hkv]; 1 where a layer cannot be compressed
    directions: tuple[tuple[str, ...], ...] | None  # [L][Hkv] "low" or "high", of signed_norm
    compressible: np.ndarray  # [L] bool
    keep: float  # the budget asked for: the share of all pairs of the compressible layers
    used: float  # of it, what the ratios take; never more
    expected_loss: float
    uniform_loss: float  # of one ratio for all, by the same policy and budget
    bound: float  # no allocation over the same bins and units loses less than this
    protect_last: int

    @property
    def gap(self) -> float:
        """At most so much less could be lost; 0 of an exact plan."""
        return max(0.0, self.expected_loss - self.bound)

    def to_spec(self) -> CompressionSpec:
        """The plan as a spec, in its shortest form: one ratio, one per layer, or one per head; whole layers skipped."""
        whole = self.compressible & (self.ratios == 1).all(axis=1)
        layers = [int(i) for i in np.flatnonzero(self.compressible & ~whole)]
        rows = {layer: [round(float(r), 9) for r in self.ratios[layer]] for layer in layers}
        distinct = {ratio for row in rows.values() for ratio in row}
        if len(distinct) <= 1:
            ratios = {"keep_ratio": distinct.pop() if distinct else self.keep}
        elif all(len(set(row)) == 1 for row in rows.values()):
            ratios = {"keep_ratio": self.keep, "layer_ratios": {layer: row[0] for layer, row in rows.items()}}
        else:
            heads = {(layer, head): ratio for layer, row in rows.items() for head, ratio in enumerate(row)}
            ratios = {"keep_ratio": self.keep, "head_ratios": heads}
        return CompressionSpec(
            **ratios,
            skip_layers=tuple(int(i) for i in np.flatnonzero(whole)),
            policy=self.policy,
            directions=self.directions,
            protect_last=self.protect_last,
        )


def plan(
    curves: LossCurves,
    keep: float = 0.5,
    *,
    by: str = "head",
    method: str = "dp",
    policy: str = "signed_norm",
    whole_without_signal: bool = False,
    weighed: bool = False,
) -> AllocationPlan:
    """Share out a budget over the kv heads.

    Args:
        keep: the budget, a share of the pairs of the layers that can be compressed. A cache rounds each head up to
            whole pairs, and holds less than one pair a head more.
        by: "head", or "layer": one ratio for all heads of a layer. Of the methods "dp" and "hull" only.
        method: one of `METHODS`.
        policy: what stays: "low_norm", "high_norm", or "signed_norm": in each head the direction that loses less at its
            ratio (low, where they lose the same).
        whole_without_signal: heads without `has_signal` at this ratio keep everything, and the others pay for it.
        weighed: attention counts by what losing it costs in each head (`LossCurves.weighed`); so do the plan's losses.

    Raises:
        SettingsError: a name is unknown, there is nothing to compress, the method looks at tokens and the curves came
            without captures, or there are no weights.
        BudgetError: the budget is too small for what must stay; the message names the least one.
    """
    check_choice("by", by, _UNITS)
    check_choice("method", method, METHODS)
    if isinstance(keep, bool) or not 0 <= keep <= 1:
        raise SettingsError(f"keep must be from 0 to 1, got {keep!r}")
    if weighed and curves.weights is None:
        raise SettingsError("these curves have no weights: measure what each head costs first (LossCurves.weighed)")
    task = _Task.of(curves, keep, policy, whole_without_signal, curves.weights if weighed else None)
    chosen, bound = _ALLOCATE[method](task, by)
    loss = task.mean_loss(chosen)
    heads = np.zeros(curves.low.shape[:2], dtype=int)
    heads[curves.compressible] = chosen.reshape(-1, curves.low.shape[1])
    ratios = np.where(curves.compressible[:, None], heads / curves.bins, 1.0)
    return AllocationPlan(
        method=method,
        policy=policy,
        ratios=ratios,
        directions=_directions(curves, heads) if policy == "signed_norm" else None,
        compressible=curves.compressible,
        keep=float(keep),
        used=float(chosen.mean() / curves.bins),
        expected_loss=loss,
        uniform_loss=task.mean_loss(_uniform(replace(task, free=np.ones_like(task.free)), by)[0]),
        bound=min(bound, loss),  # they may differ by rounding where they are the same
        protect_last=curves.protect_last,
    )


METHODS = {
    "dp": "a dynamic program over all budgets; loses least of all allocations on the bins",
    "hull": "the steepest pieces of the curves' convex hulls first; quick, exact where the budget ends with a piece",
    "uniform": "the same ratio for every head",
    "skip": "layers whose norms order worse than chance stay whole, the others keep less",
    "global": "one threshold for all pairs of all heads, on a key's norm over the median norm of its head",
    "adakv": "every layer the same; within it by the number of its top attention weights that a head holds "
    "(Feng et al., arXiv 2407.11550), a fifth of it evenly",
}


@dataclass(frozen=True, slots=True, eq=False)
class _Task:
    """What is to be shared out, over the N kv heads of the compressible layers, in order."""

    curves: LossCurves
    policy: str
    keep: float
    losses: np.ndarray  # [N, B + 1]
    layer: np.ndarray  # [N], of each head
    free: np.ndarray  # [N] bool; the others stay whole
    total: int  # bins over all heads

    @classmethod
    def of(
        cls, curves: LossCurves, keep: float, policy: str, whole_without_signal: bool, weights: np.ndarray | None
    ) -> _Task:
        losses = curves.of(policy)[curves.compressible]
        if weights is not None:
            losses = losses * weights[curves.compressible][..., None]
        layers, kv_heads, _ = losses.shape
        if not layers:
            raise SettingsError("no layer of this model can be compressed: all have a sliding window")
        free = np.ones(layers * kv_heads, dtype=bool)
        if whole_without_signal:
            free = curves.has_signal(keep, policy)[curves.compressible].ravel()
        total = int(np.floor(keep * curves.bins * len(free) + 1e-9))  # 0.29 * 100 is 28.999999999999996
        needed = int(np.where(free, curves.least_bin, curves.bins).sum())
        if needed > total:
            raise BudgetError(
                f"keep must be {needed / curves.bins / len(free):.3g} or more here, got {keep:g}: "
                f"{int((~free).sum())} of {len(free)} kv heads stay whole, and the others hold the last "
                f"{curves.protect_last} tokens"
            )
        return cls(
            curves=curves,
            policy=policy,
            keep=keep,
            losses=losses.reshape(len(free), -1),
            layer=np.repeat(np.flatnonzero(curves.compressible), kv_heads),
            free=free,
            total=total,
        )

    def mean_loss(self, chosen: np.ndarray) -> float:
        return float(np.take_along_axis(self.losses, chosen[:, None], axis=1).mean())

    @property
    def captures(self) -> tuple[Capture, ...]:
        if not self.curves.captures:
            raise SettingsError("this method looks at single tokens, and these curves came without captures")
        return self.curves.captures

    def on_bins(self, wanted: np.ndarray) -> np.ndarray:
        """The ratios wanted, [N], as bins that sum to the budget: scaled where a bound is met, then rounded."""
        least = np.where(self.free, self.curves.least_bin, self.curves.bins).astype(float)
        low, high = 0.0, (self.curves.bins + 1) / max(wanted[wanted > TINY].min(initial=1.0), TINY)

        def scaled(factor: float) -> np.ndarray:
            return np.clip(factor * wanted, least, self.curves.bins)

        for _ in range(100):  # halving: the sum grows with the factor
            middle = (low + high) / 2
            low, high = (middle, high) if scaled(middle).sum() <= self.total else (low, middle)
        exact = scaled(low)
        bins = np.floor(exact + 1e-9).astype(int)
        rest = min(self.total - int(bins.sum()), int((exact - bins > 1e-9).sum()))
        bins[np.argsort(bins - exact, kind="stable")[:rest]] += 1  # the largest remainders
        return bins


@dataclass(frozen=True, slots=True, eq=False)
class _Units:
    """What gets a ratio of its own: U of them. Bins count from the least allowed."""

    losses: np.ndarray  # [U, C], of all heads of the unit together
    sizes: np.ndarray  # [U] heads
    budget: int  # bins over all heads, beyond the least of each
    member: np.ndarray  # [N] the unit of each head, -1 of those that stay whole

    @classmethod
    def of(cls, task: _Task, by: str) -> _Units:
        names = task.layer if by == "layer" else np.arange(len(task.layer))
        member = np.full(len(names), -1)
        _, member[task.free] = np.unique(names[task.free], return_inverse=True)
        count = int(member.max(initial=-1)) + 1
        least, bins = task.curves.least_bin, task.curves.bins
        losses = np.zeros((count, bins + 1 - least))
        np.add.at(losses, member[task.free], task.losses[task.free, least:])
        needed = int(np.where(task.free, least, bins).sum())
        sizes = np.bincount(member[task.free], minlength=count)
        return cls(losses, sizes, task.total - needed, member)

    def to_heads(self, task: _Task, chosen: np.ndarray) -> np.ndarray:
        """Bins of each head [N] from those of each unit [U]."""
        bins = np.full(len(self.member), task.curves.bins)
        bins[task.free] = chosen[self.member[task.free]] + task.curves.least_bin
        return bins


@dataclass(frozen=True, slots=True, eq=False)
class _Hull:
    """Of the units' convex hulls: the choice of whole pieces, and what bounds every choice."""

    chosen: np.ndarray  # [U]
    bound: float  # the least loss if pieces could be cut (the linear program's)
    slope: float  # loss saved per bin of a head by the piece that no longer fits; 0 if all do

    @classmethod
    def of(cls, units: _Units) -> _Hull:
        chosen = units.losses[:, :1].argmin(axis=1)
        pieces = sorted(
            (slope, unit, end, cost)
            for unit, losses in enumerate(units.losses)
            for slope, end, cost in _pieces(losses, int(units.sizes[unit]))
        )
        left, slope = units.budget, 0.0
        for steepness, unit, end, cost in pieces:
            if cost > left:
                slope = -steepness
                break
            chosen[unit], left = end, left - cost
        rows = np.arange(len(chosen))
        bound = float(units.losses[rows, chosen].sum()) - slope * left
        # What is left pays for one more step, of whichever unit it helps most: more budget can only help.
        within = (np.arange(units.losses.shape[1]) - chosen[:, None]) * units.sizes[:, None] <= left
        gain = np.where(within, units.losses[rows, chosen][:, None] - units.losses, -np.inf)
        if gain.size and gain.max() > 0:
            unit, end = np.unravel_index(gain.argmax(), gain.shape)
            chosen[unit] = end
        return cls(chosen, bound, slope)


def _pieces(losses: np.ndarray, size: int) -> list[tuple[float, int, int]]:
    """The falling pieces of a curve's lower convex hull: (slope per bin of a head, the bin where it ends, its cost)."""
    corners: list[int] = []
    for b in range(len(losses)):
        while len(corners) > 1 and (losses[corners[-1]] - losses[corners[-2]]) * (b - corners[-1]) >= (
            losses[b] - losses[corners[-1]]
        ) * (corners[-1] - corners[-2]):
            corners.pop()
        corners.append(b)
    pieces, slope = [], -np.inf
    for a, b in pairwise(corners):
        if losses[b] < losses[a]:
            cost = (b - a) * size
            slope = max(slope, (losses[b] - losses[a]) / cost)  # rounding must not put a later piece first
            pieces.append((slope, b, cost))
    return pieces


Allocation = tuple[np.ndarray, float]
"""Bins of each head, [N], and a mean loss that none can be below."""


def _hull(task: _Task, by: str) -> Allocation:
    units = _Units.of(task, by)
    hull = _Hull.of(units)
    return units.to_heads(task, hull.chosen), hull.bound / len(task.losses)


def _dp(task: _Task, by: str) -> Allocation:
    """least[w] is the least loss of the units so far within a budget of w, and `choice` how each unit gets there.

    A choice that would lose more than the hull's solution even if all others were at their bound is left out: it is in
    no best allocation, and most are such.
    """
    units = _Units.of(task, by)
    hull = _Hull.of(units)
    count, steps = units.losses.shape
    if not count:
        return units.to_heads(task, hull.chosen), 0.0
    step = int(np.gcd.reduce(units.sizes))
    sizes, budget = units.sizes // step, units.budget // step
    costs = sizes[:, None] * np.arange(steps)
    reduced = units.losses + hull.slope * step * costs
    reduced -= reduced.min(axis=1, keepdims=True)
    known = float(units.losses[np.arange(count), hull.chosen].sum())
    worth = reduced <= known - hull.bound + 1e-9 * (1 + known)
    least, choice = np.zeros(budget + 1), np.zeros((count, budget + 1), dtype=np.int16)
    for unit in range(count):
        best = np.full(budget + 1, np.inf)
        for b in np.flatnonzero(worth[unit] & (costs[unit] <= budget)):
            cost = costs[unit, b]
            candidate = least[: budget + 1 - cost] + units.losses[unit, b]
            better = candidate < best[cost:]
            best[cost:][better] = candidate[better]
            choice[unit, cost:][better] = b
        least = best
    chosen, left = np.zeros(count, dtype=int), budget
    for unit in reversed(range(count)):
        chosen[unit] = choice[unit, left]
        left -= costs[unit, chosen[unit]]
    bins = units.to_heads(task, chosen)
    return bins, task.mean_loss(bins)


def _uniform(task: _Task, by: str) -> Allocation:
    return task.on_bins(np.full(len(task.losses), task.keep)), _bound(task)


def _skip(task: _Task, by: str) -> Allocation:
    """The suggested layers whole, as many of them, the worst first, as the budget can pay for."""
    policy = "low_norm" if task.policy == "signed_norm" else task.policy  # the list is of one direction
    skipped = np.array(suggest_skip_layers(task.captures, policy).layers, dtype=int)
    by_layer = np.stack([layer_loss(capture, policy).by_layer for capture in task.captures])
    badness = np.where(np.isnan(by_layer), np.inf, by_layer).mean(axis=0)
    whole, least = ~task.free, task.curves.least_bin
    for layer in skipped[np.argsort(-badness[skipped], kind="stable")]:
        more = whole | (task.layer == layer)
        if np.where(more, task.curves.bins, least).sum() > task.total:
            break
        whole = more
    return replace(task, free=~whole).on_bins(np.full(len(whole), task.keep)), _bound(task)


def _global(task: _Task, by: str) -> Allocation:
    """The pairs kept are those whose norm, over the median of their head, is the most extreme in the head's direction.

    Under signed_norm that is the direction of the mean Γ.
    """
    sign = {"low_norm": -1.0, "high_norm": 1.0}.get(task.policy)
    gammas = np.nan_to_num(task.curves.gammas)[:, task.curves.compressible].mean(axis=0).ravel()
    signs = np.where(gammas > 0, 1.0, -1.0) if sign is None else np.full(len(gammas), sign)
    kept = []
    for capture in task.captures:
        norms = np.maximum(capture.key_norm[task.curves.compressible].astype(np.float64), TINY)
        norms = norms.reshape(len(signs), -1)
        score = signs[:, None] * np.log(norms / np.median(norms, axis=1, keepdims=True))
        kept.append(_share_of_top(score, task.keep, task.curves.protect_last))
    return task.on_bins(np.mean(kept, axis=0)), _bound(task)


def _adakv(task: _Task, by: str) -> Allocation:
    """Ada-KV: B_i = (1 - α) f_i + α B / h, f_i the number of the layer's top B attention weights in head i of h."""
    shares = np.zeros(len(task.losses))
    for capture in task.captures:
        attention = by_kv_head(capture).probe_attention
        for layer in np.flatnonzero(task.curves.compressible):
            top = _share_of_top(attention[layer], task.keep, task.curves.protect_last)
            shares[task.layer == layer] += (1 - ADAKV_FLOOR) * top + ADAKV_FLOOR * task.keep
    return task.on_bins(shares / len(task.captures)), _bound(task)


def _share_of_top(score: np.ndarray, keep: float, protect_last: int) -> np.ndarray:
    """Of scores [heads, T], the share of each head's tokens among the top `keep` of all; the latest are in first."""
    heads, n = score.shape
    score = score.astype(np.float64)
    score[:, n - min(protect_last, n) :] = np.inf
    top = np.argsort(-score, axis=None, kind="stable")[: int(np.floor(keep * heads * n + 1e-9))]
    return np.bincount(top // n, minlength=heads) / n


def _bound(task: _Task) -> float:
    return _hull(task, "head")[1]


_ALLOCATE = {"dp": _dp, "hull": _hull, "uniform": _uniform, "skip": _skip, "global": _global, "adakv": _adakv}


def _directions(curves: LossCurves, bins: np.ndarray) -> tuple[tuple[str, ...], ...]:
    low, high = (np.take_along_axis(c, bins[..., None], axis=-1)[..., 0] for c in (curves.low, curves.high))
    return tuple(tuple(row) for row in np.where(high < low, "high", "low").tolist())
