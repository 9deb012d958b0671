"""Statistics of a study: means with intervals over texts, and how stable the order of layers is.

Tokens of a text, and heads of a group, are not independent, so nothing here counts them as if they were: texts are what
is resampled, and documents are where several texts are excerpts of one. An interval is the 95 % percentile bootstrap of
the mean. It is too narrow with few texts (of normal values it covers the mean in 86 % of cases with 6 texts, 92 % with
16, 94 % with 32), and with excerpts of few documents (`few_documents_warning`).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import numpy as np

from analysis.words import counted, signed

MIN_TEXTS = 6  # with fewer, one sign in all of them is no rarer by chance than 5 % (2 / 2^5): no verdict
STABLE = 0.9  # rank correlation of layers between two halves from which on their order is called stable
LEVEL = 0.95
RESAMPLES = 2000
SPLITS = 200
_ROUNDING = 1e-9  # of a difference's size: what varies less over texts does not vary


@dataclass(frozen=True, slots=True, eq=False)
class Means:
    """Mean of a metric over texts, with its interval. Arrays of one shape, such as [L, H]."""

    mean: np.ndarray  # over the texts in which it is defined; NaN where there is none
    low: np.ndarray  # ends of the interval; NaN where fewer than 2 texts define it
    high: np.ndarray
    defined: np.ndarray  # int, texts in which it is


@dataclass(frozen=True, slots=True)
class Interval:
    """Mean over texts and its 95 % interval; NaN is undefined."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if np.isnan(self.value):
            return "undefined"
        ends = "no interval" if np.isnan(self.low) else f"95 % {signed(self.low)} to {signed(self.high)}"
        return f"{signed(self.value)} ({ends})"


def documents_of(n: int, documents: Sequence[str]) -> np.ndarray:
    """Number the documents that n texts are excerpts of, [n] from 0; without documents each text is its own."""
    numbers = {name: i for i, name in enumerate(dict.fromkeys(documents))}
    return np.array([numbers[name] for name in documents]) if documents else np.arange(n)


