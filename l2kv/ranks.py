"""Ranks: the order in which pairs stay, as one int64 per slot: score in the high half, position in the low half.

So ranks have no ties (of equal scores the earlier position ranks higher), the order of evaluation cannot show, and a
rank tells where in the text its pair was, whatever slot it is in.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW_HALF = 0xFFFFFFFF
_FIRST = 0x7FFFFFFF  # high halves above and below those of any score
_LAST = -0x80000000


def rank(score: Tensor, positions: Tensor, starts: Tensor | None) -> Tensor:
    """Ranks of scores and positions that broadcast to [B, h, T], int64.

    Args:
        starts: [B], where a row begins that is padded on the left: what is before ranks last. None: no row is.
    """
    bits = (score.float() + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # IEEE 754: negative floats order backwards
    if starts is not None:
        ordered = torch.where(in_text(positions, starts) < 0, _LAST, ordered)
    return torch.add(_LOW_HALF - positions, ordered, alpha=1 << 32)


def position(ranks: Tensor) -> Tensor:
    """Positions in the text of the pairs of these ranks."""
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
    """Positions counted from where the text of each row begins: negative in its padding."""
    return positions if starts is None else positions - starts.to(positions.device)[:, None, None]
