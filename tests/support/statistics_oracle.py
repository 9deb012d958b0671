"""Attention statistics of a causal prompt the slow way: all probabilities in float64, T x T."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def statistics_slowly(
    query: Tensor, key: Tensor, width: int, options: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """What `attention_statistics` returns, for queries [1, H, n, D] and keys [1, Hkv, n, D]."""
    queries, keys = query[0].double(), key[0].double()
    heads, n, head_dim = queries.shape
    scores = torch.stack([queries[h] @ keys[h * len(keys) // heads].T for h in range(heads)])
    scores = scores * options.get("scaling", head_dim**-0.5)
    if softcap := options.get("softcap"):
        scores = softcap * torch.tanh(scores / softcap)
    future = torch.ones(n, n, dtype=torch.bool, device=query.device).triu(1)
    exponentials = scores.exp().masked_fill(future, 0.0)  # scores of tests are small
    total = exponentials.sum(-1)
    if "s_aux" in options:
        total = total + options["s_aux"].double().exp()[:, None]
    probabilities = exponentials / total[..., None]
    starts = range(0, n, width)
    pooled = torch.stack(
        [
            torch.stack([probabilities[:, q : q + width, k : k + width].sum((1, 2)) for k in starts], dim=-1)
            for q in starts
        ],
        dim=1,
    )
    return probabilities.sum(1), pooled, total.log()
