"""`CompressionSpec`: what to keep of a KV cache, as a value. Knows no tensors and no models."""

from __future__ import annotations

import numbers
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeGuard

from l2kv.errors import SpecError
from l2kv.policies import POLICIES, WINDOW

SCHEDULES = ("seen", "reference")
DIRECTIONS = ("low", "high")
BITS = (8, 4)
_COUNTS = ("prune_after", "protect_first", "protect_last", "seed")


@dataclass(frozen=True, slots=True)
class CompressionSpec:
    """Settings of a compression: immutable, hashable, and checked when made.

    After t tokens, a kv head that holds at least `prune_after` pairs, in a layer that is not skipped, holds
    `min(held, max(protected, target))` of them: the protected ones and those that the policy scores highest. The target
    is that of the head in `head_ratios`, else of its layer in `layer_ratios`, else `budget`, else `keep_ratio`.

    Source: Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", EMNLP 2024.

    Raises:
        SpecError, TypeError: a field is out of range; the message says which, and what is allowed.
    """

    if TYPE_CHECKING:  # fields hold tuples; a call may give what is handier

        def __init__(
            self,
            keep_ratio: float = 0.5,
            budget: int | None = None,
            prune_after: int = 0,
            skip_layers: Iterable[int] = (),
            policy: str = "low_norm",
            schedule: str = "seen",
            evict_every: int = 1,
            protect_first: int = 0,
            protect_last: int = 0,
            layer_ratios: Mapping[int, float] | Sequence[float | None] | Sequence[tuple[int, float]] | None = None,
            head_ratios: Mapping[tuple[int, int], float]
            | Sequence[Sequence[float | None] | None]
            | Sequence[tuple[tuple[int, int], float]]
            | None = None,
            directions: Sequence[Sequence[str]] | None = None,
            seed: int = 0,
            key_bits: int | None = None,
            value_bits: int | None = None,
            key_channels: float = 1.0,
            pinned: Iterable[int] = (),
        ) -> None: ...

    keep_ratio: float = 0.5
    """Share of the tokens seen that is kept, 0 to 1."""
    budget: int | None = None
    """Number of tokens to keep, in place of `keep_ratio`."""
    prune_after: int = 0
    """A head that holds fewer pairs than this evicts nothing."""
    skip_layers: tuple[int, ...] = ()
    """Skipped layers (0-based): they evict nothing, and store all in full."""
    policy: str = "low_norm"
    """Name of a score in `l2kv.POLICIES`."""
    schedule: str = "seen"
    """Base of a ratio: the tokens "seen", or at each eviction the pairs held ("reference", as in the paper's code)."""
    evict_every: int = 1
    """Evict once this many tokens have come since the last time; in between a head may hold as many more."""
    protect_first: int = 0
    """The first tokens of the text are never evicted (0 in the paper)."""
    protect_last: int = 0
    """Nor are the latest ones (0 in the paper; 32 is a good deal safer)."""
    layer_ratios: tuple[tuple[int, float], ...] | None = None
    """Keep ratios of single layers: give {layer: ratio}, or a ratio (or None) per layer. Stored as pairs."""
    head_ratios: tuple[tuple[tuple[int, int], float], ...] | None = None
    """Keep ratios of single kv heads: give {(layer, kv head): ratio}, or a row of ratios (or None) per layer."""
    directions: tuple[tuple[str, ...], ...] | None = None
    """For `signed_norm`: per layer and kv head, whether "low" or "high" norms stay."""
    seed: int = 0
    """Seed of the policy `random`."""
    key_bits: int | None = None
    """Bits per number of a stored key, 8 or 4; None keeps the model's dtype.

    Where pairs are stored in fewer bits or channels, the latest `protect_last` tokens are held in full as well."""
    value_bits: int | None = None
    """Bits per number of a stored value, 8 or 4; None keeps the model's dtype."""
    key_channels: float = 1.0
    """Share of the channels of each key that is stored, those that the latest queries weigh most (ThinK keeps 0.6)."""
    pinned: tuple[int, ...] = ()
    """Positions in the text (0-based) that no head evicts. Where a head would have, it holds them beside what it holds
    without them: they take no other's place. For a batch of one row."""

    def __post_init__(self) -> None:
        _check_ratio("keep_ratio", self.keep_ratio)
        for name in _COUNTS:
            _check_count(name, getattr(self, name))
        _check_count("evict_every", self.evict_every, least=1)
        if self.budget is not None:
            _check_count("budget", self.budget)
        POLICIES.find(self.policy)
        _check_choice("schedule", self.schedule, SCHEDULES)
        for name in ("key_bits", "value_bits"):
            _check_bits(name, getattr(self, name))
        _check_ratio("key_channels", self.key_channels)
        if not self.key_channels:
            raise SpecError("key_channels must be above 0: a key without channels has no attention")
        for name, value in {
            **{name: int(getattr(self, name)) for name in (*_COUNTS, "evict_every")},
            "keep_ratio": float(self.keep_ratio),
            "key_channels": float(self.key_channels),
            "budget": None if self.budget is None else int(self.budget),
            "skip_layers": _numbers("skip_layers", self.skip_layers, "layer numbers"),
            "layer_ratios": _layer_ratios(self.layer_ratios),
            "head_ratios": _head_ratios(self.head_ratios),
            "directions": _directions(self.directions),
            "pinned": _numbers("pinned", self.pinned, "positions"),
        }.items():
            object.__setattr__(self, name, value)
        if POLICIES[self.policy].needs_directions and self.directions is None:
            raise SpecError(
                f"The policy {self.policy} needs directions: for each layer a row that says, for each kv head, "
                "whether 'low' or 'high' norms are kept."
            )

    @property
    def codes(self) -> bool:
        """True if pairs are stored in fewer bits or channels than the model has."""
        return self.key_bits is not None or self.value_bits is not None or self.key_channels < 1.0

    @property
    def needs_queries(self) -> bool:
        """True if it goes by queries, which a full cache does not hold."""
        return POLICIES[self.policy].needs_received or self.needs_rows > 0

    @property
    def needs_rows(self) -> int:
        """Number of latest queries that its policy and its channels go by."""
        return max(POLICIES[self.policy].needs_rows, WINDOW if self.key_channels < 1.0 else 0)

    def codes_in(self, layer: int) -> bool:
        """Tell whether a layer stores its pairs so."""
        return self.codes and layer not in self.skip_layers

    def target_of(self, layer: int, head: int) -> Target:
        """Target of one kv head of one layer."""
        if layer in self.skip_layers:
            return WHOLE
        ratio = dict(self.head_ratios or ()).get((layer, head), dict(self.layer_ratios or ()).get(layer))
        if ratio is not None:
            return Target(ratio=ratio)
        return Target(ratio=self.keep_ratio, budget=self.budget)

    def kept(self, held: int, seen: int, target: Target) -> int:
        """Number of pairs kept by a kv head that holds `held` of `seen` tokens."""
        if target == WHOLE or held < self.prune_after:
            return held
        protected = min(seen, self.protect_first + self.protect_last)
        return min(held, max(protected, target.of(held if self.schedule == "reference" else seen)))


