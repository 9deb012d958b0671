"""Attention probabilities, worked out beside a model's own attention for those who look on."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def probabilities(
    query: Tensor, key: Tensor, hide: Callable[[Tensor], object], options: Mapping[str, object]
) -> Tensor:
    """The attention of queries [B, H, q, D] to keys [B, Hkv, n, D]: float32 [B, H, q, n].

    Args:
        hide: sets the scores [B, H, q, n] of what a query cannot see to -inf, in place.
        options: of the attention call of transformers: `scaling`, `softcap` (Gemma 2), `s_aux` (the sinks of gpt-oss: a
            logit per head that takes attention and gives nothing).
    """
    batch, heads, queries, head_dim = query.shape
    kv_heads, seen = key.shape[1:3]
    scaling, softcap, sinks = (options.get(name) for name in ("scaling", "softcap", "s_aux"))
    query = query * (head_dim**-0.5 if scaling is None else scaling)  # before the product: D numbers a row, not n
    grouped = query.reshape(batch, kv_heads, -1, head_dim)  # [B, Hkv, G * q, D]: no copy of the keys
    scores = (grouped @ key.transpose(-1, -2)).float().view(batch, heads, queries, seen)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    hide(scores)
    if sinks is None:
        return scores.softmax(dim=-1)
    sink = sinks.float().reshape(1, -1, 1, 1).expand(batch, -1, queries, 1)
    return torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]
