"""Metrics, the numbers per head of a capture: their registry, and the one program that computes them. Knows no files.

A metric describes the attention of a probe, one of `PROBES`: one query, or the mean over many. With `a` the
attention that the probe gives to the n tokens and ranks ascending (norms that differ by rounding alone share a rank,
see `analysis.ties`):

    L^m     = attention of the m tokens of highest key norm         dropping them, as low_norm does; of equals the mean
    L^m,ref = attention of the m tokens of lowest attention         the ideal order
    ALR     = sum over m = 1..n of (L^m - L^m,ref)                  Eq. 5-7 of the paper; 0 is ideal
    Γ       = cov(a, rank(norm)) / cov(a, rank(a))                  -1 ideal, 0 chance, +1 the reverse

and ALR = (1 + Γ) * the ALR expected of a random order. Each number comes with a status, and is NaN exactly where that
is not "ok". All in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from analysis.captures import Capture
from analysis.errors import SettingsError
from analysis.ties import shared_ranks
from l2kv.registry import Registry
from l2kv.spec import share

PROBES = {
    "next token": "the attention of one query, the greedy next token",
    "last queries": "each of the text's last queries by itself, over the tokens before it; then their mean",
    "all queries": "the attention that each key receives, the mean over the queries that can see it",
}
STATUSES = (
    "ok",
    "constant norms",  # all equal, or within `CONSTANT`
    "no attention",
    "too short",
    "sliding window",  # the probe sees only the latest tokens, and the others cannot be ranked by it
    "no queries kept",
    "little attention",  # next to none is left, under `LEAST_MASS`, without the first tokens
)
"""Why a number is undefined. Files hold their places in this list: add at its end."""
CONSTANT = 1e-5  # a relative spread of a head's norms below this is no order, of float32 keys either
LEAST_MASS = 0.01  # share of a row's attention: evicting less than that, in any order, loses no more than that
OVERLAP_RATIO = 0.5


class Row:
    """The attention that a probe gives to n tokens, and the norms of their keys: the input of every metric.

    What several metrics need is computed once, on first use. L layers, H query heads, Hkv kv heads.
    """

    def __init__(
        self,
        attention: np.ndarray,
        norm: np.ndarray,
        levels: np.ndarray,
        ranks: np.ndarray,
        seen: np.ndarray,
        mass: np.ndarray,
    ) -> None:
        """attention [L, H, n]; norm [L, Hkv, n]; levels, the same levelled; ranks [2, L, Hkv, n], the lowest and the
        highest of each one's equals (see `ties`); seen [L], how many of the n tokens the probe can see; mass [L, H],
        the attention to them and to the first tokens that are skipped."""
        self.mass = mass
        self.given, self.attention = attention, attention.astype(np.float64)
        self.norm, self.levels, self.ranks = norm, levels, ranks
        self.seen, self.n = seen, attention.shape[-1]

    def skipping(self, first: int) -> Row:
        """Drop the first tokens."""
        return self._without_first_token.skipping(first - 1) if first else self

    @cached_property
    def _without_first_token(self) -> Row:
        seen = np.minimum(self.seen, self.n - 1)
        levels, ranks = self.levels[..., 1:], _without(self.ranks, 0)
        return Row(self.given[..., 1:], self.norm[..., 1:], levels, ranks, seen, self.mass)

    @cached_property
    def rank(self) -> np.ndarray:
        """Ranks by ascending norm, [L, Hkv, n]: 1..n, equals share the mean of theirs."""
        return self.ranks.mean(axis=0)

    @cached_property
    def ascending(self) -> np.ndarray:
        """Attention in ascending order, [L, H, n]."""
        return np.sort(self.given, axis=-1)

    # The m-th token dropped counts in the n - m + 1 losses that follow: a token's attention is summed as often as its
    # rank says, in the order of norms, and as its rank from the other end says, in the ideal order. Of equals each is
    # dropped first as often as last: on average as often as the rank that they share says.

    @cached_property
    def by_norm(self) -> np.ndarray:
        """Sum of attention times rank by norm, [L, H]."""
        return _products(self.rank, self.attention)

    @cached_property
    def by_attention(self) -> np.ndarray:
        """Sum of attention times rank by attention, [L, H]."""
        return self.ascending @ np.arange(1.0, self.n + 1)

    @cached_property
    def by_chance(self) -> np.ndarray:
        """Sum of attention times the mean rank, [L, H]."""
        return self.attention.sum(axis=-1) * (self.n + 1) / 2

    @cached_property
    def status(self) -> np.ndarray:
        """Status of metrics that compare orders, [L, H] uint8."""
        if self.n < 3:
            return np.full(self.given.shape[:2], _CODE["too short"])
        even = np.ptp(self.given, axis=-1) <= 1e-12  # no mass at all, or spread with no difference
        little = self.attention.sum(axis=-1) < LEAST_MASS * self.mass
        constant = np.ptp(self.levels, axis=-1) <= CONSTANT * self.levels.mean(axis=-1)
        constant = np.repeat(constant, self.given.shape[1] // constant.shape[1], axis=1)
        hidden = np.broadcast_to(self.seen[:, None] < self.n, even.shape)
        reasons = {
            "sliding window": hidden,
            "constant norms": constant,
            "no attention": even,
            "little attention": little,
        }
        return np.select(list(reasons.values()), [_CODE[name] for name in reasons], _CODE["ok"])

    @cached_property
    def status_of_mass(self) -> np.ndarray:
        """Status of metrics that look at attention alone, [L, H] uint8."""
        return np.where(self.attention.sum(axis=-1) <= 1e-12, _CODE["no attention"], _CODE["ok"])


_CODE = {name: np.uint8(i) for i, name in enumerate(STATUSES)}


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric: how to compute it, and how to show it."""

    title: str
    """Title in tables and maps."""
    about: str
    """One line for a reader."""
    of: Callable[[Row], np.ndarray]
    """The numbers, [L, H]; where the status is not "ok" they may be anything."""
    low: float | None = None
    """Least value there can be, where the scale of a map begins. None: at 0."""
    high: float | None = None
    """Largest value there can be, where it ends. None: at the largest of the map."""
    diverging: bool = False
    """True if its sign matters: the colour scale diverges at 0."""
    skip_first: int = 0
    """Number of tokens skipped at the beginning."""
    about_sink: bool = False
    """True if it describes the first token, and so is never shown without that token."""
    ranks: bool = True
    """True if it compares orders, so that norms and attention must give one."""


