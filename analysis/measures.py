"""Eviction on one text: the attention lost at each step, in loss curves, and the tokens kept. Knows no model.

`analysis.metrics` sums this up in numbers per head.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.captures import Capture
from analysis.errors import SettingsError
from analysis.metrics import metrics
from analysis.ties import average_ties
from l2kv.policies import POLICIES, Pairs
from l2kv.spec import CompressionSpec, share

BINS = 100
"""Steps of the keep ratio from 0 to 1: every percent is met exactly."""

_NORM_SIGN = {"low_norm": -1.0, "high_norm": 1.0}
TOLD = (*_NORM_SIGN, "signed_norm", "random", "streaming", "accumulated")
"""Policies of which a run tells what they keep: they go by norms, by positions, or by the attention received."""


@dataclass(frozen=True, slots=True)
class AttentionLoss:
    """Attention that one head loses when m = 0..n tokens are dropped, as shares of the probe's. Each [n + 1], or
    [n + 1 - w] where the last w are protected and cannot be dropped."""

    low_norm: np.ndarray  # low norms kept: the highest dropped first
    high_norm: np.ndarray  # the mirror
    ideal: np.ndarray  # the least attended dropped first
    chance: np.ndarray  # expected of a random order


def attention_loss(
    capture: Capture, layer: int, head: int, *, skip_first: int = 0, protect_first: int = 0, protect_last: int = 0
) -> AttentionLoss:
    """Compute the loss curves of a head, for the probe query.

    Tokens of equal norm (see `ties`) may be dropped in any order: there a curve is the expected one, a straight line.

    Args:
        skip_first: number of tokens to ignore at the beginning of the text.
        protect_first, protect_last: the first and the latest tokens cannot be dropped; 0 in the paper.
    """
    first = max(skip_first, protect_first)
    free = slice(first, max(capture.n_tokens - protect_last, first))
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
    """Mark the tokens that the kv head of `head` keeps when the whole text is compressed at once, [T] bool.

    Raises:
        SettingsError: a run does not tell what the policy keeps (see `TOLD`).
    """
    if spec.policy not in TOLD:
        raise SettingsError(
            f"A run holds norms and attention but no keys, so it does not tell what {spec.policy} keeps. It does for "
            f"{', '.join(TOLD)}."
        )
    n, kv_head = capture.n_tokens, capture.kv_head(head)
    kept = np.ones(n, dtype=bool)
    if layer in spec.skip_layers or capture.layer_kinds[layer] != "full":
        return kept
    score = _score(capture, layer, kv_head, spec)
    score[: spec.protect_first] = score[n - min(spec.protect_last, n) :] = np.inf
    kept[np.argsort(-score, kind="stable")[spec.kept(n, n, spec.target_of(layer, kv_head)) :]] = False
    return kept


def attention_lost(capture: Capture, spec: CompressionSpec) -> np.ndarray:
    """Share of the next token's attention that each head loses when the whole text is compressed at once, [L, H].

    It is the attention that the evicted tokens would get; 0 where nothing is evicted. Raises as `kept_tokens`.
    """
    lost = np.zeros(capture.probe_attention.shape[:2])
    group = capture.n_heads // capture.n_kv_heads
    for layer, first in np.ndindex(capture.n_layers, capture.n_kv_heads):
        heads = slice(first * group, (first + 1) * group)
        evicted = ~kept_tokens(capture, layer, first * group, spec)
        lost[layer, heads] = capture.probe_attention[layer, heads][:, evicted].sum(axis=-1, dtype=np.float64)
    return lost


def _score(capture: Capture, layer: int, kv_head: int, spec: CompressionSpec) -> np.ndarray:
    """Score of each token by one of the policies `TOLD`, [T] float64; higher is kept."""
    norm = capture.key_norm[layer, kv_head]
    if spec.policy in _NORM_SIGN:
        return _NORM_SIGN[spec.policy] * norm.astype(np.float64)
    if spec.policy == "accumulated":
        group = capture.n_heads // capture.n_kv_heads
        received = capture.attention_received[layer, kv_head * group : (kv_head + 1) * group]
        return received.sum(axis=0, dtype=np.float64) * np.arange(capture.n_tokens, 0, -1)  # so many queries see it
    import torch  # waits until a policy of the cache's own is asked for

    row = spec.directions[layer] if spec.directions else ()
    keys = torch.from_numpy(norm.copy())[None, None, :, None]  # of one dimension, so that its norm is the norm
    pairs = Pairs(
        keys=keys,
        values=keys,
        positions=torch.arange(capture.n_tokens)[None, None],
        layer_idx=layer,
        heads=(kv_head,),
        seed=spec.seed,
        directions=(row[kv_head],) if row else None,
    )
    scores: np.ndarray = POLICIES[spec.policy].score(pairs)[0, 0].double().numpy()
    return scores


@dataclass(frozen=True, slots=True, eq=False)
class TextCurves:
    """Loss curves of one text."""

    lost: np.ndarray  # [3, L, Hkv, B + 1] low norms kept, high norms kept, and expected of a random order
    status: np.ndarray  # [L, Hkv] of str: "ok", or why norms give no order (`metrics.status`)
    gammas: np.ndarray  # [L, Hkv] Γ of the group's mean attention, NaN where undefined


def text_curves(capture: Capture, *, bins: int = BINS, protect_last: int = 0) -> TextCurves:
    """Measure the loss curves of one text; arguments as in `analysis.loss_curves`."""
    run = by_kv_head(slim(capture))
    found = metrics(run, names=["gamma"])
    status = found.status_of("gamma")
    compressible = np.array([kind == "full" for kind in run.layer_kinds])
    no_order = np.full_like(status, "a random order")
    orders = ((1, status), (-1, status), (1, no_order))
    lost = np.stack([_curves(run, state, sign, bins, protect_last) for sign, state in orders])
    return TextCurves(lost * compressible[:, None, None], status, found.of("gamma"))


def slim(capture: Capture) -> Capture:
    """Drop what curves and plans do not read, the last queries' rows and the maps: most of a run's bytes."""
    return capture.with_attention(
        tokens_per_bin=capture.n_tokens,
        recent_attention=np.zeros((0, *capture.probe_attention.shape), np.float32),  # a slice would hold on to the rows
        pooled_attention=np.zeros((*capture.pooled_scale.shape, 1, 1), np.uint8),
        pooled_scale=np.zeros_like(capture.pooled_scale),
    )


def _curves(run: Capture, state: np.ndarray, sign: int, bins: int, protect_last: int) -> np.ndarray:
    """[L, Hkv, B + 1] of a run by kv head; `sign` 1 keeps low norms, -1 high ones."""
    n, last = run.n_tokens, min(protect_last, run.n_tokens)
    rank_by = sign * run.levels
    rank_by[..., n - last :] = -np.inf
    first_kept = average_ties(run.probe_attention, rank_by)
    others = n - last
    even = first_kept[..., last:].mean(axis=-1, keepdims=True) if others else 0.0
    first_kept[..., last:] = np.where((state == "ok")[..., None], first_kept[..., last:], even)
    lost = np.zeros((*first_kept.shape[:2], n + 1))  # when k are kept, k = 0..n
    lost[..., :n] = first_kept[..., ::-1].cumsum(axis=-1)[..., ::-1]
    kept = [min(n, max(last, share(b / bins, n))) for b in range(bins + 1)]
    return lost[..., kept]


def _cumulative(values: np.ndarray) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(values)])
