"""Layers to skip: ALR by layer, suggestions with their rule, and plans and skip lists as files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.captures import Capture
from analysis.errors import RecordError, SettingsError
from analysis.metrics import metrics
from analysis.records import from_json, record
from analysis.statistics import layer_losses, means
from analysis.studies import Study
from l2kv.spec import CompressionSpec

# The loss of a policy against that of a random order, from Γ of low_norm: low and high order are one measurement.
_AGAINST_CHANCE: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "low_norm": lambda ratio: ratio,
    "high_norm": lambda ratio: 2 - ratio,
    "random": lambda ratio: np.where(np.isnan(ratio), np.nan, 1.0),
}


@dataclass(frozen=True, slots=True)
class LayerLoss:
    """Normalised ALR of a policy, by head and by layer: 0 is the ideal order, 1 a random one, 2 the reverse."""

    by_head: np.ndarray  # [L, H] normalised ALR
    by_layer: (
        np.ndarray
    )  # [L] mean ALR of the heads / their mean chance level, so heads are weighted by their chance level
    paper: np.ndarray  # [L] mean ALR of the heads, in the paper's units (of this policy)


@dataclass(frozen=True, slots=True)
class SkipSuggestion:
    """Layers to skip, and the rule that chose them, in words."""

    layers: tuple[int, ...]
    rule: str


def layer_loss(capture: Capture, policy: str = "low_norm", *, skip_first: int = 0) -> LayerLoss:
    """Loss of each layer by a policy, on the captured text. NaN where no head is defined."""
    low, chance = metrics(capture, skip_first=skip_first, names=["alr", "alr_chance"]).values
    defined = np.isfinite(low) & (chance > 0)
    by_head = np.full(low.shape, np.nan)
    by_head[defined] = _AGAINST_CHANCE[policy](low[defined] / chance[defined])
    loss, possible = np.where(defined, by_head * chance, 0.0).sum(axis=1), np.where(defined, chance, 0.0).sum(axis=1)
    heads = np.maximum(defined.sum(axis=1), 1)
    empty = ~defined.any(axis=1)
    by_layer = np.where(empty, np.nan, loss / np.where(empty, 1.0, possible))
    return LayerLoss(by_head, by_layer, np.where(empty, np.nan, loss / heads))


def suggest_skip_layers(
    measured: Capture | Sequence[Capture] | Study,
    policy: str = "low_norm",
    *,
    rule: str = "threshold",
    threshold: float = 1.0,
    count: int = 2,
    skip_first: int = 0,
) -> SkipSuggestion:
    """Suggest layers to skip, the worst by normalised ALR, from one capture, several, or a study.

    ALR is a proxy: a single-layer ablation measures what compressing a layer costs (`ablation.suggest_by_ablation`).
    Layers are judged by their mean over the texts. Those without a defined loss give no order to compress by, and are
    skipped by every rule; layers with a sliding window are never compressed, and never suggested.

    Args:
        rule: one of `RULES`.
        threshold: for the rule "threshold". The natural one is 1, the chance level: from there on the policy loses
            attention as fast as a random order, or faster.
        count: for the rule "count".
        skip_first: as in `metrics`; not for a study, which keeps no tokens.

    Raises:
        SettingsError: the rule is unknown, a number is out of range, or captures are missing or of several models.
    """
    if rule not in RULES:
        raise SettingsError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    of = _Measured.of(measured, policy, skip_first)
    loss = np.where(of.compressed, of.loss, -np.inf)
    undefined = np.isnan(loss)
    worst_first = [int(i) for i in np.argsort(-loss, kind="stable") if np.isfinite(loss[i])]
    kept = policy.replace("_", " ")
    if rule == "threshold":
        chosen = [i for i in worst_first if loss[i] >= threshold]
        bar = (
            "no less than a random order would"
            if threshold == 1
            else f"at least {threshold:g} times what a random order would"
        )
        words = (
            f"Skip every layer in which keeping by {kept} loses {bar}, both counted beyond what the ideal order loses "
            f"(normalised ALR ≥ {threshold:g})."
        )
    elif rule == "count":
        if not 0 <= count <= int(of.compressed.sum()):
            raise SettingsError(f"count must be from 0 to {int(of.compressed.sum())} layers, got {count}")
        n = max(count, int(undefined.sum()))
        chosen = worst_first[: n - int(undefined.sum())]
        words = f"Skip the {n} layers in which keeping by {kept} loses most beyond the ideal order (normalised ALR)."
    else:
        n, words = widest_gap(
            loss[worst_first], f"in what keeping by {kept} loses beyond the ideal order", "of normalised ALR"
        )
        chosen = worst_first[:n]
    words += f" Measured on {of.on}, for the next token."
    if n := int(undefined.sum()):
        words += f" Of those skipped, {n} because norms or attention give no order there, which every rule skips."
    return SkipSuggestion(tuple(sorted([*chosen, *np.flatnonzero(undefined).tolist()])), words)


RULES = {
    "threshold": "every layer at or above a threshold of normalised ALR",
    "count": "a number of layers, the worst by normalised ALR",
    "gap": "the worst layers down to the widest gap in normalised ALR, where one stands out",
}
STANDS_OUT = 2.0  # times the median gap: a gap as wide divides the layers in two


def widest_gap(loss: np.ndarray, of: str, unit: str) -> tuple[int, str]:
    """Find the number of worst layers that a gap separates from the others, and say why; `loss` is descending."""
    gaps = loss[:-1] - loss[1:]
    worse_half = gaps[: len(loss) // 2]
    if len(gaps) < 2:
        return 0, "Skip none: a gap takes three layers to stand out among."
    widest, median = float(worse_half.max()), float(np.median(gaps))
    by = f"{widest:.3f} {unit} wide, the median gap {median:.3f}"
    if widest <= 0 or widest < STANDS_OUT * median:
        return 0, f"Skip none: {of}, no gap stands out among the worse half of the layers; the widest is {by}."
    return int(worse_half.argmax()) + 1, (
        f"Skip the layers above the widest gap among the worse half, {of}: it is {by}."
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Measured:
    """Loss of each layer by a policy, on one text or several."""

    loss: np.ndarray  # [L] normalised ALR, mean over the texts that define it; NaN where none does
    compressed: np.ndarray  # [L] bool
    on: str  # its source, in words

    @classmethod
    def of(cls, measured: Capture | Sequence[Capture] | Study, policy: str, skip_first: int) -> _Measured:
        if isinstance(measured, Study):
            if skip_first:
                raise SettingsError("skip_first needs tokens, which a study does not keep: suggest from captures")
            kinds, n_tokens = [measured.layer_kinds], measured.n_tokens
            by_text = _AGAINST_CHANCE[policy](layer_losses(measured))
        else:
            captures = [measured] if isinstance(measured, Capture) else list(measured)
            kinds, n_tokens = [c.layer_kinds for c in captures], np.array([c.n_tokens for c in captures])
            if len({(c.model, c.layer_kinds) for c in captures}) != 1:
                raise SettingsError("layers are suggested from one or more captures, all of one model")
            by_text = np.array([layer_loss(c, policy, skip_first=skip_first).by_layer for c in captures])
        compressed = np.array([kind == "full" for kind in kinds[0]])
        if len(n_tokens) == 1:
            return cls(by_text[0], compressed, f"this text of {n_tokens[0]} tokens")
        least, most = n_tokens.min(), n_tokens.max()
        lengths = f"{least} tokens" if least == most else f"{least} to {most} tokens"
        return cls(means(by_text).mean, compressed, f"{len(n_tokens)} texts of {lengths}")


@record("plan", version=1, again="l2kv plan")
@dataclass(frozen=True, slots=True)
class Plan:
    """A compression chosen for a model."""

    model: str
    spec: CompressionSpec
    note: str = ""


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
