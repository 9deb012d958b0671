"""Loss curves: the attention that each kv head loses at each keep ratio, measured on texts. Knows no model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from analysis.captures import Capture
from analysis.errors import SettingsError
from analysis.measures import BINS, TextCurves, slim, text_curves
from analysis.metrics import STATUSES
from analysis.records import kind_of
from analysis.statistics import MIN_TEXTS, means
from analysis.studies import Study
from analysis.verdicts import WEAK
from l2kv.spec import CompressionSpec

BY_NORM = ("signed_norm", "low_norm", "high_norm")
"""Policies that there are curves of."""
EVEN = (
    0.2  # of a weight that every head gets: costs are of some texts, and a head that cost nothing there may elsewhere
)
SAME_SIGN = 0.8  # share of the texts that must agree on the sign of a head's Γ, or it has no signal
TINY = 1e-12  # of rounding


@dataclass(frozen=True, slots=True, eq=False)
class LossCurves:
    """Attention that each kv head loses at keep ratios b / B, b = 0..B: means over the texts.

    Losses are shares of the probe query's attention, that to its own token included. Layers with a sliding window have
    curves of 0 and take no part: they are bounded already.
    """

    low: np.ndarray  # [L, Hkv, B + 1] low norms kept
    high: np.ndarray  # [L, Hkv, B + 1] high norms kept
    compressible: np.ndarray  # [L] bool
    status: np.ndarray  # [L, Hkv] of str: "ok", or why norms give no order in one of the texts (`metrics.status`)
    gammas: np.ndarray  # [texts, L, Hkv] Γ of the group's mean attention, NaN where undefined
    protect_last: int = 0
    least_bin: int = 0  # below it the protected tokens alone hold more: nothing is saved there
    over_chance: np.ndarray | None = None  # [2, texts, L, Hkv, B + 1] loss of low and of high, less the random one
    captures: tuple[Capture, ...] = ()  # their captures, `slim`, for strategies that look at single tokens
    study: Study | None = None  # what they are of, where they came of a study
    documents: tuple[str, ...] = ()  # texts, names of what each is an excerpt of; none where it is not known
    weights: np.ndarray | None = None  # [L, Hkv] cost of lost attention in a head, of mean 1: see `weighted_by`

    @property
    def bins(self) -> int:
        """Number of steps of the keep ratio, B."""
        return self.low.shape[-1] - 1

    @property
    def ratios(self) -> np.ndarray:
        """Keep ratios from 0 to 1, [B + 1]: the common axis of the curves."""
        return np.arange(self.bins + 1) / self.bins

    def of(self, policy: str) -> np.ndarray:
        """Curves of a policy, [L, Hkv, B + 1]; for "signed_norm" the better direction at each ratio."""
        check_choice("policy", policy, BY_NORM)
        return {"low_norm": self.low, "high_norm": self.high}.get(policy, np.minimum(self.low, self.high))

    def has_signal(self, keep_ratio: float, policy: str = "signed_norm") -> np.ndarray:
        """Mark the heads in which a policy loses less than a random order at a keep ratio, [L, Hkv] bool.

        With `MIN_TEXTS` texts or more: less by a whole 95 % interval over texts (of either direction, under
        signed_norm). With fewer there is no interval to go by: |mean Γ| of `WEAK` or more with the sign of the policy,
        and that sign in 80 % of the texts. Norms must give an order in every text.
        """
        check_choice("policy", policy, BY_NORM)
        directions = {"low_norm": [0], "high_norm": [1]}.get(policy, [0, 1])
        if self.over_chance is None or self.over_chance.shape[1] < MIN_TEXTS:
            better = np.stack([self._leans(sign) for sign in (-1, 1)])
        else:
            b = min(int(np.ceil(keep_ratio * self.bins - TINY)), self.bins)
            better = np.stack([means(texts[..., b], documents=self.documents).high < 0 for texts in self.over_chance])
        return (self.status == "ok") & better[directions].any(axis=0)

    def _leans(self, sign: int) -> np.ndarray:
        """[L, Hkv]: |mean Γ| is not weak, and of this sign as in 80 % of the texts."""
        defined = np.isfinite(self.gammas)
        mean = np.where(defined, self.gammas, 0.0).sum(axis=0) / np.maximum(defined.sum(axis=0), 1)
        agree = (np.sign(self.gammas) == sign).mean(axis=0)  # an undefined one agrees with nothing
        return (sign * mean >= WEAK) & (agree >= SAME_SIGN)

    def weighted_by(self, costs: np.ndarray, keep_ratio: float) -> LossCurves:
        """Weight each head by what compressing it alone costs, per attention that it loses.

        Attention is not worth the same everywhere: a head that copies may cost more than all the others together.

        Args:
            costs: NLL change of compressing each kv head alone at `keep_ratio`, [L, Hkv] nats/token, in the direction
                that loses less (`analysis.plans.ablation.head_costs`); below 0 counts as 0.
        """
        lost = self.of("signed_norm")[..., min(int(np.ceil(keep_ratio * self.bins - TINY)), self.bins)]
        of = self.compressible
        worth = np.maximum(costs, 0.0) / np.maximum(lost, max(lost[of].mean() / 10, TINY))  # a small loss is no divisor
        total = worth[of].mean()
        weights = np.ones_like(worth) if not total > 0 else EVEN + (1 - EVEN) * worth / total
        return replace(self, weights=weights)

    def loss_of(self, spec: CompressionSpec) -> float:
        """Attention that a spec is expected to lose, mean over the kv heads that can be compressed.

        Between two bins it is interpolated. NaN where there are no curves of the spec's policy (known are `BY_NORM`,
        and random where the curves came of captures), or it gives a number of tokens.
        """
        curves = self._of_spec(spec)
        heads = np.argwhere(np.broadcast_to(self.compressible[:, None], self.low.shape[:2])).tolist()
        targets = [spec.target_of(layer, head) for layer, head in heads]
        if curves is None or not heads or any(target.budget is not None for target in targets):
            return float("nan")
        lost = [
            np.interp(target.ratio, self.ratios, curves[layer, head])
            for (layer, head), target in zip(heads, targets, strict=True)
        ]
        return float(np.mean(lost))

    def _of_spec(self, spec: CompressionSpec) -> np.ndarray | None:
        if spec.policy == "signed_norm":
            return np.where(np.array(spec.directions)[..., None] == "high", self.high, self.low)
        if spec.policy == "random" and self.over_chance is not None:
            return self.low - self.over_chance[0].mean(axis=0)
        return self.of(spec.policy) if spec.policy in BY_NORM else None


def loss_curves(
    *captures: Capture, bins: int = BINS, protect_last: int = 0, documents: Sequence[str] = ()
) -> LossCurves:
    """Measure the loss curves of one text, or of several in the same model.

    A kv head is judged by the mean attention of the query heads that read it. At keep ratio r of n tokens it keeps
    `ceil(r n)`, as the cache does, the latest `protect_last` among them. Of tokens of equal norm (see `ties`) each is
    kept as likely as another. Where norms give no order (constant norms, even attention, under 3 tokens), the loss is
    the one expected of a random order.

    Args:
        captures: one or more captures of one model, of any lengths.
        bins: number of steps of the keep ratio from 0 to 1.
        protect_last: that of the spec that will be used.
        documents: names of the documents that the texts are excerpts of, if known: intervals resample them.

    Raises:
        SettingsError: there is no capture, captures are of different models, or a number is out of range.
    """
    if not captures:
        raise SettingsError("loss_curves needs at least one capture")
    if len({(c.model, c.layer_kinds, c.n_heads, c.n_kv_heads) for c in captures}) > 1:
        raise SettingsError(f"all captures must be of one model, got {', '.join(sorted({c.model for c in captures}))}")
    if bins < 1 or protect_last < 0:
        raise SettingsError(f"bins must be 1 or more and protect_last 0 or more, got {bins} and {protect_last}")
    texts = [text_curves(capture, bins=bins, protect_last=protect_last) for capture in captures]
    curves = _of_texts(
        texts, captures[0].layer_kinds, [capture.n_tokens for capture in captures], protect_last, documents
    )
    return replace(curves, captures=tuple(map(slim, captures)))


def curves_of(study: Study) -> LossCurves:
    """Take the loss curves from a study, at its `protect_last`. They come without captures.

    Raises:
        SettingsError: the study has none, as files up to version 3.
    """
    if study.curves is None or study.curve_status is None or study.curve_gammas is None:
        raise SettingsError(f"this study is too old to hold loss curves. Make it again: {kind_of(type(study)).again}")
    status = np.array(STATUSES, dtype=object)[study.curve_status]
    texts = [
        TextCurves(*parts) for parts in zip(study.curves.astype(np.float64), status, study.curve_gammas, strict=True)
    ]
    curves = _of_texts(texts, study.layer_kinds, study.n_tokens.tolist(), study.protect_last, study.documents)
    return replace(curves, study=study)


def _of_texts(
    texts: Sequence[TextCurves],
    layer_kinds: Sequence[str],
    n_tokens: Sequence[int],
    protect_last: int,
    documents: Sequence[str],
) -> LossCurves:
    """The mean of the curves of texts."""
    low, high, random = np.stack([text.lost for text in texts], axis=1)
    states = np.stack([text.status for text in texts])
    worst = (states != "ok").argmax(axis=0)  # the first text without an order, else the first text
    protected = max(min(protect_last, n) / n for n in n_tokens)
    return LossCurves(
        low=low.mean(axis=0),
        high=high.mean(axis=0),
        compressible=np.array([kind == "full" for kind in layer_kinds]),
        status=np.take_along_axis(states, worst[None], axis=0)[0],
        gammas=np.stack([text.gammas for text in texts]),
        protect_last=protect_last,
        least_bin=int(np.ceil(protected * (low.shape[-1] - 1) - TINY)),
        documents=tuple(documents),
        over_chance=np.stack([low, high]) - random,
    )


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Check a choice. Raises SettingsError unless `value` is one of `choices`."""
    if value not in tuple(choices):
        raise SettingsError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
