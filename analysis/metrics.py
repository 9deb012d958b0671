"""A number per head of a capture, by name: the registry that studies of many texts go through. Knows no file.

Each metric is taken of one of two attentions, the `PROBES`. It comes with a status, as in `analysis.measures`, and is
NaN exactly where that is not "ok". Letters: a_i is the attention that the probe gives to token i of n.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from analysis import measures
from analysis.run import Capture
from l2kv.spec import share

PROBES = {
    "next token": "the attention of one query, the greedy next token",
    "all queries": "the attention that each key receives, the mean over the queries that can see it",
}
STATUSES = ("ok", "constant norms", "no attention", "too short", "sliding window")
OVERLAP_RATIO = 0.5


@dataclass(frozen=True, slots=True)
class Metric:
    """A number per head."""

    text: str  # one line for a reader
    of: Callable[[Capture], np.ndarray]  # [L, H]; the chosen probe's attention stands in both fields of the capture
    leave_out: int = 0  # first tokens that it leaves out
    ranks: bool = True  # it compares orders, so norms and attention must give one


def gamma(capture: Capture, leave_out: int = 0) -> np.ndarray:
    """Γ = cov(a, rank(norm)) / cov(a, rank(a)), [L, H] in [-1, 1]."""
    return measures.correlation(capture, leave_out=leave_out)


def alr_per_token(capture: Capture) -> np.ndarray:
    """ALR / n, [L, H] in [0, 1]: what texts of different lengths may be compared by."""
    return measures.alr(capture) / capture.n_tokens


def sink_share(capture: Capture) -> np.ndarray:
    """a_1 / sum of a, [L, H] in [0, 1]."""
    return measures.sink_share(capture)


def overlap(capture: Capture, ratio: float = OVERLAP_RATIO) -> np.ndarray:
    """|kept by lowest norm ∩ kept by highest attention| / k with k = ceil(ratio * n), [L, H] in [0, 1].

    1 is the ideal order, k / n is expected of a random one. Of equal tokens the earlier is kept, by norm and ideally.
    """
    k = share(ratio, capture.n_tokens)
    by_norm = _lowest(capture.key_norm_by_head(), k)
    ideal = _lowest(-capture.probe_attention, k)
    return (by_norm & ideal).sum(axis=-1) / max(k, 1)


def entropy(capture: Capture) -> np.ndarray:
    """-sum of p_i log2 p_i, p_i = a_i / sum of a, [L, H] bits in [0, log2 n]."""
    a = capture.probe_attention.astype(np.float64)
    p = a / np.maximum(a.sum(axis=-1, keepdims=True), 1e-300)
    return -(p * np.log2(p, where=p > 0, out=np.zeros_like(p))).sum(axis=-1)


def entropy_normalised(capture: Capture) -> np.ndarray:
    """Entropy / log2 of the number of tokens that the probe can see, [L, H] in [0, 1]; 1 is even attention."""
    n = capture.n_tokens
    # A window of w holds the probe query's own key as well, which is no column of its row.
    seen = np.array([min(n, window - 1) if window else n for window in capture.windows], dtype=np.float64)
    return entropy(capture) / np.log2(np.maximum(seen, 2))[:, None]


METRICS: dict[str, Metric] = {
    "gamma": Metric("Γ: how the order of norms goes with attention; −1 ideal, 0 chance, +1 the mirror", gamma),
    "gamma_without_sink": Metric("Γ with the first token left out", lambda c: gamma(c, 1), leave_out=1),
    "alr": Metric("the paper's attention loss against the ideal order; grows with the text", measures.alr),
    "alr_chance": Metric("the attention loss expected of a random order", measures.alr_chance),
    "alr_per_token": Metric("ALR / n, from 0 to 1", alr_per_token),
    "alr_against_chance": Metric("ALR / that of a random order; 0 ideal, 1 chance, 2 worst", lambda c: 1 + gamma(c)),
    "spearman": Metric("rank correlation of norm and attention", lambda c: measures.correlation(c, "spearman")),
    "pearson": Metric("linear correlation of norm and attention", lambda c: measures.correlation(c, "pearson")),
    "sink_share": Metric("share of the attention that the first token gets", sink_share, ranks=False),
    "overlap": Metric("share of the half kept by low norm that the ideal half holds too", overlap),
    "entropy": Metric("entropy of the attention, bits", entropy, ranks=False),
    "entropy_normalised": Metric("entropy as a share of that of even attention", entropy_normalised, ranks=False),
}


@dataclass(frozen=True, slots=True, eq=False)
class Figures:
    """All metrics of one capture by one probe, in the order of `METRICS`: M of them."""

    values: np.ndarray  # [M, L, H] float64; NaN where the status is not "ok"
    status: np.ndarray  # [M, L, H] uint8, index into `STATUSES`

    def of(self, metric: str) -> np.ndarray:
        """[L, H] of one metric."""
        return self.values[tuple(METRICS).index(metric)]


def metrics(capture: Capture, *, probe: str = "next token") -> Figures:
    """Every metric of every head. With "all queries", Γ and the rest are of the attention received.

    Raises:
        ValueError: there is no such probe.
    """
    seen = _through(capture, probe)
    status = np.stack([_status(seen, metric) for metric in METRICS.values()])
    values = np.stack([metric.of(seen) for metric in METRICS.values()]).astype(np.float64)
    return Figures(np.where(status == 0, values, np.nan), status)


def _through(capture: Capture, probe: str) -> Capture:
    """The capture with the attention of a probe in the place of both."""
    if probe not in PROBES:
        raise ValueError(f"probe must be one of {', '.join(PROBES)}, got {probe!r}")
    if probe == "next token":
        return replace(capture, attention_received=capture.probe_attention)
    # Every key is seen by some queries, through a window too, so nothing is hidden from this probe.
    return replace(capture, probe_attention=capture.attention_received, windows=(0,) * capture.n_layers)


def _status(seen: Capture, metric: Metric) -> np.ndarray:
    """[L, H] uint8, index into `STATUSES`."""
    if metric.ranks:
        words = measures.status(seen, leave_out=metric.leave_out)
        return np.array([STATUSES.index(word) for word in words.ravel()], np.uint8).reshape(words.shape)
    nothing = seen.probe_attention.sum(axis=-1, dtype=np.float64) <= 1e-12
    return np.where(nothing, STATUSES.index("no attention"), 0).astype(np.uint8)


def _lowest(values: np.ndarray, k: int) -> np.ndarray:
    """Which k along the last axis are lowest, of equals the earlier: bool of the same shape."""
    chosen = np.zeros(values.shape, dtype=bool)
    np.put_along_axis(chosen, np.argsort(values, axis=-1, kind="stable")[..., :k], True, axis=-1)
    return chosen
