"""Why norms do or do not predict attention: a sink's key, its few large dimensions, and length against direction.

The paper's Figures 8 and 9, and one that it names as future work. A logit is |q| |k| cos * scaling, so attention
follows lengths or directions of keys; which of the two is tried by making all keys alike in the other. From the vectors
of a layer (`analysis.paper.vectors`), in float64 where it is statistics; loads no model and draws nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np

from analysis.captures import Capture
from analysis.errors import TextError
from analysis.metrics import CONSTANT, metrics
from analysis.paper.vectors import HeadVectors, attention_rows, last_rows, pooled_attention
from analysis.statistics import LEVEL, spearman
from analysis.ties import levelled

DRAWS = 20
MOST = 0.9  # share of a total that is called most of it
HARDLY = 0.1  # a share of the attention below which a first token is hardly a sink


@dataclass(frozen=True, slots=True)
class SinkHead:
    """A head whose first token gets much attention."""

    layer: int
    head: int
    share: float  # of the probe's attention that the first token gets
    low_norm: bool  # its key is the shortest of all: what the paper calls a sink

    def __str__(self) -> str:
        words = (
            f"layer {self.layer}, head {self.head}: the first token gets {self.share:.0%} of the next one's attention"
        )
        if self.low_norm:
            return f"{words}, and its key is the shortest." + " That is hardly a sink." * (self.share < HARDLY)
        return f"{words}, and its key is not the shortest: no head of this model has a sink of low norm on this text."


def sink_head(capture: Capture) -> SinkHead:
    """Find the head with the largest sink, if possible among those in which the first token's key is the shortest.

    Raises:
        TextError: no head is defined (see `metrics.status`).
    """
    found = metrics(capture, names=["gamma", "sink_share"])
    share = np.where(found.status_of("gamma") == "ok", found.of("sink_share"), -1.0)
    shortest = capture.levels.argmin(axis=-1) == 0  # of equals it comes first
    shortest = np.repeat(shortest, capture.n_heads // capture.n_kv_heads, axis=1)
    if (share < 0).all():
        raise TextError(
            "No head is defined on this text: norms and attention give no order to compare. Try a longer text."
        )
    low_norm = bool((shortest & (share >= 0)).any())
    candidates = np.where(shortest, share, -1.0) if low_norm else share
    layer, head = map(int, np.unravel_index(candidates.argmax(), share.shape))
    return SinkHead(layer, head, float(share[layer, head]), low_norm)


@dataclass(frozen=True, slots=True, eq=False)
class SinkKey:
    """Fig 8: the key of the first token beside those of the others, D dimensions. Logits are before any soft cap."""

    sink: np.ndarray  # [D] |k_d| of the first token
    others: np.ndarray  # [D] mean |k_d| of the other tokens
    spread: np.ndarray  # [D] standard deviation of those
    z: np.ndarray  # [D] |k_sink,d - mean_d| / std_d of the signed numbers
    peaks: tuple[int, ...]  # dimensions of the largest z, the largest first
    logit: float  # to the sink, mean over the queries after it
    logit_of_peaks: float  # the part of it that comes from the peaks
    lead: float  # the logit less that to the mean of the other keys: what makes the attention
    lead_of_peaks: float


def sink_key(vectors: HeadVectors, head: int, *, n_peaks: int | None = None) -> SinkKey:
    """Find the dimensions that set the first token's key apart, and how much of its logits they carry.

    Args:
        n_peaks: number of dimensions that count as peaks; by default one in 32, at least 2.
    """
    keys = vectors.keys_of(head).astype(np.float64)
    n_peaks = max(2, keys.shape[1] // 32) if n_peaks is None else n_peaks
    if not 1 <= n_peaks < keys.shape[1]:
        raise ValueError(f"n_peaks must be 1 to {keys.shape[1] - 1}, got {n_peaks}")
    sink, others = keys[0], keys[1:]
    z = abs(sink - others.mean(axis=0)) / np.maximum(others.std(axis=0), 1e-12)
    peaks = np.argsort(-z, kind="stable")[:n_peaks]
    query = vectors.queries[head, 1:].astype(np.float64).mean(axis=0) * vectors.scaling  # logits are linear in it
    by_dimension, leads = query * sink, query * (sink - others.mean(axis=0))
    return SinkKey(
        sink=abs(sink),
        others=abs(others).mean(axis=0),
        spread=abs(others).std(axis=0),
        z=z,
        peaks=tuple(map(int, peaks)),
        logit=float(by_dimension.sum()),
        logit_of_peaks=float(by_dimension[peaks].sum()),
        lead=float(leads.sum()),
        lead_of_peaks=float(leads[peaks].sum()),
    )


@dataclass(frozen=True, slots=True)
class Zeroed:
    """Effect of zeroing some dimensions of all keys of a head, means over the queries after the first."""

    dimensions: tuple[int, ...]
    sink_share: float  # of the attention that the first token gets
    distance: float  # total variation from the row as it was, 0 to 1


@dataclass(frozen=True, slots=True, eq=False)
class Zeroing:
    """Fig 9: the peaked dimensions zeroed, against as many random others. P bins a side, as `Capture.pooled`."""

    as_it_is: Zeroed
    peaked: Zeroed
    random: tuple[Zeroed, ...]  # the draws
    n_tokens: int
    tokens_per_bin: int
    map_as_it_is: np.ndarray  # [P, P]
    map_peaked: np.ndarray
    map_random: np.ndarray  # of the first draw

    def of_random(self, field: str) -> tuple[float, float, float]:
        """Mean of the draws' `sink_share` or `distance`, and the ends of the middle 95 % of the draws."""
        values = [getattr(each, field) for each in self.random]
        low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(np.mean(values)), float(low), float(high)

    def __str__(self) -> str:
        (share, *share_ends), (moved, *moved_ends) = self.of_random("sink_share"), self.of_random("distance")
        return (
            f"Zeroing dimensions {', '.join(map(str, self.peaked.dimensions))} takes the first token's share of the "
            f"attention from {self.as_it_is.sink_share:.1%} to {self.peaked.sink_share:.1%}, and moves "
            f"{self.peaked.distance:.1%} of a query's attention; as many random others leave it at {share:.1%} "
            f"({share_ends[0]:.1%} to {share_ends[1]:.1%} in 95 % of {len(self.random)} draws) and move {moved:.1%} "
            f"({moved_ends[0]:.1%} to {moved_ends[1]:.1%})."
        )


