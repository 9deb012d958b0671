"""A number per head of a capture, by name: the registry that studies of many texts go through. Knows no file.

Each metric is taken of the attention of a probe, one of `PROBES`: of one query, or of the mean over many. It comes with
a status, as in `analysis.measures`, and is NaN exactly where that is not "ok". Letters: a_i is the attention that the
probe gives to token i of n.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from analysis.captures import Capture
from analysis.errors import SettingsError
from analysis.measures import HeadFigures, RankSums, correlation, status_of, verdicts_of
from analysis.ties import levelled, shared_ranks
from l2kv.spec import share

PROBES = {
    "next token": "the attention of one query, the greedy next token",
    "last queries": "each of the text's last queries by itself, over the tokens before it; then their mean",
    "all queries": "the attention that each key receives, the mean over the queries that can see it",
}
STATUSES = (
    "ok",
    "constant norms",
    "no attention",
    "too short",
    "sliding window",
    "no queries kept",
    "little attention",
)
OVERLAP_RATIO = 0.5


class Row:
    """The attention that a probe gives to n tokens, beside the norms of their keys: what every metric is of.

    What several metrics need is worked out once, when it is first asked for. L layers, H query heads, Hkv kv heads.
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
        the attention to them and to the first tokens that were left out."""
        self.mass = mass
        self.given, self.attention = attention, attention.astype(np.float64)
        self.norm, self.levels, self.ranks = norm, levels, ranks
        self.seen, self.n = seen, attention.shape[-1]

    @cached_property
    def without_first(self) -> Row:
        """The same for all tokens but the first, the usual sink."""
        seen = np.minimum(self.seen, self.n - 1)
        levels, ranks = self.levels[..., 1:], _without(self.ranks, 0)
        return Row(self.given[..., 1:], self.norm[..., 1:], levels, ranks, seen, self.mass)

    @cached_property
    def rank(self) -> np.ndarray:
        """By ascending norm, [L, Hkv, n]: 1..n, equals share the mean of theirs."""
        return self.ranks.mean(axis=0)

    @cached_property
    def ascending(self) -> np.ndarray:
        """The attention, sorted, [L, H, n]."""
        return np.sort(self.given, axis=-1)

    @cached_property
    def sums(self) -> RankSums:
        """What Γ and ALR are made of, [L, H] each."""
        return RankSums(
            by_norm=_products(self.rank, self.attention),
            by_attention=self.ascending @ np.arange(1.0, self.n + 1),
            by_chance=self.attention.sum(axis=-1) * (self.n + 1) / 2,
        )

    @cached_property
    def entropy(self) -> np.ndarray:
        """Of the shares of the attention, [L, H] bits."""
        shares = self.attention / np.maximum(self.attention.sum(axis=-1, keepdims=True), 1e-300)
        return -(shares * np.log2(np.where(shares > 0, shares, 1))).sum(axis=-1)

    @cached_property
    def status(self) -> np.ndarray:
        """[L, H] uint8, index into `STATUSES`: of metrics that compare orders."""
        words = status_of(self.levels, self.given, mass=self.mass, hidden=self.seen < self.n)
        return sum(i * (words == word) for i, word in enumerate(STATUSES)).astype(np.uint8)

    @cached_property
    def status_of_mass(self) -> np.ndarray:
        """[L, H] uint8, index into `STATUSES`: of metrics that look at attention alone."""
        return np.where(self.attention.sum(axis=-1) <= 1e-12, STATUSES.index("no attention"), 0).astype(np.uint8)


@dataclass(frozen=True, slots=True)
class Metric:
    """A number per head."""

    text: str  # one line for a reader
    of: Callable[[Row], np.ndarray]  # [L, H]
    leave_out: int = 0  # first tokens that it leaves out
    ranks: bool = True  # it compares orders, so norms and attention must give one


def overlap(row: Row, ratio: float = OVERLAP_RATIO) -> np.ndarray:
    """|kept by lowest norm ∩ kept by highest attention| / k with k = ceil(ratio * n), [L, H] in [0, 1].

    1 is the ideal order, k / n is expected of a random one. Of equal tokens the earlier is kept, by norm (see
    `ties`) and ideally.
    """
    k = share(ratio, row.n)
    bar = row.ascending[
        ..., row.n - k : row.n - k + 1
    ]  # of the last that is ideally kept, and maybe of some that are not
    ideal, equal = row.given > bar, row.given == bar
    ideal |= equal & (equal.cumsum(axis=-1) <= k - ideal.sum(axis=-1, keepdims=True))
    first, last = row.ranks
    kept, cut = last <= k, (first <= k) & (last > k)  # cut: of equals that are kept in part
    kept |= cut & (cut.cumsum(axis=-1) <= k + 1 - first)
    return _products(kept, ideal.astype(np.float64)) / max(k, 1)


def entropy(row: Row) -> np.ndarray:
    """-sum of p_i log2 p_i, p_i = a_i / sum of a, [L, H] bits in [0, log2 n]."""
    return row.entropy


def entropy_normalised(row: Row) -> np.ndarray:
    """Entropy / log2 of the number of tokens that the probe can see, [L, H] in [0, 1]; 1 is even attention."""
    return row.entropy / np.log2(np.maximum(row.seen, 2))[:, None]


def sink_share(row: Row) -> np.ndarray:
    """a_1 / sum of a, [L, H] in [0, 1]."""
    return row.attention[..., 0] / np.maximum(row.attention.sum(axis=-1), 1e-12)


def spearman(row: Row) -> np.ndarray:
    """Pearson's correlation of the ranks, [L, H] in [-1, 1]."""
    return _correlation(row.rank, shared_ranks(row.given).mean(axis=0))


