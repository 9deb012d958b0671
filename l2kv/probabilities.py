"""Attention probabilities, computed beside a model's own attention, which returns none. Knows no caches or policies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

OPTIONS = ("scaling", "softcap", "s_aux")
"""Options of transformers' attention call that probabilities depend on."""
_CAST = 2**20  # numbers of half precision keys that are held in float32 at a time


def attention_probabilities(
    query: Tensor, key: Tensor, hide: Callable[[Tensor], object], options: Mapping[str, Any]
) -> Tensor:
    """Compute the attention probabilities of queries [B, H, q, D] over keys [B, Hkv, n, D]: float32 [B, H, q, n].

    Float32 from the products on, whatever the dtype of queries and keys, under autocast too: a product of theirs that
    is rounded to bfloat16 is off by 0.4 %, and of a logit of 100 that is e^0.4 times the attention.

    Args:
        hide: function that sets the scores [B, H, q, n] of what a query cannot see to -inf, in place.
        options: of transformers' attention call: `scaling`, `softcap` (Gemma 2), `s_aux` (the sinks of gpt-oss: a logit
            per head that takes attention and gives nothing).
    """
    scaling, softcap, sinks = map(options.get, OPTIONS)
    with torch.autocast(query.device.type, enabled=False):
        scores = _scores(query, key, query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    hide(scores)
    if sinks is None:
        return scores.softmax(dim=-1)
    sink = sinks.float().reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
    return torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]


def hide_unseen(scores: Tensor, first_query: int, window: int = 0) -> None:
    """Set the scores [..., q, n] of keys that a causal query does not see to -inf, in place.

    Args:
        scores: scores of queries from position `first_query` on, over keys at positions 0 to n - 1.
        window: number of keys that a query sees, its own included; 0 is all up to its own.
    """
    queries, n = scores.shape[-2:]
    # All keys before the first query precede all queries: the future is in the columns from there on.
    future = scores.new_ones((queries, n - first_query), dtype=torch.bool).triu_(1)
    scores[..., first_query:].masked_fill_(future, -torch.inf)
    if window:
        past = scores.new_ones((queries, n), dtype=torch.bool).tril_(first_query - window)
        scores.masked_fill_(past, -torch.inf)


def _scores(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """scaling * query @ key, float32 [B, H, q, n]. Keys of another dtype are cast some at a time, and no copy stays."""
    (batch, heads, queries, head_dim), (_, kv_heads, n, _) = query.shape, key.shape
    scores = query.new_empty(batch * kv_heads, heads // kv_heads * queries, n, dtype=torch.float32)
    grouped = query.float().reshape(batch * kv_heads, -1, head_dim)  # query heads that share keys, as queries of one
    step = max(1, n if key.dtype == torch.float32 else _CAST // (batch * kv_heads * head_dim))
    for start in range(0, n, step):
        some = key[:, :, start : start + step].float().flatten(0, 1).transpose(1, 2)
        # `alpha`: a query that was scaled before would be rounded once more.
        scores[..., start : start + step].baddbmm_(grouped, some, beta=0, alpha=scaling)
    return scores.view(batch, heads, queries, n)
