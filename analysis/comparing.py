"""Comparison of two studies, or of two runs as studies of one text each. Knows no models and no plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from analysis import statistics
from analysis.statistics import LEVEL, MIN_TEXTS, Means, miss_rate, resampled_means, resamples
from analysis.studies import Study, head_means
from analysis.verdicts import verdict_counts, verdicts
from analysis.words import signed


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """Γ of every head in two studies, 0 and 1, by the probe "next token"."""

    names: Sequence[str]
    texts: tuple[int, int]  # number of each
    paired: bool  # both are of the same texts, so that differences are taken text by text
    means: tuple[Means, Means]  # [L, H] each, over texts
    verdicts: tuple[Mapping[str, int], Mapping[str, int]]  # heads with each verdict
    difference: Means | None  # [L, H] of study 1 less study 0; None where the shapes differ
    agreement: float  # Spearman over heads of the two means; NaN without a difference, or with too few heads

    def __str__(self) -> str:
        if self.texts == (1, 1):
            return self._of_runs()
        if self.difference is None:
            return _OTHER_SHAPES
        enough = self.difference.defined >= MIN_TEXTS
        if not enough.any():
            return f"No difference can be told: no head is defined in {MIN_TEXTS} texts or more of each."
        above, below = (int((end[enough] > 0).sum()) for end in (self.difference.low, -self.difference.high))
        texts = "the same texts, text by text" if self.paired else "different texts"
        return (
            f"On {texts}: Γ is higher in {self.names[1]} than in {self.names[0]} in {above} of {int(enough.sum())} "
            f"heads, lower in {below}, by the whole 95 % interval; in the others no difference can be told. If the "
            f"two did not differ, about {self.by_chance:.1f} heads would be called higher or lower all the same."
        )

    def _of_runs(self) -> str:
        medians = [signed(_median(one.mean)) for one in self.means]
        told = f"Median Γ is {medians[0]} in {self.names[0]} and {medians[1]} in {self.names[1]}."
        if self.difference is None:
            return f"{told} {_OTHER_SHAPES}"
        defined = np.isfinite(self.difference.mean)
        if not defined.any():
            return f"{told} No head is defined in both."
        turned = np.sign(self.means[0].mean) * np.sign(self.means[1].mean) < 0
        moved = abs(self.difference.mean[defined]).mean()
        return (
            f"{told} The Γ of a head moves by {moved:.2f} in the mean, and changes its sign in "
            f"{int(turned[defined].sum())} of {int(defined.sum())} heads; the order of heads agrees to a Spearman of "
            f"{signed(self.agreement)}."
        )

    @property
    def by_chance(self) -> float:
        """Number of heads, of those with `MIN_TEXTS`, whose interval would exclude 0 if the two did not differ."""
        if self.difference is None:
            return 0.0
        defined = self.difference.defined
        return float(miss_rate(defined[defined >= MIN_TEXTS], groups=1 if self.paired else 2).sum())


_OTHER_SHAPES = "The two have other numbers of layers or heads, so no head of one is a head of the other."


def compare(first: Study, second: Study, *, names: Sequence[str] | None = None, seed: int = 0) -> Comparison:
    """Compare Γ of every head in two studies, with intervals that resample texts; of both at once if they are the same.

    Args:
        first, second: studies of two models, or of different texts; a run as `studies.study_of(run)`.
        names: names of the two; by default those of their models.
    """
    both = (first, second)
    gammas = [study.of("gamma") for study in both]
    found = [head_means(study, seed=seed) for study in both]
    paired = first.digests == second.digests
    difference, agreement = None, np.nan
    if gammas[0].shape[1:] == gammas[1].shape[1:]:
        documents = [study.documents for study in both]
        if paired:
            difference = statistics.means(gammas[1] - gammas[0], documents=documents[0] or documents[1], seed=seed)
        else:
            difference = _unpaired(gammas, documents, seed)
        defined = np.isfinite(found[0].mean) & np.isfinite(found[1].mean)
        agreement = float(statistics.spearman(*(one.mean[defined] for one in found)))
    return Comparison(
        names=names or (first.model, second.model),
        texts=(len(first.names), len(second.names)),
        paired=paired,
        means=(found[0], found[1]),
        verdicts=(verdict_counts(verdicts(first, seed=seed)), verdict_counts(verdicts(second, seed=seed))),
        difference=difference,
        agreement=agreement,
    )


def _unpaired(gammas: Sequence[np.ndarray], documents: Sequence[Sequence[str]], seed: int) -> Means:
    """The difference of means over other texts, [N, ...] and [M, ...]: each is resampled by itself."""
    drawn = [
        resampled_means(values, resamples(len(values), documents=names, seed=seed + i))
        for i, (values, names) in enumerate(zip(gammas, documents, strict=True))
    ]
    both = [statistics.means(values, seed=seed) for values in gammas]
    defined = np.minimum(both[0].defined, both[1].defined)
    ends = np.full((2, *defined.shape), np.nan)
    told = defined >= 2
    ends[:, told] = np.nanquantile((drawn[1] - drawn[0])[:, told], [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return Means(both[1].mean - both[0].mean, ends[0], ends[1], defined)


def _median(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else float("nan")
