"""Calibration of the policy `q_filters`: where the queries of each head point."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from l2kv.seam import Look, UnsupportedModelError, WatchedCache, watching


@torch.no_grad()
def q_filters(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """The direction that the queries of each kv head's group have in common, float32 [L, Hkv, D].

    Per query head the first right singular vector of its queries, with the sign that makes their mean projection
    positive; then the mean over the heads of the group. Source: Godey et al., "Q-Filters", arXiv 2503.02812.

    Args:
        input_ids: a text to calibrate on, [B, T]: not one to be compressed later.

    Raises:
        UnsupportedModelError: the model's attention cannot be reached.
    """
    filters: dict[int, Tensor] = {}

    def look(at: Look) -> None:
        queries = at.query.transpose(0, 1).flatten(1, 2).float()  # [H, B * T, D]
        directions = torch.linalg.svd(queries, full_matrices=False).Vh[:, 0]  # [H, D]
        sign = torch.einsum("htd,hd->h", queries, directions).sign()
        grouped = (directions * sign[:, None]).unflatten(0, (at.key.shape[1], -1))
        filters[at.layer_idx] = grouped.mean(dim=1).cpu()

    cache = WatchedCache(config=model.config)
    with watching(model, cache, look):
        model.base_model(input_ids, past_key_values=cache, use_cache=True)
    if not filters:
        raise UnsupportedModelError(f"{type(model).__name__} shows no attention: it bypasses transformers' registry.")
    none = torch.zeros_like(next(iter(filters.values())))  # of layers that carry a state, not keys
    return torch.stack([filters.get(layer, none) for layer in range(len(cache.layers))])
