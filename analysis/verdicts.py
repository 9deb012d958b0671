"""Verdicts of heads on the paper's claim, and the answer for a model in a few sentences, from a study of 1..N texts.

A run is a study of one text (`studies.study_of`). One text has no interval: there a sign counts if |Γ| is not weak.
Over `MIN_TEXTS` texts or more it counts if the whole interval is on one side of 0; in between there is no verdict.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from analysis.metrics import LEAST_MASS
from analysis.statistics import MIN_TEXTS, few_documents_warning, means
from analysis.studies import median_gamma
from analysis.words import counted, ranges, signed

if TYPE_CHECKING:
    from analysis.studies import Study

TOO_FEW = 16  # tokens of which no order says anything
WEAK = 0.1  # a |Γ| below this is not called on one text: between texts it changes sign
UNSTABLE = 0.25  # more texts than this on either side: the sign depends on the text


@dataclass(frozen=True, slots=True)
class Verdict:
    """Meaning of a verdict, for one text and for many."""

    on_one: str
    """On one text; empty where it is not given there."""
    on_many: str
    """On many texts."""


def _both(words: str) -> Verdict:
    return Verdict(words, words)


VERDICTS = {
    "follows the paper": _both("Γ < 0 with and without the first token: low-norm keys get the attention"),
    "sink only": _both(
        "Γ < 0 thanks to the first token; among the others low norm gets no more attention, or less, or they get less "
        f"than {LEAST_MASS:.0%} of it"
    ),
    "hidden by the sink": _both("Γ < 0 only without the first token, which hides that low-norm keys get the attention"),
    "mirror": _both("Γ > 0 with and without the first token: HIGH-norm keys get the attention"),
    "too weak to call": Verdict(
        f"otherwise, where |Γ| < {WEAK} with the first token or without it: one text cannot tell its sign", ""
    ),
    "no signal": Verdict("", "otherwise, where the interval of Γ spans 0 with the first token or without it"),
    "unstable": Verdict(
        "", f"Γ is called (|Γ| ≥ {WEAK}) below 0 and above 0 in more than {UNSTABLE:.0%} of the texts each"
    ),
    "undefined": Verdict(
        "no order to compare: constant norms, no attention, a sliding window, or too short a text",
        f"Γ is defined in fewer than {MIN_TEXTS} texts",
    ),
}
# By the sign of Γ with and without the first token; 0 is neither.
_OF_SIGNS = {
    (-1, -1): "follows the paper",
    (-1, 0): "sink only",
    (-1, 1): "sink only",
    (0, -1): "hidden by the sink",
    (1, -1): "hidden by the sink",
    (1, 1): "mirror",
}  # else "too weak to call" on one text, "no signal" on many


def meanings(n_texts: int) -> dict[str, str]:
    """List the verdicts that are possible on so many texts, with their meanings, in the order of `VERDICTS`."""
    told = {name: of.on_one if n_texts == 1 else of.on_many for name, of in VERDICTS.items()}
    return {name: words for name, words in told.items() if words}


def verdicts(study: Study, *, probe: str = "next token", seed: int = 0) -> np.ndarray:
    """Judge each head: [L, H] of str, keys of `VERDICTS`."""
    gammas = (study.of(metric, probe=probe) for metric in ("gamma", "gamma_skip_first"))
    return verdicts_of(*gammas, documents=study.documents, seed=seed)


def verdicts_of(
    gamma: np.ndarray, skip_first: np.ndarray, *, documents: Sequence[str] = (), seed: int = 0
) -> np.ndarray:
    """Judge each head by Γ of N texts with the first token and without it, [N, L, H] each; NaN is undefined.

    In this order: undefined, if too few texts define Γ; unstable, if Γ with the first token is; else by the two signs.

    A sign over many texts is that of the whole interval. There is none where too few texts define that Γ (without the
    first token next to no attention may be left), nor where it is unstable: with very many texts an interval excludes
    0 however many texts say the opposite.
    """
    if len(gamma) == 1:
        signs = [_called(np.nan_to_num(one[0])) for one in (gamma, skip_first)]
        few, unstable, neither = np.isnan(gamma[0]), np.zeros(gamma.shape[1:], bool), "too weak to call"
    else:
        signs = [_sign_over_texts(one, documents, seed) for one in (gamma, skip_first)]
        few, unstable, neither = _too_few(gamma), _unstable(gamma), "no signal"
    result = np.full(gamma.shape[1:], neither, dtype=object)
    for pair, name in _OF_SIGNS.items():
        result[(signs[0] == pair[0]) & (signs[1] == pair[1])] = name
    result[unstable] = "unstable"
    result[few] = "undefined"
    return result


def verdict_counts(verdict: np.ndarray, names: Iterable[str] = tuple(VERDICTS)) -> dict[str, int]:
    """Count the heads with each verdict of `names`."""
    return {name: int((verdict == name).sum()) for name in names}


QUESTION = "Does a low key norm predict attention?"


def answer(study: Study, *, probe: str = "next token", seed: int = 0) -> str:
    """Answer in a few sentences: does low norm predict attention in this model? In short, by layer and by head."""
    verdict, n = verdicts(study, probe=probe, seed=seed), len(study.names)
    counts = verdict_counts(verdict)
    total = verdict.size - counts["undefined"]
    median = _median(study, probe, seed)
    if n == 1 and not total:
        return "This run cannot tell: in no head do norms and attention give an order to compare."
    if n == 1 and study.n_tokens[0] < TOO_FEW:
        return f"This run cannot tell: {study.n_tokens[0]} tokens are too few. Take a text of some hundred."
    if not total:
        return f"This study cannot tell: no head has Γ in {MIN_TEXTS} texts or more. {median}"
    weak = (
        f"in {counts['too weak to call']} it is too weak to call"
        if n == 1
        else f"in {counts['unstable']} the sign changes between texts; in {counts['no signal']} there is no signal"
    )
    follows, mirror = counts["follows the paper"], counts["mirror"]
    return (
        f"{in_short(follows, mirror, total)} {by_layer(verdict)} In {follows} of {total} heads low-norm keys get the "
        f"attention, as the paper says; in {mirror} high-norm keys do; in "
        f"{counts['sink only'] + counts['hidden by the sink']} it depends on the attention sink (the first token); "
        f"{weak}. {median}"
    )


MOSTLY, CLEARLY = 0.5, 0.75  # shares of the heads above which the answer is "Mostly yes" and "Yes", and so for no


def in_short(follows: int, mirror: int, total: int) -> str:
    """Answer in a word, from the numbers of heads that follow the paper or do the opposite, of `total` with a verdict.

    It is symmetric: exchanging low and high norms turns yes into no.
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
    """Say in a sentence what more than half of the heads of each layer show, from verdicts [L, H]."""
    layers: dict[str, list[int]] = {}
    for layer, heads in enumerate(verdict):
        layers.setdefault(_of_a_layer(heads), []).append(layer)
    told = [f"{ranges(layers[words])}: {words}" for words in _LAYER_WORDS if words in layers]
    several = not told[0].partition(":")[0].isdecimal()
    return f"Layer{'s' * several} {'; '.join(told)}."


