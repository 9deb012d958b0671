"""Layers to skip: ALR by layer, suggestions with their rule, and plans and skip lists as files."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.errors import RecordError, SettingsError
from analysis.records import from_json, record
from analysis.statistics import nanmean
from analysis.studies import Study, layer_alr
from analysis.words import counted, span
from l2kv.spec import CompressionSpec


@dataclass(frozen=True, slots=True)
class SkipSuggestion:
    """Layers to skip, and the rule that chose them, in words."""

    layers: tuple[int, ...]
    rule: str


RULES = {
    "threshold": "every layer at or above a threshold of normalised ALR",
    "count": "a number of layers, the worst by normalised ALR",
    "gap": "the worst layers down to the widest gap in normalised ALR, where one stands out",
}
STANDS_OUT = 2.0  # times the median gap: a gap as wide divides the layers in two


def suggest_skip_layers(
    study: Study, policy: str = "low_norm", *, rule: str = "threshold", threshold: float = 1.0, count: int = 2
) -> SkipSuggestion:
    """Suggest layers to skip, from a study: the worst by normalised ALR. A run is a study of one (`studies.study_of`).

    ALR is a proxy: a single-layer ablation measures what compressing a layer costs (`ablation.suggest_by_ablation`).
    Layers are judged by their mean over the texts. Those without a defined loss give no order to compress by, and are
    skipped by every rule; layers with a sliding window are never compressed, and never suggested.

    Args:
        rule: one of `RULES`.
        threshold: for the rule "threshold". The natural one is 1, the chance level: from there on the policy loses
            attention as fast as a random order, or faster.
        count: of the rule "count".

    Raises:
        SettingsError: the rule is unknown, a number out of range, or there is no ALR of the policy.
    """
    layers = np.flatnonzero(np.array(study.layer_kinds) == "full")
    losses, kept = nanmean(layer_alr(study, policy))[layers], policy.replace("_", " ")
    at_least = "no less than" if threshold == 1 else f"at least {threshold:g} times what"
    criterion = Criterion(
        f"in which keeping by {kept} loses {at_least} a random order would, both counted beyond what the ideal order "
        f"loses (normalised ALR ≥ {threshold:g})",
        f"those in which keeping by {kept} loses most beyond the ideal order (normalised ALR)",
        f"in what keeping by {kept} loses beyond the ideal order",
        "of normalised ALR",
    )
    chosen, words = choose(losses, criterion, rule=rule, threshold=threshold, count=count)
    n = len(study.names)
    on = "this text" if n == 1 else counted(n, "text")
    words += f" Measured on {on} of {span(study.n_tokens.tolist())} tokens, for the next token."
    if undefined := int(np.isnan(losses).sum()):
        words += (
            f" Of those skipped, {undefined} because norms or attention give no order there, which every rule skips."
        )
    return SkipSuggestion(tuple(sorted(int(layers[i]) for i in chosen)), words)


@dataclass(frozen=True, slots=True)
class Criterion:
    """What layers are judged by, as the words of a rule have it."""

    over: str
    """"Skip every layer {over}."""
    most: str
    """"Skip 2 layers, {most}."""
    within: str
    """"No gap stands out {within}."""
    unit: str
    """What follows the width of a gap."""


def choose(
    losses: np.ndarray, criterion: Criterion, *, rule: str, threshold: float, count: int, sure: np.ndarray | None = None
) -> tuple[list[int], str]:
    """Places of the layers that a rule picks, the worst first, and the rule in words.

    Args:
        losses: [K]; those undefined, NaN, are picked by every rule.
        rule, threshold, count: as in `suggest_skip_layers`.
        sure: [K] bool, which ones a threshold may pick; all by default.

    Raises:
        SettingsError: the rule is unknown, or a number out of range.
    """
    if rule not in RULES:
        raise SettingsError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    undefined = np.isnan(losses)
    worst_first, least = np.argsort(-np.where(undefined, np.inf, losses), kind="stable"), int(undefined.sum())
    if rule == "threshold":
        if not 0 <= threshold < np.inf:
            raise SettingsError(f"threshold must be a number from 0 on, got {threshold!r}")
        picked = undefined | ((losses >= threshold) & (True if sure is None else sure))
        return [int(i) for i in worst_first if picked[i]], f"Skip every layer {criterion.over}."
    if rule == "count":
        if not 0 <= count <= len(losses):
            raise SettingsError(f"count must be from 0 to {len(losses)} layers, got {count}")
        n, words = max(count, least), f"Skip {counted(max(count, least), 'layer')}, {criterion.most}."
    else:
        n, words = _widest_gap(losses[worst_first[least:]], criterion)
        n += least
    return worst_first[:n].tolist(), words


def _widest_gap(losses: np.ndarray, criterion: Criterion) -> tuple[int, str]:
    """How many of the worst layers a gap divides from the others, and why; `losses` fall."""
    gaps = losses[:-1] - losses[1:]
    worse_half = gaps[: len(losses) // 2]
    if len(gaps) < 2:
        return 0, "Skip none: a gap takes three layers to stand out among."
    widest, median = float(worse_half.max()), float(np.median(gaps))
    by = f"{widest:.3f} {criterion.unit} wide, the median gap {median:.3f}"
    if widest <= 0 or widest < STANDS_OUT * median:
        told = f"{criterion.within}, no gap stands out among the worse half of the layers"
        return 0, f"Skip none: {told}; the widest is {by}."
    return int(worse_half.argmax()) + 1, (
        f"Skip the layers above the widest gap among the worse half, {criterion.within}: it is {by}."
    )


@record("plan", version=1, again="l2kv plan")
@dataclass(frozen=True, slots=True)
class Plan:
    """A compression chosen for a model."""

    model: str
    spec: CompressionSpec
    note: str = ""
    planned_on: tuple[str, ...] = ()
    """Names of the texts that it was made from; empty where they are not known, or there were none."""


def skip_list(text: str, *, n_layers: int | None = None) -> tuple[int, ...]:
    """Read layers to skip from text such as "0, 1, 12" or "[0, 1]", or from a plan's file.

    Args:
        n_layers: number of the model's layers, if known.

    Raises:
        RecordError: the text is no such list, or names a layer that the model does not have.
    """
    if text.lstrip().startswith("{"):
        layers = from_json(Plan, text).spec.skip_layers
    else:
        words = text.strip().removeprefix("[").removesuffix("]").replace(",", " ").split()
        if not all(word.isdecimal() and len(word) < 6 for word in words):
            raise RecordError(f"This is no list of layers: {text.strip()!r:.60}. Write it as 0, 1, 12.")
        layers = tuple(sorted({int(word) for word in words}))
    if n_layers is not None and layers and max(layers) >= n_layers:
        raise RecordError(f"The list names layer {max(layers)}, but the layers are 0 to {n_layers - 1}.")
    return layers