def resamples(n: int, *, documents: Sequence[str] = (), count: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Draw resamples with replacement: how often each holds each of n texts, [count, n] float64, not to be written to.

    Documents are drawn, then excerpts of each drawn document (of a single document, excerpts alone). So an interval is
    as wide as documents differ, and no narrower than excerpts do where a few documents are alike by chance.
    (`scipy.stats.bootstrap` knows neither documents nor numbers that some texts leave undefined.)

    Args:
        documents: n, names of what each text is an excerpt of; a document of its own where they are not known.
    """
    return _resamples(n, tuple(documents), count, seed)


@lru_cache(maxsize=4)  # a page asks for dozens of intervals over the same texts
def _resamples(n: int, documents: tuple[str, ...], count: int, seed: int) -> np.ndarray:
    rng, which = np.random.default_rng(seed), documents_of(n, documents)
    total = int(which.max(initial=-1)) + 1
    places = rng.integers(total, size=(count, total)) + total * np.arange(count)[:, None]  # a row for each resample
    times = np.bincount(places.ravel(), minlength=count * total).reshape(count, total)
    drawn = times[:, which].astype(np.float64)
    for document, size in enumerate(np.bincount(which)):
        if size > 1:
            drawn[:, which == document] = rng.multinomial(times[:, document] * size, np.full(size, 1 / size))
    drawn.setflags(write=False)
    return drawn


def resampled_means(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean over texts in each resample: [N, ...] by `resamples` [B, N] -> [B, ...].

    Of the texts that define a number; NaN where a resample drew none of them.
    """
    flat = values.reshape(len(values), -1)
    defined = np.isfinite(flat)
    total, drawn = counts @ np.where(defined, flat, 0.0), counts @ defined.astype(np.float64)
    result = np.divide(total, drawn, where=drawn > 0, out=np.full(total.shape, np.nan))
    return result.reshape(len(counts), *values.shape[1:])


def nanmean(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of the defined values; NaN where none is."""
    defined = np.isfinite(values)
    count = defined.sum(axis=0)
    total = np.where(defined, values, 0.0).sum(axis=0)
    return np.divide(total, count, where=count > 0, out=np.full(np.shape(total), np.nan))


def miss_rate(n: np.ndarray, *, groups: int = 1) -> np.ndarray:
    """Rate at which the interval misses 0 where the mean of n normal values is 0; more than 5 % with few texts.

    The standard deviation of a resampled mean is that of the n values over √n, and so the interval is that of Student's
    t with √((n - 1) / n) of the normal law's half width.

    Args:
        n: texts, [...]; NaN is returned for fewer than 2.
        groups: 2 for the difference of two means over n texts each.
    """
    stats, few = _stats(), n < 2
    n = np.where(few, 2, n)
    half = stats.norm.isf((1 - LEVEL) / 2) * np.sqrt((n - 1) / n)
    return np.where(few, np.nan, 2 * stats.t.sf(half, groups * (n - 1)))


def means(values: np.ndarray, *, documents: Sequence[str] = (), seed: int = 0) -> Means:
    """Mean over texts, with its interval, of each number in `values` [N, ...]; NaN is undefined.

    A resample (`resamples`) counts the texts that define the number, and is left out where it has drawn none of them.
    """
    drawn = resampled_means(values, resamples(len(values), documents=documents, seed=seed))
    defined = np.isfinite(values).sum(axis=0)
    low, high = _ends(drawn)
    few = defined < 2
    return Means(nanmean(values), np.where(few, np.nan, low), np.where(few, np.nan, high), defined)


def simultaneous(values: np.ndarray, *, documents: Sequence[str] = (), seed: int = 0) -> list[Interval]:
    """Mean over texts of each column of `values` [N, K], with intervals that hold for all K at once in 95 % of cases.

    Of 40 intervals that each miss in 5 % of cases one or two are likely to miss: whoever looks for one that leaves 0
    behind finds it. These are wider.

    Each is mean ± c * standard error, and c is what the largest of the K |t| stays below in 95 % of draws. In a draw
    each text's departure from the means, all its columns together, keeps its sign or changes it by a coin (the wild
    bootstrap: Wu, Annals of Statistics 1986; the largest |t|: Romano and Wolf, Econometrica 2005). Errors are worked
    out anew in each: resampled texts with the errors of the sample make 26 % of families miss with 16 texts and 40
    columns, and 85 % with 6.

    Excerpts of one document share its coin, and count as one, if there are `MIN_TEXTS` documents; so few coins as those
    of less say nothing, and each text has its own. There are no intervals with fewer than `MIN_TEXTS` texts, nor of a
    column that is not all numbers.
    """
    n, mean = len(values), values.mean(axis=0)
    which = documents_of(n, documents if len(set(documents)) >= MIN_TEXTS else ())
    of = np.eye(int(which.max()) + 1)[which].T  # [D, N]
    sizes, sums = of.sum(axis=1), of @ (values - mean)
    scale = np.sqrt(len(sizes) / max(len(sizes) - 1, 1)) / n
    error = scale * np.sqrt((sums**2).sum(axis=0)) if n > 1 else np.full(mean.shape, np.nan)
    varies = error > _ROUNDING * np.abs(values).max(axis=0)  # of NaN it is not
    sums = sums[:, varies]
    coins = np.random.default_rng(seed).choice([-1.0, 1.0], size=(RESAMPLES, len(sizes)))
    drawn = coins @ sums / n
    # Of each document, the sum of departures from the mean that was drawn: coin * sum - size * drawn.
    squares = (sums**2).sum(axis=0) - 2 * drawn * ((coins * sizes) @ sums) + drawn**2 * (sizes**2).sum()
    errors = scale * np.sqrt(np.maximum(squares, 0.0))
    largest = np.divide(np.abs(drawn), errors, where=errors > 0, out=np.zeros(drawn.shape)).max(axis=1, initial=0.0)
    half = np.quantile(largest, LEVEL) * np.where(varies, error, 0.0)
    half = np.where(np.isfinite(mean) & (n >= MIN_TEXTS), half, np.nan)
    return [Interval(*map(float, ends)) for ends in zip(mean, mean - half, mean + half, strict=True)]


def median(values: np.ndarray, *, documents: Sequence[str] = (), seed: int = 0) -> Interval:
    """Median over all else of the means over texts, of values [N, ...]; its interval resamples the texts."""
    if not np.isfinite(values).any():
        return Interval(np.nan, np.nan, np.nan)
    drawn = resampled_means(values, resamples(len(values), documents=documents, seed=seed))
    low, high = _ends(_nanmedian(drawn.reshape(len(drawn), -1), axis=1)) if len(values) > 1 else (np.nan, np.nan)
    return Interval(float(_nanmedian(nanmean(values).ravel(), axis=0)), float(low), float(high))


def few_documents_warning(documents: Sequence[str]) -> str:
    """Warn of intervals where texts are excerpts of few documents; empty for many, or where it is not known."""
    n = len(set(documents))
    if not documents or n == len(documents) or n >= MIN_TEXTS:
        return ""
    few = "one document, so the interval is over its excerpts" if n == 1 else f"only {n} documents, so the interval is"
    return f"All {len(documents)} are excerpts of {few}{' and' * (n == 1)} too narrow for others."


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement of two halves of the texts on the order of layers, mean over random splits; NaN is undefined."""

    texts: int  # in each half
    spearman: float
    kendall: float  # tau-b


@dataclass(frozen=True, slots=True)
class Stability:
    """Stability of the order of the layers between texts."""

    by_texts: tuple[Agreement, ...]  # of 1, 2, ... texts a half
    stable_from: int | None  # texts from which on Spearman stays at `STABLE` or above; None is "not yet"

    def __str__(self) -> str:
        if not self.by_texts or np.isnan(self.by_texts[-1].spearman):
            return "The order of layers cannot be compared: that takes 2 texts and 3 layers that differ."
        last = self.by_texts[-1]
        told = f"two halves of {counted(last.texts, 'text')} agree to a Spearman of {last.spearman:.2f}"
        if self.stable_from is None:
            return f"The order of layers is not stable yet: {told}, below {STABLE}."
        return f"The order of layers is stable from {self.stable_from} texts on: {told}."


def stability(losses: np.ndarray, *, splits: int = SPLITS, seed: int = 0) -> Stability:
    """Measure how far two halves of the texts agree on the order of layers, for 1, 2, ..., N // 2 texts in each half.

    Args:
        losses: `layer_alr` of a study, [N, L]. Layers that are undefined on a text are not ordered.
    """
    losses = losses[:, np.isfinite(losses).all(axis=0)]
    n, rng = len(losses), np.random.default_rng(seed)
    by_texts = []
    for half in range(1, n // 2 + 1):
        drawn = rng.permuted(np.tile(np.arange(n), (splits, 1)), axis=1)
        one, other = (losses[texts].mean(axis=1) for texts in (drawn[:, :half], drawn[:, half : 2 * half]))
        by_texts.append(Agreement(half, float(nanmean(spearman(one, other))), float(nanmean(kendall(one, other)))))
    stable = [agreement.spearman >= STABLE for agreement in by_texts]  # NaN is not
    first = len(stable) - next((i for i, yes in enumerate(reversed(stable)) if not yes), len(stable))
    return Stability(tuple(by_texts), by_texts[first].texts if first < len(stable) else None)


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Rank correlation along the last axis, [..., L] -> [...]; NaN where one is constant or shorter than 3."""
    return _ranked("pearsonr", *(_stats().rankdata(values, axis=-1) for values in (x, y)))


def kendall(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Kendall's tau-b along the last axis, [..., L] -> [...]; NaN where one is constant or shorter than 3."""
    return _ranked("kendalltau", x, y)


def _ranked(test: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A correlation of scipy's."""
    if x.shape[-1] < 3:
        return np.full(np.broadcast_shapes(x.shape, y.shape)[:-1], np.nan)
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # of constants
        return np.asarray(getattr(_stats(), test)(x, y, axis=-1).statistic)


def _stats() -> ModuleType:
    """scipy.stats, which takes half a second that a page without intervals need not wait for."""
    from scipy import stats

    return stats


def _ends(drawn: np.ndarray) -> np.ndarray:
    """[B, ...] -> [2, ...], the ends of the middle `LEVEL` of the resamples."""
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # of heads that no text defines
        return np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)


def _nanmedian(values: np.ndarray, *, axis: int) -> np.ndarray:
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
        return np.nanmedian(values, axis=axis)
