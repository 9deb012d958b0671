"""Loss curves: the attention that each kv head loses at each keep ratio, measured on texts. Knows no model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from analysis.measures import WEAK, correlation, status
from analysis.run import Capture
from l2kv.spec import share

BY_NORM = ("signed_norm", "low_norm", "high_norm")
"""Policies that there are curves of."""
SAME_SIGN = 0.8  # of the texts must agree on the sign of a head's Γ, or it has no signal
TINY = 1e-12  # of rounding


@dataclass(frozen=True, slots=True, eq=False)
class LossCurves:
    """The attention that each kv head loses at each keep ratio b / B, b = 0..B: the mean over the texts.

    Losses are shares of all that the probe query attends to, its own token included. Layers with a sliding window have
    curves of 0 and take no part: they are bounded already.
    """

    low: np.ndarray  # [L, Hkv, B + 1] low norms kept
    high: np.ndarray  # [L, Hkv, B + 1] high norms kept
    compressible: np.ndarray  # [L] bool
    status: np.ndarray  # [L, Hkv] of str: "ok", or why norms give no order in one of the texts (`measures.status`)
    gammas: np.ndarray  # [texts, L, Hkv] Γ of the group's mean attention, NaN where undefined
    protect_last: int = 0
    least_bin: int = 0  # below it the protected tokens alone hold more: nothing is saved there
    captures: tuple[Capture, ...] = ()  # what they are of; the methods that look at single tokens need it

    @property
    def bins(self) -> int:
        """B."""
        return self.low.shape[-1] - 1

    @property
    def ratios(self) -> np.ndarray:
        """The common axis, [B + 1]: keep ratios from 0 to 1."""
        return np.arange(self.bins + 1) / self.bins

    def of(self, policy: str) -> np.ndarray:
        """The curves of a policy, [L, Hkv, B + 1]; of "signed_norm" the better direction at each ratio."""
        check_choice("policy", policy, BY_NORM)
        return {"low_norm": self.low, "high_norm": self.high}.get(policy, np.minimum(self.low, self.high))

    @property
    def has_signal(self) -> np.ndarray:
        """Heads whose norms tell something of attention, [L, Hkv] bool.

        An order in every text, |mean Γ| of `WEAK` or more, and the same sign in 80 % of the texts.
        """
        defined = np.isfinite(self.gammas)
        mean = np.where(defined, self.gammas, 0.0).sum(axis=0) / np.maximum(defined.sum(axis=0), 1)
        agree = (np.sign(self.gammas) == np.sign(mean)).mean(axis=0)  # an undefined one agrees with nothing
        return (self.status == "ok") & (abs(mean) >= WEAK) & (agree >= SAME_SIGN)


def loss_curves(*captures: Capture, bins: int = 100, protect_last: int = 0) -> LossCurves:
    """Loss curves of one text or of several in the same model.

    A kv head is judged by the mean attention of the query heads that read it. At keep ratio r of n tokens it keeps
    `ceil(r n)`, as the cache does, the latest `protect_last` among them. Where norms give no order (constant norms,
    even attention, under 3 tokens), the loss is the one expected of a random order.

    Args:
        captures: one or more; of one model, of any lengths.
        bins: steps of the keep ratio from 0 to 1. With 100, every percent is met exactly.
        protect_last: as in the spec that will be used.

    Raises:
        ValueError: no capture, captures of different models, or a number out of range.
    """
    if not captures:
        raise ValueError("loss_curves needs at least one capture")
    if len({(c.model, c.layer_kinds, c.n_heads, c.n_kv_heads) for c in captures}) > 1:
        raise ValueError(f"all captures must be of one model, got {', '.join(sorted({c.model for c in captures}))}")
    if bins < 1 or protect_last < 0:
        raise ValueError(f"bins must be 1 or more and protect_last 0 or more, got {bins} and {protect_last}")
    runs = [by_kv_head(capture) for capture in captures]
    states = np.stack([status(run) for run in runs])
    worst = (states != "ok").argmax(axis=0)  # the first text without an order, else the first text
    compressible = np.array([kind == "full" for kind in captures[0].layer_kinds])
    low, high = (
        np.mean(
            [_curves(run, state, sign, bins, protect_last) for run, state in zip(runs, states, strict=True)], axis=0
        )
        * compressible[:, None, None]
        for sign in (1, -1)
    )
    protected = max(min(protect_last, run.n_tokens) / run.n_tokens for run in runs)
    return LossCurves(
        low=low,
        high=high,
        compressible=compressible,
        status=np.take_along_axis(states, worst[None], axis=0)[0],
        gammas=np.stack([correlation(run) for run in runs]),
        protect_last=protect_last,
        least_bin=int(np.ceil(protected * bins - TINY)),
        captures=captures,
    )


def by_kv_head(capture: Capture) -> Capture:
    """The run as if each kv head had one query head, whose attention is the mean of its group's."""
    group = capture.n_heads // capture.n_kv_heads

    def mean(values: np.ndarray) -> np.ndarray:
        return values.reshape(capture.n_layers, capture.n_kv_heads, group, -1).mean(axis=2, dtype=np.float64)

    return replace(
        capture,
        probe_attention=mean(capture.probe_attention),
        attention_received=mean(capture.attention_received),
        pooled_attention=capture.pooled_attention[:, ::group],  # the maps are not read here
        pooled_scale=capture.pooled_scale[:, ::group],
    )


def _curves(run: Capture, state: np.ndarray, sign: int, bins: int, protect_last: int) -> np.ndarray:
    """[L, Hkv, B + 1] of a run by kv head; `sign` 1 keeps low norms, -1 high ones."""
    n, last = run.n_tokens, min(protect_last, run.n_tokens)
    rank_by = sign * run.key_norm.astype(np.float64)
    rank_by[..., n - last :] = -np.inf
    order = np.argsort(rank_by, axis=-1, kind="stable")  # kept first; of equals the earlier is kept, as in the cache
    attention = run.probe_attention.astype(np.float64)
    first_kept = np.take_along_axis(attention, order, axis=-1)
    others = n - last
    even = first_kept[..., last:].mean(axis=-1, keepdims=True) if others else 0.0
    first_kept[..., last:] = np.where((state == "ok")[..., None], first_kept[..., last:], even)
    lost = np.zeros((*first_kept.shape[:2], n + 1))  # when k are kept, k = 0..n
    lost[..., :n] = first_kept[..., ::-1].cumsum(axis=-1)[..., ::-1]
    kept = [min(n, max(last, share(b / bins, n))) for b in range(bins + 1)]
    return lost[..., kept]


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise ValueError unless `value` is one of the choices."""
    if value not in tuple(choices):
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
