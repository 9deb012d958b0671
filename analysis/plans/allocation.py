"""Budgets, the exact solver on loss curves, and the plan that it gives. Knows no model: all is arithmetic.

The solver works on bins: with B bins a head keeps a ratio of 0, 1/B, ... or 1, and a budget is a number of bins over
all heads. It is exact on these bins, and for the texts whose curves it was given: it promises nothing of another text.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from analysis.errors import SettingsError
from analysis.plans.curves import BY_NORM, TINY, LossCurves
from analysis.words import counted
from l2kv.spec import CompressionSpec


class BudgetError(SettingsError):
    """A budget that is too small for what must be kept; the message names the least one."""


@dataclass(frozen=True, slots=True, eq=False)
class AllocationPlan:
    """A keep ratio for each kv head, and the attention it is expected to lose on the texts that it was made from.

    Losses are means over the kv heads that may be compressed.
    """

    strategy: str
    policy: str
    ratios: np.ndarray  # [L, Hkv]; 1 where a layer cannot be compressed
    directions: tuple[tuple[str, ...], ...] | None  # [L][Hkv] "low" or "high", of signed_norm
    compressible: np.ndarray  # [L] bool
    keep_ratio: float  # the budget asked for: the share of all pairs of the compressible layers
    used: float  # share of it that the ratios use; never more than the budget
    expected_loss: float  # NaN where there are no loss curves of the policy, as are the next two
    uniform_loss: float  # loss of one ratio for all, with the same policy and budget
    bound: float  # no allocation over the bins of kv heads loses less than this
    protect_last: int

    @property
    def gap(self) -> float:
        """Upper bound of the loss that the best allocation by kv head would save."""
        return max(0.0, self.expected_loss - self.bound)

    def __str__(self) -> str:
        if np.isnan(self.expected_loss):
            alike = "" if np.ptp(self.ratios[self.compressible]) else ", the same share in each kv head"
            return (
                f"Keeps {self.used:.0%} of the pairs by {self.policy.replace('_', ' ')}{alike}. There are no loss "
                f"curves of this policy, so its attention loss is not known; a Pareto front measures its NLL change. "
                f"{1 - self.used:.0%} saved."
            )
        bound = "no other allocation loses less"
        if self.gap >= 5e-5:
            bound = f"another allocation saves at most {self.gap:.4f} more"
        return (
            f"Expected attention loss {self.expected_loss:.4f}, against {self.uniform_loss:.4f} with one ratio for "
            f"all; {bound}. This holds for the texts of the plan; a Pareto front measures on others. "
            f"{1 - self.used:.0%} saved."
        )

    def table(self) -> list[dict[str, Any]]:
        """A row for each layer that can be compressed: its mean keep ratio, and ratio and direction of each kv head."""
        return [
            {
                "layer": int(layer),
                "keep_ratio": float(self.ratios[layer].mean()),
                "by_kv_head": self.ratios[layer].tolist(),
                "direction": self.directions[layer] if self.directions else None,
            }
            for layer in np.flatnonzero(self.compressible)
        ]

    def to_spec(self) -> CompressionSpec:
        """Make the spec of the plan, in its shortest form: one ratio, one for each layer, or one for each head."""
        whole = self.compressible & (self.ratios == 1).all(axis=1)
        layers = [int(i) for i in np.flatnonzero(self.compressible & ~whole)]
        rows = {layer: [round(float(r), 9) for r in self.ratios[layer]] for layer in layers}
        distinct = {ratio for row in rows.values() for ratio in row}
        ratios: dict[str, Any]
        if len(distinct) <= 1:
            ratios = {"keep_ratio": distinct.pop() if distinct else self.keep_ratio}
        elif all(len(set(row)) == 1 for row in rows.values()):
            ratios = {"keep_ratio": self.keep_ratio, "layer_ratios": {layer: row[0] for layer, row in rows.items()}}
        else:
            heads = {(layer, head): ratio for layer, row in rows.items() for head, ratio in enumerate(row)}
            ratios = {"keep_ratio": self.keep_ratio, "head_ratios": heads}
        return CompressionSpec(
            **ratios,
            skip_layers=tuple(int(i) for i in np.flatnonzero(whole)),
            policy=self.policy,
            directions=self.directions,
            protect_last=self.protect_last,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Budget:
    """Budget of an allocation strategy, over the N kv heads of the layers that can be compressed, in order."""

    curves: LossCurves
    keep_ratio: float
    """Share of all pairs of these heads."""
    policy: str
    losses: np.ndarray
    """[N, B + 1] attention lost by the policy at each bin; NaN where there are no curves of it."""
    layer: np.ndarray
    """[N], the layer of each head."""

    @classmethod
    def of(cls, curves: LossCurves, keep_ratio: float, policy: str, *, weighted: bool = False) -> Budget:
        """Make the budget of a keep ratio; with `weighted`, losses count by their measured cost in each head.

        Raises:
            SettingsError: no layer can be compressed.
        """
        shape = (*curves.low.shape[:2], curves.bins + 1)
        losses = curves.of(policy) if policy in BY_NORM else np.full(shape, np.nan)
        if weighted and curves.weights is not None:
            losses = losses * curves.weights[..., None]
        layers = np.flatnonzero(curves.compressible)
        if not len(layers):
            raise SettingsError("no layer of this model can be compressed: all have a sliding window")
        losses = losses[layers].reshape(-1, curves.bins + 1)
        return cls(curves, float(keep_ratio), policy, losses, np.repeat(layers, shape[1]))

    @property
    def bins(self) -> int:
        """Number of bins over all heads."""
        return int(np.floor(self.keep_ratio * self.curves.bins * len(self.layer) + 1e-9))  # 0.29 * 100 is 28.99999...

    def least(self, skipped: np.ndarray) -> np.ndarray:
        """Least number of bins of each head, [N]: all for the `skipped` [N] bool, the protected tokens for the others.

        Raises:
            BudgetError: they are more than the budget.
        """
        bins = self.curves.bins
        least = np.where(skipped, bins, self.curves.least_bin)
        if least.sum() > self.bins:
            raise BudgetError(
                f"the keep ratio must be {least.sum() / bins / len(least):.3g} or more here, got {self.keep_ratio:g}: "
                f"{int(skipped.sum())} of {len(least)} kv heads keep everything, and the others hold the last "
                f"{counted(self.curves.protect_last, 'token')}"
            )
        return least

    def mean_loss(self, ratios: np.ndarray) -> float:
        """Mean attention lost over heads at ratios [N], interpolated between bins."""
        lost = [np.interp(r, self.curves.ratios, losses) for r, losses in zip(ratios, self.losses, strict=True)]
        return float(np.mean(lost))

    def bound(self) -> float:
        """Lower bound of the mean loss of any allocation over the bins of kv heads, by linear programming."""
        if np.isnan(self.losses).any():
            return float("nan")
        return _Hull.of(_Units.of(self, self._none())).bound / len(self.layer)

    def _none(self) -> np.ndarray:
        return np.zeros(len(self.layer), dtype=bool)

    def even(self, skipped: np.ndarray | None = None) -> np.ndarray:
        """Divide the budget evenly: heads `skipped` [N] bool keep everything, the others share the rest. Ratios [N].

        Raises BudgetError as `least`.
        """
        skipped = self._none() if skipped is None else skipped
        self.least(skipped)
        whole, n = int(skipped.sum()), len(skipped)
        rest = self.keep_ratio if not whole else (self.keep_ratio * n - whole) / max(n - whole, 1)
        return np.where(skipped, 1.0, rest)

    def scaled(self, wanted: np.ndarray) -> np.ndarray:
        """Divide the budget in given proportions [N], as far as bounds allow. Ratios [N] on bins.

        Raises BudgetError as `least`.
        """
        bins, least = self.curves.bins, self.least(self._none()).astype(float)
        low, high = 0.0, (bins + 1) / max(wanted[wanted > TINY].min(initial=1.0), TINY)
        for _ in range(100):  # halving: the sum grows with the factor
            middle = (low + high) / 2
            low, high = (middle, high) if np.clip(middle * wanted, least, bins).sum() <= self.bins else (low, middle)
        exact = np.clip(low * wanted, least, bins)
        found = np.floor(exact + 1e-9).astype(int)
        rest = min(self.bins - int(found.sum()), int((exact - found > 1e-9).sum()))
        found[np.argsort(found - exact, kind="stable")[:rest]] += 1  # the largest remainders
        return found / bins

    def best(self, *, by_layer: bool = False, skipped: np.ndarray | None = None) -> np.ndarray:
        """Divide the budget with the least loss; `by_layer` gives all heads of a layer one ratio. Ratios [N] on bins.

        A dynamic program: least[w] is the least loss of the units so far within a budget of w, and `choice` how each
        unit gets there. A choice that would lose more than the hull's solution even if all others were at their bound
        is dropped: it is part of no best allocation. Most are of this kind.

        Raises BudgetError as `least`.
        """
        units = _Units.of(self, self._none() if skipped is None else skipped, by_layer=by_layer)
        hull = _Hull.of(units)
        count, steps = units.losses.shape
        if not count:
            return units.to_heads(hull.chosen)
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
        return units.to_heads(chosen)


@dataclass(frozen=True, slots=True, eq=False)
class _Units:
    """U units, each with a ratio of its own. Bins count from the least allowed."""

    losses: np.ndarray  # [U, C], of all heads of the unit together
    sizes: np.ndarray  # [U] heads
    budget: int  # bins over all heads, beyond the least of each
    member: np.ndarray  # [N] the unit of each head, -1 of those that keep everything
    least: int
    bins: int

    @classmethod
    def of(cls, budget: Budget, skipped: np.ndarray, *, by_layer: bool = False) -> _Units:
        names, free = budget.layer if by_layer else np.arange(len(budget.layer)), ~skipped
        member = np.full(len(names), -1)
        _, member[free] = np.unique(names[free], return_inverse=True)
        count, least, bins = int(member.max(initial=-1)) + 1, budget.curves.least_bin, budget.curves.bins
        losses = np.zeros((count, bins + 1 - least))
        np.add.at(losses, member[free], budget.losses[free, least:])
        left = budget.bins - int(budget.least(skipped).sum())
        return cls(losses, np.bincount(member[free], minlength=count), left, member, least, bins)

    def to_heads(self, chosen: np.ndarray) -> np.ndarray:
        """Ratios of each head [N] from bins of each unit [U]."""
        bins = np.full(len(self.member), self.bins)
        free = self.member >= 0
        bins[free] = chosen[self.member[free]] + self.least
        return bins / self.bins


@dataclass(frozen=True, slots=True, eq=False)
class _Hull:
    """Solution on the units' convex hulls, in whole pieces, and the bound of every solution."""

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
            best = np.unravel_index(gain.argmax(), gain.shape)
            chosen[best[0]] = best[1]
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