def zeroing(vectors: HeadVectors, head: int, peaks: tuple[int, ...], *, draws: int = DRAWS, seed: int = 0) -> Zeroing:
    """Recompute the attention without the peaked dimensions of the keys, and without as many random ones.

    Raises:
        ValueError: there are not enough other dimensions.
    """
    keys, rng = vectors.keys_of(head), np.random.default_rng(seed)
    others = np.setdiff1d(np.arange(keys.shape[1]), peaks)
    if len(others) < len(peaks):
        raise ValueError(f"peaks must be half of the {keys.shape[1]} dimensions at most, got {len(peaks)}")
    drawn = [tuple(sorted(map(int, rng.choice(others, len(peaks), replace=False)))) for _ in range(draws)]
    choices = ((), tuple(peaks), *drawn)
    variants = [_without(keys, dimensions) for dimensions in choices]
    tried = [Zeroed(d, *_effect(vectors, head, k)) for d, k in zip(choices, variants, strict=True)]
    maps = [pooled_attention(vectors, head, keys=each) for each in variants[:3]]
    return Zeroing(tried[0], tried[1], tuple(tried[2:]), vectors.n_tokens, maps[0][1], *(pooled for pooled, _ in maps))


@dataclass(frozen=True, slots=True, eq=False)
class Channels:
    """How few of the D dimensions (channels) of a head carry its logits and its keys. Shares that sum to 1, [D].

    Source: ThinK (Xu et al., arXiv 2407.21018), which drops the channels of least magnitude.
    """

    magnitude: np.ndarray  # |Q_d| |K_d| of each channel: the Frobenius norm of its part of all logits
    energy: np.ndarray  # squared singular values of the keys, the largest first

    def __str__(self) -> str:
        by_magnitude, by_energy = (_needed(np.sort(shares)[::-1]) for shares in (self.magnitude, self.energy))
        return (
            f"{by_magnitude} of {len(self.magnitude)} channels carry {MOST:.0%} of the logits' magnitude, and "
            f"{by_energy} "
            f"directions carry {MOST:.0%} of the keys' energy."
        )