def gamma(row: Row) -> np.ndarray:
    """Γ, the Gini correlation of norms with attention, [L, H] in [-1, 1]."""
    return (row.by_norm - row.by_chance) / alr_chance(row)


def alr_of(row: Row) -> np.ndarray:
    """Attention lost by norm order beyond the ideal one, summed over m, [L, H]."""
    return row.by_norm - (2 * row.by_chance - row.by_attention)


def alr_chance(row: Row) -> np.ndarray:
    """ALR expected of a random order, [L, H]."""
    return row.by_attention - row.by_chance


def overlap(row: Row, ratio: float = OVERLAP_RATIO) -> np.ndarray:
    """|kept by lowest norm ∩ kept by highest attention| / k with k = ceil(ratio * n), [L, H] in [0, 1].

    1 is the ideal order, k / n is expected of a random one. Of equal tokens the earlier is kept, by norm (see
    `ties`) and ideally.
    """
    k = share(ratio, row.n)
    bar = row.ascending[..., row.n - k : row.n - k + 1]  # of the last that is ideally kept, and maybe of some more
    ideal, equal = row.given > bar, row.given == bar
    ideal |= equal & (equal.cumsum(axis=-1) <= k - ideal.sum(axis=-1, keepdims=True))
    first, last = row.ranks
    kept, cut = last <= k, (first <= k) & (last > k)  # cut: of equals that are kept in part
    kept |= cut & (cut.cumsum(axis=-1) <= k + 1 - first)
    return _products(kept, ideal.astype(np.float64)) / max(k, 1)


def entropy(row: Row) -> np.ndarray:
    """-sum of p_i log2 p_i, p_i = a_i / sum of a, [L, H] bits in [0, log2 n]."""
    shares = row.attention / np.maximum(row.attention.sum(axis=-1, keepdims=True), 1e-300)
    return -(shares * np.log2(np.where(shares > 0, shares, 1))).sum(axis=-1)


def entropy_normalised(row: Row) -> np.ndarray:
    """Entropy / log2 of the number of tokens that the probe can see, [L, H] in [0, 1]; 1 is even attention."""
    return entropy(row) / np.log2(np.maximum(row.seen, 2))[:, None]


def sink_share(row: Row) -> np.ndarray:
    """a_1 / sum of a, [L, H] in [0, 1]."""
    return row.attention[..., 0] / np.maximum(row.attention.sum(axis=-1), 1e-12)


def spearman(row: Row) -> np.ndarray:
    """Pearson's correlation of the ranks, [L, H] in [-1, 1]."""
    return _correlation(row.rank, shared_ranks(row.given).mean(axis=0))


def pearson(row: Row) -> np.ndarray:
    """Pearson's correlation, [L, H] in [-1, 1]."""
    return _correlation(row.norm.astype(np.float64), row.attention)


