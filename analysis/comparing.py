"""Two runs or two studies: what differs between them. Knows no model and no plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from analysis import statistics
from analysis.captures import Capture
from analysis.measures import correlation, signed, verdict_counts, verdicts
from analysis.statistics import LEVEL, MIN_TEXTS, Means, head_means, misses, resampled_means, resamples
from analysis.studies import Study


@dataclass(frozen=True, slots=True, eq=False)
class RunComparison:
    """Γ in two runs, 0 and 1. Head by head only where both models have L layers of H heads."""

    names: tuple[str, str]
    gammas: tuple[np.ndarray, np.ndarray]  # [L, H] of each
    verdicts: tuple[Mapping[str, int], Mapping[str, int]]  # heads with each verdict
    difference: np.ndarray | None  # [L, H] Γ of run 1 less that of run 0; NaN where either is undefined
    agreement: float  # Spearman over heads of the two Γ; NaN without a difference, or with too few heads

    def __str__(self) -> str:
        medians = [_median(gamma) for gamma in self.gammas]
        told = f"Median Γ is {signed(medians[0])} in {self.names[0]} and {signed(medians[1])} in {self.names[1]}."
        if self.difference is None:
            return f"{told} The two have other numbers of layers or heads, so no head of one is a head of the other."
        defined = np.isfinite(self.difference)
        if not defined.any():
            return f"{told} No head is defined in both."
        turned = np.sign(self.gammas[0]) * np.sign(self.gammas[1]) < 0
        moved = abs(self.difference[defined]).mean()
        return (
            f"{told} The Γ of a head moves by {moved:.2f} in the mean, and changes its sign in "
            f"{int(turned[defined].sum())} of {int(defined.sum())} heads; the order of heads agrees to a Spearman of "
            f"{signed(self.agreement)}."
        )


def compare_runs(first: Capture, second: Capture, *, names: tuple[str, str] | None = None) -> RunComparison:
    """Γ of every head in two runs: two models, or two texts. `names` are by default the models'."""
    runs = (first, second)
    gammas = tuple(correlation(run) for run in runs)
    alike = gammas[0].shape == gammas[1].shape
    difference = gammas[1] - gammas[0] if alike else None
    agreement = np.nan
    if alike:
        defined = np.isfinite(difference)
        agreement = float(statistics.spearman(gammas[0][defined], gammas[1][defined]))
    return RunComparison(
        names=names or (first.model, second.model),
        gammas=gammas,
        verdicts=tuple(verdict_counts(verdicts(run)) for run in runs),
        difference=difference,
        agreement=agreement,
    )


@dataclass(frozen=True, slots=True, eq=False)
class StudyComparison:
    """Mean Γ over texts in two studies, 0 and 1, of the query of the next token."""

    names: tuple[str, str]
    paired: bool  # both are of the same texts, so that differences are taken text by text
    means: tuple[Means, Means]  # [L, H] each
    verdicts: tuple[Mapping[str, int], Mapping[str, int]]
    difference: Means | None  # [L, H] of study 1 less study 0; None where the shapes differ

    def __str__(self) -> str:
        if self.difference is None:
            return "The two have other numbers of layers or heads, so no head of one is a head of the other."
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

    @property
    def by_chance(self) -> float:
        """Heads whose interval would leave 0 out if the two did not differ; of those with `MIN_TEXTS` texts."""
        if self.difference is None:
            return 0.0
        defined = self.difference.defined
        return float(misses(defined[defined >= MIN_TEXTS], groups=1 if self.paired else 2).sum())


def compare_studies(
    first: Study, second: Study, *, names: tuple[str, str] | None = None, seed: int = 0
) -> StudyComparison:
    """Mean Γ of every head in two studies, with intervals that resample texts; of both at once if they are the same."""
    both = (first, second)
    gammas = [study.of("gamma") for study in both]
    paired = first.digests == second.digests
    difference = None
    if gammas[0].shape[1:] == gammas[1].shape[1:]:
        documents = [study.documents for study in both]
        if paired:
            difference = statistics.means(gammas[1] - gammas[0], documents=documents[0] or documents[1], seed=seed)
        else:
            difference = _unpaired(gammas, documents, seed)
    return StudyComparison(
        names=names or (first.model, second.model),
        paired=paired,
        means=tuple(head_means(study, seed=seed) for study in both),
        verdicts=tuple(
            verdict_counts(statistics.head_verdicts(study, seed=seed), statistics.VERDICTS) for study in both
        ),
        difference=difference,
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
    return Means(both[1].mean - both[0].mean, *ends, defined)


def _median(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else float("nan")