def channels(vectors: HeadVectors, head: int) -> Channels:
    """Measure the channels of a head, over all tokens."""
    keys, queries = (x.astype(np.float64) for x in (vectors.keys_of(head), vectors.queries[head]))
    magnitude = np.linalg.norm(queries, axis=0) * np.linalg.norm(keys, axis=0)
    energy = np.linalg.svd(keys, compute_uv=False) ** 2
    return Channels(magnitude / max(magnitude.sum(), 1e-30), energy / max(energy.sum(), 1e-30))


def _needed(shares: np.ndarray) -> int:
    """Number of the first shares that it takes to reach `MOST`."""
    return min(int(np.searchsorted(shares.cumsum(), MOST - 1e-9)) + 1, len(shares))


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """Length against direction, for the last query of a text and the keys before it. [L, H] each; NaN is undefined."""

    by_length: np.ndarray  # Spearman of the attention with |k| alone
    by_direction: np.ndarray  # with cos(q, k) alone
    without_length: np.ndarray  # total variation, 0 to 1, from the row when all |k| are made equal (their mean)
    without_direction: np.ndarray  # when all cos are

    @classmethod
    def of(cls, layers: list[Factors]) -> Factors:
        """Join the factors of a model's layers, given in order."""
        names = ("by_length", "by_direction", "without_length", "without_direction")
        return cls(**{name: np.concatenate([getattr(each, name) for each in layers]) for name in names})

    def __str__(self) -> str:
        defined = np.isfinite(self.without_length) & np.isfinite(self.without_direction)
        total = int(defined.sum())
        if not total:
            return "No head tells: the text is too short."
        by_direction = int((self.without_direction > self.without_length)[defined].sum())
        return (
            f"In {by_direction} of {total} heads the direction of a key makes its attention, in {total - by_direction} "
            "its length: the row moves further when that is made equal for all keys. In the median head equal "
            f"directions move {np.median(self.without_direction[defined]):.0%} of the attention, equal lengths "
            f"{np.median(self.without_length[defined]):.0%}."
        )


def factors(vectors: HeadVectors) -> Factors:
    """Compare the two factors of the last query's logits, key length and direction, in one layer: [1, H] each.

    The query's own key is left out, and rows are made to sum to 1 without it. A sliding window's hidden keys are too.
    """
    heads, n = vectors.n_heads, vectors.n_tokens - 1
    first = max(0, vectors.n_tokens - vectors.window) if vectors.window else 0
    if n - first < 3:
        return Factors(*np.full((4, 1, heads), np.nan))
    keys = np.repeat(vectors.keys[:, first:n], heads // len(vectors.keys), axis=0)  # [H, n, D]
    query = vectors.queries[:, -1:]
    length, query_length = (np.linalg.norm(x, axis=-1, keepdims=True) for x in (keys, query))
    towards = query / np.maximum(query_length, 1e-30)
    cosine = (keys * towards).sum(axis=-1, keepdims=True) / np.maximum(length, 1e-30)
    row = last_rows(vectors, keys)
    alike_in_length = keys / np.maximum(length, 1e-30) * length.mean(axis=1, keepdims=True)
    alike_in_direction = length * cosine.mean(axis=1, keepdims=True) * towards
    length, cosine = levelled(length[..., 0], vectors.dtype), cosine[..., 0].astype(np.float64)
    by_length = spearman(length, row)
    by_length[np.ptp(length, axis=-1) <= CONSTANT * length.mean(axis=-1)] = np.nan  # rounding would rank them
    return Factors(
        by_length[None],
        spearman(cosine, row)[None],
        _distance(row, last_rows(vectors, alike_in_length))[None],
        _distance(row, last_rows(vectors, alike_in_direction))[None],
    )


def _without(keys: np.ndarray, dimensions: tuple[int, ...]) -> np.ndarray:
    keys = keys.copy()
    keys[:, list(dimensions)] = 0
    return keys


def _effect(vectors: HeadVectors, head: int, keys: np.ndarray) -> tuple[float, float]:
    """Sink share and distance of the attention to other keys, means over the queries after the first."""
    share, moved = [], []
    for before, after in zip(attention_rows(vectors, head), attention_rows(vectors, head, keys=keys), strict=True):
        share.append(after[:, 0])
        moved.append(_distance(before, after))
    first, second = (float(np.fromiter(chain(*each), np.float64)[1:].mean()) for each in (share, moved))
    return first, second


def _distance(row: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Total variation along the last axis."""
    return abs(row.astype(np.float64) - other).sum(axis=-1) / 2
