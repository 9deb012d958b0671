"""Ranks: the order in which pairs are kept, one int64 per slot: score in the high half, position in the low half.

So ranks have no ties (of equal scores the earlier position ranks higher), do not depend on the order of evaluation, and
tell where in the text a pair was, whatever slot it is in.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW_HALF = 0xFFFFFFFF
_FIRST = 0x7FFFFFFF  # high halves above and below those of any score
_LAST = -0x80000000


def rank(score: Tensor, positions: Tensor, starts: Tensor | None) -> Tensor:
    """Rank scores and positions that broadcast to [B, h, T], int64.

    Args:
        starts: where rows padded on the left begin, [B]: padding ranks last. None if no row is padded.
    """
    bits = (score.float() + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # IEEE 754: negative floats order backwards
    if starts is not None:
        ordered = torch.where(in_text(positions, starts) < 0, _LAST, ordered)
    return torch.add(_LOW_HALF - positions, ordered, alpha=1 << 32)


def position(ranks: Tensor) -> Tensor:
    """Read the positions in the text out of ranks."""
    return _LOW_HALF - (ranks & _LOW_HALF)


def protect(ranks: Tensor, *, first: int, last: int, seen: int, starts: Tensor | None) -> Tensor:
    """Raise the ranks of the `first` and the `last` of the tokens `seen` above all others."""
    if not first and not last:
        return ranks
    place = ranks & _LOW_HALF  # counts down from the first token
    safe = place <= _LOW_HALF - (seen - last)
    if first:
        of_text = in_text(_LOW_HALF - place, starts)
        safe |= (of_text < first) & (of_text >= 0)
    return torch.where(safe, place + (_FIRST << 32), ranks)


def in_text(positions: Tensor, starts: Tensor | None) -> Tensor:
    """Count positions from where the text of each row begins: negative in its padding."""
    return positions if starts is None else positions - starts.to(positions.device)[:, None, None]


def pin(ranks: Tensor, kept: int, pinned: Tensor, beside: Tensor) -> tuple[Tensor, Tensor]:
    """Raise the `pinned` pairs of one head that would go above all others: (ranks [T], the positions of these).

    Args:
        ranks: ranks [T] of all pairs that the head holds.
        kept: number of pairs that it keeps beside these.
        pinned: positions, int64.
        beside: the positions that it was to evict before, and holds for being pinned alone: they compete no more.
    """
    positions = position(ranks)
    competing = ranks.masked_fill(torch.isin(positions, beside), torch.iinfo(torch.int64).min)
    going = torch.isin(positions, pinned).index_fill(0, competing.topk(kept).indices, False)
    return torch.where(going, (ranks & _LOW_HALF) + (_FIRST << 32), ranks), positions[going]