def pearson(row: Row) -> np.ndarray:
    """Pearson's correlation, [L, H] in [-1, 1]."""
    return _correlation(row.norm.astype(np.float64), row.attention)


METRICS: dict[str, Metric] = {
    "gamma": Metric(
        "Γ: how the order of norms goes with attention; −1 ideal, 0 chance, +1 the mirror", lambda row: row.sums.gamma
    ),
    "gamma_without_sink": Metric(
        "Γ with the first token left out", lambda row: row.without_first.sums.gamma, leave_out=1
    ),
    "alr": Metric("the paper's attention loss against the ideal order; grows with the text", lambda row: row.sums.alr),
    "alr_chance": Metric("the attention loss expected of a random order", lambda row: row.sums.chance),
    "alr_per_token": Metric("ALR / n, from 0 to 1", lambda row: row.sums.alr / row.n),
    "alr_against_chance": Metric(
        "ALR / that of a random order; 0 ideal, 1 chance, 2 worst", lambda row: 1 + row.sums.gamma
    ),
    "spearman": Metric("rank correlation of norm and attention", spearman),
    "pearson": Metric("linear correlation of norm and attention", pearson),
    "sink_share": Metric("share of the attention that the first token gets", sink_share, ranks=False),
    "overlap": Metric("share of the half kept by low norm that the ideal half holds too", overlap),
    "entropy": Metric("entropy of the attention, bits", entropy, ranks=False),
    "entropy_normalised": Metric("entropy as a share of that of even attention", entropy_normalised, ranks=False),
}


@dataclass(frozen=True, slots=True, eq=False)
class Figures:
    """Metrics of one capture by one probe: M of them, all of `METRICS` unless fewer were asked for."""

    values: np.ndarray  # [M, L, H] float64; NaN where the status is not "ok"
    status: np.ndarray  # [M, L, H] uint8, index into `STATUSES`
    names: tuple[str, ...] = tuple(METRICS)

    def of(self, metric: str) -> np.ndarray:
        """[L, H] of one metric."""
        return self.values[self.names.index(metric)]

    def status_of(self, metric: str) -> np.ndarray:
        """[L, H] of str: "ok", or why the metric is undefined there."""
        return np.array(STATUSES, dtype=object)[self.status[self.names.index(metric)]]


