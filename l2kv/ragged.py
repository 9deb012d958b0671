"""Attention over a compressed layer, through the model's own attention: of all heads at once where they hold the same
number of pairs, else group by group.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from l2kv.heads import of_kv_heads, of_query_heads, options_of_heads
from l2kv.layer import CompressedLayer, Group
from l2kv.seam import Attention, UnsupportedModelError


def attend(
    layer: CompressedLayer,
    inner: Attention,
    module: nn.Module,
    query: Tensor,
    mask: Tensor | None,
    options: dict[str, object],
) -> tuple[Tensor, Tensor | None]:
    """The attention of the latest queries [B, H, q, D] to all that the layer holds.

    Args:
        inner: the model's own attention, of the attention layer `module`.
        mask: of the longest layer [B or 1, 1, q, n], or None where it hides nothing but what causality does.
        options: of the attention call.
    """
    if options.get("position_bias") is not None:
        raise UnsupportedModelError(
            "this model adds a bias to its attention scores that goes by the place in the cache"
        )
    hides_nothing = mask is None and layer.first_real is None
    if query.shape[2] == 1 and hides_nothing and inner is ALL_ATTENTION_FUNCTIONS["sdpa"]:
        return _of_one_token(layer, query, options), None
    if not layer.ragged:
        return inner(module, query, layer.keys, layer.values, _mask(layer, layer.groups[0], query, mask), **options)
    outputs = []
    for group in layer.groups:
        of_group = of_query_heads(query, group.heads, layer.n_heads)
        output, _ = inner(
            _Heads(module, group.heads, layer.n_heads),
            of_group,
            group.keys,
            group.values,
            _mask(layer, group, of_group, mask),
            **options_of_heads(options, group.heads, layer.n_heads),
        )
        outputs.append(output.unflatten(2, (len(group.heads), -1)))  # [B, q, h, G, D]
    return _in_order(layer, torch.cat(outputs, dim=2), dim=2).flatten(2, 3), None


def _of_one_token(layer: CompressedLayer, query: Tensor, options: dict[str, object]) -> Tensor:
    """sdpa for a single token, of which nothing is hidden: [B, H, 1, D] -> [B, 1, H, D].

    The query heads that share keys are given as queries of one head: the same sum, but the keys are read once, instead
    of once a query head.
    """
    packed = query.squeeze(2).unflatten(1, (layer.n_heads, -1))  # [B, Hkv, G, D]
    outputs = [
        scaled_dot_product_attention(
            of_kv_heads(packed, group.heads),
            group.keys,
            group.values,
            dropout_p=options.get("dropout", 0.0),
            scale=options.get("scaling"),
        )
        for group in layer.groups
    ]
    output = outputs[0] if not layer.ragged else _in_order(layer, torch.cat(outputs, dim=1), dim=1)
    return output.flatten(1, 2)[:, None]


def _in_order(layer: CompressedLayer, output: Tensor, *, dim: int) -> Tensor:
    """From the order of the groups to that of the kv heads, along `dim`."""
    order = [head for group in layer.groups for head in group.heads]
    if order == sorted(order):
        return output
    places = torch.tensor(sorted(range(len(order)), key=order.__getitem__), device=output.device)
    return output.index_select(dim, places)


def _mask(layer: CompressedLayer, group: Group, query: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask for one group. All that was held before precedes all queries, so only the length differs..."""
    if layer.first_real is None:
        return mask if mask is None else mask[..., -group.held :]
    # ... but where rows are padded, each head hides the padding that it still holds.
    visible = layer.visible(group, query.shape[2])  # [B, h or 1, q, n]
    if visible.shape[1] > 1:
        visible = visible.repeat_interleave(query.shape[1] // visible.shape[1], dim=1)
    if mask is None or mask.dtype == torch.bool:
        return visible
    return torch.zeros_like(visible, dtype=mask.dtype).masked_fill(~visible, torch.finfo(mask.dtype).min)


class _Heads:
    """An attention layer as some of its heads see it: the sinks of gpt-oss are its own, one for each query head."""

    def __init__(self, module: nn.Module, heads: tuple[int, ...], kv_heads: int) -> None:
        self._module, self._heads, self._kv_heads = module, heads, kv_heads

    def __getattr__(self, name: str):
        value = getattr(self._module, name)
        return of_query_heads(value[None], self._heads, self._kv_heads)[0] if name == "sinks" else value
