"""Does key norm order tokens as attention does? The paper's ALR, its normal form Γ, and rank correlations.

All from a `Capture`, in float64; no model, no plot. For one query head, with `a` the attention that the probe query
gives to the n tokens and ranks ascending (norms that rounding alone tells apart share theirs, see `ties`):

    L^m     = attention of the m tokens of highest key norm         dropping them, as low_norm does; of equals the mean
    L^m,ref = attention of the m tokens of lowest attention         the ideal order
    ALR     = sum over m = 1..n of (L^m - L^m,ref)                  Eq. 5-7 of the paper; 0 is ideal
    Γ       = cov(a, rank(norm)) / cov(a, rank(a))                  -1 ideal, 0 chance, +1 the reverse

and ALR = (1 + Γ) * the ALR expected of a random order. Undefined values are NaN, and `status` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from analysis.captures import Capture
from analysis.errors import SettingsError
from analysis.ties import evened, levelled, shared_ranks
from l2kv.spec import CompressionSpec

_NORM_SIGN = {"low_norm": -1.0, "high_norm": 1.0}

TOO_FEW = 16  # tokens of which no order says anything
WEAK = 0.1  # a |Γ| below this is not called on one text: between texts it changes sign
CONSTANT = 1e-5  # a relative spread of a head's norms below this is no order, of float32 keys either
LEAST_MASS = 0.01  # of a row's attention: in whatever order less than that is evicted, no more than that is lost


@dataclass(frozen=True, slots=True)
class AttentionLoss:
    """What one head loses when m = 0..n tokens are dropped, as shares of the probe's attention. Each [n + 1], or
    [n + 1 - w] where the last w are protected and cannot be dropped."""

    low_norm: np.ndarray  # low norms kept: the highest dropped first
    high_norm: np.ndarray  # the mirror
    ideal: np.ndarray  # the least attended dropped first
    chance: np.ndarray  # expected of a random order


def attention_loss(
    capture: Capture, layer: int, head: int, *, leave_out: int = 0, protect_last: int = 0
) -> AttentionLoss:
    """The loss curves of a head, for the probe query.

    Of tokens of equal norm (see `ties`) any may be dropped first: there a curve is the one expected, a straight line.

    Args:
        leave_out: the first tokens (the sink) are left out of all of it.
        protect_last: the latest tokens cannot be dropped; 0 in the paper.
    """
    free = slice(leave_out, max(capture.n_tokens - protect_last, leave_out))
    attention = capture.probe_attention[layer, head, free].astype(np.float64)
    norm = levelled(capture.key_norm[layer, capture.kv_head(head)], capture.dtype)[free]
    by_norm = evened(attention, norm)
    n = len(attention)
    return AttentionLoss(
        low_norm=_cumulative(by_norm[::-1]),
        high_norm=_cumulative(by_norm),
        ideal=_cumulative(np.sort(attention)),
        chance=np.arange(n + 1) / max(n, 1) * attention.sum(),
    )


def alr(capture: Capture, *, leave_out: int = 0) -> np.ndarray:
    """The paper's attention loss against the reference, [L, H]: a sum over m, so it grows with the text."""
    return _where_defined(capture, leave_out, RankSums.of(capture, leave_out).alr)


def alr_chance(capture: Capture, *, leave_out: int = 0) -> np.ndarray:
    """The ALR expected when tokens are dropped in random order, [L, H]."""
    return RankSums.of(capture, leave_out).chance


def correlation(capture: Capture, method: str = "gini", *, leave_out: int = 0) -> np.ndarray:
    """How key norm goes with attention, [L, H] in [-1, 1]; negative is the paper's claim, NaN is undefined (`status`).

    Args:
        method: "gini" (Γ, of the probe row), or "spearman" or "pearson" (of the attention that each key receives, as
            the mean over the queries that can see it).
        leave_out: the first tokens are left out: 1 leaves out the usual sink.
    """
    if method not in _CORRELATIONS:
        raise SettingsError(f"method must be one of {', '.join(_CORRELATIONS)}, got {method!r}")
    return _where_defined(capture, leave_out, _CORRELATIONS[method](capture, leave_out))


def status(capture: Capture, *, leave_out: int = 0) -> np.ndarray:
    """Why a head's figures are undefined, [L, H] of str: "ok", "constant norms" (all equal, or within 1e-5), "no
    attention", "little attention" (next to none is left, under `LEAST_MASS`, when the first tokens are left out), "too
    short", or "sliding window": the probe query sees only the latest tokens there, and the others cannot be ranked by
    it."""
    windows = np.array(capture.windows)
    return status_of(
        levelled(capture.key_norm, capture.dtype)[..., leave_out:],
        capture.probe_attention[..., leave_out:],
        mass=capture.probe_attention.sum(axis=-1, dtype=np.float64),
        # A window of w holds the query's own key as well, which is no column of its row.
        hidden=(windows > 0) & (windows - 1 < capture.n_tokens - leave_out),
    )


