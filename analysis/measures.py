"""Eviction by norm on one text: the attention lost at each step, and the tokens kept. Knows no model.

`analysis.metrics` sums this up in numbers per head.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.captures import Capture
from analysis.errors import SettingsError
from analysis.ties import average_ties
from l2kv.spec import CompressionSpec

_NORM_SIGN = {"low_norm": -1.0, "high_norm": 1.0}


@dataclass(frozen=True, slots=True)
class AttentionLoss:
    """Attention that one head loses when m = 0..n tokens are dropped, as shares of the probe's. Each [n + 1], or
    [n + 1 - w] where the last w are protected and cannot be dropped."""

    low_norm: np.ndarray  # low norms kept: the highest dropped first
    high_norm: np.ndarray  # the mirror
    ideal: np.ndarray  # the least attended dropped first
    chance: np.ndarray  # expected of a random order


def attention_loss(
    capture: Capture, layer: int, head: int, *, skip_first: int = 0, protect_last: int = 0
) -> AttentionLoss:
    """Compute the loss curves of a head, for the probe query.

    Tokens of equal norm (see `ties`) may be dropped in any order: there a curve is the expected one, a straight line.

    Args:
        skip_first: number of tokens to ignore at the beginning of the text.
        protect_last: the latest tokens cannot be dropped; 0 in the paper.
    """
    free = slice(skip_first, max(capture.n_tokens - protect_last, skip_first))
    attention = capture.probe_attention[layer, head, free].astype(np.float64)
    by_norm = average_ties(attention, capture.levels[layer, capture.kv_head(head), free])
    n = len(attention)
    return AttentionLoss(
        low_norm=_cumulative(by_norm[::-1]),
        high_norm=_cumulative(by_norm),
        ideal=_cumulative(np.sort(attention)),
        chance=np.arange(n + 1) / max(n, 1) * attention.sum(),
    )


def by_kv_head(capture: Capture) -> Capture:
    """Average the attention of the query heads that share a kv head: the run as if each kv head had one query head.

    So `alr(by_kv_head(run))` is the ALR of each kv head, [L, Hkv]: what a cache loses that evicts a key for all of its
    query heads at once. It is not the mean of their ALRs. Maps (`pooled`) are those of each group's first head.
    """
    group = capture.n_heads // capture.n_kv_heads

    def mean(values: np.ndarray) -> np.ndarray:  # [..., H, T] -> [..., Hkv, T]
        grouped = values.reshape(*values.shape[:-2], capture.n_kv_heads, group, values.shape[-1])
        return grouped.mean(axis=-2, dtype=np.float64)

    return capture.with_attention(
        probe_attention=mean(capture.probe_attention),
        attention_received=mean(capture.attention_received),
        recent_attention=mean(capture.recent_attention),
        pooled_attention=capture.pooled_attention[:, ::group],
        pooled_scale=capture.pooled_scale[:, ::group],
    )


def kept_tokens(capture: Capture, layer: int, head: int, spec: CompressionSpec) -> np.ndarray:
    """Mark the tokens that the kv head of `head` keeps when the whole text is compressed at once by norm, [T] bool."""
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


def _cumulative(values: np.ndarray) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(values)])
