"""Attention probabilities, computed beside a model's own attention, which returns none. Knows no caches or policies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

QUERIES = 128  # queries whose attention is worked out at a time
OPTIONS = ("scaling", "softcap", "s_aux")
"""Options of transformers' attention call that probabilities depend on."""
_CAST, _CAST_ON_GPU = 2**20, 2**26  # numbers of half precision keys that are held in float32 at a time


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
    keys, shape = in_blocks(key), (key.shape[1], key.shape[2])
    return normalised(attention_scores(query, keys, shape, attention_scale(query, options)), hide, options)


def normalised(scores: Tensor, hide: Callable[[Tensor], object], options: Mapping[str, Any]) -> Tensor:
    """Turn scores [B, H, q, n] into probabilities, as `attention_probabilities`; the scores are written to."""
    softcap, sinks = options.get("softcap"), options.get("s_aux")
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    hide(scores)
    if sinks is None:
        return scores.softmax(dim=-1)
    sink = sinks.float().reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
    return torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]


def attention_scale(query: Tensor, options: Mapping[str, Any]) -> float:
    """Number that an attention call multiplies its scores by."""
    scaling: float | None = options.get("scaling")
    return float(query.shape[-1]) ** -0.5 if scaling is None else scaling


def attention_scores(query: Tensor, keys: Iterable[Tensor], shape: tuple[int, int], scaling: float) -> Tensor:
    """Compute scaling * query @ key for queries [B, H, q, D]: float32 [B, H, q, n].

    Args:
        keys: blocks of the keys, float32 [B, Hkv, some, D], of which one is there at a time.
        shape: number of kv heads, and of keys.
    """
    (batch, heads, queries, width), (kv_heads, n) = query.shape, shape
    scores = query.new_empty(batch * kv_heads, heads // kv_heads * queries, n, dtype=torch.float32)
    grouped = query.float().reshape(batch * kv_heads, -1, width)  # query heads that share keys, as queries of one
    start = 0
    with torch.autocast(query.device.type, enabled=False):
        for some in keys:
            of_some = scores[..., start : start + some.shape[2]]
            # `alpha`: a query that was scaled before would be rounded once more.
            of_some.baddbmm_(grouped, some.flatten(0, 1).transpose(1, 2), beta=0, alpha=scaling)
            start += some.shape[2]
    return scores.view(batch, heads, queries, n)


def in_blocks(vectors: Tensor, decode: Callable[[Tensor], Tensor] = Tensor.float) -> Iterator[Tensor]:
    """Give out vectors [B, h, n, W] in float32, some at a time where they must be decoded for that."""
    batch, heads, n, width = vectors.shape
    whole = vectors.dtype == torch.float32 and decode is Tensor.float
    step = max(1, n if whole else (_CAST_ON_GPU if vectors.is_cuda else _CAST) // (batch * heads * width))
    return (decode(vectors[:, :, start : start + step]) for start in range(0, n, step))


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