def status_of(norm: np.ndarray, attention: np.ndarray, *, mass: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """`status` of any attention [L, H, n] to tokens of levelled norms [L, Hkv, n] (see `ties`).

    Args:
        mass: [L, H], the attention to all tokens, those that are left out included.
        hidden: [L] bool, some of the tokens cannot be seen.
    """
    result = np.full(attention.shape[:2], "ok", dtype=object)
    if attention.shape[-1] < 3:
        result[:] = "too short"
        return result
    even = np.ptp(attention, axis=-1) <= 1e-12  # no mass at all, or spread with no difference
    result[even] = "no attention"
    result[~even & (attention.sum(axis=-1, dtype=np.float64) < LEAST_MASS * mass)] = "little attention"
    constant = np.ptp(norm, axis=-1) <= CONSTANT * norm.mean(axis=-1)
    result[np.repeat(constant, attention.shape[1] // norm.shape[1], axis=1)] = "constant norms"
    result[hidden] = "sliding window"
    return result


def sink_share(capture: Capture, *, n_first: int = 1) -> np.ndarray:
    """The share of the probe's attention that goes to the first tokens, [L, H]."""
    row = capture.probe_attention.astype(np.float64)
    return row[..., :n_first].sum(axis=-1) / np.maximum(row.sum(axis=-1), 1e-12)


VERDICTS = {
    "follows the paper": "Γ < 0 with and without the first token: low-norm keys get the attention",
    "sink only": "Γ < 0 thanks to the first token; among the others low norm gets no more attention, or less, or they "
    f"get less than {LEAST_MASS:.0%} of it",
    "hidden by the sink": "Γ < 0 without the first token, which hides that low-norm keys get the attention",
    "mirror": "Γ > 0, and not thanks to the first token: HIGH-norm keys get the attention",
    "too weak to call": f"|Γ| < {WEAK}, or Γ > 0 only thanks to the first token: one text cannot tell its sign",
    "undefined": "no order to compare: constant norms, no attention, a sliding window, or too short a text",
}
# By the sign of Γ with and without the first token; 0 is a |Γ| below WEAK.
VERDICT_OF_SIGNS = {
    (-1, -1): "follows the paper",
    (-1, 0): "sink only",
    (-1, 1): "sink only",
    (0, -1): "hidden by the sink",
    (1, -1): "hidden by the sink",
    (0, 1): "mirror",
    (1, 1): "mirror",
    (0, 0): "too weak to call",
    (1, 0): "too weak to call",
}


def verdicts(capture: Capture) -> np.ndarray:
    """What each head says of the paper's claim on this one text, [L, H], keys of `VERDICTS`. No interval: one text."""
    return verdicts_of(correlation(capture), correlation(capture, leave_out=1))


def verdicts_of(gamma: np.ndarray, without_first: np.ndarray) -> np.ndarray:
    """`verdicts` of any Γ with and without the first token, of one shape; NaN is undefined.

    Where only the second is, the other tokens have next to no attention or no order, and cannot bear the first out.
    """
    without_first = np.where(np.isnan(without_first), 0.0, without_first)
    signs = [np.sign(value) * (abs(value) >= WEAK) for value in (gamma, without_first)]
    result = np.full(gamma.shape, "undefined", dtype=object)
    for pair, name in VERDICT_OF_SIGNS.items():
        result[(signs[0] == pair[0]) & (signs[1] == pair[1])] = name
    return result


def verdict_counts(verdict: np.ndarray, names: Iterable[str] = tuple(VERDICTS)) -> dict[str, int]:
    """How many heads have each verdict of `names`."""
    return {name: int((verdict == name).sum()) for name in names}


def answer(capture: Capture) -> str:
    """Does low norm predict attention in this model? In a few sentences: in short, by layer and by head."""
    return answer_of(verdicts(capture), correlation(capture), n_tokens=capture.n_tokens)


def answer_of(verdict: np.ndarray, gamma: np.ndarray, *, n_tokens: int) -> str:
    """`answer` from the verdict and the Γ of each head, [L, H], and from how many tokens they were worked out."""
    defined = verdict != "undefined"
    total = int(defined.sum())
    if not total:
        return "This run cannot tell: in no head do norms and attention give an order to compare."
    if n_tokens < TOO_FEW:
        return f"This run cannot tell: {n_tokens} tokens are too few. Take a text of some hundred."
    follows, mirror = (int((verdict == name).sum()) for name in ("follows the paper", "mirror"))
    sink = int(np.isin(verdict, ("sink only", "hidden by the sink")).sum())
    return (
        f"{in_short(follows, mirror, total)} {by_layer(verdict)} In {follows} of {total} heads low-norm keys get the "
        f"attention, as the paper says; in {mirror} high-norm keys do; in {sink} it depends on the attention sink (the "
        f"first token); in {total - follows - mirror - sink} it is too weak to call. Median Γ "
        f"{signed(np.median(gamma[defined]))}."
    )


MOSTLY, CLEARLY = 0.5, 0.75  # shares of the heads above which the answer is "Mostly yes" and "Yes", and so for no


def in_short(follows: int, mirror: int, total: int) -> str:
    """The answer in a word: of `total` heads that tell anything, so many follow the paper, so many do the opposite.

    Symmetric: what would be yes, with low and high norms exchanged is no.
    """
    if follows > CLEARLY * total:
        return "Yes."
    if follows > MOSTLY * total:
        return "Mostly yes."
    if mirror > CLEARLY * total:
        return "No, the opposite."
    if mirror > MOSTLY * total:
        return "Mostly no, rather the opposite."
    return "Mixed."


def by_layer(verdict: np.ndarray) -> str:
    """What more than half of the heads of each layer say, in a sentence: [L, H] of verdicts on one text or on many."""
    layers: dict[str, list[int]] = {}
    for layer, heads in enumerate(verdict):
        layers.setdefault(_of_a_layer(heads), []).append(layer)
    told = [f"{_ranges(layers[words])}: {words}" for words in _LAYER_WORDS if words in layers]
    several = not told[0].partition(":")[0].isdecimal()
    return f"Layer{'s' * several} {'; '.join(told)}."


# What is said of a layer, the best first, if these verdicts together are those of more than half of its heads.
_LAYER_WORDS = {
    "low norm predicts attention": ("follows the paper",),
    "only through the attention sink": ("sink only",),
    "partly through the attention sink": ("follows the paper", "sink only"),
    "only with the attention sink left out": ("hidden by the sink",),
    "high norm predicts attention": ("mirror",),
    "neither does": ("too weak to call", "no signal", "unstable"),
    "mixed": (),
    "cannot be told": ("undefined",),
}


def _of_a_layer(heads: np.ndarray) -> str:
    told = heads[heads != "undefined"]
    if not len(told):
        return "cannot be told"
    majority = (words for words, of in _LAYER_WORDS.items() if np.isin(told, of).mean() > MOSTLY)
    return next(majority, "mixed")


def _ranges(numbers: list[int]) -> str:
    """[1, 2, 3, 7] -> "1-3, 7"."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(f"{start}-{end}" if end > start else f"{start}" for start, end in zip(starts, ends, strict=True))


@dataclass(frozen=True, slots=True, eq=False)
class HeadFigures:
    """All figures of all heads, [L, H] each."""

    gamma: np.ndarray
    alr: np.ndarray
    alr_per_token: np.ndarray  # ALR / n, in [0, 1]: what two texts may be compared by
    alr_against_chance: np.ndarray  # 1 + Γ
    spearman: np.ndarray
    pearson: np.ndarray
    sink_share: np.ndarray
    status: np.ndarray
    verdict: np.ndarray


def head_figures(capture: Capture, *, leave_out: int = 0) -> HeadFigures:
    """Everything there is to say of each head in a number; `leave_out` as in `correlation`, not for the verdict."""
    gamma, loss = correlation(capture, leave_out=leave_out), alr(capture, leave_out=leave_out)
    return HeadFigures(
        gamma=gamma,
        alr=loss,
        alr_per_token=loss / max(capture.n_tokens - leave_out, 1),
        alr_against_chance=1 + gamma,
        spearman=correlation(capture, "spearman", leave_out=leave_out),
        pearson=correlation(capture, "pearson", leave_out=leave_out),
        sink_share=sink_share(capture),
        status=status(capture, leave_out=leave_out),
        verdict=verdicts(capture),
    )


def by_kv_head(capture: Capture) -> Capture:
    """The run as if each kv head had one query head, whose attention is the mean of its group's.

    So `alr(by_kv_head(run))` is the ALR of each kv head, [L, Hkv]: what a cache loses that evicts a key for all of its
    query heads at once. It is not the mean of their ALRs. Maps (`pooled`) are those of each group's first head.
    """
    group = capture.n_heads // capture.n_kv_heads

    def mean(values: np.ndarray) -> np.ndarray:  # [..., H, T] -> [..., Hkv, T]
        grouped = values.reshape(*values.shape[:-2], capture.n_kv_heads, group, values.shape[-1])
        return grouped.mean(axis=-2, dtype=np.float64)

    return replace(
        capture,
        probe_attention=mean(capture.probe_attention),
        attention_received=mean(capture.attention_received),
        recent_attention=mean(capture.recent_attention),
        pooled_attention=capture.pooled_attention[:, ::group],
        pooled_scale=capture.pooled_scale[:, ::group],
    )


def kept_tokens(capture: Capture, layer: int, head: int, spec: CompressionSpec) -> np.ndarray:
    """Which tokens the kv head of `head` keeps when the whole text is compressed at once by norm, [T] bool."""
    if spec.policy not in _NORM_SIGN:
        raise SettingsError(f"kept_tokens goes by norm: {', '.join(_NORM_SIGN)}; got {spec.policy!r}")
    n = capture.n_tokens
    kept = np.ones(n, dtype=bool)
    if layer in spec.skip_layers or capture.layer_kinds[layer] != "full":
        return kept
    score = _NORM_SIGN[spec.policy] * capture.key_norm[layer, capture.kv_head(head)].astype(np.float64)
    score[: spec.protect_first] = score[n - min(spec.protect_last, n) :] = np.inf
    kept[np.argsort(-score, kind="stable")[spec.kept(n, n, spec.target_of(layer, capture.kv_head(head))) :]] = False
    return kept


def signed(value: float) -> str:
    """A correlation as it is written here: two decimals, its sign, and a true minus."""
    return "undefined" if np.isnan(value) else f"{value:+.2f}".replace("-", "\N{MINUS SIGN}")


def _cumulative(values: np.ndarray) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(values)])


@dataclass(frozen=True, slots=True)
class RankSums:
    """Sums over the n tokens of attention * rank, [L, H] each. Ranks ascend from 1, so their mean is (n + 1) / 2.

    The m-th token dropped counts in the n - m + 1 losses that follow: a token's attention is summed as often as its
    rank says, in the order of norms, and as its rank from the other end says, in the ideal order. Of equals each is
    dropped first as often as last: on average as often as the rank that they share says.
    """

    by_norm: np.ndarray
    by_attention: np.ndarray
    by_chance: np.ndarray

    @classmethod
    def of(cls, capture: Capture, leave_out: int) -> RankSums:
        """Of the probe row of a capture."""
        attention = capture.probe_attention[..., leave_out:].astype(np.float64)
        ranks = shared_ranks(levelled(capture.key_norm, capture.dtype)[..., leave_out:]).mean(axis=0)
        ranks = np.repeat(ranks, capture.n_heads // capture.n_kv_heads, axis=1)
        return cls(
            by_norm=(attention * ranks).sum(axis=-1),
            by_attention=np.sort(attention, axis=-1) @ np.arange(1.0, attention.shape[-1] + 1),
            by_chance=attention.sum(axis=-1) * (attention.shape[-1] + 1) / 2,
        )

    @property
    def alr(self) -> np.ndarray:
        """The attention lost by norm order beyond the ideal one, summed over m."""
        return self.by_norm - (2 * self.by_chance - self.by_attention)

    @property
    def chance(self) -> np.ndarray:
        """The ALR expected of a random order."""
        return self.by_attention - self.by_chance

    @property
    def gamma(self) -> np.ndarray:
        """Γ, which is ALR / chance - 1."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return (self.by_norm - self.by_chance) / self.chance


def _of_ranks(capture: Capture, leave_out: int) -> np.ndarray:
    """Spearman's."""
    norm = np.repeat(levelled(capture.key_norm, capture.dtype), capture.n_heads // capture.n_kv_heads, axis=1)
    return _pearson(*(shared_ranks(x[..., leave_out:]).mean(axis=0) for x in (norm, capture.attention_received)))


def _of_values(capture: Capture, leave_out: int) -> np.ndarray:
    """Pearson's."""
    return _pearson(*(x[..., leave_out:] for x in (capture.key_norm_by_head(), capture.attention_received)))


def _pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Along the last axis; NaN of fewer than 3, and where one does not vary. (scipy takes half a second to import.)"""
    if x.shape[-1] < 3:
        return np.full(x.shape[:-1], np.nan)
    constant = (np.ptp(x, axis=-1) == 0) | (np.ptp(y, axis=-1) == 0)  # its mean may be rounded
    x, y = (values - values.mean(axis=-1, keepdims=True) for values in (x.astype(np.float64), y.astype(np.float64)))
    size = np.sqrt(np.vecdot(x, x)) * np.sqrt(np.vecdot(y, y))
    return np.where(constant, np.nan, np.clip(np.vecdot(x, y) / np.where(constant, 1, size), -1, 1))


_CORRELATIONS: dict[str, Callable[[Capture, int], np.ndarray]] = {
    "gini": lambda capture, leave_out: RankSums.of(capture, leave_out).gamma,
    "spearman": _of_ranks,
    "pearson": _of_values,
}


def _where_defined(capture: Capture, leave_out: int, values: np.ndarray) -> np.ndarray:
    return np.where(status(capture, leave_out=leave_out) == "ok", values, np.nan)
