"""Eviction policies: a score per cached token, higher = keep. Knows tensors; knows no cache and no model.

A policy is a function of the pairs that a layer just received. It is called once per pair, when it enters the cache,
so it costs nothing per step for the pairs that are already there. To add one, write it and name it in `POLICIES`: the
cache, the app and the tests pick it up from there, and the first line of its docstring is what the app shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class NewPairs:
    """The key/value pairs of one forward pass in one layer, as a policy sees them."""

    keys: Tensor  # [B, Hkv, T, D], after rotary embedding and q/k norm
    values: Tensor  # [B, Hkv, T, D]
    positions: Tensor  # int64, true positions in the text; broadcasts to [B, Hkv, T]
    layer_idx: int
    seed: int


Policy = Callable[[NewPairs], "Tensor"]
"""NewPairs -> float32 scores [B, Hkv, T], higher = keep."""


def low_norm(new: NewPairs) -> Tensor:
    """Keep the keys of lowest L2 norm (the paper's rule)."""
    return -_norm(new.keys)


def high_norm(new: NewPairs) -> Tensor:
    """Keep the keys of highest L2 norm (the mirror of the paper's rule)."""
    return _norm(new.keys)


def random(new: NewPairs) -> Tensor:
    """Keep tokens at random: what any rule must beat."""
    head = new.positions.new_tensor(range(new.keys.shape[1]))[:, None]
    # A hash, not a generator: the score of a token must not depend on how the text was cut into forward passes.
    mixed = _mix(
        _mix(_mix(new.positions + 1) + head + 1) + (new.layer_idx + 1) * 0x10001 + (new.seed * 0x1000003 & 0xFFFFFFFF)
    )
    uniform = (mixed & 0xFFFFFF).float() / 2.0**24  # 24 bits are exact in float32
    return uniform.expand(new.keys.shape[:3])


def _norm(keys: Tensor) -> Tensor:
    return keys.float().norm(dim=-1)  # float32: of bfloat16 norms nearly all tie


def _mix(x: Tensor) -> Tensor:
    """A 32-bit integer hash (C. Wellons' lowbias32) on int64 tensors."""
    mask = 0xFFFFFFFF
    x = x & mask
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & mask
    x = ((x ^ (x >> 15)) * 0x846CA68B) & mask
    return x ^ (x >> 16)


POLICIES: dict[str, Policy] = {"low_norm": low_norm, "high_norm": high_norm, "random": random}
