"""Calibration of the policy `q_filters`: where the queries of each head point."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from l2kv.seam import attention_seam


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

    def look(inner, module, query, key, value, mask, **kwargs):
        queries = query.transpose(0, 1).flatten(1, 2).float()  # [H, B * T, D]
        directions = torch.linalg.svd(queries, full_matrices=False).Vh[:, 0]  # [H, D]
        sign = torch.einsum("htd,hd->h", queries, directions).sign()
        grouped = (directions * sign[:, None]).unflatten(0, (key.shape[1], -1))
        filters[module.layer_idx] = grouped.mean(dim=1).cpu()
        return inner(module, query, key, value, mask, **kwargs)

    with attention_seam(model, look):
        model.base_model(input_ids, use_cache=False)
    return torch.stack([filters[layer] for layer in sorted(filters)])
