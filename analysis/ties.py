"""Ties: key norms that differ by rounding alone count as equal. Knows numpy; knows no capture.

In layer 0 a key's norm depends on its token alone, yet equal tokens differ there: rotary embedding rounds a key
differently at each position. Whatever goes by the order of norms treats such tokens as equal, in any layer, and gives
them one rank, so no number depends on the rounding. (The cache needs one order, and keeps the earlier of two equals.)
"""

from __future__ import annotations

import numpy as np

_EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}  # from 1 to the next larger number


def tolerance(dtype: str) -> float:
    """Largest difference of two equal norms, relative to the lower one.

    The eps of the dtype that the keys had, and two of float32's, in which norms are summed up. (Measured in layer 0 of
    seven models: one token's lowest norm and its highest are up to 1.0 eps apart in bfloat16 and float16 where heads
    have 16 dimensions or more, up to 1.4 where they have 8, and up to 2.5 in float32.)
    """
    return _EPS.get(dtype, _EPS["float32"]) + 2 * _EPS["float32"]


def levelled(norm: np.ndarray, dtype: str) -> np.ndarray:
    """Set equal norms [..., n] of keys of a dtype (such as "bfloat16") to the lowest among them, float64.

    Neighbours in ascending order are never equal if they are further apart than the `tolerance`. A chain of closer ones
    may be longer than it: there, two neighbours are equal if the run around them, of gaps no wider than theirs, spreads
    over no more than the tolerance. So equals never do, and a long chain is cut at its widest gaps.
    """
    if not norm.size:
        return norm.astype(np.float64)
    order = np.argsort(norm, axis=-1, kind="stable")
    ascending = np.take_along_axis(norm, order, axis=-1).astype(np.float64).ravel()  # row by row
    near = tolerance(dtype) * ascending
    gap = np.diff(ascending, prepend=-np.inf, append=np.inf)  # gap[i] is before number i
    gap[:: norm.shape[-1]] = np.inf
    gap[1:-1][gap[1:-1] > near[:-1]] = np.inf
    close = np.flatnonzero(np.isfinite(gap))
    lowest, highest = _wider_before(gap)[close], len(gap) - 2 - _wider_before(gap[::-1])[::-1][close]  # of the run
    apart = np.isinf(gap[:-1])
    apart[close] = ascending[highest] - ascending[lowest] > near[lowest]
    first = np.maximum.accumulate(np.where(apart, np.arange(len(ascending)), 0))  # of its equals
    result = np.empty(norm.shape)
    np.put_along_axis(result, order, ascending[first].reshape(norm.shape), axis=-1)
    return result


def shared_ranks(values: np.ndarray) -> np.ndarray:
    """Lowest and highest rank among each value's equals, [2, ..., n]: 1..n along the last axis, ascending.

    The mean of the two is the rank that equals share (mid-rank), as of `scipy.stats.rankdata`, which would sort twice
    for both, and takes half a second to import.
    """
    order = np.argsort(values, axis=-1, kind="stable")
    ascending = np.take_along_axis(values, order, axis=-1)
    place = np.broadcast_to(np.arange(1.0, values.shape[-1] + 1), values.shape)
    same = ascending[..., 1:] == ascending[..., :-1]  # as the one before
    first, last = place.copy(), place.copy()
    first[..., 1:][same] = 0
    last[..., :-1][same] = np.inf
    ranks = np.empty((2, *values.shape))
    np.put_along_axis(ranks[0], order, np.maximum.accumulate(first, axis=-1), axis=-1)
    np.put_along_axis(ranks[1], order, np.minimum.accumulate(last[..., ::-1], axis=-1)[..., ::-1], axis=-1)
    return ranks


def average_ties(attention: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Order attention [..., n] by ascending values [..., n]; equal values each get the mean of their attention.

    Its sums are what is expected where equals come in any order: within a group of equals they grow evenly.
    """
    order = np.argsort(values, axis=-1, kind="stable")
    ascending, given = (np.take_along_axis(x, order, axis=-1) for x in (values, attention.astype(np.float64)))
    first = np.ones(values.shape, dtype=bool)
    first[..., 1:] = ascending[..., 1:] != ascending[..., :-1]
    starts = np.flatnonzero(first)
    sizes = np.diff(starts, append=first.size)
    return np.repeat(np.add.reduceat(given.ravel(), starts) / sizes, sizes).reshape(values.shape)


def _wider_before(gap: np.ndarray) -> np.ndarray:
    """For each finite gap, where the nearest wider one is before it; gap[0] is infinite."""
    wider = np.arange(len(gap)) - 1
    todo = np.flatnonzero(np.isfinite(gap))
    while todo.size:
        todo = todo[gap[wider[todo]] <= gap[todo]]
        wider[todo] = wider[wider[todo]]
    return wider