def metrics(
    capture: Capture, *, probe: str = "next token", leave_out: int = 0, names: Collection[str] = tuple(METRICS)
) -> Figures:
    """Every metric of every head, or those of some names.

    "last queries" is the mean over the queries that define a metric, each of which has its own n; where none does, the
    status is that of the last.

    Args:
        probe: whose attention, one of `PROBES`.
        leave_out: as if the text began after so many tokens.
        names: which of `METRICS`.

    Raises:
        SettingsError: there is no such probe.
    """
    wanted = [METRICS[name] for name in names]
    rows = [_evaluate(row, wanted) for row in _rows(capture, probe, leave_out)]
    if not rows:
        shape = (len(wanted), capture.n_layers, capture.n_heads)
        status = np.full(shape, STATUSES.index("no queries kept"), np.uint8)
        return Figures(np.full(shape, np.nan), status, tuple(names))
    values, status = (np.stack(parts) for parts in zip(*rows, strict=True))  # [queries, M, L, H]
    count = (status == 0).sum(axis=0)
    mean = np.nansum(values, axis=0) / np.maximum(count, 1)
    status = np.where(count > 0, 0, status[0]).astype(np.uint8)
    return Figures(np.where(count > 0, mean, np.nan), status, tuple(names))


def by_query(capture: Capture, metric: str = "gamma") -> np.ndarray:
    """One metric for each of the last queries, [W, L, H]; NaN where it is undefined. Their spread is what one hides.

    Raises:
        SettingsError: there is no such metric.
    """
    if metric not in METRICS:
        raise SettingsError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    found = [_evaluate(row, [METRICS[metric]])[0][0] for row in _rows(capture, "last queries", 0)]
    return np.array(found[::-1]).reshape(-1, capture.n_layers, capture.n_heads)


def figures_of_probe(capture: Capture, probe: str, *, leave_out: int = 0) -> HeadFigures:
    """`measures.head_figures` with a probe in the place of the next token. Spearman and Pearson are always of all
    queries, and sink share and verdict, which weigh it, always of all tokens."""
    names = ("gamma", "gamma_without_sink", "alr", "alr_per_token", "alr_against_chance", "sink_share")
    whole = metrics(capture, probe=probe, names=names)
    shown = metrics(capture, probe=probe, leave_out=leave_out, names=names) if leave_out else whole
    return HeadFigures(
        gamma=shown.of("gamma"),
        alr=shown.of("alr"),
        alr_per_token=shown.of("alr_per_token"),
        alr_against_chance=shown.of("alr_against_chance"),
        spearman=correlation(capture, "spearman", leave_out=leave_out),
        pearson=correlation(capture, "pearson", leave_out=leave_out),
        sink_share=whole.of("sink_share"),
        status=shown.status_of("gamma"),
        verdict=verdicts_of(whole.of("gamma"), whole.of("gamma_without_sink")),
    )


def _rows(capture: Capture, probe: str, leave_out: int) -> Iterator[Row]:
    """The row of each query that a probe is made of, the last first."""
    if probe not in PROBES:
        raise SettingsError(f"probe must be one of {', '.join(PROBES)}, got {probe!r}")
    n, norm = capture.n_tokens, capture.key_norm
    levels = levelled(norm, capture.dtype)
    ranks = shared_ranks(levels[..., leave_out:])
    # A window of w holds the query's own key as well, which is no column of its row.
    windows = np.array([window - 1 if window else n for window in capture.windows])

    def row(attention: np.ndarray, position: int, seen: np.ndarray | int) -> Row:
        before = slice(leave_out, position)
        seen = np.minimum(seen, position - leave_out)
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
        return np.full(shape, np.nan), np.full(shape, STATUSES.index("too short"), np.uint8)
    status = []
    for metric in wanted:
        seen = row.without_first if metric.leave_out else row
        status.append(seen.status if metric.ranks else seen.status_of_mass)
    with np.errstate(divide="ignore", invalid="ignore"):  # where the status tells
        values = np.stack([metric.of(row) for metric in wanted]).astype(np.float64)
    return np.where(np.stack(status) == 0, values, np.nan), np.stack(status)


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
    return _products(x, y) / np.sqrt(spread * np.vecdot(y, y))


def _products(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Sum over tokens of x [L, Hkv, n] times y [L, H, n], each kv head's with those of the query heads that read it."""
    grouped = y.reshape(*x.shape[:2], y.shape[1] // x.shape[1], -1)
    return (grouped @ x[..., None]).reshape(y.shape[:2])
