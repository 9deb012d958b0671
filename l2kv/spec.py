"""What to keep of a KV cache, as a value: `CompressionSpec`. Knows no tensors and no models."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from l2kv.policies import POLICIES


@dataclass(frozen=True, slots=True)
class CompressionSpec:
    """How a cache is compressed; immutable, and checked when it is made.

    After t tokens, every kv head of a layer that is not skipped, and that holds at least `prune_after` pairs, holds
    `min(held, max(protected, ceil(keep_ratio * t)))` of them: those its policy scores highest, and the protected ones.

    Source: Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", EMNLP 2024.

    Raises:
        ValueError, TypeError: a field is out of range; the message says which, what was got and what is allowed.
    """

    keep_ratio: float = 0.5
    """Share of the tokens seen that is kept, 0 to 1."""
    prune_after: int = 0
    """Leave a cache of fewer pairs than this alone."""
    skip_layers: tuple[int, ...] = ()
    """Layers (0-based) that keep everything."""
    policy: str = "low_norm"
    """Name of a score in `l2kv.POLICIES`."""
    protect_first: int = 0
    """The first tokens of the text are never evicted (0 in the paper)."""
    protect_last: int = 0
    """Nor are the latest ones (0 in the paper; 32 is a good deal safer)."""
    seed: int = 0
    """Of the `random` policy."""

    def __post_init__(self) -> None:
        if isinstance(self.keep_ratio, bool) or not isinstance(self.keep_ratio, numbers.Real):
            raise TypeError(f"keep_ratio must be a number from 0 to 1, got {self.keep_ratio!r}")
        if not 0.0 <= self.keep_ratio <= 1.0:  # also refuses NaN
            raise ValueError(f"keep_ratio must be from 0 to 1, got {self.keep_ratio!r}")
        for name in ("prune_after", "protect_first", "protect_last", "seed"):
            _check_count(name, getattr(self, name))
        if self.policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {self.policy!r}")
        if isinstance(self.skip_layers, str) or not isinstance(self.skip_layers, Iterable):
            raise TypeError(f"skip_layers must be a sequence of layer numbers such as (0, 1), got {self.skip_layers!r}")
        for layer in self.skip_layers:
            _check_count("each of skip_layers", layer)
        object.__setattr__(self, "keep_ratio", float(self.keep_ratio))
        object.__setattr__(self, "skip_layers", tuple(sorted({int(layer) for layer in self.skip_layers})))

    def kept(self, held: int, seen: int) -> int:
        """Pairs a kv head that holds `held` of `seen` tokens may keep, in a layer that is not skipped."""
        if held < self.prune_after:
            return held
        protected = min(seen, self.protect_first + self.protect_last)
        return min(held, max(protected, share(self.keep_ratio, seen)))


def share(ratio: float, n: int) -> int:
    """`ceil(ratio * n)` of the ratio as written: 0.55 of 100 is 55, though 0.55 * 100 is 55.00000000000001."""
    return math.ceil(Fraction(str(round(ratio, 9))) * n)


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value}")