METRICS: Registry[Metric] = Registry(
    "metric",
    SettingsError,
    {
        "gamma": Metric(
            "Γ",
            "Gini correlation of key norms with attention: −1 ideal, 0 chance, +1 the mirror of the paper's rule",
            gamma,
            low=-1,
            high=1,
            diverging=True,
        ),
        "gamma_skip_first": Metric(
            "Γ without the first token",
            "Γ of all tokens but the first, the usual sink",
            gamma,
            low=-1,
            high=1,
            diverging=True,
            skip_first=1,
            about_sink=True,
        ),
        "alr": Metric("ALR", "the paper's attention loss against the ideal order; grows with the text", alr_of, low=0),
        "alr_chance": Metric(
            "ALR of a random order", "the attention loss expected of a random order", alr_chance, low=0
        ),
        "alr_per_token": Metric(
            "ALR / n",
            "ALR by the number of tokens; comparable between texts",
            lambda row: alr_of(row) / row.n,
            low=0,
        ),
        "normalised_alr": Metric(
            "Normalised ALR",
            "ALR over that of a random order; 0 ideal, 1 random, 2 reversed",
            lambda row: 1 + gamma(row),
            low=0,
            high=2,
        ),
        "spearman": Metric(
            "Spearman", "rank correlation of norm and attention", spearman, low=-1, high=1, diverging=True
        ),
        "pearson": Metric(
            "Pearson", "linear correlation of norm and attention", pearson, low=-1, high=1, diverging=True
        ),
        "sink_share": Metric(
            "Share of the first token",
            "share of the attention that the first token gets",
            sink_share,
            low=0,
            high=1,
            about_sink=True,
            ranks=False,
        ),
        "overlap": Metric(
            "Overlap", "share of the half kept by low norm that the ideal half holds too", overlap, low=0, high=1
        ),
        "entropy": Metric("Entropy, bits", "entropy of the attention, bits", entropy, low=0, ranks=False),
        "entropy_normalised": Metric(
            "Normalised entropy",
            "entropy as a share of that of even attention",
            entropy_normalised,
            low=0,
            high=1,
            ranks=False,
        ),
    },
)
"""Metrics by name. One that is registered is measured, saved and shown like those that are here."""


@dataclass(frozen=True, slots=True, eq=False)
class HeadValues:
    """M metrics by one probe, of every head of one capture."""

    names: tuple[str, ...]  # M
    values: np.ndarray  # [M, L, H] float64; NaN where the status is not "ok"
    status: np.ndarray  # [M, L, H] uint8, index into `STATUSES`

    def of(self, metric: str) -> np.ndarray:
        """Values of one metric, [L, H]."""
        return self.values[self.names.index(metric)]

    def status_of(self, metric: str) -> np.ndarray:
        """Status of one metric, [L, H] of str: "ok", or why it is undefined there."""
        return np.array(STATUSES, dtype=object)[self.status[self.names.index(metric)]]


def metrics(
    capture: Capture, probe: str = "next token", skip_first: int = 0, names: Collection[str] | None = None
) -> HeadValues:
    """Compute metrics of every head.

    "last queries" is the mean over the queries that define a metric, each of which has its own n; where none does, the
    status is that of the last.

    Args:
        probe: whose attention, one of `PROBES`.
        skip_first: number of tokens to ignore at the beginning of the text: 1 for the usual sink.
        names: which of `METRICS`; all by default.

    Raises:
        SettingsError: there is no such probe or metric.
    """
    names = tuple(METRICS) if names is None else tuple(names)
    wanted = [METRICS.find(name) for name in names]
    rows = [_evaluate(row, wanted) for row in _rows(capture, probe, skip_first)]
    if not rows:
        shape = (len(wanted), capture.n_layers, capture.n_heads)
        return HeadValues(names, np.full(shape, np.nan), np.full(shape, _CODE["no queries kept"]))
    values, status = (np.stack(parts) for parts in zip(*rows, strict=True))  # [queries, M, L, H]
    count = (status == 0).sum(axis=0)
    mean = np.nansum(values, axis=0) / np.maximum(count, 1)
    return HeadValues(names, np.where(count > 0, mean, np.nan), np.where(count > 0, _CODE["ok"], status[0]))


def by_query(capture: Capture, metric: str = "gamma") -> np.ndarray:
    """One metric for each of the last queries, [W, L, H]; NaN is undefined. Shows the spread that a mean hides.

    Raises:
        SettingsError: there is no such metric.
    """
    wanted = [METRICS.find(metric)]
    found = [_evaluate(row, wanted)[0][0] for row in _rows(capture, "last queries", 0)]
    return np.array(found[::-1]).reshape(-1, capture.n_layers, capture.n_heads)


_METHODS = {"gini": "gamma", "spearman": "spearman", "pearson": "pearson"}