# What is said of a layer, the best first, if these verdicts together are those of more than half of its heads.
_LAYER_WORDS: Mapping[str, tuple[str, ...]] = {
    "low norm predicts attention": ("follows the paper",),
    "only through the attention sink": ("sink only",),
    "partly through the attention sink": ("follows the paper", "sink only"),
    "only without the attention sink": ("hidden by the sink",),
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


def _median(study: Study, probe: str, seed: int) -> str:
    median, n = median_gamma(study, probe=probe, seed=seed), len(study.names)
    if n == 1:
        return f"Median Γ {signed(median.value)}."
    return f"Median Γ {median}, over {counted(n, 'text')}. {few_documents_warning(study.documents)}".rstrip()


def _called(gamma: np.ndarray) -> np.ndarray:
    """-1 or +1 where a Γ is below or above 0 and not weak; else 0."""
    return np.sign(gamma) * (abs(gamma) >= WEAK)


def _sign_over_texts(gamma: np.ndarray, documents: Sequence[str], seed: int) -> np.ndarray:
    """-1 or +1 where the whole interval is below or above 0, and enough texts agree; else 0."""
    of = means(gamma, documents=documents, seed=seed)
    return ((of.low > 0).astype(int) - (of.high < 0)) * ~_unstable(gamma) * ~_too_few(gamma)


def _too_few(gamma: np.ndarray) -> np.ndarray:
    return np.isfinite(gamma).sum(axis=0) < MIN_TEXTS


def _unstable(gamma: np.ndarray) -> np.ndarray:
    signs, defined = _called(gamma), np.maximum(np.isfinite(gamma).sum(axis=0), 1)
    below, above = ((signs == sign).sum(axis=0) / defined for sign in (-1, 1))
    return np.minimum(below, above) > UNSTABLE