@dataclass(frozen=True, slots=True)
class Target:
    """Target of a head: a share of the tokens, or a number of them where a budget is given."""

    ratio: float
    budget: int | None = None

    def of(self, n: int) -> int:
        """Number of pairs to keep of `n`."""
        return share(self.ratio, n) if self.budget is None else self.budget


WHOLE = Target(ratio=1.0)


def share(ratio: float, n: int) -> int:
    """`ceil(ratio * n)` of the ratio as written: 0.55 of 100 is 55, though 0.55 * 100 is 55.00000000000001."""
    exact = _as_written(ratio)
    return -(-exact.numerator * n // exact.denominator)


@lru_cache(maxsize=1024)  # every head asks, at every token
def _as_written(ratio: float) -> Fraction:
    """The number that a float stands for: 2/3 and 0.55 themselves, of a float32 too, not the nearest float's value."""
    exact = Fraction(ratio)
    if struct.unpack("f", struct.pack("f", ratio))[0] != ratio:
        return exact.limit_denominator(10**6)
    simple = exact.limit_denominator(1000)
    if abs(simple - exact) <= exact / 2**24:  # 203/282 too, whose float32 happens to be a short binary fraction
        return simple
    return exact if exact.denominator <= 2**20 else Fraction(str(round(ratio, 7)))


def _numbers(name: str, given: object, what: str) -> tuple[int, ...]:
    """Whole numbers in ascending order, each once."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"{name} must be a sequence of {what} such as (0, 1), got {given!r}")
    numbers = tuple(given)  # once: it may be a generator
    for number in numbers:
        _check_count(f"each of {name}", number)
    return tuple(sorted({int(number) for number in numbers}))


def _layer_ratios(given: object) -> tuple[tuple[int, float], ...] | None:
    if given is None:
        return None
    pairs = _pairs("layer_ratios", given)
    for layer, ratio in pairs:
        _check_count("each layer of layer_ratios", layer)
        _check_ratio(f"layer_ratios of layer {layer}", ratio)
    return tuple(sorted((int(layer), float(ratio)) for layer, ratio in dict(pairs).items()))


def _head_ratios(given: object) -> tuple[tuple[tuple[int, int], float], ...] | None:
    if given is None:
        return None
    pairs = _pairs("head_ratios", given)
    if not all(_is_sequence(key) for key, _ in pairs):  # a row for each layer
        pairs = [((layer, head), ratio) for layer, row in pairs for head, ratio in _pairs("head_ratios", row)]
    for key, ratio in pairs:
        if len(key) != 2:
            raise TypeError(f"head_ratios goes by (layer, kv head), got {key!r}")
        for number in key:
            _check_count("each layer and kv head of head_ratios", number)
        _check_ratio(f"head_ratios of layer {key[0]}, kv head {key[1]}", ratio)
    return tuple(sorted({(int(layer), int(head)): float(ratio) for (layer, head), ratio in pairs}.items()))


def _pairs(name: str, given: object) -> list[tuple[Any, Any]]:
    """(key, value) of a mapping, of a sequence of such pairs, or of any other by its index; None values are dropped."""
    if isinstance(given, Mapping):
        pairs = list(given.items())
    elif not _is_sequence(given):
        raise TypeError(f"{name} must be a mapping or a sequence, got {given!r}")
    else:
        # Of head_ratios a pair begins with (layer, kv head): a row of two ratios is no pair.
        keyed = all(_is_sequence(e) and len(e) == 2 and _is_sequence(e[0]) == (name == "head_ratios") for e in given)
        pairs = [(e[0], e[1]) for e in given] if keyed else list(enumerate(given))
    return [(key, value) for key, value in pairs if value is not None]


def _is_sequence(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _directions(given: object) -> tuple[tuple[str, ...], ...] | None:
    if given is None:
        return None
    if isinstance(given, str) or not isinstance(given, Sequence) or any(isinstance(row, str) for row in given):
        raise TypeError(f"directions must be a row of 'low' or 'high' for each layer, got {given!r}")
    rows = tuple(tuple(row) for row in given)
    for row in rows:
        for direction in row:
            _check_choice("each of directions", direction, DIRECTIONS)
    return rows


def _check_ratio(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number from 0 to 1, got {value!r}")
    if not 0.0 <= float(value) <= 1.0:  # also refuses NaN
        raise SpecError(f"{name} must be from 0 to 1, got {value!r}")


def _check_count(name: str, value: object, least: int = 0) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise SpecError(f"{name} must {f'be {least} or more' if least else 'not be negative'}, got {value}")


def _check_bits(name: str, value: object) -> None:
    if value is not None and (isinstance(value, bool) or value not in BITS):
        raise SpecError(f"{name} must be 8, 4 or None (the model's dtype), got {value!r}")


def _check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    if value not in tuple(choices):  # in a dict, a list would be refused as unhashable
        raise SpecError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