def correlation(
    capture: Capture, method: str = "gini", *, probe: str = "next token", skip_first: int = 0
) -> np.ndarray:
    """Correlate key norm with attention, [L, H] in [-1, 1]; negative is the paper's claim, NaN is undefined (`status`).

    Args:
        method: "gini" (Γ), "spearman" or "pearson".
        probe, skip_first: as in `metrics`.

    Raises:
        SettingsError: there is no such method or probe.
    """
    if method not in _METHODS:
        raise SettingsError(f"method must be one of {', '.join(_METHODS)}, got {method!r}")
    return metrics(capture, probe, skip_first, [_METHODS[method]]).values[0]


def alr(capture: Capture, *, probe: str = "next token", skip_first: int = 0) -> np.ndarray:
    """ALR: the paper's attention loss against the ideal order, [L, H]. A sum over m, so it grows with the text.

    Args:
        probe, skip_first: as in `metrics`.
    """
    return metrics(capture, probe, skip_first, ["alr"]).values[0]


def status(capture: Capture, *, probe: str = "next token", skip_first: int = 0) -> np.ndarray:
    """Status of each head, [L, H] of str: "ok", or why norms and attention give no order to compare (`STATUSES`)."""
    return metrics(capture, probe, skip_first, ["gamma"]).status_of("gamma")


def _rows(capture: Capture, probe: str, skip_first: int) -> Iterator[Row]:
    """The row of each query that a probe is made of, the last first."""
    if probe not in PROBES:
        raise SettingsError(f"probe must be one of {', '.join(PROBES)}, got {probe!r}")
    n, norm, levels = capture.n_tokens, capture.key_norm, capture.levels
    ranks = shared_ranks(levels[..., skip_first:]) if skip_first else capture.ranks
    # A window of w holds the query's own key as well, which is no column of its row.
    windows = np.array([window - 1 if window else n for window in capture.windows])

    def row(attention: np.ndarray, position: int, seen: np.ndarray) -> Row:
        before = slice(skip_first, position)
        seen = np.minimum(seen, position - skip_first)
        mass = attention[..., :position].sum(axis=-1, dtype=np.float64)
        return Row(attention[..., before], norm[..., before], levels[..., before], ranks, seen, mass)

    if probe == "next token":
        yield row(capture.probe_attention, n, windows)
    elif probe == "last queries":
        for position, attention in zip(capture.recent_positions[::-1], capture.recent_attention[::-1], strict=True):
            if ranks.shape[-1]:  # its own key has gone, and before it those of the later queries
                ranks = _without(ranks, -1)
            yield row(attention, position, windows)
    else:
        # Every key is seen by some queries, through a window too, so nothing is hidden from this probe.
        yield row(capture.attention_received, n, np.full(capture.n_layers, n))


def _evaluate(row: Row, wanted: Collection[Metric]) -> tuple[np.ndarray, np.ndarray]:
    """Values and status [M, L, H] of some metrics."""
    if row.n < 2:  # the text's first queries: nothing to compare
        shape = (len(wanted), *row.given.shape[:2])
        return np.full(shape, np.nan), np.full(shape, _CODE["too short"])
    rows = [row.skipping(metric.skip_first) for metric in wanted]
    status = np.stack(
        [one.status if metric.ranks else one.status_of_mass for one, metric in zip(rows, wanted, strict=True)]
    )
    with np.errstate(divide="ignore", invalid="ignore"):  # where the status tells
        values = np.stack([metric.of(one) for one, metric in zip(rows, wanted, strict=True)]).astype(np.float64)
    return np.where(status == 0, values, np.nan), status


def _without(ranks: np.ndarray, place: int) -> np.ndarray:
    """Ranks as `shared_ranks` when the first (0) or the last (-1) token has gone: one sort does for all the queries of
    a text.
    """
    gone, others = ranks[..., [place]], ranks[..., 1:] if place == 0 else ranks[..., :-1]
    below = others > gone  # of [0] those above the one that has gone, of [1] its equals too
    below[1] |= others[1] == gone[1]
    return others - below


def _correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's of x [L, Hkv, n] and y [L, H, n]: [L, H]. scipy's works out more, and is slow over many queries."""
    x, y = (values - values.mean(axis=-1, keepdims=True) for values in (x, y))
    spread = np.repeat(np.vecdot(x, x), y.shape[1] // x.shape[1], axis=1)
    return np.clip(_products(x, y) / np.sqrt(spread * np.vecdot(y, y)), -1, 1)


def _products(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Sum over tokens of x [L, Hkv, n] times y [L, H, n], each kv head's with those of the query heads that read it."""
    grouped = y.reshape(*x.shape[:2], y.shape[1] // x.shape[1], -1)
    return (grouped @ x[..., None]).reshape(y.shape[:2])
